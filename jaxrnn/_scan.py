"""`scan`: `jax.lax.scan` over blocks of time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any
Body = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]

METHODS = ("auto", "sequential", "lax")


def check_options(chunk: Any, remat: Any, method: Any) -> None:
    """Raises the ValueError that a wrong option of the engine deserves."""
    chunk_is_count = isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1
    if not (chunk is None or chunk == "auto" or chunk_is_count):
        raise ValueError(
            f"chunk is {chunk!r}; expected 'auto', None, or a number of timesteps n >= 1."
        )
    if not isinstance(remat, bool):
        raise ValueError(f"remat is {remat!r}; expected True or False.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(map(repr, METHODS))}.")


def scan(
    f: Body,
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    chunk: int | str | None = "auto",
    remat: bool = False,
    method: str = "auto",
) -> tuple[PyTree, PyTree]:
    """Same result as `jax.lax.scan`."""
    check_options(chunk, remat, method)
    leaves = jax.tree.leaves(xs)
    time = leaves[0].shape[0] if leaves else length
    if not remat or not isinstance(time, int) or method == "lax":
        return lax.scan(f, init, xs, length, reverse, unroll)
    block = chunk if isinstance(chunk, int) else math.isqrt(time - 1) + 1

    def run_block(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return lax.scan(f, carry, xs, None, reverse, unroll)

    return over_blocks(run_block, init, xs, time, min(block, time), reverse, remat)


def over_blocks(
    run_block: Body,
    init: PyTree,
    xs: PyTree,
    time: int,
    block: int,
    reverse: bool,
    remat: bool,
) -> tuple[PyTree, PyTree]:
    """Runs `run_block` over consecutive blocks of time, the shorter remainder last.

    Args:
        run_block: `(carry, xs of one block) -> (carry, ys of that block)`.
        init: the first carry.
        xs: pytree of arrays `[T, ...]`.
        time: T.
        block: timesteps per block, at most T.
        reverse: whether the last block comes first.
        remat: whether only the carries between blocks are kept for the backward pass.

    Returns:
        The last carry, and ys as a pytree of arrays `[T, ...]`.
    """
    if remat:
        run_block = jax.checkpoint(run_block, prevent_cse=time < 2 * block)
    blocks, rest = divmod(time, block)
    if blocks == 1 and not rest:
        return run_block(init, xs)
    split = rest if reverse else time - rest
    first, second = (jax.tree.map(lambda x: x[s], xs) for s in (slice(split), slice(split, None)))
    main, remainder = (second, first) if reverse else (first, second)
    main = jax.tree.map(lambda x: x.reshape(blocks, block, *x.shape[1:]), main)
    carry, ys = lax.scan(run_block, init, main, reverse=reverse)
    ys = jax.tree.map(lambda y: y.reshape(blocks * block, *y.shape[2:]), ys)
    if rest:
        carry, ys_rest = run_block(carry, remainder)
        parts = (ys_rest, ys) if reverse else (ys, ys_rest)
        ys = jax.tree.map(lambda *y: jnp.concatenate(y), *parts)
    return carry, ys
