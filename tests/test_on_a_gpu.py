"""What is decided on a GPU, and what is handed to its compilers, where there is none at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from recurrences import FEATURES, FUSED, TIME, UNITS, draw, flagged, loss, operands, scalar_of
from structure import DOT, SCAN, count, equations, loops

import jaxrnn
from jaxrnn import _device, _fused


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
    monkeypatch.setattr(_device, "gpu", lambda: Gpu(capability))
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
    monkeypatch.setattr(_device, "gpu", lambda: Gpu("9.0"))

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
    monkeypatch.setattr(_device, "gpu", lambda: Gpu("9.0"))
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    make, p, init, xs = operands("lstm")
    jaxpr = jax.make_jaxpr(lambda p: jaxrnn.scan(make(p), init, xs))(p).jaxpr
    assert count(jaxpr, _fused._fused_p) == 0


@pytest.mark.parametrize(("batch", "over"), [(1, 1), (3, 0)])
def test_one_row_on_a_gpu_meets_the_weights_as_they_are_stored(batch, over, monkeypatch):
    """Sums over the rows of a matrix are faster there than sums over its columns."""
    monkeypatch.setattr(_device, "gpu", lambda: Gpu("9.0"))
    make, *arguments = operands("lstm", batch)
    scan = functools.partial(jaxrnn.scan, method="sequential")
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, make, scan), (0, 1, 2)))(*arguments)
    *_, backward = loops(jaxpr.jaxpr)
    (product,) = (e for e, _ in equations(backward) if e.primitive is DOT)
    (_, axes), _ = product.params["dimension_numbers"]
    assert tuple(axes) == (over,)


def test_a_lone_long_sample_is_not_filled_up_whole(monkeypatch):
    """A kernel's sixteen rows for each of its one would take sixteen times the memory."""
    monkeypatch.setattr(_device, "gpu", lambda: Gpu("9.0"))
    make, p, init, xs = operands("lstm", 1)

    def kernels(time):
        rows = jax.ShapeDtypeStruct((time, *xs.shape[1:]), xs.dtype)
        gradient = jax.grad(lambda p, xs: loss(make, jaxrnn.scan, p, init, xs))
        found = equations(jax.make_jaxpr(gradient)(p, rows).jaxpr)
        return [e.params["call"].length for e, _ in found if e.primitive is _fused._fused_p]

    short, long = 1 << 10, 1 << 20
    assert kernels(short) == [short, short]
    assert max(kernels(long)) < long


@pytest.mark.parametrize("method", ["auto", "parallel", "sequential"])
def test_a_step_that_does_nothing_but_hand_on(method, monkeypatch):
    monkeypatch.setattr(_device, "gpu", lambda: Gpu("9.0"))
    xs, first = draw(TIME, 3, UNITS), draw(3, UNITS)
    last, ys = jaxrnn.scan(lambda before, x: (x, before), first, xs, method=method)
    np.testing.assert_array_equal(last, xs[-1])
    np.testing.assert_array_equal(ys, np.concatenate([first[None], xs[:-1]]))


def test_a_symbolic_number_of_samples_is_no_kernel(monkeypatch):
    monkeypatch.setattr(_device, "gpu", lambda: Gpu("9.0"))
    make, p, init, xs = operands("tanh", 3)
    (batch,) = jax.export.symbolic_shape("b")
    types = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p),
        jax.ShapeDtypeStruct((batch, *init.shape[1:]), init.dtype),
        jax.ShapeDtypeStruct((len(xs), batch, *xs.shape[2:]), xs.dtype),
    ]

    def exported(scan):
        return jax.export.export(jax.jit(functools.partial(loss, make, scan)))(*types)

    assert_same(exported(jaxrnn.scan).call(p, init, xs), loss(make, lax.scan, p, init, xs))
    with pytest.raises(ValueError, match=r"method='fused'.*symbolic"):
        exported(FUSED)


def test_weights_that_fit_an_h100_are_refused_for_a_smaller_gpu(monkeypatch):
    v, w = draw(128, 128, scale=0.1), draw(128, 128, seed=1, scale=0.1)

    def body(h, x):
        h = jnp.tanh(jnp.tanh(h @ v) @ w + x[:, :1])
        return h, h

    arguments = body, draw(3, 128), draw(TIME, 3, FEATURES)
    assert_same(FUSED(*arguments), lax.scan(*arguments))
    monkeypatch.setattr(_device, "gpu", lambda: Gpu("8.9"))
    with pytest.raises(ValueError, match="the weights take 128 KiB; 64 at most"):
        jax.make_jaxpr(FUSED, static_argnums=0)(*arguments)


@pytest.fixture
def for_a_gpu(monkeypatch):
    """Lets kernels be written for a GPU that is not there: up to what is handed to XLA."""
    write = _fused._to_kernel
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
    axis = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=axis, abstract_device=device)

    def write_for(context, *operands, call):
        with jax.sharding.use_abstract_mesh(mesh):
            return write(context, *operands, call=call)

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
        program = kernel.params["call"].kernel.program
        made = [e.primitive for e in program.equations]
        assert made.count(DOT) == products
        assert {p.name for p in made} & {"split", "slice", "concatenate", "transpose"} == set()


def test_an_exported_program_holds_loops():
    """JAX exports no kernels, as it does not promise that they run later."""
    make, *arguments = operands("lstm")
    run = jax.jit(lambda p, init, xs: FUSED(make(p), init, xs))
    exported = jax.export.export(run, platforms=["cuda"])(*arguments)
    assert "stablehlo.while" in exported.mlir_module()
