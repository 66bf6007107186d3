"""How a configuration becomes the eleven arguments of a call; the generator and the test share it.

A configuration is a JSON object:

    name                  unique, readable
    problem               step, inputs, states, constants and weights (key of `problems`)
    zero_start            initial states of zeros, as Keras's layers pass them
    bare_state            the one initial state is passed itself, not in a list
    mask, mask_dtype, mask_rank     key of `masks` or null, and how it is spelled
    input_length, input_length_as   an integer or integers [B]; "python", "array" or "tensor"
    go_backwards, unroll, time_major, zero_output_for_mask, return_all_outputs

Arrays lie in `arrays.npz`, inputs batch-major. In the JSON a string stands for the array of that
key, a list for a tuple, an object for a dict.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
DEFAULTS = {
    "zero_start": False,
    "bare_state": False,
    "mask": None,
    "mask_dtype": "bool",
    "mask_rank": 2,
    "input_length": None,
    "input_length_as": "python",
    "go_backwards": False,
    "unroll": False,
    "time_major": False,
    "zero_output_for_mask": False,
    "return_all_outputs": True,
}


class Problem(NamedTuple):
    """A step and everything that it works on, as NumPy arrays."""

    step: str
    inputs: object
    initial_states: list
    constants: list | None
    weights: dict


def load():
    """Reads the golden data: the JSON's content and the arrays."""
    with open(HERE / "configurations.json", encoding="utf-8") as file:
        meta = json.load(file)
    with np.load(HERE / "arrays.npz") as file:
        arrays = dict(file)
    return meta, arrays


def tree_map(function, tree):
    """Maps over lists, tuples and dicts (sorted by key); anything else is a leaf."""
    if isinstance(tree, dict):
        return {key: tree_map(function, tree[key]) for key in sorted(tree)}
    if isinstance(tree, list | tuple):
        return type(tree)(tree_map(function, item) for item in tree)
    return function(tree)


def leaves(tree):
    """The leaves of a tree, in the order of `tree_map`."""
    found = []
    tree_map(found.append, tree)
    return found


def decode(tree, arrays):
    """The tree that a piece of JSON stands for."""
    if isinstance(tree, dict):
        return {key: decode(item, arrays) for key, item in tree.items()}
    if isinstance(tree, list):
        return tuple(decode(item, arrays) for item in tree)
    return arrays[tree]


def decode_problem(description, arrays):
    """The `Problem` that a piece of JSON stands for."""
    constants = description["constants"]
    return Problem(
        description["step"],
        decode(description["inputs"], arrays),
        list(decode(description["initial_states"], arrays)),
        None if constants is None else list(decode(constants, arrays)),
        decode(description["weights"], arrays),
    )


def complete(configuration):
    """A configuration with every key in place."""
    unknown = set(configuration) - set(DEFAULTS) - {"name", "problem"}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} in configuration {configuration}")
    return DEFAULTS | configuration


def mask_array(configuration, masks):
    """The mask as booleans `[B, T]` in stored order, or None."""
    if configuration["mask"] is None:
        return None
    return np.array([[letter == "1" for letter in row] for row in masks[configuration["mask"]]])


def arguments(configuration, problem, masks, convert, convert_length):
    """The arguments after `step_function`, all ten, in Keras's order.

    Args:
        configuration: A completed configuration.
        problem: Its `Problem`.
        masks: The mask table of the JSON.
        convert: From a NumPy array to the library's.
        convert_length: From `(input_length, input_length_as)` to what a user would pass.
    """

    def arrange(x):
        return convert(np.swapaxes(x, 0, 1) if configuration["time_major"] else x)

    def start(x):
        return convert(np.zeros_like(x) if configuration["zero_start"] else x)

    states = tree_map(start, problem.initial_states)
    mask = mask_array(configuration, masks)
    if mask is not None:
        mask = mask.astype(configuration["mask_dtype"])
        mask = arrange(mask if configuration["mask_rank"] == 2 else mask[:, :, None])
    length = configuration["input_length"]
    return (
        tree_map(arrange, problem.inputs),
        states[0] if configuration["bare_state"] else states,
        configuration["go_backwards"],
        mask,
        None if problem.constants is None else tree_map(convert, problem.constants),
        configuration["unroll"],
        None if length is None else convert_length(length, configuration["input_length_as"]),
        configuration["time_major"],
        configuration["zero_output_for_mask"],
        configuration["return_all_outputs"],
    )
