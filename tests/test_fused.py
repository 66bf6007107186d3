"""A recurrence as one kernel: right in every form that fits, refused with the reason where not.

Kernels run on GPUs. Here Pallas interprets them, operation by operation as they were written for
the GPU; and where there is none the same primitive is a plain loop.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from jax.interpreters import mlir
from recurrences import (
    FEATURES,
    FORMS,
    FUSED,
    TIME,
    UNITS,
    draw,
    flagged,
    loss,
    operands,
    scalar_of,
)

import jaxrnn
from jaxrnn import _fused


def lowered_as(function):
    """From now on, what a fused recurrence computes is computed by `function`."""
    jax.clear_caches()
    mlir.register_lowering(_fused._fused_p, mlir.lower_fun(function, multiple_results=True))


@pytest.fixture(autouse=True, scope="module")
def _interpreted():
    lowered_as(functools.partial(_fused._as_kernel, interpret=True))
    yield
    lowered_as(_fused._as_scan)


@pytest.fixture
def as_a_loop():
    lowered_as(_fused._as_scan)
    yield
    lowered_as(functools.partial(_fused._as_kernel, interpret=True))


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form):
    make, *arguments = operands(form)

    def everything(scan):
        def of(p, init, xs):
            results = scan(make(p), init, xs)
            return scalar_of(results), results

        return jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))(*arguments)

    assert_same(everything(FUSED), everything(lax.scan), scale=10)


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (20, {"reverse": True}),
        (20, {"chunk": 2}),
        (1, {"chunk": 2, "reverse": True}),
        (1, {"remat": True}),
        (1, {"unroll": 2}),
    ],
    ids=str,
)
def test_options_and_numbers_of_samples(options, batch):
    make, *arguments = operands("lstm", batch)
    plain = functools.partial(lax.scan, reverse=options.get("reverse", False))
    actual, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, make, scan), (0, 1, 2)))(*arguments)
        for scan in (functools.partial(FUSED, **options), plain)
    )
    assert_same(actual, expected, scale=10)


def test_without_such_a_gpu_it_is_a_loop(as_a_loop):
    test_values_and_gradients("lstm")
    test_transformations("vmap of grad over weights")


def _ensemble(f, p):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 0.5, leaf + 0.1]), p)


TRANSFORMATIONS = {
    "vmap of grad over weights": lambda f, p, h, x: jax.vmap(jax.grad(f), (0, None, None))(
        _ensemble(f, p), h, x
    ),
    "grad of vmap over weights": lambda f, p, h, x: jax.grad(
        lambda q: jax.vmap(f, (0, None, None))(q, h, x).sum()
    )(_ensemble(f, p)),
    "grad of vmap over inputs": lambda f, p, h, x: jax.grad(
        lambda p: jax.vmap(f, (None, None, 0))(p, h, jnp.stack([x, x + 1])).sum()
    )(p),
    "vmap of vmap": lambda f, p, h, x: jax.vmap(
        lambda q: jax.vmap(jax.grad(f), (None, None, 0))(q, h, jnp.stack([x, x + 1]))
    )(_ensemble(f, p)),
    "jvp": lambda f, *args: jax.jvp(f, args, jax.tree.map(jnp.cos, args)),
    "forward over reverse": lambda f, *args: jax.jvp(
        jax.grad(f), args, jax.tree.map(jnp.cos, args)
    ),
    "reverse over reverse": lambda f, p, h, x: jax.grad(lambda p: scalar_of(jax.grad(f)(p, h, x)))(
        p
    ),
    "jacobian": lambda f, p, h, x: jax.jacrev(lambda h: f(p, h, x) * h)(h),
    "checkpoint": lambda f, *args: jax.grad(jax.checkpoint(f), (0, 1, 2))(*args),
    "of inputs alone": lambda f, *args: jax.grad(f, 2)(*args),
    "of one of the weights": lambda f, p, h, x: jax.grad(lambda u: f(p | {"u": u}, h, x))(p["u"]),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_transformations(transformation):
    make, *arguments = operands("gru")
    actual, expected = (
        jax.jit(
            functools.partial(TRANSFORMATIONS[transformation], functools.partial(loss, make, scan))
        )(*arguments)
        for scan in (FUSED, lax.scan)
    )
    assert_same(actual, expected, scale=20)


def test_one_sample_under_vmap_is_the_kernel_of_a_batch():
    """By itself the product of a vector fits none."""
    _, p, h, xs = operands("tanh")

    def body(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"])
        return h, h

    def run(scan, h, xs):
        return jax.vmap(functools.partial(scan, body), (0, 1), (0, 1))(h, xs)

    def gradient(scan):
        return jax.jit(jax.grad(lambda *a: scalar_of(run(scan, *a)), (0, 1)))(h, xs)

    with pytest.raises(ValueError, match="cannot run as one kernel"):
        FUSED(body, h[0], xs[:, 0])
    assert_same(gradient(FUSED), gradient(lax.scan), scale=20)


def test_rnn_with_masks_resets_and_padding_of_nan():
    cell = jaxrnn.cells.lstm(UNITS)
    params = cell.init(jax.random.key(0), FEATURES)
    x, mask = draw(3, TIME, FEATURES), jnp.asarray(np.arange(TIME) < [[5], [2], [0]])
    x = jnp.where(mask[..., None], x, jnp.nan)
    reset = jnp.asarray(np.arange(TIME) == 2)[None].repeat(3, 0)

    def of(params, x, method):
        results = jaxrnn.rnn(
            cell.step(params), x, cell.initial_states(3), mask=mask, reset=reset, method=method
        )
        return scalar_of(results)

    actual, expected = (
        jax.jit(jax.value_and_grad(of, (0, 1)), static_argnums=2)(params, x, method)
        for method in ("fused", "lax")
    )
    assert_same(actual, expected, scale=10)


def test_flags_and_counters_of_samples_in_the_state():
    _, p, h, xs = operands("tanh")
    init = (h, jnp.asarray([True, False, False]), jnp.zeros(3, jnp.int32))
    assert_same(FUSED(flagged(p), init, xs), lax.scan(flagged(p), init, xs))


def test_features_as_many_as_samples_are_no_samples():
    _, p, h, xs = operands("tanh", UNITS)

    def body(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + jnp.sum(p["v"], 0) + p["v"][0])
        return h, h

    assert_same(FUSED(body, h, xs), lax.scan(body, h, xs))
    with pytest.raises(ValueError, match="mixes samples or is shared by them"):
        FUSED(lambda h, x: (h * jnp.sum(x[:, :1] + p["b"][None], 0)[:, None],) * 2, h, xs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_wide_between_products(dtype):
    """What a kernel makes of them is no farther from the float32 result than `lax.scan`'s is."""
    make, *arguments = operands("lstm")
    arguments = jax.tree.map(lambda leaf: leaf.astype(dtype), arguments)
    exact = lax.scan(make(wide(arguments[0])), *wide(arguments[1:]))
    run = jax.jit(lambda scan, p, init, xs: scan(make(p), init, xs), static_argnums=0)
    ours, plain = (run(scan, *arguments) for scan in (FUSED, lax.scan))
    assert jax.tree.map(jnp.result_type, ours) == jax.tree.map(jnp.result_type, plain)
    assert distance(ours, exact) <= distance(plain, exact) * 1.05


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def distance(actual, expected):
    pairs = zip(jax.tree.leaves(wide(actual)), jax.tree.leaves(expected), strict=True)
    return float(sum(jnp.sum((a - b) ** 2) for a, b in pairs)) ** 0.5


# What does not fit, and what the error says of it.
UNFIT = {
    "not powers of two": (
        lambda h, x: (jnp.tanh(h @ jnp.ones((24, 24)) + x[:, :1]),) * 2,
        (3, 24), r"the sizes of an array \[24, 24\] are not powers of two",
    ),
    "weights": (
        lambda h, x: (jnp.tanh(h @ jnp.ones((256, 256)) + x[:, :1]),) * 2,
        (3, 256), "the weights take 256 KiB; 192 at most",
    ),
    "width": (
        lambda h, x: (jnp.tanh(h + x[:, :1]) * (x @ jnp.ones((FEATURES, 512))),) * 2,
        (3, 512), "has more than 256 features",
    ),
    "operation": (
        lambda h, x: (jnp.cumsum(h, 1) * 0.1 + x @ jnp.ones((FEATURES, 16)),) * 2,
        (3, 16), "kernels do not support 'cumsum'",
    ),
    "small product": (
        lambda h, x: (jnp.tanh(h @ jnp.ones((8, 8)) + x),) * 2,
        (3, 8), r"a product with a matrix \[8, 8\]",
    ),
    "weights that change": (
        lambda h, x: (jnp.tanh(h @ (jnp.ones((16, 16)) * x.sum(1).sum())),) * 2,
        (4, 16), r"a product with a matrix \[16, 16\], which must be the same at all steps",
    ),
    "sum over several axes": (
        lambda h, x: (jnp.tanh(h * h.sum() + x @ jnp.ones((FEATURES, 16))),) * 2,
        (4, 16), "kernels do not support 'reduce_sum' over several axes",
    ),
    "samples that meet": (
        lambda h, x: (h - h.mean(0) + x @ jnp.ones((FEATURES, 16)),) * 2,
        (3, 16), "mixes samples or is shared by them",
    ),
    "a piece of a state": (
        lambda h, x: (jnp.concatenate([h[:, 8:], h[:, :8]], 1) + x @ jnp.ones((FEATURES, 16)),) * 2,
        (3, 16), "concatenate|slice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_fits_no_kernel_is_refused_with_the_reason(case):
    body, shape, message = UNFIT[case]
    xs = draw(TIME, shape[0], FEATURES)
    with pytest.raises(
        ValueError,
        match=rf"method='fused': the recurrence cannot run as one kernel: .*(?:{message})",
    ):
        jaxrnn.scan(body, draw(*shape), xs, method="fused")


def test_float64_is_refused():
    with jax.enable_x64(True):
        make, p, init, xs = jax.tree.map(lambda leaf: leaf, operands("tanh"))
        p, init, xs = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (p, init, xs))
        with pytest.raises(ValueError, match="dtype float64"):
            FUSED(make(p), init, xs)


def test_no_samples_are_refused():
    make, *arguments = operands("tanh", 0)
    with pytest.raises(ValueError, match="is empty"):
        FUSED(make(arguments[0]), *arguments[1:])


def test_effects_are_refused():
    def body(h, x):
        jax.debug.print("{}", h[0, 0])
        return h + x @ jnp.ones((FEATURES, UNITS)), h

    with pytest.raises(ValueError, match="method='fused': the step has effects"):
        FUSED(body, draw(3, UNITS), draw(TIME, 3, FEATURES))


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((2, 3, UNITS), lambda x: x[0] + x[1]),
        ((3, 2 * UNITS), lambda x: lax.slice(x, (0, 0), x.shape, (1, 2))),
        ((6, UNITS), lambda x: lax.slice_in_dim(x, 3, 6)),
    ],
    ids=["rows", "every second column", "samples"],
)
def test_what_cuts_inputs_otherwise_than_in_columns_is_named(shape, cut):
    def body(h, x):
        h = jnp.tanh(cut(x) + h @ draw(UNITS, UNITS))
        return h, h

    with pytest.raises(ValueError, match=r"method='fused'.*not support 'slice'"):
        FUSED(body, draw(3, UNITS), draw(TIME, *shape))


def test_products_of_states_with_one_another_are_named():
    with pytest.raises(ValueError, match=r"method='fused'.*must be the same at all steps"):
        FUSED(lambda h, x: (jnp.tanh(h @ h + x), h), draw(16, 16), draw(TIME, 16, 16))
