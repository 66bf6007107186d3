"""Split over devices by batch, a gradient talks once per block of time, not at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bodies import BODIES
from helpers import assert_same
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from structure import ALL_COLLECTIVES, executed_collectives

import jaxrnn

pytestmark = pytest.mark.several_devices

DEVICES, BATCH, TIME, FEATURES, UNITS = 8, 16, 256, 4, 8
SEQUENTIAL = functools.partial(jaxrnn.scan, method="sequential")
KINDS = "all-gather", "all-to-all", "collective-permute", "reduce-scatter"


@pytest.fixture(params=[AxisType.Auto], ids=["auto"])
def mesh(request):
    if jax.device_count() < DEVICES:
        pytest.skip("needs eight devices, simulated ones will do (see conftest.py)")
    return jax.make_mesh((DEVICES,), ("batch",), (request.param,))


def problem(name, time=TIME):
    gates = {"lstm_split": 4, "elman_cell": 1}[name]
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)

    n = gates * UNITS
    p = {"w": draw(FEATURES, n), "u": draw(UNITS, n), "b": draw(n)}
    return p, [draw(BATCH, UNITS), draw(BATCH, UNITS)], draw(time, BATCH, FEATURES)


def loss(scan, name, p, init, xs):
    init = tuple(init) if name == "lstm_split" else init[0]
    return (scan(BODIES[name].make(p), init, xs)[1] ** 2).mean()


def compiled_gradient(scan, name, mesh, operands):
    p, init, xs = operands
    placed = (
        jax.device_put(p, NamedSharding(mesh, P())),
        jax.device_put(init, NamedSharding(mesh, P("batch"))),
        jax.device_put(xs, NamedSharding(mesh, P(None, "batch"))),
    )
    gradient = jax.value_and_grad(functools.partial(loss, scan, name), (0, 1, 2))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient).lower(*placed).compile()
        return compiled, compiled(*placed)


@pytest.mark.parametrize("name", ["lstm_split", "elman_cell"])
def test_a_batch_sharded_gradient_reduces_once_per_block(mesh, name):
    operands = problem(name)
    compiled, results = compiled_gradient(SEQUENTIAL, name, mesh, operands)
    text = compiled.as_text()
    assert executed_collectives(text) <= TIME // 8
    assert not any(executed_collectives(text, kind) for kind in KINDS)
    expected = jax.value_and_grad(functools.partial(loss, lax.scan, name), (0, 1, 2))(*operands)
    assert_same(results, expected, scale=10)


def test_the_measure_sees_a_collective_at_every_step(mesh):
    """`lax.scan` reduces the gradient of the weights step by step; what is counted is right."""
    compiled, _ = compiled_gradient(lax.scan, "elman_cell", mesh, problem("elman_cell"))
    assert executed_collectives(compiled.as_text()) >= TIME


def test_fresh_states_do_not_keep_the_engine_from_its_work():
    """Zeros made inside the function are on no mesh, whereas the states to come are.

    With axes of type Explicit `lax.scan` refuses such states.
    """
    mesh = jax.make_mesh((DEVICES,), ("batch",), (AxisType.Auto,))
    p, _, xs = problem("elman_cell")

    def gradient(scan):
        def loss(p, xs):
            h = jnp.zeros((BATCH, UNITS))
            return (scan(BODIES["elman_cell"].make(p), h, xs)[1] ** 2).mean()

        placed = (
            jax.device_put(p, NamedSharding(mesh, P())),
            jax.device_put(xs, NamedSharding(mesh, P(None, "batch"))),
        )
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss)).lower(*placed).compile()
            return compiled.as_text(), compiled(*placed)

    text, results = gradient(SEQUENTIAL)
    before, expected = gradient(lax.scan)
    assert_same(results, expected, scale=10)
    executed = [executed_collectives(t, ALL_COLLECTIVES) for t in (text, before)]
    assert executed[0] <= executed[1] / 4


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_vmap_over_an_axis_of_a_mesh(axis):
    """The state that all samples start from is split as their inputs are."""
    mesh = jax.make_mesh((DEVICES,), ("batch",), (axis,))
    p, (h, _), xs = problem("elman_cell", 5)

    def loss(scan, p, h, xs):
        run = jax.vmap(lambda x: scan(BODIES["elman_cell"].make(p), h, x)[1], 1)
        return (run(xs) ** 2).mean()

    def value_and_gradient(scan):
        with jax.set_mesh(mesh):
            placed = (
                jax.device_put(p, NamedSharding(mesh, P())),
                jax.device_put(h[0], NamedSharding(mesh, P())),
                jax.device_put(xs, NamedSharding(mesh, P(None, "batch"))),
            )
            gradient = jax.value_and_grad(functools.partial(loss, scan), (0, 1, 2))
            return jax.jit(gradient)(*placed)

    ours = value_and_gradient(functools.partial(SEQUENTIAL, chunk=2))
    plain = value_and_gradient(lax.scan)
    assert_same(ours, plain, scale=10)
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), ours, plain)
    assert jax.tree.all(same)


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("convolutional", False),
        ("branches_per_sample", False),
        ("lstm_split", True),
        ("elman_cell", True),
    ],
)
def test_samples_split_over_an_explicit_mesh(name, alone, monkeypatch):
    """What would merge their axis with others, or part with it, stays as it is.

    Also where there is no other device, and what is split lies in one piece.
    """
    samples, case = 1 if alone else 3, BODIES[name]
    if alone:
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    mesh = jax.make_mesh((samples,), ("b",), (AxisType.Explicit,), devices=jax.devices()[:samples])
    consts, init, xs = case.operands()

    def value_and_gradient(scan):
        def loss(consts, init, xs):
            return jnp.sum(jnp.sin(scan(case.make(consts), init, xs)[1]))

        with jax.set_mesh(mesh):
            placed = (
                jax.device_put(consts, P()),
                jax.device_put(init, P("b")),
                jax.device_put(xs, P(None, "b")),
            )
            results = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*placed)
            return results, jax.tree.map(jax.typeof, results)

    ours, types = value_and_gradient(functools.partial(SEQUENTIAL, chunk=3))
    plain, expected = value_and_gradient(lax.scan)
    assert types == expected
    assert_same(ours, plain, scale=10)


def shard_mapped(scan, manual):
    """Results and gradients of a body that takes a mean over the whole batch."""
    mesh = jax.make_mesh((DEVICES // 2, 2), ("batch", "other"), (AxisType.Auto,) * 2)
    p, (h, _), xs = problem("elman_cell", 6)

    def run(p, h, xs):
        def body(h, x):
            z = x @ p["w"] + h @ p["u"]
            h = jnp.tanh(z - lax.pmean(z.mean(0), "batch") + p["b"])
            return h, h @ p["u"]

        return scan(body, h, xs)

    specs = P(), P("batch"), P(None, "batch")
    split = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=specs[1:], axis_names=set(manual)
    )
    gradient = jax.grad(lambda *a: (split(*a)[1] ** 2).sum(), (0, 1, 2))
    return jax.jit(lambda *a: (split(*a), gradient(*a)))(p, h, xs)


plain_shard_mapped = functools.cache(functools.partial(shard_mapped, lax.scan))


@pytest.mark.parametrize("flags", [{}, {"chunk": 4, "remat": True}], ids=["plain", "remat"])
@pytest.mark.parametrize("manual", [("batch", "other"), ("batch",)], ids=["all_axes", "some_axes"])
def test_shard_map_with_a_collective_inside_the_body(manual, flags):
    """The body talks to the other devices; `shard_map` may leave axes to the compiler."""
    actual = shard_mapped(functools.partial(SEQUENTIAL, **flags), manual)
    assert_same(actual, plain_shard_mapped(manual), scale=10)


def test_shard_map_with_integers_and_keys_of_each_device():
    mesh = jax.make_mesh((DEVICES,), ("batch",), (AxisType.Auto,))
    p, _, xs = problem("elman_cell", 4)

    def gradient(scan):
        def run(p, xs):
            def body(carry, x):
                h, n, key = carry
                kept = jax.random.bernoulli(key, shape=h.shape)
                h = jnp.tanh(x @ p["w"] + h @ p["u"] + n) * kept
                return (h, n + 1, jax.random.split(key)[0]), (h, n)

            device = lax.axis_index("batch")
            init = (xs[0] @ p["w"], device, jax.random.key(device))
            return scan(body, init, xs)[1][0]

        split = jax.shard_map(
            run, mesh=mesh, in_specs=(P(), P(None, "batch")), out_specs=P(None, "batch")
        )
        return jax.jit(jax.grad(lambda p: (split(p, xs) ** 2).sum()))(p)

    assert_same(gradient(SEQUENTIAL), gradient(lax.scan))
