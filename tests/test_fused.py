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
from structure import DOT, SCAN, count, equations, loops

import jaxrnn
from jaxrnn import _fused, _placement

TIME, UNITS, FEATURES = 5, 16, 8


def draw(*shape, seed=0, scale=0.4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def matrix(gates=1, rows=UNITS, seed=1):
    return draw(rows, gates * UNITS, seed=seed, scale=0.3)


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


def lstm(split):
    def make(p):
        def body(carry, x):
            h, c = carry
            i, f, g, o = split(p, x, h)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        return body

    return make


def activated_before_the_split(p):
    def body(carry, x):
        h, c = carry
        z = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = (f + 1) * c + (i + 1) * g
        h = (o + 1) * jnp.tanh(c) * 0.3
        return (h, c), h

    return body


def gru(p):
    def body(h, x):
        xz, xr, xh = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
        hz, hr, hh = jnp.split(h @ p["u"], 3, axis=-1)
        z = jax.nn.sigmoid(xz + hz)
        h = z * h + (1 - z) * jnp.tanh(xh + jax.nn.sigmoid(xr + hr) * hh)
        return h, h

    return body


def elman(make_new):
    def make(p):
        def body(h, x):
            h = make_new(p, x @ p["w"] + p["b"], h)
            return h, h

        return body

    return make


def normalised(z):
    z = z - z.mean(-1, keepdims=True)
    return z * lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-3)


def masked(p):
    def body(h, x):
        x, keep = x[:, :-1], x[:, -1] > 0
        new = jnp.tanh(x @ p["w"][:-1] + h @ p["u"])
        h = jnp.where(keep[:, None], new, h)
        return h, jnp.where(keep[:, None], new, 0)

    return body


def readout(p):
    def body(h, x):
        h = jnp.tanh(x @ p["w"] + jnp.tanh(h @ p["u"]) @ p["v"])
        return h, (h @ p["v"], h)

    return body


def with_a_constant_per_sample(p):
    def body(h, x):
        h = jnp.tanh(x @ p["w"] + (h * p["drop"]) @ p["u"])
        return h, h

    return body


def transposed_weights(p):
    def body(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"].T)
        return h, h

    return body


def sliced(p):
    def body(h, x):
        z = x @ p["w"] + h @ p["u"]
        h = jnp.tanh(z[:, :UNITS]) * jax.nn.sigmoid(z[:, UNITS:])
        return h, h

    return body


# Name: gates, states, make(params) -> body.
FORMS = {
    "lstm": (
        4, 2, lstm(lambda p, x, h: jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, axis=-1))
    ),
    "lstm of four matmuls": (
        4, 2,
        lstm(lambda p, x, h: [
            x @ w + h @ u
            for w, u in zip(jnp.split(p["w"], 4, -1), jnp.split(p["u"], 4, -1), strict=True)
        ]),
    ),
    "lstm over both side by side": (
        4, 2,
        lstm(lambda p, x, h: jnp.split(
            jnp.concatenate([x, h], -1) @ jnp.concatenate([p["w"], p["u"]]), 4, axis=-1
        )),
    ),
    "activated before the split": (4, 2, activated_before_the_split),
    "gru": (3, 1, gru),
    "tanh": (1, 1, elman(lambda p, z, h: jnp.tanh(z + h @ p["u"]))),
    "custom_jvp": (1, 1, elman(lambda p, z, h: jax.nn.relu(z + h @ p["u"]) * 0.5)),
    "softmax": (1, 1, elman(lambda p, z, h: jax.nn.softmax(z + h @ p["u"]))),
    "layer norm": (1, 1, elman(lambda p, z, h: jnp.tanh(normalised(z + h @ p["u"]) * p["b"]))),
    "no product in the loop": (1, 1, elman(lambda p, z, h: jax.nn.sigmoid(z) * h + p["b"])),
    "masked": (1, 1, masked),
    "two products": (1, 1, readout),
    "a constant per sample": (1, 1, with_a_constant_per_sample),
    "transposed weights": (1, 1, transposed_weights),
    "slices": (2, 1, sliced),
}  # fmt: skip


def operands(form, batch=3):
    gates, states, make = FORMS[form]
    p = {
        "w": matrix(gates, FEATURES),
        "u": matrix(gates, seed=2),
        "v": matrix(seed=3),
        "b": draw(gates * UNITS, seed=4),
        "drop": (draw(batch, UNITS, seed=5) > 0) * 2.0,
    }
    init = [draw(batch, UNITS, seed=6 + i) for i in range(states)]
    return make, p, tuple(init) if states > 1 else init[0], draw(TIME, batch, FEATURES, seed=9)


def scalar_of(tree):
    return sum(jnp.sum(jnp.sin(leaf * (1 + i))) for i, leaf in enumerate(jax.tree.leaves(tree)))


def loss(make, scan, p, init, xs):
    return scalar_of(scan(make(p), init, xs))


FUSED = functools.partial(jaxrnn.scan, method="fused")


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

    with pytest.raises(ValueError, match="fits no kernel"):
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


def flagged(p):
    def body(carry, x):
        h, on, n = carry
        h = jnp.where(on[:, None], jnp.tanh(jnp.array(x) @ p["w"] + jnp.copy(h) @ p["u"]), h)
        on = on | (h.max(1) > 0.5)
        return (h, on, n + on), (on, n)

    return body


def test_flags_and_counters_of_samples_in_the_state():
    _, p, h, xs = operands("tanh")
    init = (h, jnp.asarray([True, False, False]), jnp.zeros(3, jnp.int32))
    assert_same(FUSED(flagged(p), init, xs), lax.scan(flagged(p), init, xs))


@pytest.fixture
def for_a_gpu(monkeypatch):
    """Lets kernels be written for a GPU that is not there: up to what is handed to XLA."""
    write = _fused._to_kernel
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axis, abstract_device=device)

    def write_for(context, *operands, how):
        with jax.sharding.use_abstract_mesh(mesh):
            return write(context, *operands, how=how)

    monkeypatch.setattr(_fused, "_to_kernel", write_for)

    def kernels(function, *arguments):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("gpu.triton")

    return kernels


@pytest.mark.parametrize("form", ["lstm", "gru", "layer norm", "masked", "custom_jvp"])
def test_the_compiler_of_kernels_takes_them(form, for_a_gpu):
    """And warns of nothing: that JAX has deprecated it is not the user's to mend."""
    make, *arguments = operands(form)
    assert for_a_gpu(jax.grad(functools.partial(loss, make, FUSED), (0, 1, 2)), *arguments) == 2
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arguments)
    assert for_a_gpu(functools.partial(loss, make, FUSED), *narrow) == 1


def test_the_compiler_of_kernels_takes_flags_and_counters(for_a_gpu):
    _, p, h, xs = operands("tanh")
    init = (h, jnp.asarray([True, False, False]), jnp.zeros(3, jnp.int32))
    assert for_a_gpu(lambda init, xs: FUSED(flagged(p), init, xs), init, xs) == 1


def test_features_as_many_as_samples_are_no_samples():
    _, p, h, xs = operands("tanh", UNITS)

    def body(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + jnp.sum(p["v"], 0) + p["v"][0])
        return h, h

    assert_same(FUSED(body, h, xs), lax.scan(body, h, xs))
    with pytest.raises(ValueError, match="mixes samples or is shared by them"):
        FUSED(lambda h, x: (h * jnp.squeeze(x[:1, :1] + p["b"][None], 0)[:, None],) * 2, h, xs)


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


@pytest.mark.parametrize(
    ("form", "products"),
    [
        ("lstm", 4),
        ("lstm over both side by side", 4),
        ("gru", 3),
        ("activated before the split", 4),
    ],
)
def test_a_gradient_is_two_kernels_with_a_product_per_gate_and_no_cuts(form, products):
    make, *arguments = operands(form)
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, make, FUSED), (0, 1, 2)))(*arguments)
    kernels = [e for e, _ in equations(jaxpr.jaxpr) if e.primitive is _fused._fused_p]
    assert len(kernels) == 2
    assert count(jaxpr.jaxpr, SCAN) == 0
    for kernel in kernels:
        program = kernel.params["how"].kernel.program
        made = [e.primitive for e in program.equations]
        assert made.count(DOT) == products
        assert {p.name for p in made} & {"split", "slice", "concatenate", "transpose"} == set()


# What does not fit, and what the error says of it.
UNFIT = {
    "no powers of two": (
        lambda h, x: (jnp.tanh(h @ jnp.ones((24, 24)) + x[:, :1]),) * 2,
        (3, 24), r"the sizes of an array \[24, 24\] are no powers of two",
    ),
    "weights": (
        lambda h, x: (jnp.tanh(h @ jnp.ones((256, 256)) + x[:, :1]),) * 2,
        (3, 256), "the weights take 256 KiB; 192 at most",
    ),
    "width": (
        lambda h, x: (jnp.tanh(h + x[:, :1]) * (x @ jnp.ones((FEATURES, 512))),) * 2,
        (3, 512), "a state of 512 units; 256 at most",
    ),
    "operation": (
        lambda h, x: (jnp.cumsum(h, 1) * 0.1 + x @ jnp.ones((FEATURES, 16)),) * 2,
        (3, 16), "there is no 'cumsum' in a kernel",
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
        (4, 16), "there is no 'reduce_sum' over several axes in a kernel",
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
        ValueError, match=rf"method='fused': the recurrence fits no kernel: .*(?:{message})"
    ):
        jaxrnn.scan(body, draw(*shape), xs, method="fused")


def test_weights_that_fit_an_h100_are_refused_for_a_smaller_gpu(monkeypatch):
    v, w = draw(128, 128, scale=0.1), draw(128, 128, seed=1, scale=0.1)

    def body(h, x):
        h = jnp.tanh(jnp.tanh(h @ v) @ w + x[:, :1])
        return h, h

    arguments = body, draw(3, 128), draw(TIME, 3, FEATURES)
    assert_same(FUSED(*arguments), lax.scan(*arguments))
    monkeypatch.setattr(_placement, "gpu", lambda: Gpu("8.9"))
    with pytest.raises(ValueError, match="the weights take 128 KiB; 64 at most"):
        jax.make_jaxpr(FUSED, static_argnums=0)(*arguments)


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


class Gpu:
    """What the engine asks of a GPU."""

    core_count = 2
    shared_memory_per_block_optin = 99 << 10

    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


@pytest.mark.parametrize(
    ("capability", "batch", "kernels"),
    [("9.0", 3, 2), ("9.0", 32, 2), ("9.0", 33, 0), ("8.0", 3, 0)],
)
def test_auto_uses_kernels_on_the_gpus_on_which_they_were_measured(
    capability, batch, kernels, monkeypatch
):
    """There, and if all blocks of threads run at once."""
    monkeypatch.setattr(_placement, "gpu", lambda: Gpu(capability))
    make, *arguments = operands("lstm", batch)
    gradient = jax.grad(functools.partial(loss, make, jaxrnn.scan), (0, 1, 2))
    jaxpr = jax.make_jaxpr(gradient)(*arguments).jaxpr
    assert count(jaxpr, _fused._fused_p) == kernels
    report = jaxrnn.explain(
        jaxrnn.cells.lstm(UNITS).step(jaxrnn.cells.lstm(UNITS).init(jax.random.key(0), FEATURES)),
        draw(batch, TIME, FEATURES),
        [draw(batch, UNITS)] * 2,
    )
    assert ('method "fused"' in report) == bool(kernels)
    assert ("one kernel: recurrence" in report) == bool(kernels)


def test_auto_on_a_gpu_runs_what_fits_no_kernel_in_an_unrolled_loop(monkeypatch):
    monkeypatch.setattr(_placement, "gpu", lambda: Gpu("9.0"))

    def body(h, x):
        h = jnp.cumsum(jnp.tanh(x @ p["w"] + h @ p["u"]), 1)
        return h, h

    _, p, init, xs = operands("tanh")

    def unrolled(function, *arguments):
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        return {e.params["unroll"] for e, _ in equations(jaxpr) if e.primitive is SCAN}

    def step(x, states):
        h, _ = body(states[0], x)
        return h, [h]

    def by_rnn(x):
        return jaxrnn.rnn(step, x, [init], mask=jnp.ones((3, TIME), bool))

    for unroll, expected in ((1, 8), (2, 2)):
        scan = functools.partial(jaxrnn.scan, body, unroll=unroll)
        assert unrolled(jax.grad(lambda xs, scan=scan: scalar_of(scan(init, xs))), xs) == {expected}
    assert unrolled(by_rnn, xs.swapaxes(0, 1)) == {8}


def test_on_several_devices_the_compiler_splits_loops_and_auto_leaves_them(monkeypatch):
    monkeypatch.setattr(_placement, "gpu", lambda: Gpu("9.0"))
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    make, p, init, xs = operands("lstm")
    jaxpr = jax.make_jaxpr(lambda p: jaxrnn.scan(make(p), init, xs))(p).jaxpr
    assert count(jaxpr, _fused._fused_p) == 0


@pytest.mark.parametrize(("batch", "over"), [(1, 1), (3, 0)])
def test_one_row_on_a_gpu_meets_the_weights_as_they_are_stored(batch, over, monkeypatch):
    """Sums over the rows of a matrix are faster there than sums over its columns."""
    monkeypatch.setattr(_placement, "gpu", lambda: Gpu("9.0"))
    make, *arguments = operands("lstm", batch)
    scan = functools.partial(jaxrnn.scan, method="sequential")
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, make, scan), (0, 1, 2)))(*arguments)
    *_, backward = loops(jaxpr.jaxpr)
    (product,) = (e for e, _ in equations(backward) if e.primitive is DOT)
    (_, axes), _ = product.params["dimension_numbers"]
    assert tuple(axes) == (over,)


def test_an_exported_program_holds_loops():
    """JAX exports no kernels, as it does not promise that they run later."""
    make, *arguments = operands("lstm")
    run = jax.jit(lambda p, init, xs: FUSED(make(p), init, xs))
    exported = jax.export.export(run, platforms=["cuda"])(*arguments)
    assert "stablehlo.while" in exported.mlir_module()


def test_a_lone_long_sample_is_not_filled_up_whole(monkeypatch):
    """A kernel's sixteen rows for each of its one would take sixteen times the memory."""
    monkeypatch.setattr(_placement, "gpu", lambda: Gpu("9.0"))
    make, p, init, xs = operands("lstm", 1)

    def kernels(time):
        rows = jax.ShapeDtypeStruct((time, *xs.shape[1:]), xs.dtype)
        gradient = jax.grad(lambda p, xs: loss(make, jaxrnn.scan, p, init, xs))
        found = equations(jax.make_jaxpr(gradient)(p, rows).jaxpr)
        return [e.params["how"].length for e, _ in found if e.primitive is _fused._fused_p]

    short, long = 1 << 10, 1 << 20
    assert kernels(short) == [short, short]
    assert max(kernels(long)) < long
