"""bidirectional against one sample at a time, cut to its length: no padding anywhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn import bidirectional, cells, rnn

B, T, D, H = 4, 6, 3, 2
LENGTHS = np.array([6, 1, 4, 3])


def decay_step(weight, rate):
    """An output that differs from the state and depends on the order of the steps."""

    def step(x, states):
        (s,) = states
        s = rate * s + x @ weight
        return jnp.tanh(s), [s]

    return step


def numpy_decay(weight, rate, x, s):
    outputs = []
    for x_t in x:
        s = rate * s + x_t @ weight
        outputs.append(np.tanh(s))
    return np.array(outputs), s


@pytest.fixture(scope="module")
def problem():
    """Of all tests, so that calls of the same steps are compiled once."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights, rates = (draw(D, H), draw(D, H + 1)), (0.5, -0.75)
    return {
        "weights": weights,
        "rates": rates,
        "steps": [decay_step(w, r) for w, r in zip(weights, rates, strict=True)],
        "x": draw(B, T, D),
        "initial": (draw(B, H), draw(B, H + 1)),
    }


def truncated(problem, valid):
    """The expected values, sample by sample, from the valid steps alone."""
    (wf, wb), (rf, rb) = problem["weights"], problem["rates"]
    rows = {"last": ([], []), "states": ([], []), "outputs": []}
    for b in range(B):
        x = np.float64(problem["x"][b][valid[b]])
        forward, forward_state = numpy_decay(wf, rf, x, problem["initial"][0][b])
        backward, backward_state = numpy_decay(wb, rb, x[::-1], problem["initial"][1][b])
        rows["outputs"].append((forward, backward[::-1]))
        for side, outputs, state in ((0, forward, forward_state), (1, backward, backward_state)):
            rows["last"][side].append(outputs[-1])
            rows["states"][side].append(state)
    return rows


def call(problem, x, **options):
    initial_forward, initial_backward = problem["initial"]
    return bidirectional(*problem["steps"], x, [initial_forward], [initial_backward], **options)


def check(result, expected, valid):
    last, outputs, states = result
    for side in (0, 1):
        np.testing.assert_allclose(last[side], np.stack(expected["last"][side]), atol=1e-5)
        assert isinstance(states[side], list)
        np.testing.assert_allclose(states[side][0], np.stack(expected["states"][side]), atol=1e-5)
        assert outputs[side].shape == (B, T, H + side)
        for b in range(B):
            actual = np.asarray(outputs[side])[b][valid[b]]
            np.testing.assert_allclose(actual, expected["outputs"][b][side], atol=1e-5)


RIGHT_PADDED = np.arange(T) < LENGTHS[:, None]
LEFT_PADDED = np.arange(T) >= T - LENGTHS[:, None]
WITH_GAPS = np.array(
    [[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1]], bool
)


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf, 1e30])
@pytest.mark.parametrize(
    "valid", [RIGHT_PADDED, LEFT_PADDED, WITH_GAPS], ids=["right", "left", "gaps"]
)
def test_equals_each_sample_without_its_padding(problem, valid, fill):
    x = np.where(valid[..., None], problem["x"], np.float32(fill))
    check(call(problem, x, mask=valid), truncated(problem, valid), valid)


def test_lengths_stand_for_a_mask(problem):
    x = np.where(RIGHT_PADDED[..., None], problem["x"], np.nan)
    expected = truncated(problem, RIGHT_PADDED)
    check(call(problem, x, input_length=LENGTHS), expected, RIGHT_PADDED)


def test_without_padding(problem):
    everything = np.ones((B, T), bool)
    check(call(problem, problem["x"]), truncated(problem, everything), everything)


def test_padding_rows_hold_or_are_zero(problem):
    _, held, _ = call(problem, problem["x"], mask=RIGHT_PADDED)
    _, zeroed, _ = call(problem, problem["x"], mask=RIGHT_PADDED, zero_output_for_mask=True)
    for b, length in enumerate(LENGTHS):
        last_valid = jnp.broadcast_to(held[0][b, length - 1], (T - length, H))
        chex.assert_trees_all_equal(held[0][b, length:], last_valid)
        # Backward, the padding comes first: nothing but the initial state is there to hold.
        initial = jnp.broadcast_to(problem["initial"][1][b], (T - length, H + 1))
        chex.assert_trees_all_equal(held[1][b, length:], initial)
        for side in (0, 1):
            assert not np.any(zeroed[side][b, length:])
            chex.assert_trees_all_equal(zeroed[side][b, :length], held[side][b, :length])


def test_time_major_swaps_the_axes_of_inputs_mask_and_outputs(problem):
    expected = call(problem, problem["x"], mask=RIGHT_PADDED)
    swapped = call(problem, problem["x"].swapaxes(0, 1), mask=RIGHT_PADDED.T, time_major=True)
    last, outputs, states = swapped
    outputs = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), outputs)
    chex.assert_trees_all_close((last, outputs, states), expected, rtol=1e-6)


def test_results_are_pairs_in_the_structures_of_either_side(problem):
    """Each side keeps its own states' container and its own pytree of outputs."""

    def counting_step(x, states):
        (total, count) = states
        total, count = total + x, count + 1
        return {"mean": total / count[:, None], "count": count}, (total, count)

    x = problem["x"]
    initial = (jnp.zeros((B, D)), jnp.zeros(B))
    forward_step, _ = problem["steps"]
    last, outputs, states = bidirectional(
        forward_step, counting_step, x, [problem["initial"][0]], initial, input_length=LENGTHS,
        zero_output_for_mask=True,
    )  # fmt: skip
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in (last, outputs, states))
    assert isinstance(states[0], list)
    assert isinstance(states[1], tuple)
    remaining = np.maximum(LENGTHS[:, None] - np.arange(T), 0)
    np.testing.assert_array_equal(outputs[1]["count"], remaining)
    np.testing.assert_array_equal(last[1]["count"], LENGTHS)
    means = np.stack([x[b, : LENGTHS[b]].mean(axis=0) for b in range(B)])
    np.testing.assert_allclose(last[1]["mean"], means, atol=1e-6)


def test_options_reach_both_sides(problem):
    expected = call(problem, problem["x"], mask=RIGHT_PADDED)
    for options in ({"unroll": 2}, {"remat": True, "chunk": 4}):
        actual = call(problem, problem["x"], mask=RIGHT_PADDED, **options)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    last, outputs, states = call(problem, problem["x"], mask=RIGHT_PADDED, return_all_outputs=False)
    chex.assert_trees_all_close((last, states), (expected[0], expected[2]), rtol=1e-6)
    chex.assert_trees_all_close(outputs, tuple(leaf[:, None] for leaf in expected[0]), rtol=1e-6)


def test_gradients_see_no_padding(problem):
    """One padded sample against a loop over its valid steps."""
    sample, length = 3, LENGTHS[3]
    initial = [state[sample : sample + 1] for state in problem["initial"]]
    x = problem["x"][sample : sample + 1, :length]
    padded = np.pad(x, [(0, 0), (0, T - length), (0, 0)], constant_values=np.nan)

    def loss(weights, x):
        steps = [decay_step(w, r) for w, r in zip(weights, problem["rates"], strict=True)]
        last, outputs, _ = bidirectional(
            *steps, x, [initial[0]], [initial[1]], input_length=length, zero_output_for_mask=True
        )
        return sum(jnp.sum(leaf**2) for leaf in (*last, *outputs))

    def looped_loss(weights, x):
        total = 0.0
        for side, order in enumerate((1, -1)):
            s = initial[side]
            for t in range(length)[::order]:
                s = problem["rates"][side] * s + x[:, t] @ weights[side]
                total += jnp.sum(jnp.tanh(s) ** 2)
            total += jnp.sum(jnp.tanh(s) ** 2)
        return total

    weights, inputs = jax.jit(jax.grad(loss, argnums=(0, 1)))(problem["weights"], padded)
    expected = jax.jit(jax.grad(looped_loss, argnums=(0, 1)))(problem["weights"], x)
    chex.assert_trees_all_close((weights, inputs[:, :length]), expected, rtol=1e-4, atol=1e-5)
    assert not np.any(inputs[:, length:])


def test_with_cells_equals_two_runs_of_rnn(problem):
    """The backward side is rnn over each sequence reversed within its length."""
    cell = cells.gru(H)
    keys = jax.random.split(jax.random.key(0))
    params = [cell.init(key, D) for key in keys]
    steps = [cell.step(p) for p in params]
    x = problem["x"]
    position = np.where(RIGHT_PADDED, LENGTHS[:, None] - 1 - np.arange(T), np.arange(T))
    mirrored = np.take_along_axis(x, position[..., None], axis=1)
    states = cell.initial_states(B)
    last, outputs, _ = bidirectional(*steps, x, states, states, mask=RIGHT_PADDED)
    forward = rnn(steps[0], x, states, mask=RIGHT_PADDED)
    backward = rnn(steps[1], mirrored, states, mask=RIGHT_PADDED)
    chex.assert_trees_all_close(last, (forward[0], backward[0]), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(outputs[0], forward[1], rtol=1e-5, atol=1e-6)
    unmirrored = np.take_along_axis(np.asarray(backward[1]), position[..., None], axis=1)
    valid = RIGHT_PADDED[..., None]
    np.testing.assert_allclose(
        np.where(valid, outputs[1], 0), np.where(valid, unmirrored, 0), rtol=1e-5, atol=1e-6
    )


STARTS = np.array(
    [[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1]], bool
)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize(
    "valid", [None, RIGHT_PADDED, WITH_GAPS], ids=["everything", "right", "gaps"]
)
def test_no_side_looks_beyond_where_a_sample_begins_anew(problem, valid, time_major):
    """Each piece by itself, from the initial states, its masked steps left out."""
    counts = np.ones((B, T), bool) if valid is None else valid
    x = np.where(counts[..., None], problem["x"], np.nan)
    arguments = {"mask": valid, "reset": STARTS}
    if time_major:
        x = x.swapaxes(0, 1)
        arguments = {k: None if v is None else v.T for k, v in arguments.items()}
    _, outputs, states = call(problem, x, time_major=time_major, **arguments)
    for side, order in enumerate((1, -1)):
        actual = np.asarray(outputs[side]).swapaxes(0, 1) if time_major else outputs[side]
        weight, rate = problem["weights"][side], problem["rates"][side]
        for b in range(B):
            steps = np.flatnonzero(counts[b])
            pieces = np.split(steps, np.flatnonzero(STARTS[b][steps]))
            for piece in (p[::order] for p in pieces if p.size):
                expected, state = numpy_decay(
                    weight, rate, problem["x"][b][piece], problem["initial"][side][b]
                )
                np.testing.assert_allclose(actual[b][piece], expected, atol=1e-5)
                if piece[-1] == (steps[-1], steps[0])[side]:
                    np.testing.assert_allclose(states[side][0][b], state, atol=1e-5)


def test_both_steps_get_the_constants(problem):
    def step(x, states):
        total, shift, scale = states
        total = total + scale * x + shift
        return total, [total]

    x, (shift, scale) = problem["x"], (problem["x"][:, 0], np.float32(3))
    start = [jnp.zeros((B, D))]
    _, outputs, states = bidirectional(step, step, x, start, start, constants=[shift, scale])
    added = 3 * x + shift[:, None]
    np.testing.assert_allclose(outputs[0], np.cumsum(added, 1), atol=1e-5)
    np.testing.assert_allclose(outputs[1], np.cumsum(added[:, ::-1], 1)[:, ::-1], atol=1e-5)
    assert [len(side) for side in states] == [1, 1]


def test_mistakes_are_reported_as_rnn_reports_them(problem):
    with pytest.raises(ValueError, match="mask"):
        call(problem, problem["x"], mask=np.ones((B, T + 1), bool))
    forward, backward = problem["initial"]
    with pytest.raises(TypeError, match="step_function"):
        bidirectional(problem["steps"][0], None, problem["x"], [forward], [backward])


def test_mistakes_in_states_are_those_of_one_direction(problem):
    forward, backward = problem["initial"]
    for states, name in [([forward], None), "backward"], [(None, [backward]), "forward"]:
        with pytest.raises(ValueError, match="initial_states") as caught:
            bidirectional(*problem["steps"], problem["x"], *states)
        assert f"initial_states are {name}_states" in "".join(caught.value.__notes__)
