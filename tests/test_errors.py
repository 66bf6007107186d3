"""Every mistake is refused by jaxrnn itself, in words that name place, finding and remedy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_identical
from jax import export

import jaxrnn

X = np.ones((3, 7, 2), np.float32)
H = np.ones((3, 4), np.float32)
N = np.zeros((3,), np.int32)
NESTED = [H, {"c": H, "n": N}]
MASK = np.ones((3, 7), bool)
CELL = jaxrnn.cells.gru(4)


def keeps(x, states):
    """A step without fault: whatever its states are, they stay."""
    return x, states


def without_states(x, states):
    return x, []


@pytest.fixture(autouse=True)
def whole_tracebacks():
    """JAX hides its own frames by default, and with them who raised an error."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def assert_refused(error, words, *arguments, **flags):
    """Asserts that a call is refused by jaxrnn's own code, with every one of the words."""
    with pytest.raises(error) as caught:
        jaxrnn.rnn(*arguments, **flags)
    package = pathlib.Path(jaxrnn.__file__).parent
    assert package in pathlib.Path(caught.traceback[-1].path).parents
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# Words that must be found in the message: the place, what came, what was expected, the remedy.
ARGUMENTS = {
    "step_not_callable": (TypeError, ["step_function", "3"], (3, X, [H]), {}),
    "a_cell_for_a_step": (TypeError, ["a Cell", "cell.step(params)"], (CELL, X, [H]), {}),
    "inputs_of_two_axes": (
        ValueError,
        ["inputs", "(3, 7)", "3 axes", "x[..., None]", "One sample alone", "expand_dims(x, 0)"],
        (keeps, X[..., 0], [H]),
        {},
    ),
    "input_leaf_of_two_axes": (
        ValueError,
        ["inputs['b'][1]", "(3, 7)", "3 axes"],
        (keeps, {"a": X, "b": [X, X[..., 0]]}, [H]),
        {},
    ),
    "input_leaves_that_disagree_on_time": (
        ValueError,
        ["inputs['b']", "(3, 6, 2)", "(3, 7, 2)"],
        (keeps, {"a": X, "b": X[:, :6]}, [H]),
        {},
    ),
    "input_leaves_that_disagree_on_batch": (
        ValueError,
        ["inputs[1]", "(2, 7, 2)", "(3, 7, 2)"],
        (keeps, (X, X[:2]), [H]),
        {},
    ),
    "no_inputs": (ValueError, ["inputs", "jnp.zeros([B, T, 0])"], (keeps, {}, [H]), {}),
    "no_timesteps": (ValueError, ["inputs", "(3, 0, 2)"], (keeps, X[:, :0], [H]), {}),
    "no_timesteps_in_a_leaf": (
        ValueError,
        ["inputs['a']", "(0, 3, 2)"],
        (keeps, {"a": X[:0, :3]}, [H]),
        {"time_major": True},
    ),
    "mask_of_one_axis": (
        ValueError,
        ["mask", "(3,)", "(3, 7)"],
        (keeps, X, [H]),
        {"mask": MASK[:, 0]},
    ),
    "mask_transposed": (
        ValueError,
        ["mask", "(7, 3)", "(3, 7)"],
        (keeps, X, [H]),
        {"mask": MASK.T},
    ),
    "mask_batch_major_for_time_major_inputs": (
        ValueError,
        ["mask", "(3, 7)", "(7, 3)"],
        (keeps, X.swapaxes(0, 1), [H]),
        {"mask": MASK, "time_major": True},
    ),
    "mask_with_features": (
        ValueError,
        ["mask", "(3, 7, 2)", "(3, 7)"],
        (keeps, X, [H]),
        {"mask": X},
    ),
    "mask_too_long": (
        ValueError,
        ["mask", "(3, 8)", "(3, 7)"],
        (keeps, X, [H]),
        {"mask": np.ones((3, 8))},
    ),
    "mask_without_states": (
        ValueError,
        ["mask", "initial_states"],
        (without_states, X, []),
        {"mask": MASK},
    ),
    "mask_without_states_in_a_tuple": (
        ValueError,
        ["mask", "initial_states"],
        (without_states, X, ()),
        {"mask": MASK},
    ),
    "reset_of_one_axis": (
        ValueError,
        ["reset", "(7,)", "(3, 7)"],
        (keeps, X, [H]),
        {"reset": MASK[0]},
    ),
    "reset_transposed": (
        ValueError,
        ["reset", "(7, 3)", "(3, 7)"],
        (keeps, X, [H]),
        {"reset": MASK.T},
    ),
    "lengths_of_another_batch": (
        ValueError,
        ["input_length", "(2,)", "(3,)"],
        (keeps, X, [H]),
        {"input_length": np.array([1, 2])},
    ),
    "lengths_of_two_axes": (
        ValueError,
        ["input_length", "(3, 1)", "(3,)"],
        (keeps, X, [H]),
        {"input_length": np.ones((3, 1), int)},
    ),
    "lengths_that_are_floats": (
        (ValueError, TypeError),
        ["input_length", "float32", "integer"],
        (keeps, X, [H]),
        {"input_length": np.ones((3,), np.float32)},
    ),
    "length_that_is_a_float": (
        (ValueError, TypeError),
        ["input_length", "integer"],
        (keeps, X, [H]),
        {"input_length": 3.5},
    ),
    "ragged_mask": (ValueError, ["mask", "list of length 2"], (keeps, X, [H]), {"mask": [[1], []]}),
    "mask_of_keys": (
        TypeError,
        ["mask", "key<fry>", "bool"],
        (keeps, X, [H]),
        {"mask": jax.random.split(jax.random.key(0), (3, 7))},
    ),
    "a_number_too_large_for_a_state": (
        ValueError,
        ["initial_states[1]", "1099511627776", "int32"],
        (keeps, X, [H, 2**40]),
        {},
    ),
    "two_directions": (
        ValueError,
        ["go_backwards", "[1, 0]", "True or False"],
        (keeps, X, [H]),
        {"go_backwards": [1, 0]},
    ),
    "a_word_for_a_flag": (
        ValueError,
        ["time_major", "'no'", "True or False"],
        (keeps, X, [H]),
        {"time_major": "no"},
    ),
    "state_without_batch_axis_under_a_mask": (
        ValueError,
        ["initial_states[1]['n']", "()", "mask", "batch"],
        (keeps, X, [H, {"n": np.float32(0)}]),
        {"mask": MASK},
    ),
    "state_without_batch_axis_under_lengths": (
        ValueError,
        ["initial_states[1]", "(4,)", "input_length", "batch"],
        (keeps, X, (H, H[0])),
        {"input_length": 3},
    ),
    "state_without_batch_axis_under_a_reset": (
        ValueError,
        ["initial_states['n']", "(2,)", "reset", "batch"],
        (keeps, X, {"h": H, "n": N[:2]}),
        {"reset": MASK},
    ),
    "constants_with_a_dict_state": (
        ValueError,
        ["initial_states", "dict", "constants", "list"],
        (keeps, X, {"h": H}),
        {"constants": [H]},
    ),
    "one_bare_constant": (
        ValueError,
        ["constants", "list", "[c]"],
        (keeps, X, [H]),
        {"constants": H},
    ),
    "state_that_is_a_string": (
        (ValueError, TypeError),
        ["initial_states[1]", "array"],
        (keeps, X, [H, "memory"]),
        {},
    ),
    "inputs_that_are_a_string": (
        (ValueError, TypeError),
        ["inputs", "array"],
        (keeps, "sentence", [H]),
        {},
    ),
    "no_initial_states": (ValueError, ["initial_states", "None", "[]"], (keeps, X, None), {}),
    "unroll_zero": (ValueError, ["unroll", "0", ">= 1"], (keeps, X, [H]), {"unroll": 0}),
    "unroll_negative": (ValueError, ["unroll", "-1", ">= 1"], (keeps, X, [H]), {"unroll": -1}),
    "unroll_a_float": (ValueError, ["unroll", "2.5"], (keeps, X, [H]), {"unroll": 2.5}),
    "chunk_zero": (ValueError, ["chunk", "0", "auto"], (keeps, X, [H]), {"chunk": 0}),
    "chunk_unknown": (ValueError, ["chunk", "'all'", "auto"], (keeps, X, [H]), {"chunk": "all"}),
    "method_unknown": (
        ValueError,
        ["method", "'fast'", "auto", "sequential", "lax"],
        (keeps, X, [H]),
        {"method": "fast"},
    ),
}


@pytest.mark.parametrize("mistake", ARGUMENTS)
def test_a_wrong_argument(mistake):
    error, words, arguments, flags = ARGUMENTS[mistake]
    assert_refused(error, words, *arguments, **flags)


STEPS = {
    "one_array": (ValueError, ["step_function", "pair", "new_states"], lambda x, _: x),
    "three_results": (ValueError, ["step_function", "pair", "3"], lambda x, s: (x, s[0], s[1])),
    "nothing": (ValueError, ["step_function", "pair", "None"], lambda _x, _s: None),
    "a_state_too_few": (ValueError, ["1", "2", "states"], lambda x, s: (x, s[:1])),
    "a_state_too_many": (ValueError, ["3", "2", "states"], lambda x, s: (x, [*s, s[0]])),
    "no_states": (ValueError, ["states", "0", "2"], lambda x, _: (x, [])),
    "none_for_states": (ValueError, ["states", "None", "list"], lambda x, _: (x, None)),
    "one_state_bare": (ValueError, ["states", "list"], lambda x, s: (x, s[0])),
    "a_key_too_few": (
        ValueError,
        ["[1]", "'c'", "'n'"],
        lambda x, s: (x, [s[0], {"c": s[1]["c"]}]),
    ),
    "another_container": (
        ValueError,
        ["[1]", "tuple", "dict"],
        lambda x, s: (x, [s[0], (s[1]["c"], s[1]["n"])]),
    ),
    "another_shape": (
        ValueError,
        ["initial_states[1]['c']", "(3, 8)", "(3, 4)"],
        lambda x, s: (x, [s[0], {"c": jnp.tile(s[1]["c"], 2), "n": s[1]["n"]}]),
    ),
    "another_rank": (
        ValueError,
        ["initial_states[0]", "(3, 4, 1)", "(3, 4)"],
        lambda x, s: (x, [s[0][..., None], s[1]]),
    ),
    "integer_becomes_float": (
        TypeError,
        ["initial_states[1]['n']", "int32", "float32", "astype"],
        lambda x, s: (x, [s[0], {"c": s[1]["c"], "n": s[1]["n"] + 0.5}]),
    ),
    "integer_becomes_narrower": (
        TypeError,
        ["initial_states[1]['n']", "int32", "int8", "astype"],
        lambda x, s: (x, [s[0], {"c": s[1]["c"], "n": s[1]["n"].astype(jnp.int8)}]),
    ),
    "float_becomes_integer": (
        TypeError,
        ["initial_states[0]", "int32", "float32", "astype"],
        lambda x, s: (x, [s[0].astype(jnp.int32), s[1]]),
    ),
    "float_becomes_boolean": (
        TypeError,
        ["initial_states[0]", "bool", "float32", "astype"],
        lambda x, s: (x, [s[0] > 0, s[1]]),
    ),
    "float_becomes_complex": (
        TypeError,
        ["initial_states[0]", "complex64", "float32", "astype"],
        lambda x, s: (x, [s[0] * 1j, s[1]]),
    ),
}


@pytest.mark.parametrize("flags", [{}, {"mask": MASK, "remat": True}], ids=["plain", "masked"])
@pytest.mark.parametrize("mistake", STEPS)
def test_a_wrong_step(mistake, flags):
    error, words, step = STEPS[mistake]
    assert_refused(error, words, step, X, NESTED, **flags)


def test_an_array_whose_batch_is_two_is_no_pair():
    """It could be unpacked into two things, neither of them meant."""
    assert_refused(ValueError, ["step_function", "pair"], lambda x, _: x, X[:2], [H[:2]])


def test_a_key_of_another_kind():
    def step(x, states):
        return x, [jax.random.key(0, impl="rbg")]

    words = ["initial_states[0]", "key<fry>", "key<rbg>", "jax.random.split"]
    assert_refused(TypeError, words, step, X, [jax.random.key(0)])


def test_a_wrong_step_under_jit_and_grad_reads_the_same():
    def loss(x):
        return jaxrnn.rnn(lambda x, s: (x, s[:1]), x, NESTED)[0].sum()

    for transformed in (jax.jit(loss), jax.grad(loss), lambda x: jax.vmap(loss)(x[None])):
        with pytest.raises(ValueError, match=r"1 states; expected 2"):
            transformed(X)


def test_a_traced_option_is_told_how_to_be_static():
    for name in ("unroll", "go_backwards", "remat"):
        with pytest.raises(ValueError, match=rf"{name} is a traced value.*static_argnames"):
            jax.jit(lambda value, name=name: jaxrnn.rnn(keeps, X, [H], **{name: value}))(2)


def test_options_may_be_numbers_of_numpy():
    one, true = np.int64(2), np.True_
    expected = jaxrnn.rnn(keeps, X, [H], unroll=2, chunk=2, remat=True, go_backwards=True)
    actual = jaxrnn.rnn(keeps, X, [H], unroll=one, chunk=one, remat=true, go_backwards=true)
    assert_identical(actual, expected)


def test_a_dtype_error_tells_a_cast_that_works():
    def step(x, states):
        return x, [states[0] + 0.5]

    with pytest.raises(TypeError, match=r"astype"):
        jaxrnn.rnn(step, X, [N])
    _, _, (state,) = jaxrnn.rnn(lambda x, s: (x, [(s[0] + 0.5).astype("int32")]), X, [N])
    assert state.dtype == N.dtype
    _, _, (state,) = jaxrnn.rnn(step, X, [N.astype("float32")])
    np.testing.assert_array_equal(state, np.full((3,), 3.5))


def test_full_unrolling_of_a_symbolic_time_axis():
    def run(x):
        return jaxrnn.rnn(keeps, x, [x[:, 0]], unroll=True)[0]

    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 2"), jnp.float32)
    with pytest.raises(ValueError, match=r"unroll.*time"):
        export.export(jax.jit(run))(shape)


def test_an_error_of_the_step_itself_comes_through_as_it_is_and_says_what_the_step_was_given():
    class OwnError(Exception):
        pass

    def step(x, states):
        raise OwnError("mine")

    with pytest.raises(OwnError, match=r"^mine") as caught:
        jaxrnn.rnn(step, {"a": X}, [H], mask=MASK)
    (note,) = [note for note in caught.value.__notes__ if note.startswith("rnn calls")]
    assert "step_function(input_t, states), in this order" in note
    assert "input_t['a']: float32[3, 2]" in note
    assert "states[0]: float32[3, 4]" in note


@pytest.mark.parametrize("states", [H[:2], H[:1]], ids=["unlike", "one"])
def test_states_for_another_number_of_samples_are_named(states):
    """Whether the step fails on them or broadcasts them."""
    with pytest.raises((TypeError, ValueError)) as caught:
        jaxrnn.rnn(lambda x, s: (x, [s[0] + x[:, :1]]), X, [states])
    words = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert f"initial_states[0] has {len(states)} on its first axis, inputs have 3 samples" in words


def test_a_mistake_of_another_kind_is_not_put_down_to_the_states():
    with pytest.raises(KeyError) as caught:
        jaxrnn.rnn(lambda _x, _s: {}["typo"], X, [H[:2]])
    assert "first axis" not in "".join(caught.value.__notes__)


def test_nothing_runs_before_an_error_is_raised():
    ran = []

    def step(x, states):
        jax.debug.callback(lambda: ran.append(1))
        return x, [states[0].astype(jnp.int32)]

    with pytest.raises(TypeError):
        jaxrnn.rnn(step, X, [H])
    jax.effects_barrier()
    assert not ran


def test_a_call_that_fails_leaves_the_next_one_unharmed():
    width = [8]

    def step(x, states):
        return x, [jnp.ones((3, width[0]))]

    with pytest.raises(ValueError, match="shape"):
        jaxrnn.rnn(step, X, [H])
    width[0] = 4
    _, _, (state,) = jaxrnn.rnn(step, X, [H])
    assert state.shape == (3, 4)
