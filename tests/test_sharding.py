"""Split over devices by batch, the forward pass needs no word between them but for masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, assert_same, numerical_gradient, reference_rnn, scalar_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from structure import ALL_COLLECTIVES, executed_collectives

import jaxrnn

pytestmark = pytest.mark.several_devices

DEVICES = 4
MASK = np.array([[1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1]] * 4, bool)
CASE = CASES["readout"]
PATHS = pytest.mark.parametrize("flags", [{}, {"method": "sequential", "chunk": 3}])


def mesh_of(axis_type):
    """A mesh of simulated devices, which conftest.py asks for."""
    return jax.make_mesh((DEVICES,), ("batch",), (axis_type,), devices=jax.devices()[:DEVICES])


def problem():
    params, inputs, states, _ = CASE.arguments(batch=2 * DEVICES)
    return params, inputs, states


def call(params, inputs, states, mask, **flags):
    return jaxrnn.rnn(CASE.make_step(jnp, params), inputs, states, mask=mask, **flags)


def call_with_fresh_states(params, inputs, mask, **flags):
    """As most people write it: the initial states are zeros made inside the jitted function."""
    return call(params, inputs, [jnp.zeros((inputs.shape[0], 4))], mask, **flags)


def expectation(params, inputs, states):
    return reference_rnn(CASE.make_step(np, params), inputs, states, mask=MASK)


def placed(mesh, params, *by_batch):
    """Parameters on every device, everything else split by batch."""
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    return whole, *jax.device_put(by_batch, NamedSharding(mesh, P("batch")))


def collectives(compiled):
    return executed_collectives(compiled.as_text(), ALL_COLLECTIVES)


@PATHS
def test_without_a_mask_nothing_is_sent(flags):
    params, inputs, states = problem()
    operands = placed(mesh_of(AxisType.Auto), params, inputs, states)
    run = functools.partial(call, mask=None, **flags)
    assert collectives(jax.jit(run).lower(*operands).compile()) == 0


@PATHS
@pytest.mark.parametrize("fresh", [False, True], ids=["given", "fresh"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_jit_keeps_the_batch_sharding_and_loops_apart(axis_type, fresh, flags):
    params, inputs, states = problem()
    mesh = mesh_of(axis_type)
    if fresh:
        states = [np.zeros_like(states[0])]
        operands = placed(mesh, params, inputs, MASK)
    else:
        operands = placed(mesh, params, inputs, states, MASK)
    function = functools.partial(call_with_fresh_states if fresh else call, **flags)
    compiled = jax.jit(function).lower(*operands).compile()
    results = compiled(*operands)
    by_batch = NamedSharding(mesh, P("batch"))
    for leaf in jax.tree.leaves(results):
        assert leaf.sharding.is_equivalent_to(by_batch, leaf.ndim)
    # Which sample has something to lend to those that are masked throughout, and what.
    assert collectives(compiled) <= 2
    assert_same(results, expectation(params, inputs, states))


def unlike_the_state(x, states):
    """A step whose outputs are of several ranks, and of which one is the same for all samples."""
    output, new_states = CASE.make_step(jnp, problem()[0])(x, states)
    samples, width = output.shape[0], states[0].shape[1]
    whole = jnp.broadcast_to(jnp.arange(1.0, width + 1), (samples, width))
    return {"part": output[:, 1:], "sum": output.sum(-1), "whole": whole}, new_states


@pytest.mark.parametrize("given", ["mask", "mask of each device", "input_length"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"zero_output_for_mask": True, "go_backwards": True}, {"return_all_outputs": False}],
    ids=["plain", "backwards", "last"],
)
def test_what_is_held_is_split_as_outputs_are(flags, given):
    """Outputs that are unlike the state, of any rank, split or not, over an explicit mesh."""
    _, inputs, states = problem()
    mesh = mesh_of(AxisType.Explicit)
    lengths = np.arange(2 * DEVICES) % (inputs.shape[1] + 1)

    def run(inputs, states, arrays):
        options = {given.split()[0]: arrays} | flags
        return jaxrnn.rnn(unlike_the_state, inputs, states, **options)

    arrays = lengths if given == "input_length" else MASK
    expected = run(inputs, states, arrays)
    with jax.set_mesh(mesh):
        operands = jax.device_put((inputs, states), P("batch"))
        if given == "mask of each device":
            arrays = jax.device_put(arrays, P("batch"))
        actual = jax.jit(run)(*operands, arrays)
    assert_same(actual, expected)
    last_output, outputs, _ = actual
    for output in (last_output, outputs):
        specs = {name: jax.typeof(leaf).sharding.spec[0] for name, leaf in output.items()}
        assert specs == {"part": "batch", "sum": "batch", "whole": None}


@PATHS
def test_the_gradient_of_sharded_jit(flags):
    """Over an automatic mesh: over an explicit one JAX 0.12 differentiates no lax.scan either."""
    params, inputs, states = problem()
    operands = placed(mesh_of(AxisType.Auto), params, inputs, MASK)

    def loss(params, inputs, mask):
        return scalar_of(call_with_fresh_states(params, inputs, mask, **flags))

    zeros = [np.zeros_like(states[0], np.float64)]
    expected = numerical_gradient(
        lambda p: scalar_of(expectation(p, inputs.astype(np.float64), zeros), np), params
    )
    actual = jax.jit(jax.grad(loss))(*operands)
    assert_same(actual, jax.tree.map(np.float32, expected), scale=10)


@PATHS
def test_shard_map(flags):
    params, inputs, states = problem()
    split = jax.shard_map(
        functools.partial(call, **flags),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("batch"), P("batch"), P("batch")),
        out_specs=P("batch"),
    )
    actual = jax.jit(split)(params, inputs, states, MASK)
    assert_same(actual, expectation(params, inputs, states))


def delayed(x, states):
    """Its second state lies as the inputs do from the second step on."""
    h, before = states
    return jnp.sin(x[:, :1]), [jnp.tanh(h + before + x.sum(axis=1, keepdims=True)), h]


def counting(x, states):
    """Its second state depends on no input, and is held by the mask alone."""
    h, count = states
    return h, [jnp.tanh(h + x.sum(axis=1, keepdims=True)), count + 1]


def twice_the_state(x, states):
    """Its output at the first step depends on no input."""
    return 2 * states[0], [jnp.tanh(states[0] + x.sum(axis=1, keepdims=True)), states[1]]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("flags", [{}, {"return_all_outputs": False}], ids=["all", "last"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("step", [delayed, counting, twice_the_state])
def test_states_made_of_nothing_come_to_lie_as_their_step_has_them(step, masked, flags, axis_type):
    _, inputs, _ = problem()

    def run(inputs, *mask):
        samples = inputs.shape[0]
        states = [jnp.zeros((samples, 1)), jnp.zeros((samples, 1), int)]
        if step is delayed:
            states[1] = states[1].astype(float)
        return jaxrnn.rnn(step, inputs, states, mask=mask[0] if mask else None, **flags)

    operands = (inputs, MASK) if masked else (inputs,)
    expected, mesh = run(*operands), mesh_of(axis_type)
    split = run
    if axis_type == AxisType.Auto:
        specs = {"in_specs": P("batch"), "out_specs": P("batch")}
        split = jax.shard_map(run, mesh=mesh, **specs)
    with jax.set_mesh(mesh):
        actual = jax.jit(split)(*jax.device_put(operands, NamedSharding(mesh, P("batch"))))
    assert_same(actual, expected)


def test_a_state_that_is_the_same_on_all_devices_stays_so():
    """Units are split over the devices, and inputs, mask and a count are not."""
    _, inputs, _ = problem()

    def run(w, inputs, mask):
        def step(x, states):
            h, count = states
            return count * 2, [jnp.tanh(h + x @ w), count + 1]

        samples = len(inputs)
        states = [jnp.zeros((samples, w.shape[1])), jnp.zeros((samples, 1))]
        return jaxrnn.rnn(step, inputs, states, mask=mask)

    w = np.float32(np.random.default_rng(0).normal(size=(inputs.shape[-1], 2 * DEVICES)))
    by_units = P(None, "batch")
    split = jax.shard_map(
        run,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(by_units, P(), P()),
        out_specs=(P(), P(), [by_units, P()]),
    )
    assert_same(jax.jit(split)(w, inputs, MASK), run(w, inputs, MASK))
