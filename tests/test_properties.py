"""Random programs: shapes, masks with gaps, flags, nestings and dtypes, against the plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_same, reference_rnn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrnn

DTYPES = ("float32", "float16", "bfloat16")


def draw_array(draw, shape, dtype=np.float32):
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return np.asarray(rng.normal(size=shape), dtype)


def draw_inputs(draw, batch, time):
    def leaf():
        axes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
        return draw_array(draw, (batch, time, *axes))

    return draw(
        st.sampled_from([leaf, lambda: (leaf(), leaf()), lambda: {"a": [leaf()], "b": leaf()}])
    )()


def draw_states(draw, batch):
    """A list, tuple, dict or bare array of states of any rank and dtype."""

    def state():
        kind = draw(st.sampled_from(["float", "nested", "count", "flag"]))
        if kind == "count":
            return draw_array(draw, (batch,), np.int32)
        if kind == "flag":
            return draw_array(draw, (batch, 2)) > 0
        axes = draw(st.lists(st.integers(1, 3), max_size=2))
        leaf = draw_array(draw, (batch, *axes), jnp.dtype(draw(st.sampled_from(DTYPES))))
        return {"inner": (leaf,)} if kind == "nested" else leaf

    states = [state() for _ in range(draw(st.integers(1, 3)))]
    container = draw(st.sampled_from(["list", "tuple", "dict", "bare"]))
    if container == "tuple":
        return tuple(states)
    if container == "dict":
        return {f"state{n}": state for n, state in enumerate(states)}
    return draw_array(draw, (batch, 2)) if container == "bare" else states


def draw_pattern(draw, batch, time):
    """A mask or reset of any form, gaps included, or none."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    pattern = rng.random((batch, time)) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    pattern = pattern[..., None] if draw(st.booleans()) else pattern
    return pattern.astype(draw(st.sampled_from(["bool", "float32", "int32", "uint8"])))


@st.composite
def programs(draw):
    """Arguments and flags of one call."""
    batch, time = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    inputs, states = draw_inputs(draw, batch, time), draw_states(draw, batch)
    flags = {
        "go_backwards": draw(st.booleans()),
        "unroll": draw(st.sampled_from([False, False, True, 1, 2, 20])),
        "zero_output_for_mask": draw(st.booleans()),
        "return_all_outputs": draw(st.sampled_from([True, True, False])),
        "remat": draw(st.booleans()),
        "method": draw(st.sampled_from(["auto", "sequential", "lax"])),
        "chunk": draw(st.sampled_from(["auto", None, 1, 2, 5])),
    }
    for name in ("mask", "reset"):
        if draw(st.booleans()):
            flags[name] = draw_pattern(draw, batch, time)
    lengths = draw(st.sampled_from(["none", "one", "each"]))
    if lengths == "one":
        flags["input_length"] = draw(st.integers(0, time + 1))
    elif lengths == "each":
        each = draw(st.lists(st.integers(0, time + 1), min_size=batch, max_size=batch))
        flags["input_length"] = np.array(each, np.int32)
    if draw(st.booleans()):
        flags["time_major"] = True
        inputs = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), inputs)
        for name in {"mask", "reset"} & flags.keys():
            flags[name] = flags[name].swapaxes(0, 1)
    if isinstance(states, list | tuple) and draw(st.booleans()):
        flags["constants"] = [draw_array(draw, (batch,)), {"gain": draw_array(draw, ())}]
    output = draw(st.sampled_from(["state", "squared", "wide", "tree"]))
    return output, inputs, states, flags


def make_step(xp, output, has_constants, states_like):
    """A step over any structure: a state feels inputs, itself, its neighbour and constants."""

    def per_sample(leaf):
        wide = leaf.astype(np.float32)
        return wide.reshape(wide.shape[0], -1).sum(axis=-1) / max(1, wide[0].size)

    def step(x, states):
        drive = functools.reduce(lambda a, b: a - b, map(per_sample, jax.tree.leaves(x)))
        if has_constants:
            *states, offset, gain = states
            drive = drive * gain["gain"] + offset
        leaves = jax.tree.leaves(states)
        new = []
        for position, leaf in enumerate(leaves):
            push = drive + 0.1 * per_sample(leaves[position - 1])
            push = push.reshape(push.shape + (1,) * (leaf.ndim - 1))
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                new.append(xp.tanh(0.5 * leaf.astype(np.float32) + push))
            else:
                new.append(leaf + 1 if leaf.dtype == np.int32 else ~leaf)
        outputs = {
            "state": new[0],
            "squared": new[0] * new[0],
            "wide": xp.stack([drive] * 3, axis=-1),
            "tree": (drive, {"last": new[-1]}),
        }
        return outputs[output], jax.tree.unflatten(jax.tree.structure(states_like), new)

    return step


@settings(max_examples=40)
@given(programs())
def test_any_program_equals_the_plain_loop(program):
    output, inputs, states, flags = program
    bare = isinstance(states, np.ndarray)
    make = functools.partial(
        make_step,
        output=output,
        has_constants="constants" in flags,
        states_like=[states] if bare else states,
    )
    actual = jaxrnn.rnn(make(jnp), inputs, states, **flags)
    expected = reference_rnn(make(np), inputs, states, **flags)
    dtypes = [jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(states)]
    narrow = next((d for d in ("bfloat16", "float16") if jnp.dtype(d) in dtypes), "float32")
    assert_same(actual, expected, narrow)
