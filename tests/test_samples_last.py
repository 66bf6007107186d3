"""States with the samples on the last axis: where that is so, and that it changes nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from structure import DOT, count, innermost_loops, loops, products_in_innermost_loops

import jaxrnn
from jaxrnn import _passes, _recurrence

TIME = 3


def lstm(p):
    def body(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return body


def elman(p):
    def body(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, h

    return body


def rectified(p):
    def body(h, x):
        h = jax.nn.relu(x @ p["w"] + h @ p["u"] + p["b"])  # has a derivative rule of its own
        return h, h

    return body


def readout(p):
    step = lstm(p)

    def body(carry, x):
        carry, h = step(carry, x)
        return carry, h @ p["u"][:, :7]

    return body


def network(p):
    """A layer that makes more of the state, and one that makes a state of it again: no gates."""

    def body(h, x):
        h = h + jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]) @ p["u"].T
        return h, h

    return body


def masked(p):
    step = lstm(p)

    def body(carry, x):
        x, keep = x[:, 1:], x[:, :1] > 0
        new, h = step(carry, x)
        return jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, carry), h

    return body


GATES = {lstm: 4, elman: 1, rectified: 1, readout: 4, network: 2, masked: 4}


def operands(make, samples, units, features=8):
    def draw(seed, *shape):
        drawn = np.random.default_rng(seed).standard_normal(shape)
        return jnp.asarray(drawn / np.sqrt(units), jnp.float32)

    columns = GATES[make] * units
    p = {"w": draw(0, features, columns), "u": draw(1, units, columns), "b": draw(2, columns)}
    h = draw(3, samples, units)
    return (
        p,
        h if GATES[make] < 4 else (h, 2 * h),
        draw(4, TIME, samples, features + (make is masked)),
    )


def results(scan, make, p, init, xs):
    return scan(make(p), init, xs)


def loss_and_results(scan, make, *operands):
    made = results(scan, make, *operands)
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(made)), made


def loss(scan, make, *operands):
    return loss_and_results(scan, make, *operands)[0]


def apart(of, *arguments):
    """Results and gradients of `of(*arguments) -> (loss, results)`, each from a scan of its own."""

    def both(*arguments):
        gradient = jax.grad(lambda *a: of(*a)[0], tuple(range(len(arguments))))
        return of(*arguments)[1], gradient(*arguments)

    return jax.jit(both)(*arguments)


def together(of, *arguments):
    """The same from one scan: `lax.scan` makes the same results whoever asks for gradients."""
    gradient = jax.grad(of, tuple(range(len(arguments))), has_aux=True)
    gradients, made = jax.jit(gradient)(*arguments)
    return made, gradients


def carries(jaxpr):
    """The shapes of what the innermost loops carry, of what has an axis."""
    return [{v.aval.shape for v in body.outvars if v.aval.shape} for body in innermost_loops(jaxpr)]


def is_laid_so(make, samples, units, function=results, scan=jaxrnn.scan, features=8):
    """Whether a loop carries states with the samples on the last axis."""
    arguments = operands(make, samples, units, features)
    jaxpr = jax.make_jaxpr(functools.partial(function, scan, make))(*arguments)
    across = {(1, samples * units), (units, samples)}
    return [not shapes.isdisjoint(across) for shapes in carries(jaxpr.jaxpr)]


@pytest.mark.parametrize(
    ("make", "samples", "units", "expected"),
    [
        (lstm, 32, 128, [True]),
        (lstm, 32, 64, [False]),
        (lstm, 36, 128, [False]),
        (lstm, 72, 128, [False]),
        (lstm, 24, 128, [False]),
        (lstm, 24, 256, [False]),
        (elman, 32, 256, [False]),
        (elman, 32, 736, [True]),
        (rectified, 32, 736, [True]),
        (network, 32, 240, [False]),
        (masked, 24, 256, [False]),
        (masked, 32, 256, [True]),
        (lstm, 32, 184, [False]),
        (lstm, 32, 240, [True]),
        (readout, 32, 128, [False]),
        (readout, 32, 256, [True]),
    ],
)
def test_results_are_laid_so_for_some_samples_and_large_matrices(make, samples, units, expected):
    assert is_laid_so(make, samples, units) == expected


@pytest.mark.parametrize(
    ("features", "units", "expected"),
    [(127, 128, [True]), (128, 128, [False]), (128, 256, [True])],
)
def test_a_pass_of_long_sums_is_given_up_for_larger_matrices(features, units, expected):
    assert is_laid_so(lstm, 32, units, features=features) == expected


@pytest.mark.parametrize(
    ("make", "samples", "units", "expected"),
    [
        (lstm, 12, 128, [False, False]),
        (lstm, 8, 128, [False, False]),
        (lstm, 8, 256, [True, False]),
        (lstm, 16, 64, [False, False]),
        (lstm, 16, 128, [True, False]),
        (lstm, 16, 184, [True, False]),
        (lstm, 16, 384, [True, True]),
        (masked, 16, 384, [False, False]),
    ],
)
def test_gradients_are_laid_so_for_larger_ones(make, samples, units, expected):
    def gradient(*arguments):
        return jax.grad(functools.partial(loss, *arguments[:2]), (0, 1, 2))(*arguments[2:])

    assert is_laid_so(make, samples, units, gradient) == expected


@pytest.mark.parametrize("options", [{"chunk": 2}, {"chunk": None}, {"method": "lax"}])
def test_whoever_chooses_has_the_choice(options):
    assert is_laid_so(lstm, 32, 128, scan=functools.partial(jaxrnn.scan, **options)) in (
        [False],
        [False, False],  # the last block is shorter
    )


@pytest.mark.several_devices
def test_not_over_several_devices():
    assert is_laid_so(lstm, 32, 128) == [False]


def test_not_for_a_symbolic_number_of_samples():
    (samples,) = jax.export.symbolic_shape("b")
    p, (h, _), xs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands(lstm, 16, 128)
    )
    h = jax.ShapeDtypeStruct((samples, *h.shape[1:]), h.dtype)
    xs = jax.ShapeDtypeStruct((TIME, samples, xs.shape[2]), xs.dtype)
    run = jax.jit(functools.partial(results, jaxrnn.scan, lstm))
    exported = jax.export.export(run)(p, (h, h), xs)
    p, init, xs = operands(lstm, 5, 128)
    assert_same(exported.call(p, init, xs), results(lax.scan, lstm, p, init, xs), scale=10)


@pytest.mark.parametrize(
    ("make", "samples", "units"),
    [
        (lstm, 16, 384),
        (elman, 32, 736),
        (rectified, 32, 736),
        (masked, 32, 256),
        (readout, 32, 256),
    ],
)
def test_values_and_gradients_are_those_of_lax_scan(make, samples, units):
    arguments = operands(make, samples, units)
    actual = apart(functools.partial(loss_and_results, jaxrnn.scan, make), *arguments)
    expected = together(functools.partial(loss_and_results, lax.scan, make), *arguments)
    assert_same(actual, expected, scale=20)


def test_results_are_one_loop_and_a_readout_is_a_pass():
    """Products of the inputs stay in the loop, whose rows no pass has to write."""

    def products(make):
        run = functools.partial(results, jaxrnn.scan, make)
        jaxpr = jax.make_jaxpr(run)(*operands(make, 32, 256)).jaxpr
        return products_in_innermost_loops(jaxpr), count(jaxpr, DOT), len(list(loops(jaxpr)))

    assert products(lstm) == ([2], 2, 1)
    assert products(readout) == ([2], 3, 1)  # so short, it is one block


def test_the_times_of_all_that_is_turned_are_known(monkeypatch):
    """Whoever asks for the weights of a product looks for what has no time."""
    plans = []

    def listen(plan, steps, block):
        plans.append(plan)
        return block

    monkeypatch.setattr(_recurrence, "results_block", listen)
    jax.make_jaxpr(functools.partial(results, jaxrnn.scan, readout))(*operands(readout, 32, 256))
    (plan,) = plans
    (loop,) = plan.loops
    assert loop.form is not None
    products = [e for e in plan.in_loops if e.primitive is DOT]
    assert [plan.times[e.invars[1]] for e in products] == [-1, -1]
    assert all(plan.times[v] == 1 for e in plan.in_loops for v in e.outvars)
    assert all(plan.times[v] == -1 for v in loop.consts)


def test_compiled_the_matrix_is_on_the_left_as_it_lies():
    """XLA sees through the transposes: `U.T @ h`, and `U @ dz` in the gradient, without a copy."""
    samples, units = 16, 384
    arguments = operands(lstm, samples, units)
    gradient = jax.jit(jax.grad(functools.partial(loss, jaxrnn.scan, lstm), (0, 1, 2)))
    text = gradient.lower(*arguments).compile().as_text()
    axes = r".*lhs_contracting_dims=\{1\}, rhs_contracting_dims=\{(\d)\}"
    products = [
        (made, over)
        for made, over in re.findall(rf"= f32\[([\d,]+)\]\S* dot\({axes}", text)
        if made.endswith(f",{samples}")
    ]
    assert sorted(products) == [
        (f"{4 * units},{samples}", "0"),  # of the state
        (f"{4 * units},{samples}", "1"),  # of the input, `[samples, features]`
        (f"{units},{samples}", "0"),
    ]


def test_batch_major_inputs_are_read_where_they_lie():
    """No array `[T, B, D]` is made of `[B, T, D]`."""
    p, states, xs = operands(lstm, 32, 128)
    inputs = jnp.moveaxis(xs, 0, 1)

    def step(x, states):
        (h, c), _ = lstm(p)(tuple(states), x)
        return h, [h, c]

    run = jax.jit(functools.partial(jaxrnn.rnn, step, initial_states=list(states)))
    text = run.lower(inputs).compile().as_text()
    shapes = [f"f32[{','.join(map(str, x.shape))}]" for x in (inputs, xs)]
    assert [shape in text for shape in shapes] == [True, False]
    assert_same(run(inputs)[0], results(lax.scan, lstm, p, states, xs)[1][-1], scale=10)


def test_batch_major_inputs_that_are_a_state_at_last():
    """The last input is a state that no step reads: it is no business of the loop."""
    p, (h, c), xs = operands(lstm, 32, 128)

    def step(x, states):
        (h, c), _ = lstm(p)(tuple(states[:2]), x)
        return h, [h, c, 2 * x]

    inputs = jnp.moveaxis(xs, 0, 1)
    _, outputs, new = jaxrnn.rnn(step, inputs, [h, c, jnp.zeros_like(xs[0])])
    last, ys = results(lax.scan, lstm, p, (h, c), xs)
    assert_same((outputs, new), (jnp.moveaxis(ys, 0, 1), [*last, 2 * xs[-1]]), scale=10)


# Wherever it fits, it changes nothing.


def hessian_vector_product(run, p, init, xs):
    def directional(p):
        return jax.jvp(jax.grad(lambda p: run(p, init, xs)), (p,), (jax.tree.map(jnp.cos, p),))[1]

    return directional(p)


TRANSFORMATIONS = {
    "jvp": lambda run, *operands: jax.jvp(run, operands, jax.tree.map(jnp.cos, operands)),
    "hessian-vector product": hessian_vector_product,
    "reverse over reverse": lambda run, p, init, xs: jax.grad(
        lambda xs: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(run)(p, init, xs)))
    )(xs),
    "vmap over weights": lambda run, p, init, xs: jax.vmap(jax.grad(run), (0, None, None))(
        jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), p), init, xs
    ),
    "vmap over batches": lambda run, p, init, xs: jax.vmap(
        jax.jit(jax.grad(run, (0, 2))), (None, None, 0)
    )(p, init, jnp.stack([xs, -xs])),
    "checkpoint": lambda run, *operands: jax.grad(jax.checkpoint(run), (0, 1, 2))(*operands),
}


@pytest.mark.parametrize("make", [lstm, elman, masked, readout])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name, make, samples_last_everywhere, monkeypatch):
    """Here all gradients of weights are products of transposes that lie ready, too."""

    def is_wide(matrix, _, together):
        return matrix.ndim == 2 and together > 0

    monkeypatch.setattr(_passes, "_is_wide", is_wide)
    arguments = operands(make, 2, 7 if make is readout else 4)

    def transformed(scan, *arguments):
        return TRANSFORMATIONS[name](functools.partial(loss, scan, make), *arguments)

    ours = functools.partial(jaxrnn.scan, method="sequential")
    actual, expected = (
        jax.jit(functools.partial(transformed, scan))(*arguments) for scan in (ours, lax.scan)
    )
    assert_same(actual, expected, scale=20)


@functools.cache
def small_lstm_by_lax_scan(reverse):
    scan = functools.partial(lax.scan, reverse=reverse)
    return together(functools.partial(loss_and_results, scan, lstm), *operands(lstm, 2, 4))


@pytest.mark.parametrize("options", [{"reverse": True}, {"remat": True}, {"unroll": 2}])
def test_options(options, samples_last_everywhere):
    ours = functools.partial(jaxrnn.scan, method="sequential", **options)
    actual = apart(functools.partial(loss_and_results, ours, lstm), *operands(lstm, 2, 4))
    assert_same(actual, small_lstm_by_lax_scan("reverse" in options), scale=20)


ODD = {
    "units exchanged": lambda h, _: jnp.concatenate([h[:, 2:], h[:, :2]], 1),
    "softmax": lambda h, _: jax.nn.softmax(h),
    "one number for each sample": lambda h, _: h * h[:, :1],
    "a sum over samples": lambda h, _: h - h.mean(0),
    "a maximum over units": lambda h, _: h - h.max(1, keepdims=True),
    "all of a number": lambda h, x: h * jnp.full(h.shape, x[0, 0]),
    "inputs as they are": lambda h, x: h * x,
    "inputs of each sample": lambda h, x: h * x.sum(1)[:, None],
    "transposed": lambda h, _: jnp.tanh(h.T).T,
    "turned over": lambda h, _: h[:, ::-1],
    "every second unit": lambda h, _: h + jnp.repeat(h[:, ::2], 2, axis=1),
    "a row of weights": lambda h, _: h * W[:1] + W[1],
    "cut by a comparison": lambda h, x: jnp.where(h > x, h, 0.5 * h),
    "another dtype": lambda h, _: h.astype(jnp.bfloat16).astype(jnp.float32),
    "a rule of its own": lambda h, _: jax.nn.relu(h),
    "the samples among themselves": lambda h, _: W @ h,
}
W = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


@pytest.mark.parametrize("name", ODD)
def test_what_else_a_step_may_do(name, samples_last_everywhere):
    """As many samples as units and features: what lies the wrong way round still fits."""

    def scanned(scan, h, xs):
        def body(h, x):
            new = jnp.tanh(ODD[name](h @ W + x @ W.T, x))
            return new, (new, h.sum(1), x)

        return scan(body, h, xs)

    def loss_and_results(scan, h, xs):
        made = scanned(scan, h, xs)
        return jnp.sum(jnp.sin(made[1][0])), made

    h, xs = (np.random.default_rng(n).standard_normal(n * (4,)).astype(np.float32) for n in (2, 3))
    ours = functools.partial(jaxrnn.scan, method="sequential")
    actual = apart(functools.partial(loss_and_results, ours), h, xs)
    expected = together(functools.partial(loss_and_results, lax.scan), h, xs)
    assert_same(actual, expected, scale=20)
