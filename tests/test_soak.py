"""Random programs against the plain Python loop. What fails, fails by its seed."""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, reference_rnn, scalar_of

import jaxrnn

PROGRAMS, PER_TEST = 80, 10


class Program(NamedTuple):
    """One random program.

    Attributes:
        step: (rnn, xp, params) -> step function; `rnn` is what an inner call goes to.
        params, inputs, states: NumPy arrays, `states` in their container.
        flags: of the outermost call.
    """

    step: Any
    params: Any
    inputs: Any
    states: Any
    flags: dict[str, Any]


def draw_program(seed: int) -> Program:
    """Shapes, the way in which every state is made, nesting, containers and flags by chance."""
    rng = np.random.default_rng(seed)
    batch, time = int(rng.integers(1, 4)), int(rng.integers(1, 8))
    features, *units = (int(n) for n in rng.integers(1, 6, size=1 + rng.integers(1, 3)))
    kinds = [rng.choice(["elman", "gated", "concatenating", "affine", "nested"]) for _ in units]
    output = rng.choice(["state", "readout", "tree", "with_input"])
    counts = bool(rng.random() < 0.3)

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(0.5 * rng.standard_normal(shape), np.float32)

    params = {"readout": normal(units[-1], 3)}
    for n, (size, kind) in enumerate(zip(units, kinds, strict=True)):
        columns = 2 * size if kind == "gated" else size
        # Every state sees the one before it, and the first one sees the last.
        before = units[n - 1]
        params[f"{n}"] = {
            "w": normal(features, columns),
            "u": normal(size, columns),
            "v": normal(before, columns),
            "k": normal(features + size, size),
            "b": normal(columns),
        }

    def step(rnn: Any, xp: ModuleType, p: Any) -> Any:
        def new_state(n: int, kind: str, x: Any, hs: list[Any]) -> Any:
            q, h, before = p[f"{n}"], hs[n], hs[n - 1]
            if kind == "concatenating":
                return xp.tanh(xp.concatenate([x, h], axis=-1) @ q["k"] + q["b"])
            z = x @ q["w"] + h @ q["u"] + before @ q["v"] + q["b"]
            if kind == "gated":
                gate, candidate = xp.split(z, 2, axis=-1)
                gate = 1 / (1 + xp.exp(-gate))
                return gate * h + (1 - gate) * xp.tanh(candidate)
            if kind == "affine":
                return 0.5 * h + 0.3 * z
            if kind == "nested":

                def inner(x: Any, states: Any) -> Any:
                    h = xp.tanh(x + states[0] @ q["u"])
                    return h * x, [h]

                last_output, _, (last,) = rnn(inner, xp.stack([z, 0.5 * z, xp.sin(z)], 1), [h])
                return 0.5 * (last + last_output)
            return xp.tanh(z)

        def body(x: Any, states: Any) -> Any:
            if flags.get("constants"):
                *states, shift = states
                x = x + shift
            hs = list(states[: len(units)])
            new = [new_state(n, kind, x, hs) for n, kind in enumerate(kinds)]
            readout = new[-1] @ p["readout"]
            y = {
                "state": new[0],
                "readout": readout,
                "tree": {"y": (readout, hs[0]), "h": new[-1] * new[-1]},
                "with_input": xp.concatenate([readout, x], axis=-1),
            }[output]
            return y, container([*new, *(count + 1 for count in states[len(units) :])])

        return body

    states = [normal(batch, size) for size in units]
    if counts:
        states.append(np.asarray(rng.integers(0, 9, batch), np.int32))
    container = (list, tuple)[rng.integers(2)]
    flags: dict[str, Any] = {
        "go_backwards": bool(rng.random() < 0.5),
        "unroll": [False, False, True, 2][rng.integers(4)],
        "zero_output_for_mask": bool(rng.random() < 0.3),
        "return_all_outputs": bool(rng.random() < 0.7),
        "remat": bool(rng.random() < 0.3),
        "chunk": ["auto", None, 1, 2, 3, 50][rng.integers(6)],
        "method": ["sequential", "sequential", "sequential", "lax"][rng.integers(4)],
        "time_major": bool(rng.random() < 0.3),
    }
    for name in ("mask", "reset"):
        if rng.random() < 0.4:
            pattern = rng.random((batch, time)) < 0.7
            flags[name] = pattern.T if flags["time_major"] else pattern
    if rng.random() < 0.3:
        flags["input_length"] = np.asarray(rng.integers(0, time + 1, batch), np.int32)
    if rng.random() < 0.3:
        flags["constants"] = [normal(batch, features)]
    inputs = normal(batch, time, features)
    return Program(
        step,
        params,
        inputs.swapaxes(0, 1) if flags["time_major"] else inputs,
        container(states),
        flags,
    )


@pytest.mark.parametrize("first", range(0, PROGRAMS, PER_TEST))
def test_random_programs_equal_the_plain_loop(first):
    """Values of all programs; of every tenth the gradient by everything, too."""
    for seed in range(first, first + PER_TEST):
        print(f"seed {seed}")
        program = draw_program(seed)

        def call(rnn, xp, operands, program=program):
            params, inputs, states = operands
            return rnn(program.step(rnn, xp, params), inputs, states, **program.flags)

        operands = program.params, program.inputs, program.states
        ours = functools.partial(call, jaxrnn.rnn, jnp)
        assert_same(jax.jit(ours)(operands), call(reference_rnn, np, operands))
        if seed % 10 == 0:
            loop = functools.partial(call, functools.partial(reference_rnn, xp=jnp), jnp)
            actual, expected = (
                jax.jit(jax.grad(lambda o, f=f: scalar_of(f(o)), allow_int=True))(operands)
                for f in (ours, loop)
            )
            floats = [
                [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == np.float32]
                for tree in (actual, expected)
            ]
            assert len(floats[0]) > len(jax.tree.leaves(program.params)) // 2
            assert_same(*floats, scale=10)
