"""One sample: sums of products lose its axis of one, which older versions of XLA are slow at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from structure import equations, primitive_of

import jaxrnn
from jaxrnn import _singleton_axes

ROWS, COLUMNS, TIME = 3, 4, 8
SUM = primitive_of(jnp.sum, np.ones(3, np.float32))
SPLIT = {"method": "sequential", "chunk": 4}


def memory(params, h, x):
    """A memory whose rows a matrix decays and a vector reads, and of which a mean is taken."""
    k, v, q = jnp.split(x @ params["w"], [ROWS, ROWS + COLUMNS], -1)
    h = jax.nn.sigmoid(params["decay"]) * h + k[:, :, None] * v[:, None, :]
    h = jnp.clip(h - 0.1 * jnp.mean(h * q[:, None, :], (0, 1), keepdims=True), -9.0, 9.0)
    return h, jnp.sum(h * q[:, None, :] * params["scale"], -1) @ params["o"]


def operands(samples):
    rng = np.random.default_rng(0)
    params = {
        "w": (5, ROWS + 2 * COLUMNS),
        "decay": (ROWS, COLUMNS),
        "scale": (ROWS, 1),
        "o": (ROWS, 5),
    }
    shapes = params, (samples, ROWS, COLUMNS), (TIME, samples, 5)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple) and isinstance(leaf[0], int),
    )


def run(scan, **flags):
    return lambda params, h, xs: scan(lambda h, x: memory(params, h, x), h, xs, **flags)


def with_cotangents(run):
    """What the engine makes of cotangents, and no sum of another's."""

    def pulled_back(*arguments):
        results, pull = jax.vjp(run, *arguments)
        return pull(results)

    return pulled_back


FUNCTIONS = {"results": lambda run: run, "cotangents": with_cotangents}


@functools.cache
def expected_of(name, samples):
    return jax.jit(FUNCTIONS[name](run(lax.scan)))(*operands(samples))


def shapes_of_sums(program):
    """What is summed up; taking an axis of one away adds nothing."""
    sums = [
        (e.invars[0].aval.shape, e.params["axes"])
        for e, _ in equations(program)
        if e.primitive is SUM
    ]
    return [shape for shape, axes in sums if any(shape[axis] > 1 for axis in axes)]


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("samples", [1, 2])
def test_no_sum_runs_over_an_axis_of_one(monkeypatch, slow, samples):
    monkeypatch.setattr(_singleton_axes, "UNITS_SLOW_DOWN_SUMS", slow)
    monkeypatch.setattr(_singleton_axes, "_FEW", ROWS * COLUMNS)
    given = operands(samples)
    for name, function in FUNCTIONS.items():
        ours = function(run(jaxrnn.scan, **SPLIT))
        sums = shapes_of_sums(jax.make_jaxpr(ours)(*given))
        assert len(sums) >= 2
        assert any(1 in shape for shape in sums) == (samples == 1 and not slow)
        assert_same(jax.jit(ours)(*given), expected_of(name, samples), scale=10)


def test_small_sums_keep_their_axes(monkeypatch):
    """They are as fast, and programs of vectors stay as they are."""
    given = operands(1)
    programs = []
    for slow in (True, False):
        monkeypatch.setattr(_singleton_axes, "UNITS_SLOW_DOWN_SUMS", slow)
        programs.append(str(jax.make_jaxpr(with_cotangents(run(jaxrnn.scan, **SPLIT)))(*given)))
    assert programs[0] == programs[1]
