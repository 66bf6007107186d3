"""Every transformation with every form of a call: each pair gives what the plain loop gives.

`test_transformations.py` goes deeper into single transformations; here it is the pairs that count.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, cast_floats, reference_rnn, scalar_of
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn

BATCH, TIME, FEATURES, UNITS, OUTPUTS = 2, 5, 3, 4, 6
# Blocks of two steps and a lone one. The arrays are so small that the method has to be named.
ENGINE = {"method": "sequential", "chunk": 2}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0]], bool)},
    "reset": {"reset": np.array([[0, 0, 1, 0, 0], [1, 0, 0, 0, 1]], bool)},
    "go_backwards": {"go_backwards": True},
    "remat": {"remat": True},
}
each_form = pytest.mark.parametrize("form", FORMS)


class Operands(NamedTuple):
    """What is differentiated, mapped and split."""

    params: Any
    inputs: Any
    state: Any


def operands(seed=0, batch=BATCH, time=TIME):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return np.asarray(0.5 * rng.standard_normal(shape), np.float32)

    params = {
        "w": draw(FEATURES, UNITS),
        "u": draw(UNITS, UNITS),
        "b": draw(UNITS),
        "v": draw(UNITS, OUTPUTS),
    }
    return Operands(params, draw(batch, time, FEATURES), draw(batch, UNITS))


def make_step(xp, p, activate=None):
    """A product for the prologue, one in the loop, and one for the epilogue."""

    def step(x, states):
        h = (activate or xp.tanh)(x @ p["w"] + states[0] @ p["u"] + p["b"])
        return h @ p["v"], [h]

    return step


jax_step = functools.partial(make_step, jnp)


def ours(form, make=jax_step):
    """The call under test, `(operands, **patterns) -> results`."""

    def call(o, **patterns):
        flags = ENGINE | FORMS[form] | patterns
        return jaxrnn.rnn(make(o.params), o.inputs, [o.state], **flags)

    return call


def theirs(form, make=jax_step, xp=jnp):
    """The same by the plain loop, which can be differentiated but has no other ambitions."""

    def call(o, **patterns):
        flags = FORMS[form] | patterns
        return reference_rnn(make(o.params), o.inputs, [o.state], xp=xp, **flags)

    return call


def plain_numpy(form, o, **patterns):
    """What the call gives, by NumPy."""
    return theirs(form, functools.partial(make_step, np), np)(o, **patterns)


def value_and_gradient(call):
    """Results, and the gradient of a number made of all of them by everything."""

    def function(o):
        results = call(o)
        return scalar_of(results), results

    return jax.value_and_grad(function, has_aux=True)


@functools.cache
def by_plain_loop(transformation, form, make):
    """What a transformation is to give, compiled once for all that compare with it."""
    if form == "remat":  # which changes no result
        return by_plain_loop(transformation, "plain", make)
    return jax.jit(transformation(theirs(form, make)))


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def patterns_of(form):
    """The arrays among the flags of a form."""
    return {name: FORMS[form][name] for name in {"mask", "reset"} & FORMS[form].keys()}


@each_form
def test_jit(form):
    assert_same(jax.jit(ours(form))(operands()), plain_numpy(form, operands()))


@each_form
def test_vmap_over_parameters(form):
    """The gradient, too: an ensemble in training."""
    several = [operands(seed) for seed in range(3)]
    shared = several[0]
    members = [one.params for one in several]

    def member(params):
        return value_and_gradient(ours(form))(shared._replace(params=params))

    actual = jax.jit(jax.vmap(member))(stack(members))
    reference = by_plain_loop(value_and_gradient, form, jax_step)
    expected = [reference(shared._replace(params=params)) for params in members]
    assert_same(actual, stack(expected), scale=10)


@each_form
def test_vmap_over_inputs_and_patterns(form):
    several = [operands(seed) for seed in range(3)]
    shared = several[0]
    rng = np.random.default_rng(0)
    each = [{name: rng.random((BATCH, TIME)) < 0.6 for name in patterns_of(form)} for _ in several]

    def call(inputs, patterns):
        return ours(form)(shared._replace(inputs=inputs), **patterns)

    actual = jax.jit(jax.vmap(call))(np.stack([one.inputs for one in several]), stack(each))
    expected = [
        plain_numpy(form, shared._replace(inputs=one.inputs), **patterns)
        for one, patterns in zip(several, each, strict=True)
    ]
    assert_same(actual, stack(expected))


def jvp(call):
    direction = operands(seed=1)
    return lambda o: jax.jvp(call, (o,), (direction,))


def jacfwd_over_grad(call):
    """Second derivatives: by the parameters of the loop and by the initial state at once."""

    def gradient(u, state, o):
        def function(u, state):
            return scalar_of(call(o._replace(params=o.params | {"u": u}, state=state)))

        return jax.grad(function, (0, 1))(u, state)

    return lambda o: jax.jacfwd(gradient, (0, 1))(o.params["u"], o.state, o)


def scan_of_rnn(call):
    """An outer loop that hands the state on, as truncated backpropagation does."""

    def run(o):
        def body(state, scale):
            _, outputs, (state,) = call(o._replace(inputs=scale * o.inputs, state=state))
            return state, outputs

        return jax.lax.scan(body, o.state, np.array([1.0, -0.5, 2.0], np.float32))

    return value_and_gradient(run)


@each_form
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradient(checkpoint, form):
    call = jax.checkpoint(ours(form)) if checkpoint else ours(form)
    actual = jax.jit(value_and_gradient(call))(operands())
    expected = by_plain_loop(value_and_gradient, form, jax_step)(operands())
    assert_same(actual, expected, scale=10)


@each_form
@pytest.mark.parametrize("transformation", [jvp, jacfwd_over_grad, scan_of_rnn])
def test_derivatives(transformation, form):
    actual = jax.jit(transformation(ours(form)))(operands())
    expected = by_plain_loop(transformation, form, jax_step)(operands())
    assert_same(actual, expected, scale=10)


@jax.custom_vjp
def surrogate(z):
    return jnp.tanh(z)


surrogate.defvjp(lambda z: (jnp.tanh(z), z), lambda z, g: (g / (1 + jnp.abs(z)),))
surrogate_step = functools.partial(make_step, jnp, activate=surrogate)


@each_form
def test_a_step_with_a_custom_vjp(form):
    """The rule is wrong on purpose: only a gradient that follows it can match."""
    actual = jax.jit(value_and_gradient(ours(form, surrogate_step)))(operands())
    expected = by_plain_loop(value_and_gradient, form, surrogate_step)(operands())
    assert_same(actual, expected, scale=10)


@each_form
def test_rnn_inside_rnn(form):
    """Each outer step runs a whole inner call, of the same form, over its own features."""

    # Of three steps, or the reference would take long to compile.
    patterns = {name: pattern[:, :3] for name, pattern in patterns_of(form).items()}

    def nested(rnn, **flags):
        def make(params):
            inner = make_step(jnp, params)

            def step(x, states):
                inputs = jnp.stack([x, x - 1, jnp.sin(x)], axis=1)
                last_output, _, new_states = rnn(inner, inputs, states, **flags)
                return last_output, new_states

            return step

        return make

    flags = FORMS[form] | patterns
    inside, outside = nested(jaxrnn.rnn, **ENGINE, **flags), nested(reference_rnn, xp=jnp, **flags)
    actual = jax.jit(value_and_gradient(ours(form, inside)))(operands())
    expected = jax.jit(value_and_gradient(theirs(form, outside)))(operands())
    assert_same(actual, expected, scale=10)


def mesh():
    return jax.make_mesh((BATCH,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:BATCH])


@pytest.mark.several_devices
@each_form
def test_shard_map(form):
    specs = (Operands(P(), P("batch"), P("batch")), P("batch"))
    split = jax.shard_map(
        lambda o, patterns: ours(form)(o, **patterns),
        mesh=mesh(),
        in_specs=specs,
        out_specs=P("batch"),
    )
    actual = jax.jit(split)(operands(), patterns_of(form))
    assert_same(actual, plain_numpy(form, operands()))


@pytest.mark.several_devices
@each_form
def test_sharded_jit(form):
    whole, by_batch = (NamedSharding(mesh(), spec) for spec in (P(), P("batch")))
    placed = jax.device_put(operands(), Operands(whole, by_batch, by_batch))
    (_, results), gradient = jax.jit(value_and_gradient(ours(form)))(placed)
    for leaf in jax.tree.leaves(results):
        assert leaf.sharding.is_equivalent_to(by_batch, leaf.ndim)
    expected = by_plain_loop(value_and_gradient, form, jax_step)(operands())
    assert_same((results, gradient), (expected[0][1], expected[1]), scale=10)


@each_form
def test_export_with_symbolic_batch_and_time(form):
    b, t = export.symbolic_shape("b, t")

    def symbolic(leaf, *leading):
        return jax.ShapeDtypeStruct((*leading, *leaf.shape[len(leading) :]), leaf.dtype)

    params, inputs, state = operands()
    shapes = jax.tree.map(symbolic, params), symbolic(inputs, b, t), symbolic(state, b)
    patterns = {name: symbolic(value, b, t) for name, value in patterns_of(form).items()}
    run = jax.jit(lambda o, patterns: ours(form)(Operands(*o), **patterns))
    exported = export.deserialize(export.export(run)(shapes, patterns).serialize())
    for batch, time in [(BATCH, TIME), (1, 1), (3, 8)]:
        o = operands(0, batch, time)
        rng = np.random.default_rng(time)
        drawn = {name: rng.random((batch, time)) < 0.6 for name in patterns}
        assert_same(exported.call(tuple(o), drawn), plain_numpy(form, o, **drawn))


@each_form
def test_double_precision(form):
    with jax.enable_x64(True):
        o = cast_floats(operands(), np.float64)
        actual = jax.jit(value_and_gradient(ours(form)))(o)
        expected = by_plain_loop(value_and_gradient, form, jax_step)(o)
        assert_same(actual, expected, scale=10)
        assert_same(actual[0][1], plain_numpy(form, o))


@each_form
def test_bfloat16(form):
    o = cast_floats(operands(), jnp.bfloat16)
    actual = jax.jit(value_and_gradient(ours(form)))(o)
    reference = by_plain_loop(value_and_gradient, form, jax_step)
    (_, expected), gradient = reference(cast_floats(o, np.float32))
    rounded = cast_floats((expected, gradient), jnp.bfloat16)
    assert_same((actual[0][1], actual[1]), rounded, scale=2)


@each_form
def test_debug_print(form, capfd):
    """Once per step, in processing order, as the first and always valid sample shows."""

    def make(params):
        step = make_step(jnp, params)

        def printing(x, states):
            jax.debug.print("step {}", x[0, 0].astype(int))
            return step(x, states)

        return printing

    o = operands()
    o.inputs[0, :, 0] = np.arange(TIME)
    actual = jax.jit(ours(form, make))(o)
    jax.block_until_ready(actual)
    jax.effects_barrier()
    order = np.arange(TIME)[:: -1 if form == "go_backwards" else 1]
    assert capfd.readouterr().out.splitlines() == [f"step {t}" for t in order]
    assert_same(actual, plain_numpy(form, o))
