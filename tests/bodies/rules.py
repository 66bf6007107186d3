"""Rules of the user's own, control flow, and randomness inside."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bodies.table import BATCH, FEATURES, UNITS, body, elman, layer, state, two_states


@jax.custom_jvp
def own_tanh(x):
    return jnp.tanh(x)


@own_tanh.defjvp
def _own_tanh_jvp(primals, tangents):
    y = own_tanh(primals[0])
    return y, tangents[0] * (1 - y * y)


@jax.custom_jvp
def spike(x):
    """A threshold with the slope of something smooth, as in spiking networks."""
    return (x > 0).astype(x.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    return spike(primals[0]), tangents[0] / (1 + jnp.abs(primals[0])) ** 2


@jax.custom_vjp
def straight_through(x, w):
    """A product that is rounded, with a gradient that is not that of rounding."""
    return jnp.round(4 * (x @ w)) / 4


def _straight_through_forward(x, w):
    return straight_through(x, w), (x, w)


def _straight_through_backward(kept, g):
    x, w = kept
    return 0.5 * g @ w.T, 3.0 * x.T @ g


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


@jax.custom_vjp
def clipped_gradient(x):
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@body(consts=layer(), init=state())
def custom_jvp_inside(p):
    def f(h, x):
        h = own_tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, own_tanh(jax.nn.relu(h @ p["u"]))

    return f


@jax.custom_jvp
def other_once_differentiated(x):
    return jnp.sin(x)


@other_once_differentiated.defjvp
def _other_once_differentiated_jvp(primals, tangents):
    return 1.5 * jnp.sin(primals[0]), jnp.cos(2 * primals[0]) * tangents[0]


@body(consts=layer(), init=state())
def custom_jvp_with_results_of_its_own(p):
    def f(h, x):
        z = other_once_differentiated(x @ p["w"]) + other_once_differentiated(h @ p["u"])
        h = other_once_differentiated(z + p["b"])
        return h, other_once_differentiated(h @ p["u"])

    return f


@body(consts=layer(), init=two_states)
def spiking(p):
    """A leaky integrate-and-fire layer."""

    def f(carry, x):
        v, s = carry
        v = 0.9 * v * (1 - s) + x @ p["w"] + s @ p["u"] + p["b"]
        s = spike(v)
        return (v, s), s @ p["u"]

    return f


@body(consts=layer(), init=state(), forward=False)
def custom_vjp_inside(p):
    def f(h, x):
        h = jnp.tanh(straight_through(x, p["w"]) + clipped_gradient(h @ p["u"]) + p["b"])
        return h, straight_through(h, p["u"])

    return f


@body(consts=layer(), init=state(), forward=False)
def custom_vjp_of_products(p):
    """Of those that leave the loop, forwards and in the gradient, and of one that stays."""

    def f(h, x):
        h = jnp.tanh(clipped_gradient(x @ p["w"]) + clipped_gradient(h @ p["u"]) + p["b"])
        return h, clipped_gradient(h @ p["u"])

    return f


@body(consts=layer(), init=state(), forward=False)
def clipped_gradient_of_weights(p):
    """What is clipped at each step is something else than what is clipped of a sum."""

    def f(h, x):
        h = jnp.tanh(x @ jax.jit(clipped_gradient)(p["w"]) + h @ clipped_gradient(p["u"]))
        return h, h @ p["u"]

    return f


@body(consts=layer(), init=state(), forward=False)
def clipped_gradient_of_what_is_read_twice(p):
    """In a pass and in a loop, whose product is out of sight: their sum is clipped."""

    def f(h, x):
        x = clipped_gradient(x)
        inner, _ = lax.scan(lambda v, _: (jnp.tanh(v @ p["u"]), None), h, None, 2)
        h = jnp.tanh(x @ p["w"] + inner + x[:, :1])
        return h, h + x[:, 1:2]

    return f


@jax.custom_vjp
def clipped_product(x, w):
    return jnp.tanh(x @ w)


clipped_product.defvjp(
    lambda x, w: (clipped_product(x, w), (x, w)),
    lambda kept, g: (jnp.clip(g, -0.1, 0.1) @ kept[1].T, jnp.clip(kept[0].T @ g, -0.1, 0.1)),
)


@body(consts=layer(), init=state(), forward=False)
def clipped_gradient_of_the_last_step(p):
    """Of a state that no step reads the last value counts, and of an output all of them."""

    def f(_, x):
        z = clipped_product(x @ p["w"], p["u"])
        return jnp.tanh(z), z @ p["u"]

    return f


@body(consts=layer(), init=two_states, forward=False)
def clipped_gradient_handed_on(p):
    """States that no step reads, of which one is the very result of the rule."""

    def f(_, x):
        z = clipped_product(x @ p["w"], p["u"])
        return (z, jnp.tanh(z)), jnp.sin(z) @ p["u"]

    return f


STEPS_OF_ROUNDING = np.linspace(8, 16, UNITS, dtype=np.float32)


@jax.custom_vjp
def rounded(z):
    return jnp.round(z * STEPS_OF_ROUNDING) / STEPS_OF_ROUNDING


rounded.defvjp(lambda z: (rounded(z), None), lambda _, g: (g * STEPS_OF_ROUNDING / 8,))


@body(consts=layer(), init=state(), forward=False)
def rule_that_closes_over_an_array(p):
    def f(h, x):
        h = jnp.tanh(rounded(x @ p["w"]) + rounded(h @ p["u"]))
        return h, rounded(h)

    return f


@jax.custom_vjp
def quantised(w):
    """Weights of few bits, whose gradient is that of the weights themselves within a range."""
    return jnp.round(8 * jnp.clip(w, -1, 1)) / 8


quantised.defvjp(
    lambda w: (quantised(w), jnp.abs(w) <= 1), lambda inside, g: (jnp.where(inside, g, 0),)
)


@body(consts=layer(), init=state(), forward=False)
def quantised_weights(p):
    def f(h, x):
        h = jnp.tanh(x @ jax.jit(quantised)(3 * p["w"]) + h @ quantised(3 * p["u"]))
        return h, h @ p["u"]

    return f


@body(consts=layer(), init=state())
def inner_scan(p):
    """Pondering: the recurrent product three times at each step, and a scan over the input."""

    def f(h, x):
        def ponder(v, _):
            return jnp.tanh(v @ p["u"] + x @ p["w"]), v @ p["u"]

        h, seen = lax.scan(ponder, h, None, 3)
        total, _ = lax.scan(lambda a, b: (a + jnp.sin(b), None), jnp.zeros(BATCH), x.T)
        return h, (seen, total)

    return f


@body(consts=layer(), init=state())
def inner_cond(p):
    def f(h, x):
        h = lax.cond(
            x.sum() > 0,
            lambda: elman(p, x, h),
            lambda: 0.5 * h + x @ p["w"],
        )
        chosen = lax.switch((x[0, 0] > 0).astype(int) + (x[1, 0] > 0), [
            lambda v: v @ p["u"], jnp.sin, lambda v: v + p["b"],
        ], h)  # fmt: skip
        return h, (chosen, lax.cond(x[0, 1] > 0, lambda: x @ p["w"], lambda: jnp.ones_like(h)))

    return f


@body(consts=layer(), init=state(), reverse_mode=False)
def inner_while(p):
    """Another number of rounds at each step."""

    def f(h, x):
        def more(loop):
            return (loop[0] < 3) & (jnp.abs(loop[1]).sum() > 2.5)

        _, h = lax.while_loop(more, lambda loop: (loop[0] + 1, elman(p, x, loop[1])), (0, h))
        rounds, _ = lax.while_loop(
            lambda loop: loop[1] > 0.1, lambda loop: (loop[0] + 1, loop[1] / 2), (0, x[0, 0])
        )
        return elman(p, x, h), rounds

    return f


@body(consts=layer(), init=state())
def inner_checkpoint(p):
    @jax.checkpoint
    def cell(h, x):
        return elman(p, x, h)

    def f(h, x):
        h = cell(h, x)
        return h, jax.checkpoint(lambda h: jnp.sin(h @ p["u"]))(h)

    return f


@body(consts=layer(), init=state())
def inner_fori_and_updates(p):
    """A state written to at an index that changes, and a gather from it."""

    def f(h, x):
        h = h.at[:, 0].set(jnp.tanh(x @ p["w"])[:, 1])
        h = lax.fori_loop(0, 2, lambda i, v: v.at[:, i].add(x[:, i]), h)
        h = elman(p, x, lax.dynamic_update_slice_in_dim(h, x, 1, axis=1))
        return h, jnp.take_along_axis(h, jnp.argsort(x, axis=-1), axis=-1)

    return f


@body(consts=layer(), init=state())
def vmapped_inside(p):
    def f(h, x):
        h = jax.vmap(lambda h, x: jnp.tanh(p["w"].T @ x + p["u"].T @ h))(h, x)
        return h, jax.vmap(jnp.outer)(h, x)

    return f


@body(consts=lambda d: layer()(d) | {"v": d(2, UNITS, UNITS)}, init=state())
def branches_per_sample(p):
    """Under `vmap` all branches run, on weights copied for each sample, and one is selected."""

    def deep(h, x):
        hidden = jnp.tanh(jnp.concatenate([x, h]) @ jnp.concatenate([p["w"], p["u"]]))
        return jnp.sin(p["u"].T @ hidden - p["b"])

    def stacked(h, x):
        choice = (x[1] > 0).astype(int)
        return lax.switch(choice, [lambda h: h @ p["v"][0], lambda h: p["v"][1] @ h], h)

    def one(h, x):
        h = lax.cond(x[0] > 0, deep, stacked, h, x)
        return h, lax.cond(h[0] > x[0], lambda: h @ p["u"].T, lambda: h)

    return jax.vmap(one)


@body(consts=layer(), init=state())
def root_of_an_equation(p):
    """A root that is differentiated by its equation, and not by the search for it."""

    def newton(f, y):
        return lax.fori_loop(0, 8, lambda _, y: y - f(y) / (1 + 3 * y**2), y)

    def solve(linear, y):
        return y / linear(jnp.ones_like(y))

    def f(h, x):
        z = x @ p["w"] + h @ p["u"] + p["b"]
        h = lax.custom_root(lambda y: y + y**3 - z, z, newton, solve)
        return h, h @ p["u"]

    return f


@body(consts=layer(), init=state())
def stopped_gradient(p):
    def f(h, x):
        h = elman(p, x, lax.stop_gradient(h))
        return h, lax.stop_gradient(h) @ p["u"]

    return f


@body(consts=layer(), init=lambda d: (jax.random.key(d.seed), d(BATCH, UNITS)))
def noise_by_key(p):
    """A typed random key in the state; dropout on the state and noise on the output."""

    def f(carry, x):
        key, h = carry
        key, one, other = jax.random.split(key, 3)
        h = elman(p, x, h * jax.random.bernoulli(one, 0.8, h.shape))
        return (key, h), h @ p["u"] + jax.random.normal(other, h.shape)

    return f


@body(consts=lambda d: d(UNITS), init=lambda d: (jax.random.PRNGKey(d.seed), d(BATCH, UNITS)))
def random_walk(scale):
    """A raw random key in the state, and no product."""

    def f(carry, x):
        key, h = carry
        key, now = jax.random.split(key)
        h = jnp.tanh(h + scale * jax.random.normal(now, h.shape) + x.sum())
        return (key, h), h

    return f


@body(consts=layer(), init=lambda d: (jax.random.key(d.seed, impl="rbg"), d(BATCH, UNITS)))
def noise_by_rbg_key(p):
    return noise_by_key(p)


@body(consts=layer(), init=state(),
      xs=lambda d: (jax.random.split(jax.random.key(d.seed, impl="rbg"), d.time),
                    d.rows(BATCH, FEATURES)))  # fmt: skip
def noise_by_rbg_keys_of_xs(p):
    """Random bits that must not be drawn for many steps at once: rbg's depend on batching."""

    def f(h, x):
        key, x = x
        h = elman(p, x * jax.random.bernoulli(key, 0.7, x.shape), h)
        return h, jax.random.uniform(key, (BATCH, UNITS)) @ p["u"]

    return f


@body(
    consts=lambda d: layer()(d) | {"key": jax.random.key(d.seed)},
    init=lambda d: (d(BATCH, UNITS), 0),
)
def noise_by_step_number(p):
    """A key closed over, folded with a counter that is a Python number at first."""

    def f(carry, x):
        h, n = carry
        noise = jax.random.normal(jax.random.fold_in(p["key"], n), x.shape)
        h = elman(p, x + noise, h)
        return (h, n + 1), h

    return f
