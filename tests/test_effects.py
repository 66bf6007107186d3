"""Effects inside the step happen once per step, in processing order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn

TIME = 6
X = np.arange(2.0 * TIME, dtype=np.float32).reshape(2, TIME, 1)
H = np.zeros((2, 1), np.float32)

PATHS = [
    {},
    {"go_backwards": True},
    {"unroll": True},
    {"remat": True},
    {"mask": np.array([[1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]])},
    {"chunk": 2},
]


def order(flags):
    return range(TIME)[:: -1 if flags.get("go_backwards") else 1]


@pytest.mark.parametrize("flags", PATHS, ids=[next(iter(flags), "plain") for flags in PATHS])
@pytest.mark.parametrize("jit", [False, True])
def test_debug_print_fires_once_per_step_in_order(flags, jit, capfd):
    def step(x, states):
        jax.debug.print("step {n}", n=states[1])
        return x, [states[0] + x, states[1] + 1]

    def run(x):
        return jaxrnn.rnn(step, x, [jnp.asarray(H), jnp.zeros((2,), jnp.int32)], **flags)

    jax.block_until_ready((jax.jit(run) if jit else run)(X))
    jax.effects_barrier()
    lines = capfd.readouterr().out.splitlines()
    if flags.get("unroll"):
        # Unordered effects have no order outside a loop; the next test asks for one.
        lines.sort()
    if "mask" in flags:
        # At a masked step a sample's step is fed what it began with, and the result thrown away.
        counts = (np.cumsum(flags["mask"], axis=1) - 1) * flags["mask"]
        assert lines == [f"step {counts[:, t]}" for t in range(TIME)]
    else:
        assert lines == [f"step {np.full(2, n)}" for n in range(TIME)]


@pytest.mark.parametrize(
    "flags",
    [{}, {"go_backwards": True}, {"unroll": True}, {"remat": True}],
    ids=["forwards", "backwards", "unrolled", "remat"],
)
def test_ordered_callbacks_see_the_inputs_in_order(flags):
    seen = []

    def step(x, states):
        jax.debug.callback(lambda x: seen.append(float(x)), x[0, 0], ordered=True)
        return x, [states[0] + x]

    jax.block_until_ready(jaxrnn.rnn(step, X, [H], **flags))
    jax.effects_barrier()
    assert seen == [float(X[0, t, 0]) for t in order(flags)]


@pytest.mark.parametrize("method", ["auto", "lax"])
def test_effects_are_not_repeated_for_the_gradient(method):
    """What `remat` would compute again has been seen already."""
    seen = []

    def step(x, states):
        jax.debug.callback(lambda n: seen.append(int(n)), states[1][0])
        return x, [jnp.tanh(states[0] @ jnp.eye(1) + x), states[1] + 1]

    def loss(x):
        states = [jnp.asarray(H), jnp.zeros((2,), jnp.int32)]
        return jaxrnn.rnn(step, x, states, remat=True, method=method)[2][0].sum()

    jax.block_until_ready(jax.grad(loss)(X))
    jax.effects_barrier()
    assert seen == list(range(TIME))


def test_a_pure_callback_inside_the_step():
    def step(x, states):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        h = states[0] + jax.pure_callback(np.sin, like, x, vmap_method="sequential")
        return h, [h]

    last_output, _, _ = jaxrnn.rnn(step, X, [H])
    np.testing.assert_allclose(last_output, np.sin(X).sum(axis=1), rtol=1e-5)
