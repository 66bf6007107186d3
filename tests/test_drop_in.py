"""`scan` is called as `lax.scan` is: same arguments, contexts and types, and traced as rarely."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxrnn

U, H, X = 0.5 * np.eye(4, dtype=np.float32), np.ones((2, 4), np.float32), np.ones((5, 2, 4))
X = X.astype(np.float32)
SPLIT = {"method": "sequential"}


def tanh_step(h, x):
    h = jnp.tanh(h @ U + x)
    return h, h @ U


def weak_types(tree):
    return jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), tree)


@pytest.mark.parametrize("flags", [{}, SPLIT, SPLIT | {"chunk": 2}, {"method": "lax"}])
@pytest.mark.parametrize(
    "transformation",
    [
        lambda f: f,
        lambda f: jax.grad(lambda h, x: f(h, x)[1].sum()),
        lambda f: jax.vmap(f, (None, 1)),
    ],
    ids=["values", "grad", "vmap"],
)
def test_a_second_eager_call_traces_nothing(flags, transformation):
    calls = []

    def step(h, x):
        calls.append(None)
        return tanh_step(h, x)

    run = transformation(lambda h, x: jaxrnn.scan(step, h, x, **flags))
    run(H, X)
    before = len(calls)
    actual = run(2 * H, X)
    assert len(calls) == before
    assert_same(actual, transformation(lambda h, x: lax.scan(tanh_step, h, x))(2 * H, X))


@pytest.mark.parametrize("length", [np.array(3), np.int64(3), jnp.int32(3), 3.0])
def test_lengths_of_other_types(length):
    traced = jax.make_jaxpr(
        lambda h: jaxrnn.scan(lambda h, _: tanh_step(h, X[0]), h, None, length, chunk=1, **SPLIT)
    )(H)
    # Split as with a plain integer: the blocks are a loop of their own.
    plain = jax.make_jaxpr(
        lambda h: jaxrnn.scan(lambda h, _: tanh_step(h, X[0]), h, None, 3, chunk=1, **SPLIT)
    )(H)
    assert len(str(traced)) == len(str(plain))
    actual = jaxrnn.scan(lambda h, _: tanh_step(h, X[0]), H, None, length, **SPLIT)
    assert_same(actual, lax.scan(lambda h, _: tanh_step(h, X[0]), H, None, 3))


@pytest.mark.parametrize("flags", [{}, SPLIT, {"method": "lax", "remat": True}])
def test_without_jit_the_step_sees_numbers(flags):
    def step(h, x):
        return tanh_step(2 * h if float(h.sum()) > 0 else h, x)

    with jax.disable_jit():
        actual, expected = jaxrnn.scan(step, H, X, **flags), lax.scan(step, H, X)
    assert_same(actual, expected)


def test_double_precision_inside_the_step_alone():
    def step(h, x):
        with jax.enable_x64(True):
            u, first, second = (a.astype(jnp.float64) for a in (U, x[0], h[0]))
            h = (u @ first + u @ second + 1e-9 + x).astype(jnp.float32)
        return tanh_step(h, x)

    assert_same(jaxrnn.scan(step, H, X, **SPLIT), lax.scan(step, H, X))


def weak_step(carry, x):
    h, scale, count = carry
    h, y = tanh_step(h, x[0])
    return (h, scale * 2, count + 1), (y, scale * 3 + 1, 1.0, x[1])


@pytest.mark.parametrize("flags", [{}, {"chunk": 2}, {"remat": True}])
def test_weak_types_stay_weak(flags):
    xs = X, jnp.broadcast_to(jnp.asarray(2.0), (5,))
    actual, expected = (
        scan(weak_step, (H, 1.0, 0), xs, **kwargs)
        for scan, kwargs in ((jaxrnn.scan, SPLIT | flags), (lax.scan, {}))
    )
    assert weak_types(actual) == weak_types(expected)
    assert_same(actual, expected)


@pytest.mark.parametrize("narrow", [lambda h: jnp.round(h).astype(int), jnp.real])
def test_a_weak_carry_is_not_cast_to_what_holds_less(narrow):
    """A step that makes integers of floats, or floats of complex numbers, changes its carry."""

    def step(carry, x):
        h, total = carry
        h, y = tanh_step(h, x)
        return (h, narrow(total + y.sum())), y

    for scan, flags in ((jaxrnn.scan, SPLIT), (lax.scan, {})):
        with pytest.raises(TypeError, match="carry"):
            scan(step, (H, 0.5 if narrow is not jnp.real else 1j), X, **flags)


def strengthening_step(carry, x):
    h, scale, sharp = carry
    h, y = tanh_step(h, x)
    y = (y.mean() * scale, scale, scale * 2, scale * x.astype(jnp.bfloat16))
    return (h, scale + 0.1 * h.mean(), sharp + h.mean().astype(jnp.bfloat16)), (y, sharp)


@pytest.mark.parametrize("flags", [{}, {"chunk": 2}, {"remat": True}])
def test_what_is_made_of_a_weak_carry_is_weak_even_if_the_carry_becomes_strong(flags):
    """Strong from the start, it would make float32 of what it meets in bfloat16."""

    def run(scan, **flags):
        def loss(h):
            last, ys = scan(strengthening_step, (h, 0.5, 0.25), X, **flags)
            return last[1] + ys[0][3].astype(jnp.float32).sum(), (last, ys)

        return jax.grad(loss, has_aux=True)(H)

    (actual, results), (expected, wanted) = run(jaxrnn.scan, **SPLIT, **flags), run(lax.scan)
    assert weak_types(results) == weak_types(wanted)
    assert_same(results, wanted, jnp.bfloat16)
    assert_same(actual, expected, jnp.bfloat16)


@pytest.mark.several_devices
def test_products_with_weights_split_over_an_explicit_mesh():
    """Products of one state are not merged where their weights lie differently."""
    mesh = jax.make_mesh((2,), ("units",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split, whole = jax.device_put(U, P(None, "units")), jax.device_put(U, P(None, None))
        h, x = jax.device_put(H, P(None, None)), jax.device_put(X, P(None, None, None))

        def step(h, x):
            z = jax.sharding.reshard(h @ split, P(None, None))
            return jnp.tanh(z + x), (h @ whole, jnp.concatenate([x, h], 1)[:, 2:6] @ whole)

        actual, expected = jaxrnn.scan(step, h, x, **SPLIT), lax.scan(step, h, x)
        types = [jax.tree.map(jax.typeof, tree) for tree in (actual, expected)]
        assert types[0] == types[1]
    assert_same(actual, expected)


@pytest.mark.parametrize("flags", [{}, {"chunk": 2}])
@pytest.mark.parametrize("under", [lambda f: f, jax.checkpoint], ids=["", "checkpoint"])
def test_profiles_name_the_scopes_of_the_step(under, flags):
    """Those of products that left the loop, were merged or are differentiated, too."""

    def step(h, x):
        with jax.named_scope("joined"):
            z = under(lambda h, x: jnp.concatenate([x, h], 1) @ jnp.concatenate([U, U]))(h, x)
        with jax.named_scope("merged"):
            a, b = h @ U, h @ (2 * U)
        with jax.named_scope("gates"):
            h = jnp.tanh(z + a) * b
        with jax.named_scope("readout"):
            return h, h @ U

    def loss(h, x):
        return jaxrnn.scan(step, h, x, **SPLIT | flags)[1].sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(H, X).compile().as_text()
    products = re.findall(r' dot\(.*op_name="([^"]*)"', compiled)
    scopes = {scope for name in products for scope in re.split(r"\W+", name)}
    assert {"joined", "merged", "readout"} <= scopes
    assert all(re.search("joined|merged|readout", name) for name in products)
    assert all("gates" in name for name in re.findall(r' tanh\(.*op_name="([^"]*)"', compiled))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """A class that takes nothing but arrays, as many do that check what they are given."""

    array: jax.Array

    def __post_init__(self):
        if not isinstance(self.array, jax.Array):
            raise TypeError(f"array is a {type(self.array)}")


@pytest.mark.parametrize("flags", [{}, SPLIT | {"chunk": 2}, {"method": "lax", "remat": True}])
def test_classes_that_take_arrays_alone(flags):
    def step(h, x):
        h, y = tanh_step(h.array, x.array)
        return Rows(h), Rows(y)

    def run(scan):
        return lambda h, x: scan(step, Rows(h), Rows(x))

    scan = functools.partial(jaxrnn.scan, **flags)
    h, x = jnp.asarray(H), jnp.asarray(X)
    for apply in (lambda f: f, jax.jit, lambda f: jax.vmap(f, (0, 1))):
        assert_same(apply(run(scan))(h, x), apply(run(lax.scan))(h, x))


def bare_step(x, states):
    h, y = tanh_step(states[0], x)
    return y, [h]


@pytest.mark.parametrize("flags", [{}, SPLIT | {"remat": True}, {"method": "lax"}])
@pytest.mark.parametrize("mask", [None, np.arange(5) < [[3], [5]]])
def test_classes_that_take_arrays_alone_in_rnn(flags, mask):
    def step(x, states):
        h, y = tanh_step(states[0].array, x.array)
        return Rows(y), [Rows(h)]

    x = jnp.asarray(X).swapaxes(0, 1)
    operands = step, Rows(x), [Rows(jnp.asarray(H))]
    for return_all_outputs in (True, False):
        given = {"mask": mask, "return_all_outputs": return_all_outputs}
        actual = jaxrnn.rnn(*operands, **given, **flags)
        expected = jaxrnn.rnn(bare_step, x, [H], **given)
        assert_same(jax.tree.leaves(actual), jax.tree.leaves(expected))
        assert isinstance(actual[0], Rows)
        assert isinstance(actual[2][0], Rows)
    assert "5 steps" in jaxrnn.explain(*operands, **given, **flags)
