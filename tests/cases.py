"""The table of cases: every kind of step function that the library has to serve.

Each step is written once, as ``make_step(xp, params) -> step_function``, and runs under NumPy
(``xp=numpy``, for the plain-Python reference) as well as under JAX (``xp=jax.numpy``). Arguments
are drawn as NumPy arrays, batch-major. All axes have different lengths, so that no two of them can
be taken for each other unnoticed.

A new case joins every test that goes over ``CASES``:

    @case(params=lambda d: {"w": d.normal(FEATURES, UNITS)}, states=lambda d: [...])
    def my_step(xp, p):
        def step(x, states): ...
        return step
"""

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


# The cells that people write.


@case(params=dense, states=one_state)
def simple_rnn(xp, p):
    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0] @ p["u"] + p["b"])
        return h, [h]

    return step


@case(params=lambda d: dense(d, 4), states=two_states)
def lstm(xp, p):
    def step(x, states):
        h, c = lstm_update(xp, x @ p["w"] + states[0] @ p["u"] + p["b"], states[1])
        return h, [h, c]

    return step


@case(params=lambda d: dense(d, 3), states=one_state)
def gru(xp, p):
    def step(x, states):
        (h,) = states
        xz, xr, xh = xp.split(x @ p["w"] + p["b"], 3, axis=-1)
        hz, hr, hh = xp.split(h @ p["u"], 3, axis=-1)
        z, r = sigmoid(xp, xz + hz), sigmoid(xp, xr + hr)
        h = z * h + (1.0 - z) * xp.tanh(xh + r * hh)
        return h, [h]

    return step


@case(
    params=lambda d: {gate: dense(d) for gate in "ifgo"},
    states=lambda d: tuple(two_states(d)),
)
def four_matmul_lstm(xp, p):
    """One pair of matmuls for each gate; states in a tuple, returned as a list."""

    def step(x, states):
        h, c = states
        z = [x @ p[gate]["w"] + h @ p[gate]["u"] + p[gate]["b"] for gate in "ifgo"]
        h, c = lstm_update(xp, xp.concatenate(z, axis=-1), c)
        return h, [h, c]

    return step


@case(
    params=lambda d: {"k": d.normal(FEATURES + UNITS, 4 * UNITS), "b": d.normal(4 * UNITS)},
    states=two_states,
)
def concatenating_lstm(xp, p):
    """One matmul over ``[x, h]``; states in a list, returned as a tuple."""

    def step(x, states):
        h, c = states
        h, c = lstm_update(xp, xp.concatenate([x, h], axis=-1) @ p["k"] + p["b"], c)
        return h, (h, c)

    return step


# What becomes of the output.


@case(params=lambda d: dense(d) | {"v": d.normal(UNITS, OUTPUTS)}, states=one_state)
def readout(xp, p):
    """The output is no state and has another shape: before the first valid step it is zero."""

    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0] @ p["u"] + p["b"])
        return h @ p["v"], [h]

    return step


@case(params=dense, states=one_state)
def scaled_output(xp, p):
    """The output has the first state's shape but is another value."""

    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0] @ p["u"] + p["b"])
        return 2.0 * h + 1.0, [h]

    return step


@case(params=dense, states=one_state)
def output_ignores_state(xp, p):
    def step(x, states):
        return xp.tanh(x @ p["w"]), [0.5 * states[0] + x @ p["w"]]

    return step


@case(params=lambda d: {"w": d.normal(FEATURES, UNITS)}, states=one_state)
def no_output(xp, p):
    def step(x, states):
        return None, [xp.tanh(states[0] + x @ p["w"])]

    return step


@case(
    params=dense,
    inputs=lambda d: {
        "flat": d.normal(d.batch, d.time, FEATURES),
        "deep": {"grid": d.normal(d.batch, d.time, HEIGHT, WIDTH)},
    },
    states=one_state,
)
def nested_inputs_and_outputs(xp, p):
    def step(x, states):
        pooled = xp.tanh(x["deep"]["grid"]).sum(axis=-2)
        h = xp.tanh((x["flat"] + pooled) @ p["w"] + states[0] @ p["u"] + p["b"])
        return (h, {"grid": x["deep"]["grid"] * h[:, :1, None], "mean": h.mean(axis=-1)}), [h]

    return step


# What states look like.


class Memory(NamedTuple):
    """A state container whose first field has the shape of the output."""

    h: Any
    c: Any


@case(
    params=lambda d: dense(d, 4) | {"v": d.normal(UNITS, OUTPUTS)},
    states=lambda d: {"h": d.normal(d.batch, UNITS), "c": d.normal(d.batch, UNITS)},
)
def dict_state(xp, p):
    def step(x, states):
        h, c = lstm_update(xp, x @ p["w"] + states["h"] @ p["u"] + p["b"], states["c"])
        return h @ p["v"], {"h": h, "c": c}

    return step


@case(params=lambda d: dense(d, 4), states=lambda d: Memory(*two_states(d)))
def namedtuple_state(xp, p):
    def step(x, states):
        h, c = lstm_update(xp, x @ p["w"] + states.h @ p["u"] + p["b"], states.c)
        return h, Memory(h, c)

    return step


@case(
    params=dense,
    states=lambda d: (
        d.normal(d.batch, UNITS),
        {"c": d.normal(d.batch, UNITS), "trace": (d.normal(d.batch, HEIGHT, WIDTH),)},
    ),
)
def nested_states(xp, p):
    def step(x, states):
        h, memory = states
        trace = 0.5 * memory["trace"][0] + x[:, None, :]
        c = 0.9 * memory["c"] + x @ p["w"] * trace.mean(axis=(1, 2))[:, None]
        h = xp.tanh(c + h @ p["u"] + p["b"])
        return h, (h, {"c": c, "trace": (trace,)})

    return step


@case(params=dense, states=lambda d: d.normal(d.batch, UNITS))
def bare_state(xp, p):
    """``initial_states`` is one array; the step sees a list of one."""

    def step(x, states):
        (h,) = states
        h = xp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, [h]

    return step


@case(params=lambda d: {"a": d.normal()}, states=lambda d: [d.normal(d.batch)])
def rank_1_state(xp, p):
    """States and outputs of shape [B]."""

    def step(x, states):
        mean = p["a"] * states[0] + x.mean(axis=-1)
        return mean, [mean]

    return step


@case(
    params=lambda d: {"a": d.normal(HEIGHT, WIDTH), "b": d.normal(WIDTH, WIDTH)},
    inputs=lambda d: d.normal(d.batch, d.time, HEIGHT, WIDTH),
    states=lambda d: [d.normal(d.batch, HEIGHT, WIDTH)],
)
def rank_3_state(xp, p):
    """A state with two spatial axes, mixed along one of them as a convolution does."""

    def step(x, states):
        (s,) = states
        s = xp.tanh(x + p["a"] * s + xp.roll(s, 1, axis=1) @ p["b"])
        return s, [s]

    return step


@case(params=dense, states=lambda d: [d.normal(d.batch, UNITS), d.integers(5, d.batch)])
def counter(xp, p):
    """An integer state, and an integer output beside a float one."""

    def step(x, states):
        h, n = states
        h = xp.tanh(x @ p["w"] + h @ p["u"] + 0.1 * n.astype(h.dtype)[:, None])
        return (h, n), [h, n + 1]

    return step


@case(
    params=dense,
    states=lambda d: [d.normal(d.batch, UNITS), d.integers(2, d.batch).astype(bool)],
)
def boolean_state(xp, p):
    def step(x, states):
        h, seen = states
        seen = seen | (x[:, 0] > 0.4)
        h = xp.where(seen[:, None], xp.tanh(x @ p["w"] + h @ p["u"]), h)
        return h, [h, seen]

    return step


@case(
    states=lambda d: [d.normal(d.batch, FEATURES) for _ in range(3)],
)
def swapped_states(xp, p):
    """Two states change places and a third is passed through."""

    def step(x, states):
        a, b, kept = states
        return a + kept, [b, xp.tanh(a + x), kept]

    return step


@case(params=dense, states=one_state, compute_dtype="bfloat16", smooth=False)
def bfloat16_compute(xp, p):
    """Computes and gives out bfloat16; the state is float32 and stays so."""

    def narrow(x):
        return x.astype(jnp.bfloat16)

    def step(x, states):
        z = narrow(x) @ narrow(p["w"]) + narrow(states[0]) @ narrow(p["u"]) + narrow(p["b"])
        h = xp.tanh(narrow(z))
        return h, [h]

    return step


@case(params=dense, states=lambda d: [d.normal(d.batch, UNITS).astype(jnp.bfloat16)],
      compute_dtype="bfloat16", smooth=False)  # fmt: skip
def bfloat16_state(xp, p):
    """Computes and gives out float32; the state is bfloat16 and stays so."""

    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0].astype(x.dtype) @ p["u"] + p["b"])
        return h, [h]

    return step


@case(
    inputs=lambda d: d.integers(HEIGHT, d.batch, d.time, 1),
    params=lambda d: dense(d) | {"table": d.normal(HEIGHT, FEATURES)},
    states=one_state,
)
def tokens(xp, p):
    """Integer inputs that index an embedding."""

    def step(x, states):
        h = xp.tanh(p["table"][x[:, 0]] @ p["w"] + states[0] @ p["u"])
        return h, [h]

    return step


# Constants, and states that cannot be held.


@case(
    params=lambda d: {"b": d.normal(UNITS)},
    states=one_state,
    constants=lambda d: [
        d.normal(FEATURES, UNITS),
        {"u": d.normal(UNITS, UNITS), "gain": d.normal(d.batch, UNITS)},
    ],
)
def constants(xp, p):
    """Weights and a per-sample gain come as constants, one of them a pytree."""

    def step(x, states):
        h, w, other = states
        h = xp.tanh(x @ w + (h * other["gain"]) @ other["u"] + p["b"])
        return h, [h]

    return step


@case(params=lambda d: {"w": d.normal(FEATURES, UNITS)}, states=lambda _: [], holdable=False)
def stateless(xp, p):
    def step(x, states):
        return xp.tanh(x @ p["w"]), []

    return step


@case(
    params=dense,
    states=lambda d: [d.normal(d.batch, UNITS), d.normal()],
    holdable=False,
)
def unbatched_state(xp, p):
    """The second state is a scalar that all samples share."""

    def step(x, states):
        h, level = states
        h = xp.tanh(x @ p["w"] + h @ p["u"] + level)
        return h, [h, 0.5 * level + h.mean()]

    return step
