"""Exported once with symbolic batch and time, a call serves every size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, assert_same, reference_rnn
from jax import export, lax

import jaxrnn

SIZES = ((3, 7), (1, 1), (2, 12))


def symbolic(arguments, batch, time):
    """Shapes of a case's arguments with their axes B and T replaced by symbols."""
    b, t = export.symbolic_shape("b, t")

    def shape(leaf, leading):
        return jax.ShapeDtypeStruct((*leading, *leaf.shape[len(leading) :]), leaf.dtype)

    return arguments._replace(
        inputs=jax.tree.map(lambda leaf: shape(leaf, (b, t)), arguments.inputs),
        initial_states=jax.tree.map(lambda leaf: shape(leaf, (b,)), arguments.initial_states),
    ), jax.ShapeDtypeStruct((b, t), bool)


@pytest.mark.parametrize("flags", [{"unroll": 2}, {"go_backwards": True, "remat": True}])
@pytest.mark.parametrize("name", ["lstm", "nested_inputs_and_outputs"])
def test_symbolic_batch_and_time(name, flags):
    case = CASES[name]
    shapes, _ = symbolic(case.arguments(), *SIZES[0])
    run = jax.jit(
        lambda *a: case.call(
            jaxrnn.rnn, jnp, shapes._replace(params=a[0], inputs=a[1], initial_states=a[2]), **flags
        )
    )
    exported = export.export(run)(*shapes[:3])
    for batch, time in SIZES:
        arguments = case.arguments(batch, time)
        actual = exported.call(*arguments[:3])
        assert_same(actual, case.call(reference_rnn, np, arguments, **flags))


def test_symbolic_with_mask_lengths_and_reset():
    case = CASES["readout"]
    shapes, pattern = symbolic(case.arguments(), *SIZES[0])
    lengths = jax.ShapeDtypeStruct(pattern.shape[:1], jnp.int32)

    def flags(mask, input_length, reset):
        return {"mask": mask, "input_length": input_length, "reset": reset, "go_backwards": True}

    def run(params, inputs, initial_states, *patterns):
        arguments = shapes._replace(params=params, inputs=inputs, initial_states=initial_states)
        return case.call(jaxrnn.rnn, jnp, arguments, **flags(*patterns))

    exported = export.export(jax.jit(run))(*shapes[:3], pattern, lengths, pattern)
    for batch, time in SIZES:
        rng = np.random.default_rng(time)
        arguments = case.arguments(batch, time)
        mask, reset = rng.random((2, batch, time)) > 0.4
        patterns = (mask, rng.integers(0, time + 2, batch, np.int32), reset)
        actual = exported.call(*arguments[:3], *patterns)
        assert_same(actual, case.call(reference_rnn, np, arguments, **flags(*patterns)))


def test_the_gradient_of_an_export():
    case = CASES["simple_rnn"]
    shapes, _ = symbolic(case.arguments(), *SIZES[0])

    def loss(params, inputs, initial_states):
        arguments = shapes._replace(params=params, inputs=inputs, initial_states=initial_states)
        return (case.call(jaxrnn.rnn, jnp, arguments)[1] ** 2).sum()

    exported = export.export(jax.jit(loss))(
        *shapes[:3],
    )
    arguments = case.arguments()
    actual = jax.grad(exported.call)(*arguments[:3])
    assert_same(actual, jax.grad(loss)(*arguments[:3]), scale=10)


@pytest.mark.parametrize("gradient", [False, True])
def test_symbolic_batch_alone(gradient):
    """Time is known, so the engine runs, and decides what to move without knowing the batch."""
    features, units, time = 3, 48, 6
    rng = np.random.default_rng(0)
    w, u = (np.float32(0.2 * rng.normal(size=(n, units))) for n in (features, units))

    def call(rnn, xp, w, inputs, mask):
        def step(x, states):
            h = xp.tanh(x @ w + states[0] @ u)
            return h * 2, [h]

        return rnn(step, inputs, [xp.zeros((inputs.shape[0], units), xp.float32)], mask=mask)

    def run(rnn, w, *arguments):
        if gradient:
            return jax.grad(lambda w: (call(rnn, jnp, w, *arguments)[1] ** 2).sum())(w)
        return call(rnn, jnp, w, *arguments)

    (batch,) = export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct(w.shape, w.dtype),
        jax.ShapeDtypeStruct((batch, time, features), jnp.float32),
        jax.ShapeDtypeStruct((batch, time), bool),
    ]
    exported = export.export(jax.jit(functools.partial(run, jaxrnn.rnn)))(*shapes)
    for samples in (1, 3):
        inputs = np.float32(rng.normal(size=(samples, time, features)))
        arguments = (w, inputs, rng.random((samples, time)) < 0.6)
        expected = run(functools.partial(reference_rnn, xp=jnp), *arguments)
        assert_same(exported.call(*arguments), expected, scale=10)


def kept_average(carry, x, w):
    h, average = carry
    h = jnp.tanh(x @ w + h @ w)
    return (h, 0.9 * average + 0.1 * h.mean(0)), h


def repeated_start(carry, x, w):
    (h,) = carry
    start = jnp.broadcast_to(w[0], h.shape)
    scores = jnp.einsum("bi,bi->b", h, start)
    h = jnp.where(scores[:, None] > 0, jnp.tanh(x @ w + h @ w), start)
    return (h,), h


@pytest.mark.parametrize("step", [kept_average, repeated_start])
def test_a_symbolic_batch_beside_what_has_none(step):
    units, time = 48, 6
    w = np.float32(0.2 * np.random.default_rng(0).normal(size=(units, units)))

    def run(scan, w, xs):
        def loss(w):
            start = [jnp.zeros(xs.shape[1:]), jnp.zeros(units)]
            carry = tuple(start[: 2 if step is kept_average else 1])
            carry, ys = scan(lambda carry, x: step(carry, x, w), carry, xs)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((carry, ys)))

        return jax.grad(loss)(w)

    xs = jax.ShapeDtypeStruct((time, *export.symbolic_shape("b"), units), jnp.float32)
    ours = functools.partial(jaxrnn.scan, method="sequential")
    exported = export.export(jax.jit(functools.partial(run, ours)))(w, xs)
    for samples in (1, 3):
        xs = np.float32(np.random.default_rng(1).normal(size=(time, samples, units)))
        assert_same(
            exported.call(w, xs), jax.jit(functools.partial(run, lax.scan))(w, xs), scale=20
        )


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("symbolic_axis", ["features", "units", "outputs"])
def test_symbolic_sizes_of_weights(symbolic_axis, gradient):
    sizes = {"features": 3, "units": 48, "outputs": 5}
    (n,) = export.symbolic_shape("n")

    def arguments(make, features, units, outputs):
        shapes = (features, units), (units, units), (units, outputs), (2, units), (6, 2, features)
        return [make(shape) for shape in shapes]

    def run(scan, *arguments):
        def results(w, u, v, h, xs):
            def body(h, x):
                h = jnp.tanh(x @ w + h @ u)
                return h, h @ v

            return scan(body, h, xs)

        def loss(*arguments):
            return sum(jnp.sum(leaf**2) for leaf in results(*arguments))

        return (jax.grad(loss, (0, 1, 2)) if gradient else results)(*arguments)

    types = arguments(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), **sizes | {symbolic_axis: n}
    )
    ours = functools.partial(run, functools.partial(jaxrnn.scan, method="sequential"))
    draw = np.random.default_rng(0).normal
    numbers = arguments(lambda shape: np.float32(0.2 * draw(size=shape)), **sizes)
    actual = export.export(jax.jit(ours))(*types).call(*numbers)
    assert_same(actual, run(lax.scan, *numbers), scale=20)
