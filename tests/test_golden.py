"""A Keras user's call gives the Keras result: `rnn` against stored `tf_keras.backend.rnn` results.

`golden/generate.py` made the results and says how. Where tf_keras and the contract differ, `RULES`
states which entries differ and what stands there instead; all others have to be the golden ones.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.calls import arguments, decode, decode_problem, leaves, load, mask_array, tree_map
from golden.steps import STEPS

import jaxrnn

META, ARRAYS = load()
MASKS = META["masks"]
CONFIGURATIONS = META["configurations"]
AGREEING = [c for c in CONFIGURATIONS if c["difference"] is None]
DIFFERING = [c for c in CONFIGURATIONS if c["difference"] is not None]
FLAGS = ("go_backwards", "unroll", "time_major", "zero_output_for_mask", "return_all_outputs")

OPS = SimpleNamespace(
    tanh=jnp.tanh,
    sigmoid=jax.nn.sigmoid,
    sum=jnp.sum,
    concat=jnp.concatenate,
    cast=lambda x, dtype: x.astype(dtype),
    column=lambda x: x.reshape(-1, 1),
)


def problem_of(configuration):
    return decode_problem(META["problems"][configuration["problem"]], ARRAYS)


def call(configuration):
    """The Keras call: eleven positional arguments."""
    problem = problem_of(configuration)
    step = STEPS[problem.step](OPS, tree_map(jnp.asarray, problem.weights))

    def convert_length(length, spelling):
        return length if spelling == "python" else np.array(length, np.int32)

    return jaxrnn.rnn(step, *arguments(configuration, problem, MASKS, jnp.asarray, convert_length))


def stored(result):
    """A stored result as `(last_output, outputs, new_states)`, the states in a list as in `rnn`."""
    last_output, outputs, new_states = decode(result, ARRAYS)
    return last_output, outputs, list(new_states)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(leaves(got), leaves(expected), strict=True):
        assert isinstance(one, jax.Array)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# Each rule takes a configuration, the golden result and the result of the `instead` call, and
# returns `(covered, expected)`, trees like the result: where `covered` is true the contract asks
# for `expected`, elsewhere for the golden value.


def in_processing_order(configuration, valid):
    return valid[:, ::-1] if configuration["go_backwards"] else valid


def valid_steps(configuration):
    """`[B, T]` in processing order: the steps that count by the contract."""
    batch, time = leaves(problem_of(configuration).inputs)[0].shape[:2]
    valid = np.ones((batch, time), bool)
    if configuration["mask"] is not None:
        valid = mask_array(configuration, MASKS)
    if configuration["input_length"] is not None:
        valid = valid & (np.arange(time) < np.reshape(configuration["input_length"], (-1, 1)))
    return in_processing_order(configuration, valid)


def valid_steps_of_tf_keras(configuration):
    """The same by tf_keras: a mask, or else a length that is a tensor, unless unrolled."""
    batch, time = leaves(problem_of(configuration).inputs)[0].shape[:2]
    if configuration["mask"] is not None:
        return in_processing_order(configuration, mask_array(configuration, MASKS))
    if configuration["input_length_as"] != "tensor" or configuration["unroll"]:
        return np.ones((batch, time), bool)
    length = np.array(configuration["input_length"])[:, None]
    # Backwards, it counts from the longest length and not from the end of the time axis.
    start = length.max() - length if configuration["go_backwards"] else 0
    stop = time if configuration["go_backwards"] else length
    return (start <= np.arange(time)) & (np.arange(time) < stop)


def cover(configuration, result, samples, rows, states):
    """Booleans like `result`: `[B]` for last_output, `[B, T]` for outputs, `[B]` for new_states."""
    last_output, outputs, new_states = result
    if not configuration["return_all_outputs"]:
        rows = rows[:, -1:]
    if configuration["time_major"]:
        rows = rows.T

    def spread(x, flags):
        return np.broadcast_to(flags.reshape(flags.shape + (1,) * (x.ndim - flags.ndim)), x.shape)

    return (
        tree_map(lambda x: spread(x, samples), last_output),
        tree_map(lambda x: spread(x, rows), outputs),
        tree_map(lambda x: spread(x, states), new_states),
    )


def initially_masked(configuration, golden, _):
    """Before its first valid step a sample holds `initial_states[0]`; tf_keras holds zeros."""
    before = ~np.logical_or.accumulate(valid_steps(configuration), axis=1)
    none = np.zeros(len(before), bool)
    covered = cover(configuration, golden, before[:, -1], before, none)
    for flags, part in zip(leaves(covered), leaves(golden), strict=True):
        assert not part[flags].any()
    first = problem_of(configuration).initial_states[0]
    rows = np.expand_dims(first, 0 if configuration["time_major"] else 1)
    expected = (first, np.broadcast_to(rows, golden[1].shape), golden[2])
    return covered, expected


def last_output_zeroed(configuration, golden, intended):
    """`last_output` is the latest valid output, which tf_keras gives only without zeroing."""
    valid = valid_steps(configuration)
    masked_last = ~valid[:, -1]
    covered = cover(configuration, golden, masked_last, np.zeros_like(valid), ~masked_last & False)
    for flags, part in zip(leaves(covered), leaves(golden), strict=True):
        assert not part[flags].any()
    return covered, intended


def input_length(configuration, golden, intended):
    """Lengths mask always; where the two masks begin to differ, so may the results."""
    valid, by_tf_keras = valid_steps(configuration), valid_steps_of_tf_keras(configuration)
    after = np.logical_or.accumulate(valid != by_tf_keras, axis=1)
    return cover(configuration, golden, after[:, -1], after, after[:, -1]), intended


def unrolled_backwards_zeroed(configuration, golden, intended):
    """Masked rows of `outputs` are zeros; unrolled, tf_keras zeros by the mask not turned round."""
    valid = valid_steps(configuration)
    none = np.zeros(len(valid), bool)
    return cover(configuration, golden, none, valid != valid[:, ::-1], none), intended


RULES = {
    "initially_masked": initially_masked,
    "input_length": input_length,
    "last_output_zeroed": last_output_zeroed,
    "unrolled_backwards_zeroed": unrolled_backwards_zeroed,
}

# Calls that fail in tf_keras, and the change after which they succeed with the result due here.
FAILURES = {
    "bare_state": {"bare_state": False},
    "rank_one_state": {"problem": "clock"},
    "unrolled_nest": {"unroll": False},
    "unrolled_zeroed_last": {"unroll": False},
}


@pytest.mark.parametrize("configuration", AGREEING, ids=lambda c: c["name"])
def test_gives_the_golden_result(configuration):
    assert_same(call(configuration), stored(configuration["result"]))


@pytest.mark.parametrize(
    "configuration",
    [c for c in DIFFERING if c["difference"]["kind"] in RULES],
    ids=lambda c: f"{c['difference']['kind']}:{c['name']}",
)
def test_differs_only_by_the_rule(configuration):
    golden = stored(configuration["result"])
    difference = configuration["difference"]
    intended = stored(difference["result"]) if difference["result"] else None
    covered, expected = RULES[difference["kind"]](configuration, golden, intended)
    expected = jax.tree.map(np.where, covered, expected, golden)
    assert_same(call(configuration), expected)
    pairs = zip(leaves(expected), leaves(golden), strict=True)
    assert any(not np.allclose(one, other) for one, other in pairs), "no difference left to state"


@pytest.mark.parametrize(
    "configuration",
    [c for c in DIFFERING if c["difference"]["kind"] in FAILURES],
    ids=lambda c: f"{c['difference']['kind']}:{c['name']}",
)
def test_makes_the_call_that_tf_keras_fails_to_make(configuration):
    assert configuration["failure"]
    difference = configuration["difference"]
    assert difference["instead"] == FAILURES[difference["kind"]]
    last_output, outputs, new_states = stored(difference["result"])
    if difference["kind"] == "rank_one_state":
        h, time = new_states
        new_states = [h, time[:, 0]]
    assert_same(call(configuration), (last_output, outputs, new_states))


def test_a_mask_without_states_is_an_error_that_tf_keras_only_documents():
    (configuration,) = (c for c in DIFFERING if c["difference"]["kind"] == "mask_without_states")
    assert configuration["failure"] is None
    with pytest.raises(ValueError, match="mask"):
        call(configuration)


def test_every_configuration_is_tested_and_every_combination_of_flags_occurs():
    kinds = {c["difference"]["kind"] for c in DIFFERING}
    assert kinds == set(RULES) | set(FAILURES) | {"mask_without_states"}
    assert len(AGREEING) >= 60
    assert len({c["name"] for c in CONFIGURATIONS}) == len(CONFIGURATIONS)
    masked = [c for c in CONFIGURATIONS if c["mask"] is not None]
    assert len({tuple(c[flag] for flag in FLAGS) for c in masked}) == 2 ** len(FLAGS)
    assert {META["problems"][c["problem"]]["step"] for c in AGREEING} == set(STEPS)


def test_the_golden_files_say_where_they_come_from():
    assert META["versions"]["tensorflow"].startswith("2.21.")
    assert META["versions"]["tf_keras"].startswith("2.21.")
    assert len(META["parameters"]) == 11
