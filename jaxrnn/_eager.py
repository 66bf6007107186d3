"""Calls outside `jit`: compiled once for each function that a caller hands in."""

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PyTree = Any
Run = Callable[[Any, Any, PyTree], PyTree]


def run_compiled(name: str, run: Run, function: Any, options: Any, operands: PyTree) -> PyTree:
    """`run(function, options, operands)`, so that a second call outside `jit` traces nothing.

    Under `grad` or `vmap` alone this is outside, too. Where the call is traced for `jit` anyway, or
    cannot be compiled apart (an operand that is no array, a function that is made anew for each
    call), it is simply run.

    Args:
        name: what profilers show.
        run: a function of a module; it stays for good.
        function: the caller's.
        options: hashable.
        operands: pytree of arrays.
    """
    apart = all(map(_is_operand, jax.tree.leaves(operands)))
    if not apart or _in_jit():
        return run(function, options, operands)
    return _compiled(name, run, function)(options, operands)


def is_jit_disabled() -> bool:
    """Whether a caller wants to see numbers in the functions handed in, under a debugger, say."""
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]


def _in_jit() -> bool:
    """Whether a trace for `jit` is under way: then even what is made of nothing is a tracer."""
    # An array of zeros would be moved to the device, which a transfer guard may forbid.
    return isinstance(lax.iota(jnp.int32, 1), jax.core.Tracer)


def _is_operand(leaf: Any) -> bool:
    """Whether `jit` takes a leaf."""
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        return abs(leaf) < 1 << 31
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | float | complex)


def _compiled(name: str, run: Run, function: Any) -> Callable[[Any, PyTree], PyTree]:
    """`run` of one function, jitted.

    Kept as long as the function is: what is jitted refers to it weakly, or it would never be freed.
    A function that cannot be referred to so is simply traced again.
    """
    try:
        return _jitted[run][function]
    except KeyError:
        reference = weakref.ref(function)
    except TypeError:
        return functools.partial(run, function)

    def call(options: Any, operands: PyTree) -> PyTree:
        function = reference()
        assert function is not None, "the caller holds it"
        return run(function, options, operands)

    call.__name__ = name
    _jitted[run][function] = jitted = jax.jit(call, static_argnums=0)
    return jitted


_jitted: defaultdict[Run, weakref.WeakKeyDictionary[Any, Callable[[Any, PyTree], PyTree]]] = (
    defaultdict(weakref.WeakKeyDictionary)
)
