"""Calls outside `jit`: compiled once for each function that a caller hands in."""

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
Arrays = tuple[Any, ...]


@jax.tree_util.register_pytree_node_class
class PureStep:
    """A function with arrays that it takes before all else; a pytree of these.

    It branches on none of them, and reads nothing beside what it is given.
    """

    def __init__(self, function: Callable[..., Any], *arrays: Any):
        """Binds `arrays`."""
        self.function, self.arrays = function, arrays
        self.__name__ = function.__name__

    def __call__(self, *args: Any) -> Any:
        """What the function makes of the arrays and of `args`."""
        return self.function(*self.arrays, *args)

    def __repr__(self) -> str:
        """Its name and the shapes of its arrays."""
        leaves = jax.tree.leaves(self.arrays)  # under `jax.tree.map` they may be anything
        shapes = ", ".join(str(getattr(leaf, "shape", leaf)) for leaf in leaves)
        return f"<{self.__name__} with arrays of {shapes}>"

    def tree_flatten(self) -> tuple[Arrays, Callable[..., Any]]:
        """The arrays, and the function."""
        return self.arrays, self.function

    @classmethod
    def tree_unflatten(cls, function: Callable[..., Any], arrays: Arrays) -> "PureStep":
        """The opposite."""
        return cls(function, *arrays)


def run_compiled(name: str, run: Run, function: Any, options: Any, operands: PyTree) -> PyTree:
    """`run(function, options, operands)`, so that a second call outside `jit` traces nothing.

    Under `grad` or `vmap` alone this is outside, too. Where the call is traced for `jit` anyway, or
    cannot be compiled apart (an operand that is no array, a function that cannot be referred to
    weakly), it is simply run.

    Args:
        name: what profilers show.
        run: a function of a module; it stays for good.
        function: the caller's; the arrays of a `PureStep` are operands.
        options: a tuple, hashable.
        operands: pytree of arrays.
    """
    arrays, bare = function.tree_flatten() if isinstance(function, PureStep) else ((), function)
    if not all(map(is_operand, jax.tree.leaves((arrays, operands)))) or _in_jit():
        return run(function, options, operands)
    # True equals 1, and as an option is something else.
    types = tuple(map(type, options))
    return _compiled(name, run, bare)((options, types), arrays, operands)


def is_jit_disabled() -> bool:
    """Whether a caller wants to see numbers in the functions handed in, under a debugger, say."""
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]


def _in_jit() -> bool:
    """Whether a trace for `jit` is under way: then even what is made of nothing is a tracer."""
    # An array of zeros would be moved to the device, which a transfer guard may forbid.
    return isinstance(lax.iota(jnp.int32, 1), jax.core.Tracer)


def is_operand(leaf: Any) -> bool:
    """Whether `jit` takes a leaf."""
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        return abs(leaf) < 1 << 31
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | float | complex)


def _compiled(name: str, run: Run, function: Any) -> Callable[[Any, Arrays, PyTree], PyTree]:
    """`run` of one function, or of a `PureStep` of it and of arrays, jitted.

    It takes the options with their types.

    Kept as long as the function is: what is jitted refers to it weakly, or it would never be freed.
    A function that cannot be referred to so is simply traced again.
    """
    try:
        return _jitted[run][function]
    except KeyError:
        reference = weakref.ref(function)
    except TypeError:
        return lambda typed, _, operands: run(function, typed[0], operands)

    def call(typed: tuple[Any, Any], arrays: Arrays, operands: PyTree) -> PyTree:
        (options, _), function = typed, reference()
        assert function is not None, "the caller holds it"
        return run(PureStep(function, *arrays) if arrays else function, options, operands)

    call.__name__ = name
    _jitted[run][function] = jitted = jax.jit(call, static_argnums=0)
    return jitted


_jitted: defaultdict[
    Run, weakref.WeakKeyDictionary[Any, Callable[[Any, Arrays, PyTree], PyTree]]
] = defaultdict(weakref.WeakKeyDictionary)
