"""Outputs are written where the caller wants them, and their derivatives read there."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, scalar_of
from jax.interpreters.partial_eval import dce_jaxpr
from structure import equations, primitive_of

import jaxrnn

SAMPLES, TIME, FEATURES, UNITS, CLASSES = 2, 7, 3, 4, 5
TRANSPOSE = primitive_of(jnp.transpose, np.ones((2, 3)))
MASK = np.array([[1, 0, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0]], bool)

# Seven steps in blocks of three, and all else that decides who writes a row, and when.
WAYS = {
    "one_block": {"chunk": None},
    "blocks": {"chunk": 3},
    "blocks_backwards": {"chunk": 3, "go_backwards": True},
    "blocks_unrolled": {"chunk": 3, "unroll": 2},
    "unrolled_backwards": {"chunk": None, "unroll": True, "go_backwards": True},
    "masked": {"chunk": 3, "mask": MASK},
    "masked_to_zero": {"chunk": None, "mask": MASK, "zero_output_for_mask": True},
    "last_alone": {"chunk": 3, "return_all_outputs": False, "mask": MASK},
    "remat": {"chunk": 3, "remat": True},
    "parallel": {"chunk": 3, "method": "parallel"},
    "parallel_whole": {"chunk": None, "method": "parallel"},
    "lax": {"method": "lax"},
    "time_first": {"chunk": 3, "time_major": True, "mask": MASK},
    "time_first_backwards": {"chunk": 3, "time_major": True, "go_backwards": True},
}
# Of these flags, those on which results depend.
CONTRACT = {
    "go_backwards": True,
    "mask": MASK,
    "zero_output_for_mask": True,
    "return_all_outputs": False,
}


def gated(p):
    """Its output is its state."""

    def step(x, states):
        (h,) = states
        z, g = jnp.split(x @ p["w"] + h @ p["u"], 2, axis=-1)
        h = jax.nn.sigmoid(z) * h + jnp.tanh(g)
        return h, [h]

    return step


def reading(p):
    """Its outputs are made behind the loop, of a state that is an output as well, or of nothing."""

    def step(x, states):
        h, count = states
        h = jnp.tanh(x @ p["w"][:, :UNITS] + h @ p["u"][:, :UNITS])
        outputs = {
            "state": h,
            "again": h,
            "scores": jax.nn.log_softmax(h @ p["readout"]),
            "count": count + 1,
            "narrow": h.astype(jnp.bfloat16),
            "nothing": jnp.ones((len(h), 2)),
        }
        return outputs, [h, count + 1]

    return step


def affine(p):
    """Has no loop over time under "parallel"."""

    def step(x, states):
        (h,) = states
        keep = jax.nn.sigmoid(x @ p["w"][:, :UNITS])
        h = keep * h + x @ p["w"][:, UNITS:]
        return h, [h]

    return step


def operands(make):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)

    p = {
        "w": draw(FEATURES, 2 * UNITS),
        "u": draw(UNITS, 2 * UNITS),
        "readout": draw(UNITS, CLASSES),
    }
    states = [draw(SAMPLES, UNITS)]
    if make is reading:
        states.append(jnp.zeros((SAMPLES, 1), jnp.int32))
    return p, draw(SAMPLES, TIME, FEATURES), states


def run(make, p, inputs, states, **how):
    """From samples first to samples first: where the call has time first, turned by hand."""

    def turned(rows):
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), rows)

    how = {"method": "sequential"} | how
    if not how.get("time_major"):
        return jaxrnn.rnn(make(p), inputs, states, **how)
    if "mask" in how:
        how["mask"] = turned(how["mask"])
    last, outputs, states = jaxrnn.rnn(make(p), turned(inputs), states, **how)
    return last, turned(outputs), states


def transposed(function, *args):
    """The shapes of all arrays that a program transposes, and reads."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [e.outvars[0].aval.shape for e, _ in equations(jaxpr) if e.primitive is TRANSPOSE]


def loss(make, p, inputs, states, **how):
    return scalar_of(run(make, p, inputs, states, **how))


def results_and_derivatives(make, **how):
    def everything(p, inputs, states):
        of = functools.partial(loss, make, states=states, **how)
        results = run(make, p, inputs, states, **how)
        slopes = jax.tree.map(jnp.cos, (p, inputs))
        return results, jax.grad(of, (0, 1))(p, inputs), jax.jvp(of, (p, inputs), slopes)

    return jax.jit(everything)(*operands(make))


def first_and_second_derivatives(make, **how):
    p, inputs, states = operands(make)
    of = functools.partial(loss, make, p, states=states, **how)
    return jax.jit(lambda inputs: (jax.grad(of)(inputs), jax.hessian(of)(inputs)))(inputs)


def contract(way):
    """The names of the flags on which the results of a way depend."""
    return tuple(name for name in CONTRACT if name in WAYS[way])


@functools.cache
def by_lax_scan(derivatives, make, names):
    """What `derivatives` is to give for all ways that have these flags: time first, no engine."""
    flags = {name: CONTRACT[name] for name in names}
    return derivatives(make, method="lax", time_major=True, **flags)


CASES = [(make, way) for make in (gated, reading) for way in WAYS if "parallel" not in way]
CASES += [(affine, way) for way in ("blocks", "parallel", "parallel_whole")]


@pytest.mark.parametrize(("make", "way"), CASES)
def test_results_and_derivatives_are_those_of_lax_scan_with_time_first(make, way):
    actual = results_and_derivatives(make, **WAYS[way])
    assert_same(actual, by_lax_scan(results_and_derivatives, make, contract(way)))


@pytest.mark.parametrize("make", [gated, reading])
@pytest.mark.parametrize("way", ["one_block", "blocks", "masked"])
def test_first_and_second_derivatives_are_those_of_lax_scan(make, way):
    actual = first_and_second_derivatives(make, **WAYS[way])
    expected = by_lax_scan(first_and_second_derivatives, make, contract(way))
    assert_same(actual, expected, scale=10)


@pytest.mark.parametrize("way", ["one_block", "blocks", "blocks_unrolled", "masked"])
def test_outputs_are_not_transposed(way):
    p, inputs, states = operands(gated)
    shapes = transposed(lambda *a: run(gated, *a, states, **WAYS[way])[1], p, inputs)
    assert not shapes or max(map(math.prod, shapes)) < SAMPLES * TIME * UNITS


@pytest.mark.parametrize("way", ["blocks", "blocks_backwards", "blocks_unrolled", "masked"])
def test_a_gradient_transposes_a_block_at_a_time(way):
    """Neither the outputs nor what comes back for them."""
    p, inputs, states = operands(gated)

    def gradient(*a):
        return jax.grad(lambda *a: loss(gated, *a, states, **WAYS[way]), (0, 1))(*a)

    shapes = transposed(gradient, p, inputs)
    assert max(map(math.prod, shapes)) < SAMPLES * TIME * UNITS


@pytest.mark.several_devices
def test_on_several_devices_rows_lie_time_first():
    """A loop that writes across an axis which may be split would have to gather it."""
    p, inputs, states = operands(gated)
    shapes = transposed(lambda p, inputs: run(gated, p, inputs, states)[1], p, inputs)
    assert (SAMPLES, TIME, UNITS) in shapes


def test_what_stays_with_lax_scan_has_the_same_axes():
    """A step with nothing to move, none with a product, and no step at all."""

    def add(x, states):
        return states[0] + x, [states[0] + x]

    inputs = jnp.arange(24.0).reshape(2, 3, 4)
    last, outputs, (state,) = jaxrnn.rnn(add, inputs, [jnp.zeros((2, 4))])
    np.testing.assert_array_equal(outputs, jnp.cumsum(inputs, 1))
    np.testing.assert_array_equal(last, outputs[:, -1])
    np.testing.assert_array_equal(state, last)
