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
from jax.tree_util import Partial

PyTree = Any
Run = Callable[[Any, Any, PyTree], PyTree]
Given = tuple[tuple[Any, ...], dict[str, Any]]


def run_compiled(name: str, run: Run, function: Any, options: Any, operands: PyTree) -> PyTree:
    """`run(function, options, operands)`, so that a second call outside `jit` traces nothing.

    Under `grad` or `vmap` alone this is outside, too. Where the call is traced for `jit` anyway, or
    cannot be compiled apart (an operand that is no array, a function that cannot be referred to
    weakly), it is simply run.

    Args:
        name: what profilers show.
        run: a function of a module; it stays for good.
        function: the caller's; arrays that a `jax.tree_util.Partial` holds are operands.
        options: hashable.
        operands: pytree of arrays.
    """
    apart = all(map(_is_operand, jax.tree.leaves(operands)))
    if not apart or _in_jit():
        return run(function, options, operands)
    bare, given = _without_arrays(function)
    return _compiled(name, run, bare)(options, given, operands)


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


def _without_arrays(function: Any) -> tuple[Any, Given]:
    """A function, and the arrays that it is given beforehand if it is a pytree of these alone.

    On other leaves, such as Python numbers, it may branch.
    """
    if isinstance(function, Partial):
        given = function.args, function.keywords
        if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given)):
            return function.func, given
    return function, ((), {})


def _compiled(name: str, run: Run, function: Any) -> Callable[[Any, Given, PyTree], PyTree]:
    """`run` of one function, with the arrays that it is given beforehand, jitted.

    Kept as long as the function is: what is jitted refers to it weakly, or it would never be freed.
    A function that cannot be referred to so is simply traced again.
    """

    def with_given(function: Any, options: Any, given: Given, operands: PyTree) -> PyTree:
        args, keywords = given
        whole = Partial(function, *args, **keywords) if args or keywords else function
        return run(whole, options, operands)

    try:
        return _jitted[run][function]
    except KeyError:
        reference = weakref.ref(function)
    except TypeError:
        return functools.partial(with_given, function)

    def call(options: Any, given: Given, operands: PyTree) -> PyTree:
        function = reference()
        assert function is not None, "the caller holds it"
        return with_given(function, options, given, operands)

    call.__name__ = name
    _jitted[run][function] = jitted = jax.jit(call, static_argnums=0)
    return jitted


_jitted: defaultdict[
    Run, weakref.WeakKeyDictionary[Any, Callable[[Any, Given, PyTree], PyTree]]
] = defaultdict(weakref.WeakKeyDictionary)
