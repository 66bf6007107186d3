"""`scan` takes what `jax.lax.scan` takes, and is it in all but how it runs.

The bodies are small: `method="sequential"` has them taken apart nevertheless.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, checking_leaks, scalar_of
from jax import export, lax
from structure import DOT, SCAN, equations

import jaxrnn

SPLIT = {"method": "sequential"}

# The same arguments.


def elman(w, u):
    def body(h, x):
        h = jnp.tanh(x @ w + h @ u)
        return h, h

    return body


W, U = np.linspace(-0.5, 0.5, 8).reshape(2, 4), np.linspace(-0.4, 0.3, 16).reshape(4, 4)
W, U = W.astype(np.float32), U.astype(np.float32)
H, X = np.ones((3, 4), np.float32), np.linspace(-1, 1, 42, dtype=np.float32).reshape(7, 3, 2)
Pair = collections.namedtuple("Pair", "left right")


def both(*args, **kwargs):
    """The results of `jaxrnn.scan` and of `lax.scan` for the same arguments."""
    return jaxrnn.scan(*args, **kwargs, **SPLIT), lax.scan(*args, **kwargs)


@pytest.mark.parametrize(
    "call",
    [
        lambda body: both(body, H, X),
        lambda body: both(body, H, X, 7, True, 2),
        lambda body: both(f=body, init=H, xs=X, length=7, reverse=True, unroll=True),
        lambda body: both(body, H, X[:1]),
        lambda _: both(lambda _, x: (x @ W, None), H, X),  # no loop is left, and no pass
        lambda body: both(body, H, X[:0]),
        lambda body: both(body, H, X, unroll=3),
        lambda body: both(lambda h, _: body(h, H[:, :2]), H, length=5),
        lambda body: both(lambda h, _: body(h, H[:, :2]), H, None, 0),
        lambda body: both(lambda h, x: body(h, x[None]), H, X[:, 0]),
        lambda body: both(lambda h, x: body(h @ U, x[0]), H, [X, None, {}]),
        lambda body: both(lambda c, x: (Pair(body(c.left, x)[0], None), c), Pair(H, None), X),
        lambda body: both(lambda c, x: ({"h": body(c["h"], x)[0]}, [()]), {"h": H}, X),
        lambda body: both(lambda c, x: ((c[0] + 1, body(c[1], x)[0]), c[0]), (0, H), X),
        lambda body: both(lambda c, x: (c * 0.5 + body(H, x)[0].sum(), c), 1.0, X),
        lambda body: both(lambda c, x: (c + (body(H, x)[0] > 0).any(), c), 2, X),
    ],
)
def test_whatever_lax_scan_accepts(call):
    assert_same(*call(elman(W, U)))


def test_without_jit():
    x = X[:3]
    with jax.disable_jit():
        actual, expected = both(elman(W, U), H, x, reverse=True)
        gradient = jax.grad(lambda u: jaxrnn.scan(elman(W, u), H, x, chunk=2, **SPLIT)[0].sum())(U)
    assert_same(actual, expected)
    assert_same(gradient, jax.grad(lambda u: lax.scan(elman(W, u), H, x)[0].sum())(U), scale=10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_double_precision(dtype):
    """float64 throughout, and float32 inputs that meet a float64 state."""
    with jax.enable_x64(True):
        operands = [
            W.astype(np.float64),
            U.astype(np.float64),
            H.astype(np.float64),
            X.astype(dtype),
        ]

        def run(scan, w, u, h, x, **flags):
            def body(h, x):
                return elman(w, u)(h, x)[0], (x @ w.astype(x.dtype), h @ u)

            results = scan(body, h, x, **flags)
            return scalar_of(jax.tree.map(jnp.sin, results)), results

        def value_and_gradient(scan, **flags):
            of = functools.partial(run, scan, **flags)
            return jax.jit(jax.value_and_grad(of, (0, 1, 2, 3), has_aux=True))(*operands)

        actual = value_and_gradient(jaxrnn.scan, chunk=4, **SPLIT)
        expected = value_and_gradient(lax.scan)
        assert_same(actual, expected, compute_dtype=dtype, scale=10)


@pytest.mark.parametrize("precision", ["highest", "bfloat16"])
def test_the_precision_of_products_is_that_of_the_call(precision):
    """Both the context around the scan and that inside the body reach the products."""

    def precisions(scan, body, **flags):
        with jax.default_matmul_precision(precision):
            jaxpr = jax.make_jaxpr(lambda x: scan(body, H, x, **flags))(X)
        return {
            str(equation.params["precision"])
            for equation, _ in equations(jaxpr)
            if equation.primitive is DOT
        }

    def mixed(h, x):
        with jax.default_matmul_precision("float32"):
            z = x @ W
        h = jnp.tanh(z + h @ U)
        return h, h

    for body in (elman(W, U), mixed):
        assert precisions(jaxrnn.scan, body, **SPLIT) == precisions(lax.scan, body)


# Where the engine stands aside.


def the_scan(scan, body, *operands, **flags):
    """The one loop of a program, as text."""
    jaxpr = jax.make_jaxpr(lambda *a: scan(body, *a, **flags))(*operands)
    (equation,) = [e for e in jaxpr.eqns if e.primitive is SCAN]
    return str(equation)


def printing(h, x):
    jax.debug.print("{}", x[0, 0])
    return elman(W, U)(h, x)


def calling_back(h, x):
    like = jax.ShapeDtypeStruct(h.shape, h.dtype)
    h = jax.experimental.io_callback(lambda h: h, like, h @ U, ordered=True)
    return h, x @ W


def elementwise(h, x):
    h = jnp.tanh(0.5 * h + x.sum())
    return h, h.mean()


def control_flow_alone(h, x):
    h = lax.cond(x.sum() > 0, lambda: h @ U, lambda: h)
    return lax.while_loop(lambda h: h.sum() < 3, lambda h: h + x @ W, h), None


@pytest.mark.parametrize("flags", [{}, {"chunk": 2}, SPLIT], ids=["auto", "chunk", "sequential"])
@pytest.mark.parametrize("body", [printing, calling_back, elementwise, control_flow_alone])
def test_plain_lax_scan_where_nothing_can_be_moved(body, flags):
    assert the_scan(jaxrnn.scan, body, H, X, **flags) == the_scan(lax.scan, body, H, X)


@pytest.mark.parametrize(("rows", "stands_aside"), [(8, False), (9, True)])
def test_plain_lax_scan_where_a_derivative_would_decompose_matrices_again(rows, stands_aside):
    def body(h, x):
        triangle = jnp.linalg.cholesky(jnp.eye(rows) + x[:, :, None] * x[:, None, :])
        h = jnp.tanh(jnp.einsum("bij,bj->bi", triangle, h) @ jnp.ones((rows, rows)) + x)
        return h, h @ jnp.ones((rows, 256))

    operands = jnp.ones((3, rows)), jnp.ones((7, 3, rows))
    scans = [
        e for e, _ in equations(jax.make_jaxpr(functools.partial(jaxrnn.scan, body))(*operands))
    ]
    plain = the_scan(lax.scan, body, *operands)
    assert [str(e) == plain for e in scans if e.primitive is SCAN] == [stands_aside]


def test_method_lax_is_plain_lax_scan():
    body = elman(W, U)
    assert the_scan(jaxrnn.scan, body, H, X, method="lax") == the_scan(lax.scan, body, H, X)


@pytest.mark.parametrize("flags", [{}, {"remat": True}], ids=["plain", "remat"])
def test_effects_happen_once_per_step_in_order(flags, capfd):
    def body(carry, x):
        n, h = carry
        jax.debug.print("step {}", n)
        h, _ = elman(W, U)(h, x)
        return (n + 1, h), h @ U

    results = jaxrnn.scan(body, (0, H), X, **flags, **SPLIT)
    jax.block_until_ready(results)
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines() == [f"step {n}" for n in range(len(X))]


def test_a_symbolic_time_axis():
    t, b = export.symbolic_shape("t, b")
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in [(b, 4), (t, b, 2)]]

    def run(h, x):
        gradient = jax.grad(lambda h: jaxrnn.scan(elman(W, U), h, x, **SPLIT)[0].sum())(h)
        return jaxrnn.scan(elman(W, U), h, x, reverse=True, remat=True), gradient

    exported = export.export(jax.jit(run))(*shapes)
    for time, batch in [(7, 3), (2, 1)]:
        h, x = H[:batch], X[:time, :batch]
        expected = lax.scan(elman(W, U), h, x, reverse=True)
        gradient = jax.grad(lambda h, x=x: lax.scan(elman(W, U), h, x)[0].sum())(h)
        assert_same(exported.call(h, x), (expected, gradient), scale=10)


def test_a_symbolic_batch_is_taken_apart():
    (b,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in [(b, 4), (7, b, 2)]]

    def run(h, x):
        def loss(u):
            return jaxrnn.scan(elman(W, u), h, x, chunk=3, **SPLIT)[0].sum()

        return jax.value_and_grad(loss)(U)

    exported = export.export(jax.jit(run))(*shapes)
    for batch in (1, 3):
        h, x = H[:batch], X[:, :batch]
        loss = lambda u, h=h, x=x: lax.scan(elman(W, u), h, x)[0].sum()  # noqa: E731
        assert_same(exported.call(h, x), jax.value_and_grad(loss)(U), scale=10)


# Tracing.


def test_the_number_of_traces_does_not_grow_with_time():
    counts = []
    for time in (7, 70, 700):
        calls = []

        def body(h, x, calls=calls):
            calls.append(None)
            return elman(W, U)(h, x)

        x = np.ones((time, 3, 2), np.float32)
        jax.make_jaxpr(jax.grad(lambda h, x=x, b=body: jaxrnn.scan(b, h, x, **SPLIT)[0].sum()))(H)
        counts.append(len(calls))
    assert len(set(counts)) == 1
    assert counts[0] <= 3


def test_no_tracer_leaks():
    def loss(u, remat):
        h = jax.jit(lambda u: H @ u)(u)
        return jaxrnn.scan(elman(W, u), h, X[:6], chunk=3, remat=remat, **SPLIT)[1].sum()

    with checking_leaks():
        for remat in (False, True):
            of = functools.partial(loss, remat=remat)
            jax.jit(jax.grad(of))(U)
            jax.vmap(of)(U[None])
        jax.make_jaxpr(jax.hessian(functools.partial(loss, remat=False)))(U)


def test_weights_are_not_baked_into_the_program():
    """What a body closes over may be gigabytes; it stays an argument of the loop."""

    def text(scan, **flags):
        def run(u, x):
            doubled = 2.0 * u
            return scan(elman(W, doubled), H, x, **flags)

        return jax.jit(run).lower(U, X).as_text()

    def constants(text):
        return sum(f"tensor<{shape}xf32>" in line and "dense<" in line
                   for line in text.splitlines() for shape in ("4x4", "2x4"))  # fmt: skip

    assert constants(text(jaxrnn.scan, **SPLIT)) <= constants(text(lax.scan)) + 1


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"chunk": 0}, "chunk is 0; expected"),
        ({"chunk": -3}, "chunk is -3"),
        ({"chunk": 2.0}, r"chunk is 2\.0"),
        ({"chunk": True}, "chunk is True"),
        ({"chunk": "big"}, "chunk is 'big'"),
        ({"chunk": np.zeros(2)}, "chunk is array"),
        ({"method": "bogus"}, "method is 'bogus'; expected one of 'auto'"),
        ({"method": None}, "method is None"),
        ({"remat": 1}, "remat is 1; expected True or False"),
    ],
)
def test_options_that_do_not_exist(flags, message):
    with pytest.raises(ValueError, match=message):
        jaxrnn.scan(elman(W, U), H, X, **flags)


def structures(states, *results):
    """A body of products that returns what it likes."""

    def body(carry, x):
        h = jax.tree.leaves(carry)[0]
        values = {"h": jnp.tanh(h @ U + x @ W), "y": h @ U, "c": h}
        return jax.tree.map(values.get, results[0] if len(results) == 1 else results)

    return lambda scan: scan(body, states, X)


@pytest.mark.parametrize(
    "call",
    [
        lambda scan: scan(elman(W, U), H, {"x": X, "mask": X[:5]}),
        lambda scan: scan(elman(W, U), H, X, 5),
        lambda scan: scan(elman(W, U), H),
        lambda scan: scan(elman(W, U), H, 3.0),
        lambda scan: scan(lambda h, x: ((h @ U).astype(int), x @ W), H, X),
        lambda scan: scan(lambda h, x: ((h @ U)[:2], x @ W), H, X),
        lambda scan: scan(lambda h, x: (h @ U + jnp.ones((1, 1, 1)), x @ W), H, X),
        lambda scan: scan("no function", H, X),
        lambda scan: scan(lambda *_: None, H, X),  # a `return` that was forgotten
        lambda scan: scan(lambda *_: (), H, X),
        lambda scan: scan(lambda *_: (None, None), H, X),
        lambda scan: scan(lambda _, x: ((), x @ W), (H, H), X),
        structures(H, "h"),
        structures(H, "h", "y", "c"),
        structures(H, ("h", "c"), "y"),
        structures((H, H), ["h", "c"], "y"),
        structures((H, H), ("h",), "y"),
        structures({"a": H}, {"b": "h"}, "y"),
        structures((H, None), ("h", "c"), "y"),
    ],
)
def test_mistakes_read_as_they_do_with_lax_scan(call):
    with pytest.raises((TypeError, ValueError)) as expected:
        call(lax.scan)
    with pytest.raises(expected.type) as actual:
        call(functools.partial(jaxrnn.scan, **SPLIT))
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]
