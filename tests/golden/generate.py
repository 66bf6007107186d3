"""Writes the golden data: `tf_keras.backend.rnn` run over the configurations below.

Needs Python 3.11 and, in an environment of its own, TensorFlow and tf_keras 2.21:

    pip install "tensorflow-cpu==2.21.*" "tf_keras==2.21.*"
    cd tests && python -m golden.generate

It overwrites `configurations.json` (versions, configurations, which array is what) and
`arrays.npz`. Every call is made eagerly and inside `tf.function`; both must give the same result,
or both fail. The test reads the two files and needs no TensorFlow.

Where tf_keras differs from the contract of `jaxrnn.rnn`, the configuration carries a `difference`:
its kind, and mostly `instead`, the options with which tf_keras gives what the contract promises for
the call as written. That result is stored too.
"""

import inspect
import itertools
import json
import os
import platform
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tf_keras

from golden.calls import HERE, Problem, arguments, complete, leaves, mask_array, tree_map
from golden.steps import STEPS

B, T, D, H, K = 3, 5, 2, 4, 6
FLAGS = ("go_backwards", "unroll", "time_major", "zero_output_for_mask", "return_all_outputs")

MASKS = {
    "full": ["11111", "11111", "11111"],
    "right": ["11111", "11100", "11000"],
    "left": ["11111", "00111", "00011"],
    "gaps": ["10011", "11011", "10111"],
    "late": ["00110", "01011", "11010"],
    "absent": ["11111", "00000", "10101"],
    "nothing": ["00000", "00000", "00000"],
    "one step": ["1", "0", "1"],
    "one sample": ["10110"],
}

OPS = SimpleNamespace(
    tanh=tf.tanh,
    sigmoid=tf.sigmoid,
    sum=tf.reduce_sum,
    concat=tf.concat,
    cast=tf.cast,
    column=lambda x: tf.reshape(x, (-1, 1)),
)


def build_problems():
    """Every step with inputs, states, constants and weights of its own, drawn from one seed."""
    random = np.random.default_rng(20)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    def weights(**shapes):
        return {name: 0.7 * draw(*shape) for name, shape in shapes.items()}

    def column(value):
        return np.full((B, 1), value, np.int32)

    x, h = draw(B, T, D), draw(B, H)
    counts = random.integers(0, 5, size=(B, T, D)).astype(np.int32)
    simple = weights(W=(D, H), U=(H, H), b=(H,))
    gates = weights(W=(D, 4 * H), U=(H, 4 * H), b=(4 * H,))
    ticking = weights(W=(D, H), U=(H, H), v=(H,))
    time = np.array([0.0, 1.0, 2.0], np.float32)
    deep = {"flat": x, "deep": draw(B, T, 3, D)}
    return {
        "simple_rnn": Problem("simple_rnn", x, [h], None, simple),
        "lstm": Problem("lstm", x, [h, draw(B, H)], None, gates),
        "lstm_memory": Problem("lstm_memory", x, [h, draw(B, H)], None, gates),
        "gru": Problem("gru", x, [h], None, weights(W=(D, 3 * H), U=(H, 3 * H), b=(3 * H,))),
        "attention": Problem("attention", x, [h], [draw(B, K, H), draw(H)], weights(W=(D, H))),
        "scaled_output": Problem("scaled_output", x, [h], None, simple),
        "readout": Problem("readout", x, [h], None, weights(W=(D, H), U=(H, H), V=(H, K))),
        "affine": Problem("affine", x, [h], None, weights(W=(D, H), decay=(H,), b=(H,))),
        "delay": Problem("delay", x, [draw(B, D), draw(B, D)], None, {}),
        "running_mean": Problem("running_mean", x, [draw(B, D), column(0)], None, {}),
        "event_counter": Problem("event_counter", counts, [counts[:, 0] + 1], None, {}),
        "clock": Problem("clock", x, [h, time[:, None]], None, ticking),
        "clock_rank_one": Problem("clock", x, [h, time], None, ticking),
        "grid": Problem("grid", draw(B, T, 3, D), [draw(B, 3, H)], None, simple),
        "two_inputs": Problem(
            "two_inputs", (x, draw(B, T, 3, K)), [h], None, weights(W=(D, H), U=(H, H), Y=(K, H))
        ),
        "nested_states": Problem("nested_states", x, [h, (draw(B, H), column(1))], None, simple),
        "nested": Problem("nested", deep, [h, (draw(B, 3, D), column(1))], None, simple),
        "two_outputs": Problem("two_outputs", x, [h], None, simple),
        "stateless": Problem("stateless", x, [], None, weights(W=(D, H))),
        "single_step": Problem("simple_rnn", draw(B, 1, D), [h], None, simple),
        "single_sample": Problem("simple_rnn", draw(1, T, D), [draw(1, H)], None, simple),
    }


def build_configurations():
    """All configurations: those in which tf_keras keeps the contract come first."""
    listed = []

    def add(problem, **options):
        listed.append({"problem": problem, **options})

    # Every combination of the five flags, with a mask that has gaps and reaches both ends.
    for flags in itertools.product([False, True], repeat=len(FLAGS)):
        add("scaled_output", mask="gaps", **dict(zip(FLAGS, flags, strict=True)))

    # Every step: unmasked, turned round, padded.
    for problem in ("simple_rnn", "lstm", "attention", "readout", "affine", "two_inputs"):
        add(problem, go_backwards=True, unroll=True)
        add(problem, mask="gaps", go_backwards=True)
    for problem in ("gru", "lstm_memory", "running_mean", "clock", "grid", "nested_states"):
        add(problem, mask="gaps", go_backwards=True, mask_rank=3)
        add(problem, mask="right", unroll=True)
    for problem in ("delay", "event_counter", "two_outputs", "nested"):
        add(problem, time_major=True)
        add(problem, mask="right", mask_rank=3)
        add(problem, mask="gaps", go_backwards=True)
    add("nested", mask="gaps", zero_output_for_mask=True, time_major=True)
    add("nested", return_all_outputs=False)
    add("clock_rank_one", unroll=True)
    add("clock_rank_one", go_backwards=True)
    add("stateless")
    add("stateless", unroll=True, go_backwards=True, time_major=True)

    # Initially masked samples, from states of zeros and where the output is unlike the first state.
    for mask in ("left", "late", "nothing"):
        add("lstm", mask=mask, zero_start=True)
    for mask in ("late", "absent"):
        add("readout", mask=mask, unroll=mask == "absent")
    add("gru", mask="right", zero_start=True, go_backwards=True)
    add("gru", mask="right", zero_start=True, go_backwards=True, unroll=True, time_major=True)
    add("simple_rnn", mask="left", zero_output_for_mask=True)
    add("simple_rnn", mask="left", zero_output_for_mask=True, unroll=True, mask_rank=3)
    add("simple_rnn", mask="nothing", zero_output_for_mask=True)
    add("lstm", mask="right", zero_output_for_mask=True, go_backwards=True)
    add("lstm", mask="right", return_all_outputs=False)
    add("lstm", mask="right", return_all_outputs=False, unroll=True, time_major=True)

    # Spellings of a mask, sizes of one, lengths that mask as the contract says.
    add("gru", mask="gaps", mask_dtype="int32", mask_rank=3)
    add("gru", mask="right", mask_dtype="float32", time_major=True, mask_rank=3)
    add("gru", mask="full")
    add("single_step")
    add("single_step", mask="one step", zero_start=True)
    add("single_step", mask="one step", zero_start=True, unroll=True)
    add("single_sample", mask="one sample")
    add("single_sample", unroll=True, go_backwards=True, time_major=True)
    add("gru", input_length=[5, 3, 1], input_length_as="tensor")
    add("gru", input_length=[2, 1, 4], input_length_as="tensor", time_major=True)
    add("gru", input_length=[2, 5, 3], input_length_as="tensor", go_backwards=True, zero_start=True)
    add("lstm", input_length=[4, 2, 3], input_length_as="tensor", return_all_outputs=False)
    add("lstm", input_length=5)
    add("simple_rnn", input_length=[5, 5, 5], input_length_as="array", unroll=True)

    # From here on the differences. Outputs held before the first valid step:
    for problem in ("simple_rnn", "lstm_memory", "grid"):
        add(problem, mask="late", time_major=problem == "grid")
        add(problem, mask="left", unroll=problem == "simple_rnn")
    add("lstm", mask="absent")
    add("lstm", mask="nothing", return_all_outputs=False)
    add("lstm", mask="right", go_backwards=True)
    add("nested_states", mask="left")
    # last_output of samples whose last step is masked:
    add("gru", mask="right", zero_output_for_mask=True)
    add("gru", mask="late", zero_output_for_mask=True, unroll=True, zero_start=True)
    add("lstm", mask="right", zero_output_for_mask=True, return_all_outputs=False)
    add("lstm", mask="left", zero_output_for_mask=True, go_backwards=True, time_major=True)
    add("nested", mask="right", zero_output_for_mask=True)
    # Lengths that tf_keras ignores or counts from elsewhere:
    add("gru", input_length=[5, 3, 1], input_length_as="array")
    add("gru", input_length=3)
    add("gru", input_length=[5, 3, 1], input_length_as="tensor", unroll=True)
    add("gru", input_length=[4, 3, 2], input_length_as="tensor", mask="gaps")
    add("gru", input_length=[4, 3, 2], input_length_as="array", mask="gaps", unroll=True)
    add("gru", input_length=[4, 2, 1], input_length_as="tensor", go_backwards=True, zero_start=True)
    # Calls that tf_keras fails to make, and one that it makes against its own documentation:
    add("simple_rnn", bare_state=True, go_backwards=True)
    add("simple_rnn", bare_state=True, mask="right", unroll=True)
    add("clock_rank_one", mask="gaps")
    add("clock_rank_one", mask="gaps", unroll=True)
    add("nested", unroll=True)
    add("two_outputs", unroll=True)
    add("two_outputs", unroll=True, mask="gaps")
    add("stateless", mask="gaps")
    return [complete({"name": name_of(options), **options}) for options in listed]


def name_of(options):
    """The problem and every option that isn't the default."""
    words = [options["problem"]]
    for key, value in options.items():
        if value is not False and key != "problem" and complete({})[key] != value:
            words.append(key if value is True else f"{key}={value}")
    if not options.get("return_all_outputs", True):
        words.append("last_only")
    return "-".join(words).replace(" ", "")


def add_length_mask(configuration):
    """The name of the mask that says the same as a configuration's mask and `input_length`."""
    lengths = np.broadcast_to(configuration["input_length"], B)
    valid = np.arange(T) < lengths[:, None]
    mask = mask_array(configuration, MASKS)
    name = f"lengths {lengths.tolist()}"
    if mask is not None:
        valid = valid & mask
        name += f" and {configuration['mask']}"
    MASKS[name] = ["".join("01"[int(v)] for v in row) for row in valid]
    return name


def call(configuration, problems):
    """One call of tf_keras, made eagerly and inside `tf.function`.

    Returns:
        `(result, None)`, or `(None, message)` if the call failed both ways.
    """
    problem = problems[configuration["problem"]]

    def convert_length(length, spelling):
        if spelling == "python":
            return length
        array = np.array(length, np.int32)
        return tf.constant(array) if spelling == "tensor" else array

    def run():
        step = STEPS[problem.step](OPS, tree_map(tf.constant, problem.weights))
        return tf_keras.backend.rnn(
            step, *arguments(configuration, problem, MASKS, tf.constant, convert_length)
        )

    results, failures = [], []
    for way in (run, tf.function(run)):
        try:
            last_output, outputs, new_states = way()
            results.append((last_output, outputs, tuple(new_states)))
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            failures.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if len(results) == 1:
        raise RuntimeError(f"{configuration['name']}: {failures} only one way")
    if failures:
        return None, failures[0]
    eager, graph = ([leaf.numpy() for leaf in leaves(result)] for result in results)
    for one, other in zip(eager, graph, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        assert one.dtype == other.dtype
    return tree_map(lambda leaf: leaf.numpy(), results[0]), None


def differences(configuration, problem, result):
    """Every kind of documented difference that a configuration runs into, with its `instead`."""
    c = configuration
    length = c["input_length"]
    mask = mask_array(c, MASKS)
    if c["bare_state"]:
        yield "bare_state", {"bare_state": False}
    if c["unroll"] and c["problem"] in ("two_outputs", "nested"):
        yield "unrolled_nest", {"unroll": False}
    if length is not None and np.min(length) < T:
        as_contract = c["input_length_as"] == "tensor" and mask is None and not c["unroll"]
        if not as_contract or (c["go_backwards"] and np.max(length) < T):
            yield "input_length", {"input_length": None, "mask": add_length_mask(c)}
    if mask is None:
        return
    in_order = mask[:, ::-1] if c["go_backwards"] else mask
    if not problem.initial_states:
        yield "mask_without_states", None
    if any(leaf.ndim == 1 for leaf in leaves(problem.initial_states)):
        yield "rank_one_state", {"problem": c["problem"].removesuffix("_rank_one")}
    if c["zero_output_for_mask"]:
        if c["unroll"] and not c["return_all_outputs"]:
            yield "unrolled_zeroed_last", {"unroll": False}
        elif c["unroll"] and c["go_backwards"] and (mask != in_order).any():
            yield "unrolled_backwards_zeroed", {"unroll": False}
        if (in_order.any(1) & ~in_order[:, -1]).any():
            yield "last_output_zeroed", {"zero_output_for_mask": False}
    elif result is not None and not c["zero_start"] and not in_order[:, 0].all():
        first = problem.initial_states[0] if problem.initial_states else None
        if isinstance(result[0], np.ndarray) and np.shape(first) == result[0].shape:
            yield "initially_masked", None


class ArrayStore(dict):
    """Arrays by key; equal arrays are kept once."""

    def add(self, array):
        """The key of an array, under which it is stored from now on."""
        array = np.ascontiguousarray(array)
        for key, known in self.items():
            if known.dtype == array.dtype and np.array_equal(known, array):
                return key
        key = f"a{len(self)}"
        self[key] = array
        return key


def main():
    """Runs all configurations and writes both files."""
    problems, store, listed = build_problems(), ArrayStore(), []
    for configuration in build_configurations():
        result, failure = call(configuration, problems)
        kinds = list(differences(configuration, problems[configuration["problem"]], result))
        if len(kinds) > 1 or (failure and not kinds):
            raise RuntimeError(
                f"{configuration['name']}: {failure}, differences {kinds}; expected at most one"
            )
        entry = configuration | {"failure": failure, "difference": None}
        entry["result"] = None if failure else tree_map(store.add, result)
        for kind, instead in kinds:
            entry["difference"] = {"kind": kind, "instead": instead, "result": None}
            if instead is not None:
                intended, _ = call(configuration | instead, problems)
                entry["difference"]["result"] = tree_map(store.add, intended)
        listed.append(entry)
    meta = {
        "versions": {
            "numpy": np.__version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "tf_keras": tf_keras.__version__,
        },
        "parameters": list(inspect.signature(tf_keras.backend.rnn).parameters),
        "masks": MASKS,
        "problems": {name: tree_map_problem(store, problem) for name, problem in problems.items()},
        "configurations": listed,
    }
    np.savez_compressed(HERE / "arrays.npz", **store)
    with open(HERE / "configurations.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.write("\n")
    differing = sum(entry["difference"] is not None for entry in listed)
    print(f"{len(listed)} configurations, {differing} of them with a documented difference")


def tree_map_problem(store, problem):
    """A `Problem` as JSON."""
    return {"step": problem.step} | {
        field: None if part is None else tree_map(store.add, part)
        for field, part in list(problem._asdict().items())[1:]
    }


if __name__ == "__main__":
    main()
