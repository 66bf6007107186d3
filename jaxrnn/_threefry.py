"""Threefry, JAX's default random generator, as one chain of operations on each number.

JAX compiles the twenty rounds of this cipher for a CPU as a loop whose state are whole arrays, read
and written five times. Spelled out the rounds are part of the kernel that makes use of the bits.
Measured on a CPU, half a million numbers that are compared with a threshold took 0.4 ms so, against
3.5 ms (JAX 0.10) and 6 ms (0.12), and were compiled in a third of the time. What is encrypted, and
which bits are made of that, is left to JAX; the cipher is Threefry-2x32-20, which does not change.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._device import is_cpu
from jaxrnn._jaxpr import Equation, at, bind, inline, trace
from jaxrnn._primitives import THREEFRY, random_bits_p, threefry2x32_p

Array = jax.Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def bind_spelled_out(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """Applies the primitive of `equation` to `operands`, on a CPU with threefry spelled out."""
    primitive = equation.primitive
    if primitive not in THREEFRY or not is_cpu():
        return bind(equation, operands)
    function, names = THREEFRY[primitive]
    key, *others = operands
    if (
        equation.params.keys() != set(names)
        or jax.random.key_impl(key) != "threefry2x32"
        or any(jnp.shape(x) != key.shape for x in others)
    ):
        return bind(equation, operands)
    params = [equation.params[name] for name in names]

    def draw(*operands: Array) -> Array:
        return function(*operands, *params)

    for _ in key.shape:
        draw = jax.vmap(draw)
    with at(equation):
        given = [jax.random.key_data(key), *others]
        traced = trace(draw, *given)
        (drawn,) = inline(traced.program, *traced.consts, *given, apply=_bind_rounds)
        if primitive is random_bits_p:
            return [drawn]
        # Or XLA would make keys within the kernels that read them, one within the other: those of a
        # few steps in one iteration took it minutes to compile.
        return [jax.random.wrap_key_data(lax.optimization_barrier(drawn), impl="threefry2x32")]


def _bind_rounds(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    is_cipher = equation.primitive is threefry2x32_p
    return _threefry(*operands) if is_cipher else bind(equation, operands)


def _threefry(first_key: Array, second_key: Array, first: Array, second: Array) -> list[Array]:
    """The cipher, on pairs of numbers of 32 bits."""
    keys = (first_key, second_key, first_key ^ second_key ^ jnp.uint32(_PARITY))
    first, second = first + keys[0], second + keys[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            first = first + second
            second = first ^ _rotated(second, distance)
        first = first + keys[(i + 1) % 3]
        second = second + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return [first, second]


def _rotated(numbers: Array, distance: int) -> Array:
    """Numbers of 32 bits rotated to the left."""
    return (numbers << jnp.uint32(distance)) | (numbers >> jnp.uint32(32 - distance))
