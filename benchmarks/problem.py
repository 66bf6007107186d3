"""The numbers that every library is given, and what they must give back: NumPy alone.

Weights are in Keras's layout: `kernel` [D, G*H], `recurrent_kernel` [H, G*H], `bias` [G*H], or
[2, 3*H] for the GRU. Gates stand in the order i, f, g, o (LSTM) and z, r, h (GRU).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.cases import GATES, Case

Weights = dict[str, np.ndarray]


class Problem(NamedTuple):
    """One case in numbers, all float32.

    Attributes:
        weights: the parameters in Keras's layout.
        inputs: [B, T, D].
        loss_weights: [B, T, H]; the loss is the mean of outputs times these.
        reference: the outputs [B, T, H] by NumPy.
        reset_before: for a GRU, the outputs of the older form that resets before the matmul.
    """

    weights: Weights
    inputs: np.ndarray
    loss_weights: np.ndarray
    reference: np.ndarray
    reset_before: np.ndarray


def make(case: Case, seed: int = 0) -> Problem:
    """Random weights and inputs for a case, and the outputs that they lead to."""
    rng = np.random.default_rng(seed)
    weights = draw_weights(case, rng)
    inputs = _normal(rng, case.B, case.T, case.D)
    loss_weights = _normal(rng, case.B, case.T, case.H)
    reference = run(case.cell, weights, inputs)
    reset_before = run("gru_reset_before", weights, inputs) if case.cell == "gru" else reference
    return Problem(weights, inputs, loss_weights, reference, reset_before)


def draw_weights(case: Case, rng: np.random.Generator) -> Weights:
    """Random weights for a case."""
    gates = GATES[case.cell]

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return scale * _normal(rng, *shape)

    columns = gates * case.H
    weights = {
        "kernel": normal(case.D, columns, scale=case.D**-0.5),
        "recurrent_kernel": normal(case.H, columns, scale=0.8 * case.H**-0.5),
        "bias": normal(*((2,) if case.cell == "gru" else ()), columns, scale=0.1),
    }
    if case.cell == "gru":
        # Flax's cell has no recurrent bias in the candidate; without it all compute the same.
        weights["bias"][1, 2 * case.H :] = 0
    return weights


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def save(problem: Problem, path: Path) -> None:
    """Writes a problem where the workers can read it."""
    arrays = problem._asdict() | {f"weights/{k}": v for k, v in problem.weights.items()}
    del arrays["weights"]
    np.savez(path, **arrays)


def load(path: str) -> Problem:
    """Reads what `save` wrote."""
    with np.load(path) as arrays:
        weights = {k.removeprefix("weights/"): arrays[k] for k in arrays if "/" in k}
        return Problem(weights, **{k: arrays[k] for k in arrays if "/" not in k})


def sigmoid(z: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return 0.5 * np.tanh(0.5 * z) + 0.5


def _lstm(weights: Weights, x: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    h, c = states
    z = x @ weights["kernel"] + h @ weights["recurrent_kernel"] + weights["bias"]
    i, f, g, o = np.split(z, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return [sigmoid(o) * np.tanh(c), c]


def _gru(weights: Weights, x: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    (h,) = states
    xz, xr, xh = np.split(x @ weights["kernel"] + weights["bias"][0], 3, axis=-1)
    hz, hr, hh = np.split(h @ weights["recurrent_kernel"] + weights["bias"][1], 3, axis=-1)
    z = sigmoid(xz + hz)
    return [z * h + (1 - z) * np.tanh(xh + sigmoid(xr + hr) * hh)]


def _gru_reset_before(
    weights: Weights, x: np.ndarray, states: list[np.ndarray]
) -> list[np.ndarray]:
    (h,) = states
    xz, xr, xh = np.split(x @ weights["kernel"] + weights["bias"].sum(0), 3, axis=-1)
    uz, ur, uh = np.split(weights["recurrent_kernel"], 3, axis=-1)
    z = sigmoid(xz + h @ uz)
    return [z * h + (1 - z) * np.tanh(xh + (sigmoid(xr + h @ ur) * h) @ uh)]


def _elman(weights: Weights, x: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    (h,) = states
    return [np.tanh(x @ weights["kernel"] + h @ weights["recurrent_kernel"] + weights["bias"])]


_STEPS = {"lstm": _lstm, "gru": _gru, "gru_reset_before": _gru_reset_before, "elman": _elman}


def run(cell: str, weights: Weights, inputs: np.ndarray) -> np.ndarray:
    """Outputs [B, T, H] of a cell over inputs [B, T, D], from zero states."""
    batch, time, _ = inputs.shape
    units = weights["recurrent_kernel"].shape[0]
    states = [np.zeros((batch, units), inputs.dtype)] * (2 if cell == "lstm" else 1)
    outputs = np.empty((batch, time, units), inputs.dtype)
    for t in range(time):
        states = _STEPS[cell](weights, inputs[:, t], states)
        outputs[:, t] = states[0]
    return outputs
