"""The step is traced a few times at most, and not at all when the same call comes again."""

import functools
import gc
import logging
import tracemalloc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, GAPS, RESETS, assert_same, checking_leaks, reference_rnn

import jaxrnn
from jaxrnn import cells

X = np.ones((3, 7, 2), np.float32)
H = np.ones((3, 2), np.float32)


def counting_step():
    """A step and the list that grows by one whenever Python runs it."""
    calls = []

    def step(x, states):
        calls.append(None)
        h = jnp.tanh(x + states[0])
        return h, [h]

    return step, calls


@pytest.mark.parametrize(
    "flags",
    [{}, {"masked": True}, {"remat": True}, {"unroll": 4}],
    ids=["plain", "masked", "remat", "unrolled"],
)
def test_the_number_of_traces_does_not_grow_with_time(flags):
    flags = dict(flags)
    masked = flags.pop("masked", False)
    counts = []
    for time in (5, 50, 500):
        step, calls = counting_step()
        mask = np.ones((3, time), bool) if masked else None
        jaxrnn.rnn(step, np.ones((3, time, 2), np.float32), [H], mask=mask, **flags)
        counts.append(len(calls))
    # A sequence shorter than a block may need fewer traces, never more.
    assert counts[0] <= counts[1] == counts[2]
    assert counts[2] <= 8


def test_the_number_of_traces_of_a_gradient_does_not_grow_with_time():
    counts = []
    for time in (50, 500):
        step, calls = counting_step()
        jax.grad(lambda x, step=step: jaxrnn.rnn(step, x, [H])[0].sum())(jnp.ones((3, time, 2)))
        counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("flags", [{}, {"mask": GAPS, "reset": RESETS, "remat": True}])
def test_a_second_eager_call_of_the_same_shapes_traces_nothing(flags):
    step, calls = counting_step()
    jaxrnn.rnn(step, X, [H], **flags)
    before = len(calls)
    other = {name: ~value if name in {"mask", "reset"} else value for name, value in flags.items()}
    actual = jaxrnn.rnn(step, 2.0 * X, [3.0 * H], **other)
    assert len(calls) == before

    def plain(x, states):
        h = np.tanh(x + states[0])
        return h, [h]

    assert_same(actual, reference_rnn(plain, 2.0 * X, [3.0 * H], **other))


@pytest.mark.parametrize(
    "transformation",
    [
        lambda f: jax.grad(lambda x: f(x)[0].sum()),
        lambda f: jax.vmap(lambda x: f(x[None])),
        lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_a_second_eager_transformation_traces_nothing(transformation):
    step, calls = counting_step()

    def call(x):
        return jaxrnn.rnn(step, x, [H[: len(x)]])

    transformed = transformation(call)
    transformed(jnp.asarray(X))
    before = len(calls)
    transformed(2 * jnp.asarray(X))
    assert len(calls) == before


def test_unrolled_is_another_program_than_one_step_at_a_time():
    """As numbers True and 1 are the same."""
    steps = []

    def step(x, states):
        steps.append(x)
        return x, [states[0] + x]

    jaxrnn.rnn(step, X, [H], unroll=1)
    traced = len(steps)
    jaxrnn.rnn(step, X, [H], unroll=True)
    assert len(steps) > traced


@pytest.mark.parametrize("make", [cells.simple_rnn, cells.gru, cells.lstm])
def test_eager_calls_with_other_parameters_of_a_cell_compile_nothing(make, caplog):
    cell = make(2)
    first, other = (cell.init(jax.random.key(seed), 2) for seed in (0, 1))

    def results(params):
        def run(params):
            return jaxrnn.rnn(cell.step(params), X, cell.initial_states(3))

        return run(params), jax.grad(lambda params: run(params)[0].sum())(params)

    results(first)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        actual = results(other)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
    assert_same(actual, jax.jit(results)(other))


def test_a_partial_may_branch_on_its_arrays_and_read_what_changes():
    """As under `lax.scan` it is a function of its own, whatever it is made of."""
    factor = 1.0

    def step(is_doubled, x, states):
        h = jnp.tanh(x + states[0]) * factor
        return h, [2 * h if is_doubled else h]

    def last():
        return jaxrnn.rnn(jax.tree_util.Partial(step, jnp.array(True)), X, [H])[0]

    before, factor = last(), 3.0
    h = H
    for t in range(X.shape[1]):
        output = np.tanh(X[:, t] + h) * factor
        h = 2 * output
    assert_same(last(), output)
    assert not np.allclose(before, output)


def test_states_handed_on_trace_nothing_new():
    """Streaming: new_states are as good as the initial states that the call began with."""
    step, calls = counting_step()
    _, _, states = jaxrnn.rnn(step, X, [jnp.full((3, 2), 0.0)])
    before = len(calls)
    for _ in range(3):
        _, _, states = jaxrnn.rnn(step, X, states)
    assert len(calls) == before


def test_a_second_call_under_jit_traces_nothing():
    case = CASES["lstm"]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(arguments):
        return case.call(jaxrnn.rnn, jnp, arguments, mask=GAPS)

    for seed in range(3):
        run(case.arguments(seed=seed))


def test_a_training_step_traces_once():
    case = CASES["simple_rnn"]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(params, arguments):
        def loss(params):
            moved = arguments._replace(params=params)
            return case.call(jaxrnn.rnn, jnp, moved, mask=GAPS, remat=True)[0].sum()

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    params = case.arguments().params
    for seed in range(3):
        params = update(params, case.arguments(seed=seed))


@pytest.mark.parametrize("jit", [True, False])
def test_memory_is_flat_over_500_training_steps(jit):
    """Arrays alive on the device, and what Python holds.

    Outside `jit`, `rnn` has a cache of its own; a gradient by what the step closes over traces anew
    each time there and is slow, so that only results are computed.
    """
    case = CASES["lstm"]
    several = [case.arguments(seed=seed) for seed in range(4)]
    step = case.make_step(jnp, several[0].params)

    @jax.jit
    def update(params, arguments):
        def loss(params):
            moved = arguments._replace(params=params)
            return case.call(jaxrnn.rnn, jnp, moved, mask=GAPS, method="sequential")[0].sum()

        return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))

    def train(params, count):
        for n in range(count):
            arguments = several[n % len(several)]
            if jit:
                params = update(params, arguments)
            else:
                _, inputs, states, _ = arguments
                jax.block_until_ready(jaxrnn.rnn(step, inputs, states, mask=GAPS))
        return jax.block_until_ready(params)

    def in_use():
        gc.collect()
        return sum(leaf.nbytes for leaf in jax.live_arrays()), tracemalloc.get_traced_memory()[0]

    params = train(several[0].params, 4)  # compiled before anything is traced, which is slow
    tracemalloc.start()
    try:
        params = train(params, 96)
        device_before, python_before = in_use()
        params = train(params, 400)
        device_after, python_after = in_use()
    finally:
        tracemalloc.stop()
    assert device_after == device_before
    # A hundred bytes per step would be seen; an odd cache entry is not.
    assert python_after - python_before < 100 * 400


def test_a_step_and_what_it_closes_over_are_freed():
    step, _ = counting_step()
    jaxrnn.rnn(step, X, [H])
    freed = weakref.ref(step)
    del step
    gc.collect()
    assert freed() is None


class Cell:
    """A step with an identity of its own, as cells of module libraries are."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x, states):
        h = self.scale * states[0] + x
        return h, [h]

    def step(self, x, states):
        return self(x, states)


@pytest.mark.parametrize("how", ["callable", "method", "partial"])
def test_steps_of_other_kinds(how):
    """Callable objects, bound methods and partials: each result is that of its own object."""
    for scale in (1.0, 2.0):
        cell = Cell(scale)
        step = {
            "callable": cell,
            "method": cell.step,
            "partial": jax.tree_util.Partial(cell.step),
        }[how]
        last_output, _, _ = jaxrnn.rnn(step, X[:, :2], [H])
        np.testing.assert_array_equal(last_output, np.full((3, 2), scale * (scale + 1) + 1))


def test_no_tracer_leaks():
    case = CASES["simple_rnn"]
    arguments = case.arguments()

    def loss(params):
        moved = arguments._replace(params=params)
        return case.call(jaxrnn.rnn, jnp, moved, mask=GAPS)[0].sum()

    with checking_leaks():
        jax.grad(loss)(jax.tree.map(jnp.asarray, arguments.params))
        jax.jit(jax.grad(loss))(arguments.params)


def split_late(step_count):
    def body(h, x):
        z = x @ np.full((2, 8), 0.1, np.float32) + h
        for _ in range(step_count):
            z = jnp.tanh(z)
        a, b = jnp.split(z, 2, axis=-1)
        return jnp.concatenate([a @ np.full((4, 4), 0.1, np.float32), b], -1), a

    return body, 8


def joined_often(step_count):
    def body(h, x):
        z, joined = x @ np.full((2, 2), 0.1, np.float32), h
        for _ in range(step_count):
            joined = jnp.concatenate([joined, z], -1)
        return jnp.tanh(joined[:, -2:] + joined[:, :2] @ np.eye(2, dtype=np.float32)), z

    return body, 2


def checkpoints_in_each_other(depth):
    def wrapped(h, x, depth):
        inner = functools.partial(wrapped, depth=depth - 1)
        return jax.checkpoint(inner)(h, x) if depth else jnp.tanh(x @ np.eye(2) + h)

    def body(h, x):
        h = wrapped(h, x, depth)
        return h, h

    return body, 2


# More than the depth of Python's stack; and of which twice as long for each one more never ends.
@pytest.mark.parametrize(
    "case",
    [split_late(350), joined_often(350), checkpoints_in_each_other(40)],
    ids=["split_late", "joined_often", "checkpoints"],
)
def test_long_and_deep_steps_are_traced(case):
    body, width = case
    h, xs = jnp.zeros((2, width)), jnp.linspace(-1, 1, 12).reshape(3, 2, 2)
    actual = jaxrnn.scan(body, h, xs, method="sequential")
    assert_same(actual, jax.lax.scan(body, h, xs), np.float32)


def test_a_recurrence_too_long_for_one_kernel_is_refused():
    body, width = split_late(350)
    with pytest.raises(ValueError, match="as one kernel: more than 100 operations"):
        jaxrnn.scan(body, jnp.zeros((2, width)), jnp.ones((3, 2, 2)), method="fused")
