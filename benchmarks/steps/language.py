"""Steps over tokens: embeddings inside the loop, logits and losses over a vocabulary.

Letters: B samples, T timesteps, D features of an embedding, H units.
"""

import jax
import jax.numpy as jnp

from benchmarks.steps.forms import Draw, Loop, Size, loop
from benchmarks.steps.gated import gru_cell, lstm_cell


def logits(draw: Draw, size: Size) -> Loop:
    """A GRU language model: tokens in, logits over 1000 of them out at every step."""
    B, T, D, H = size
    vocabulary = 1000

    def body(p):
        def step(h, token):
            h = gru_cell(p, p["embedding"][token], h)
            return h, h @ p["V"]

        return step

    params = draw.gates(3, D, H)
    params |= {"embedding": draw.normal(vocabulary, D), "V": draw.weight(H, vocabulary)}
    return loop(body, params, draw.normal(B, H), draw.integers(vocabulary, T, B))


def embedding(draw: Draw, size: Size) -> Loop:
    """Tokens in, looked up inside the step; the last state is what counts."""
    B, T, D, H = size
    vocabulary = 1000

    def body(p):
        def step(carry, token):
            h, c = lstm_cell(p, p["embedding"][token], *carry)
            return (h, c), None

        return step

    params = draw.gates(4, D, H) | {"embedding": draw.normal(vocabulary, D)}
    init = (draw.normal(B, H), draw.normal(B, H))
    return loop(body, params, init, draw.integers(vocabulary, T, B))


def token_loss(draw: Draw, size: Size) -> Loop:
    """A GRU language model that sums its loss over 2000 tokens in the carry."""
    B, T, D, H = size
    vocabulary = 2000

    def body(p):
        def step(carry, tokens):
            h, total = carry
            token, target = tokens
            h = gru_cell(p, p["embedding"][token], h)
            logs = jax.nn.log_softmax(h @ p["V"] + p["c"])
            return (h, total - logs[jnp.arange(B), target]), None

        return step

    params = draw.gates(3, D, H) | {
        "embedding": draw.normal(vocabulary, D),
        "V": draw.weight(H, vocabulary),
        "c": draw.normal(vocabulary, scale=0.1),
    }
    tokens = draw.integers(vocabulary, T + 1, B)
    return loop(body, params, (draw.normal(B, H), jnp.zeros(B)), (tokens[:-1], tokens[1:]))


def attention_decoder(draw: Draw, size: Size) -> Loop:
    """A GRU that attends to 24 encoder states by a small network at each step (Bahdanau)."""
    B, T, D, H = size
    places, vocabulary = 24, 200

    def body(p):
        keys = p["encoded"] @ p["K"]

        def step(h, token):
            scores = jnp.tanh(keys + (h @ p["Q"])[:, None]) @ p["v"]
            context = jnp.einsum("bs,bsh->bh", jax.nn.softmax(scores), p["encoded"])
            x = jnp.concatenate([p["embedding"][token], context], axis=-1)
            h = gru_cell(p, x, h)
            return h, jax.nn.log_softmax(h @ p["V"])

        return step

    params = draw.gates(3, D + H, H) | {name: draw.weight(H, H) for name in "KQ"}
    params |= {
        "encoded": draw.normal(B, places, H),
        "v": draw.normal(H),
        "embedding": draw.normal(vocabulary, D),
        "V": draw.weight(H, vocabulary),
    }
    return loop(body, params, draw.normal(B, H), draw.integers(vocabulary, T, B))
