"""Reading programs: what lies in which loop of a jaxpr, and what a compiled program executes."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bodies import BODIES
from jax import lax

import jaxrnn


def primitive_of(function: Callable, *args: Any) -> Any:
    """The primitive of the last equation of a function."""
    return jax.make_jaxpr(function)(*args).eqns[-1].primitive


_MATRIX = np.ones((2, 2), np.float32)
SCAN = primitive_of(lambda x: lax.scan(lambda c, r: (c + r, None), x[0], x)[0], _MATRIX)
WHILE = primitive_of(lambda x: lax.while_loop(lambda v: v < 3, lambda v: v + 1, x), 0)
DOT = primitive_of(jnp.dot, _MATRIX, _MATRIX)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in equation.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if hasattr(item, "eqns"):
                yield item


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation, those of inner jaxprs included, and how often it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inside = times * (equation.params["length"] if equation.primitive is SCAN else 1)
        for inner in inner_jaxprs(equation):
            yield from equations(inner, inside)


def loops(jaxpr: Any) -> Iterator[Any]:
    """The bodies of all loops."""
    for equation, _ in equations(jaxpr):
        if equation.primitive in (SCAN, WHILE):
            yield from inner_jaxprs(equation)


def innermost_loops(jaxpr: Any) -> list[Any]:
    """The bodies of the loops that hold no other loop."""
    return [body for body in loops(jaxpr) if not list(loops(body))]


def count(jaxpr: Any, primitive: Any) -> int:
    """Equations of a primitive, those of inner jaxprs included."""
    return sum(equation.primitive is primitive for equation, _ in equations(jaxpr))


def products_in_innermost_loops(jaxpr: Any) -> list[int]:
    """For each loop that holds no other loop, the number of its products, in ascending order."""
    return sorted(count(body, DOT) for body in innermost_loops(jaxpr))


def multiply_adds(jaxpr: Any) -> int:
    """The multiply-adds of all products that run."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive is DOT:
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval
            depth = [lhs.shape[axis] for axis in contracted]
            total += times * int(np.prod([*equation.outvars[0].aval.shape, *depth]))
    return total


TIME = 8  # steps of `programs`


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is floating or complex, a Python number among them."""
    return bool(jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact))


def over_floats(function: Callable, tree: Any) -> tuple[Callable, list[Any]]:
    """`function(tree)` as a function of the list of the floating and complex leaves, and these."""
    leaves, structure = jax.tree.flatten(tree)

    def of(floats):
        given = iter(floats)
        merged = [next(given) if is_inexact(leaf) else leaf for leaf in leaves]
        return function(structure.unflatten(merged))

    return of, list(filter(is_inexact, leaves))


def sum_of_sines(tree: Any) -> Any:
    """A scalar that depends on every float and complex number of a tree, and not linearly."""
    floats = filter(is_inexact, jax.tree.leaves(tree))
    return sum(jnp.sum(jnp.sin(jnp.abs(leaf))) for leaf in floats)


@functools.cache
def programs(name: str, scan: Callable = jaxrnn.scan, **flags: Any) -> tuple[Any, Any]:
    """The jaxprs of a body of the table under a scan, and of its gradient with respect to all.

    Traced once, which is enough as long as all tests that ask see one device.
    """
    case = BODIES[name]
    run, floats = over_floats(
        lambda operands: case.run(scan, operands, TIME, **flags), case.operands(TIME)
    )
    gradient = jax.grad(lambda floats: sum_of_sines(run(floats)))
    return jax.make_jaxpr(run)(floats), jax.make_jaxpr(gradient)(floats)


ALL_COLLECTIVES = "(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"


def executed_collectives(hlo: str, kind: str = "all-reduce") -> int:
    """How often a collective, or any of `ALL_COLLECTIVES`, runs in a compiled program's text."""
    return executions(hlo, rf" {kind}(-start)?\(")


def executions(hlo: str, pattern: str) -> int:
    """How often lines with a pattern run in a compiled program's text.

    One in the body of a `while` counts as often as the loop runs.
    """
    computations: dict[str, list[str]] = {}
    entry = lines = None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith(" "):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif lines is not None:
            lines.append(line)

    def runs(name: str) -> int:
        total = 0
        for line in computations[name]:
            total += bool(re.search(pattern, line))
            called = re.findall(r"(?:calls|to_apply|body|true_computation)=%?([\w.\-]+)", line)
            times = 1
            if " while(" in line:
                times = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
            total += sum(times * runs(other) for other in called if other in computations)
        return total

    return runs(entry)
