"""What a case is, how its arguments are drawn, and what many of them have in common."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BATCH, TIME = 3, 7
FEATURES, UNITS, OUTPUTS = 2, 4, 5
HEIGHT, WIDTH = 6, 2


class Draw:
    """Draws the arrays of a case; the axes `batch` and `time` are the caller's choice."""

    def __init__(self, batch: int, time: int, seed: int):
        self.batch, self.time = batch, time
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        """Normal float32 values, small enough to keep tanh away from saturation."""
        return np.asarray(0.5 * self._rng.standard_normal(shape), np.float32)

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """int32 values in ``[0, high)``."""
        return np.asarray(self._rng.integers(high, size=shape), np.int32)


class Arguments(NamedTuple):
    """What a case calls `rnn` with: NumPy arrays, batch-major."""

    params: Any
    inputs: Any
    initial_states: Any
    constants: Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A step function with builders for everything it needs.

    Attributes:
        name: the name of the step's maker.
        make_step: ``(xp, params) -> step_function``.
        params, inputs, states: ``Draw -> pytree`` of NumPy arrays.
        constants: the same, or None for a step without constants.
        holdable: every state has the batch axis and there is one, so that masks, lengths and
            resets are allowed.
        compute_dtype: the narrowest dtype that the step computes in; sets the tolerance.
        smooth: differentiable, in float64 too, with respect to every float argument.
    """

    name: str
    make_step: Callable[[ModuleType, Any], Callable]
    params: Callable[[Draw], Any]
    inputs: Callable[[Draw], Any]
    states: Callable[[Draw], Any]
    constants: Callable[[Draw], Any] | None
    holdable: bool
    compute_dtype: str
    smooth: bool

    def arguments(self, batch: int = BATCH, time: int = TIME, seed: int = 0) -> Arguments:
        """The arguments of one problem; equal seeds give equal values."""
        draw = Draw(batch, time, seed)
        return Arguments(
            self.params(draw),
            self.inputs(draw),
            self.states(draw),
            None if self.constants is None else self.constants(draw),
        )

    def call(self, rnn: Callable, xp: ModuleType, arguments: Arguments, **flags: Any):
        """Calls `rnn` (the library's, or the reference) with this case's step.

        With ``time_major=True`` among the flags, inputs, mask and reset are transposed here.
        """
        params, inputs, initial_states, constants = (
            jax.tree.map(jnp.asarray, arguments) if xp is jnp else arguments
        )
        if flags.get("time_major"):
            inputs = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), inputs)
            for name in {"mask", "reset"} & flags.keys():
                flags[name] = flags[name].swapaxes(0, 1)
        step = self.make_step(xp, params)
        return rnn(step, inputs, initial_states, constants=constants, **flags)

    def scan_problem(self, xp: ModuleType, arguments: Arguments):
        """The case as arguments of ``lax.scan``: ``(body, init, xs)``, with xs time-major."""
        params, inputs, initial_states, constants = (
            jax.tree.map(jnp.asarray, arguments) if xp is jnp else arguments
        )
        bare = isinstance(initial_states, np.ndarray | jax.Array)
        init = [initial_states] if bare else initial_states
        step = self.make_step(xp, params)

        def body(carry, x):
            states = carry if constants is None else type(carry)([*carry, *constants])
            output, new_states = step(x, states)
            new_states = jax.tree.map(lambda new, old: new.astype(old.dtype), new_states, carry)
            return new_states, output

        return body, init, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), inputs)


CASES: dict[str, Case] = {}


def case(
    *, states, params=None, inputs=None, constants=None, holdable=True,
    compute_dtype="float32", smooth=True,
):  # fmt: skip
    """Enters the decorated maker of a step into `CASES` under its own name."""

    def enter(make_step):
        CASES[make_step.__name__] = Case(
            make_step.__name__,
            make_step,
            params or (lambda _: {}),
            inputs or (lambda d: d.normal(d.batch, d.time, FEATURES)),
            states,
            constants,
            holdable,
            compute_dtype,
            smooth,
        )
        return make_step

    return enter


def sigmoid(xp, x):
    """The logistic function from what NumPy and JAX share."""
    return 0.5 * xp.tanh(0.5 * x) + 0.5


def dense(d: Draw, gates: int = 1):
    """Kernel, recurrent kernel and bias of a layer with so many gates."""
    return {
        "w": d.normal(FEATURES, gates * UNITS),
        "u": d.normal(UNITS, gates * UNITS),
        "b": d.normal(gates * UNITS),
    }


def one_state(d: Draw):
    return [d.normal(d.batch, UNITS)]


def two_states(d: Draw):
    return [d.normal(d.batch, UNITS), d.normal(d.batch, UNITS)]


def lstm_update(xp, z, c):
    i, f, g, o = xp.split(z, 4, axis=-1)
    c = sigmoid(xp, f) * c + sigmoid(xp, i) * xp.tanh(g)
    return sigmoid(xp, o) * xp.tanh(c), c
