"""Steps that are no gated cells: linear recurrences, filters, control flow, random numbers.

Letters: B samples, T timesteps, D input features, H units.
"""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.steps.forms import Draw, Loop, Size, loop


def min_gru(draw: Draw, size: Size) -> Loop:
    """Gate and candidate depend on the input alone; affine in the state."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            z = jax.nn.sigmoid(x @ p["Wz"])
            h = (1 - z) * h + z * (x @ p["Wh"])
            return h, h

        return step

    params = {"Wz": draw.weight(D, H), "Wh": draw.weight(D, H)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def diagonal(draw: Draw, size: Size) -> Loop:
    """A diagonal linear recurrence with a dense input and a dense readout."""
    B, T, D, H = size

    def body(p):
        decay = jnp.exp(-jnp.exp(p["log_rate"]))

        def step(h, x):
            h = decay * h + x @ p["W"]
            return h, h @ p["V"]

        return step

    params = {"log_rate": draw.normal(H) - 2, "W": draw.weight(D, H), "V": draw.weight(H, D)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def complex_diagonal(draw: Draw, size: Size) -> Loop:
    """The linear recurrent unit: complex eigenvalues inside the unit circle."""
    B, T, D, H = size

    def body(p):
        eigenvalue = jnp.exp(-jnp.exp(p["log_rate"]) + 1j * p["angle"])

        def step(h, x):
            h = eigenvalue * h + x @ p["W"]
            return h, jnp.tanh(h.real @ p["V"])

        return step

    params = {
        "log_rate": draw.normal(H) - 2,
        "angle": draw.normal(H),
        "W": draw.weight(D, H),
        "V": draw.weight(H, D),
    }
    init = lax.complex(draw.normal(B, H), draw.normal(B, H))
    return loop(body, params, init, draw.normal(T, B, D))


def moving_average(draw: Draw, size: Size) -> Loop:
    """Elementwise alone: nothing to move out of the loop."""
    B, T, _, H = size

    def body(p):
        def step(mean, x):
            mean = p * mean + (1 - p) * x
            return mean, x - mean

        return step

    return loop(body, jax.nn.sigmoid(draw.normal(H)), draw.normal(B, H), draw.normal(T, B, H))


def count(draw: Draw, size: Size) -> Loop:
    """Integer state: how often each feature was positive, which scales a projection."""
    B, T, D, H = size

    def body(p):
        def step(count, x):
            count = count + (x > 0).astype(jnp.int32)
            return count, (x / (1 + count)) @ p

        return step

    return loop(body, draw.weight(D, H), draw.integers(3, B, D), draw.normal(T, B, D))


def kalman(draw: Draw, size: Size) -> Loop:
    """A Kalman filter with H states and D measurements: small matrices, one solve per step."""
    B, T, D, H = size

    def body(p):
        transition, emission, process, noise = p

        def step(carry, y):
            mean, covariance = carry
            mean = mean @ transition.T
            covariance = transition @ covariance @ transition.T + process @ process.T
            innovation = y - mean @ emission.T
            spread = emission @ covariance @ emission.T + noise @ noise.T + jnp.eye(D)
            gain = jnp.linalg.solve(spread, emission @ covariance).mT
            mean = mean + (gain @ innovation[..., None])[..., 0]
            covariance = covariance - gain @ emission @ covariance
            return (mean, covariance), innovation

        return step

    params = (
        0.9 * draw.weight(H, H),
        draw.weight(D, H),
        draw.normal(H, H, scale=0.1),
        draw.normal(D, D, scale=0.1),
    )
    init = (draw.normal(B, H), jnp.broadcast_to(jnp.eye(H), (B, H, H)))
    return loop(body, params, init, draw.normal(T, B, D))


def experts(draw: Draw, size: Size) -> Loop:
    """A mixture of four experts, of which each sample takes two at every step."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            score, chosen = lax.top_k(jax.nn.softmax(h @ p["gate"]), 2)
            z = jnp.einsum("bh,bkhj->bkj", h, p["U"][chosen]) + (x @ p["W"])[:, None]
            h = jnp.einsum("bk,bkj->bj", score, jnp.tanh(z))
            return h, h

        return step

    params = {
        "gate": draw.weight(H, 4),
        "W": draw.weight(D, H),
        "U": draw.normal(4, H, H, scale=H**-0.5),
    }
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def sparsemax(draw: Draw, size: Size) -> Loop:
    """A memory of 32 rows read with sparse weights, which takes a sort (arXiv:1602.02068)."""
    B, T, D, H = size
    rows = 32

    def weights(scores):
        ordered = -jnp.sort(-scores)
        sums = jnp.cumsum(ordered, axis=-1)
        count = jnp.sum(1 + jnp.arange(1, rows + 1) * ordered > sums, axis=-1, keepdims=True)
        threshold = (jnp.take_along_axis(sums, count - 1, axis=-1) - 1) / count
        return jax.nn.relu(scores - threshold)

    def body(p):
        def step(h, x):
            read = weights(h @ p["keys"]) @ p["values"]
            h = jnp.tanh(x @ p["W"] + h @ p["U"] + read)
            return h, h

        return step

    params = {
        "W": draw.weight(D, H),
        "U": draw.weight(H, H),
        "keys": draw.weight(H, rows),
        "values": draw.weight(rows, H),
    }
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def ctc(draw: Draw, size: Size) -> Loop:
    """The forward variable of CTC, for as many labels as units: a sum over paths, as logarithms."""
    B, T, D, H = size
    symbols = 30
    labels = jnp.zeros((B, 2 * H + 1), jnp.int32)
    labels = labels.at[:, 1::2].set(1 + draw.integers(symbols - 1, B, H))

    def moved(paths, by, missing):
        return jnp.pad(paths[:, :-by], ((0, 0), (by, 0)), constant_values=missing)

    may_skip = (labels != 0) & (labels != moved(labels, 2, 0))

    def body(w):
        def step(paths, x):
            log_p = jnp.take_along_axis(jax.nn.log_softmax(x @ w), labels, axis=1)
            skipping = jnp.where(may_skip, moved(paths, 2, -1e30), -1e30)
            paths = jnp.logaddexp(jnp.logaddexp(paths, moved(paths, 1, -1e30)), skipping) + log_p
            return paths, jnp.logaddexp(paths[:, -1], paths[:, -2])

        return step

    start = jnp.full((B, 2 * H + 1), -1e30).at[:, 0].set(0)
    return loop(body, draw.weight(D, symbols), start, draw.normal(T, B, D))


def viterbi(draw: Draw, size: Size) -> Loop:
    """The best path through H states: its score so far, and where it came from."""
    B, T, D, H = size

    def body(p):
        def step(scores, x):
            through = scores[:, :, None] + p["transitions"]
            return jnp.max(through, axis=1) + x @ p["W"], jnp.argmax(through, axis=1)

        return step

    params = {"transitions": draw.normal(H, H), "W": draw.weight(D, H)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def hidden_markov(draw: Draw, size: Size) -> Loop:
    """The forward algorithm over as many states as units, in logarithms: a sum over all pairs."""
    B, T, D, H = size

    def body(p):
        log_a = jax.nn.log_softmax(p["A"])

        def step(alpha, x):
            log_p = jax.nn.log_softmax(x @ p["W"])
            alpha = jax.nn.logsumexp(alpha[:, :, None] + log_a, axis=1) + log_p
            return alpha, jax.nn.logsumexp(alpha, axis=-1)

        return step

    params = {"A": draw.normal(H, H), "W": draw.weight(D, H)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))
