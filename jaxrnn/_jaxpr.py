"""The one door to jaxprs: functions traced to programs, programs cut and run.

A `Program` is what the rest of the engine works on: variables in, equations, atoms out, and no
captured constants. How jaxpr classes differ between JAX versions (from 0.12 on a `ClosedJaxpr`
*is* a `Jaxpr`) is this file's affair alone.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util

from jaxrnn._primitives import (
    FLAT,
    INLINED,
    OWN_RULES,
    convert_element_type_p,
)
from jaxrnn._sharding import explicit_sharding, varying

PyTree = Any
Var = core.Var
Literal = core.Literal
Atom = Var | Literal
Equation = core.JaxprEqn

UNITS_SLOW_DOWN_SUMS = jax.__version_info__ < (0, 11)  # see `_singleton_axes.py`
LOOPS_ARE_KERNELS = not UNITS_SLOW_DOWN_SUMS  # on a CPU, but for large products


class Program(NamedTuple):
    """A straight-line program: equations in an order in which they can run.

    `origin` is the jaxpr that the equations were traced to; a jaxpr is only ever made from another.
    """

    invars: tuple[Var, ...]
    outvars: tuple[Atom, ...]
    equations: tuple[Equation, ...]
    origin: Any

    def cut(
        self, invars: Iterable[Var], outvars: Iterable[Atom], equations: Iterable[Equation]
    ) -> "Program":
        """A program made of some of the equations of this one."""
        return Program(tuple(invars), tuple(outvars), tuple(equations), self.origin)

    def run(self, *args: Any) -> list[Any]:
        """Runs the program."""
        jaxpr = self.origin.replace(
            constvars=(), invars=self.invars, outvars=self.outvars, eqns=list(self.equations)
        )
        closed = core.ClosedJaxpr(jaxpr, ())  # type: ignore[attr-defined, unused-ignore]
        return list(core.jaxpr_as_fun(closed)(*args))

    def step(
        self, consts: Sequence[Any], carry: Sequence[Any], x: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Runs the program as a scan body, `(consts, carry, x) -> (carry, y)`."""
        carry, y = parts(self.run(*consts, *carry, *x), len(carry))
        return carry, y


class Traced(NamedTuple):
    """A traced function: `program(*consts, *args)`, the outputs flat."""

    program: Program
    consts: tuple[Any, ...]
    out_tree: Any
    has_effects: bool


def trace(f: Callable[..., PyTree], *args: Any) -> Traced:
    """Traces `f` at `args`, one array each; what `f` closes over becomes `consts`."""
    out_tree = None

    def flat(*args: Any) -> list[Any]:  # a class of the user's may take arrays alone
        nonlocal out_tree
        leaves, out_tree = jax.tree.flatten(f(*args))
        return leaves

    closed = jax.make_jaxpr(flat)(*args)
    return Traced(program_of(closed.jaxpr), tuple(closed.consts), out_tree, bool(closed.effects))


def program_of(jaxpr: Any) -> Program:
    """A jaxpr as a program, which takes its constants first."""
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    return Program(inputs, tuple(jaxpr.outvars), tuple(jaxpr.eqns), jaxpr)


def bind(equation: Equation, args: Sequence[Any]) -> list[Any]:
    """Applies the primitive of `equation` to `args`."""
    params = equation.primitive.get_bind_params(equation.params)
    with at(equation):
        result = equation.primitive.bind(*args, **params)
    return list(result) if equation.primitive.multiple_results else [result]


@contextlib.contextmanager
def at(equation: Equation) -> Iterator[None]:
    """As where `equation` was written: its name in profiles, its line in errors, its settings."""
    source = equation.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    with source_info_util.user_context(source.traceback, name_stack=names), equation.ctx.manager:
        yield


def scopes(equation: Equation) -> list[str]:
    """The names of the scopes (`jax.named_scope`) that `equation` stands in."""
    return str(equation.source_info.name_stack).split("/")


def inline(program: Program, *args: Any, apply: Callable[..., list[Any]] = bind) -> list[Any]:
    """Runs `program` by `apply`, with the bodies of inner `jit`s in place of the calls.

    Functions with a derivative rule of their own (`custom_jvp`, `custom_vjp`) stay calls. Stacks,
    their opposite and tiles are spelled out.
    """
    env = dict(zip(program.invars, args, strict=True))
    for equation in program.equations:
        if not equation.outvars and not equation.effects:
            continue
        values = [read(env, atom) for atom in equation.invars]
        if equation.primitive in INLINED:
            closed = equation.params[INLINED[equation.primitive]]
            inner = program_of(closed.jaxpr)
            with at(equation):
                results = inline(inner, *closed.consts, *values, apply=apply)
        elif equation.primitive in SPELLED_OUT:
            with at(equation):
                results = SPELLED_OUT[equation.primitive](*values, **equation.params)
        else:
            results = apply(equation, values)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(env, atom) for atom in program.outvars]


def retraced(
    traced: Traced, example: Sequence[Any], apply: Callable[..., list[Any]] = bind
) -> Traced:
    """The same function, run by `apply` as in `inline`; its consts come first as before."""
    step = trace(lambda *args: inline(traced.program, *args, apply=apply), *traced.consts, *example)
    return step._replace(consts=(*step.consts, *traced.consts), out_tree=traced.out_tree)


def _stack(*parts: Any, axis: int) -> list[Any]:
    return [lax.concatenate([lax.expand_dims(part, (axis,)) for part in parts], axis)]


def _unstack(whole: Any, *, axis: int) -> list[Any]:
    count = whole.shape[axis]
    return [lax.index_in_dim(whole, i, axis, keepdims=False) for i in range(count)]


def _tile(array: Any, *, reps: Sequence[int]) -> list[Any]:
    lengths = array.shape
    spread = [n for pair in zip(reps, lengths, strict=True) for n in pair]
    each = lax.broadcast_in_dim(array, spread, range(1, len(spread), 2))
    return [lax.reshape(each, [r * n for r, n in zip(reps, lengths, strict=True)])]


SPELLED_OUT: dict[Any, Callable[..., list[Any]]] = {
    lax.stack_p: _stack,
    lax.unstack_p: _unstack,
    lax.tile_p: _tile,
}


def without_rule(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """The results of `equation`; a derivative rule of its own is forgotten."""
    if equation.primitive not in OWN_RULES:
        return bind(equation, values)
    return list(core.jaxpr_as_fun(equation.params["call_jaxpr"])(*values))


def dependents(
    program: Program, sources: Sequence[Var], *, through_tangents: bool = False
) -> set[Var]:
    """The variables of `program` that depend on `sources`, these among them.

    Or `through_tangents`: those that have a tangent where `sources` have one.
    """
    found = set(sources)
    for equation in program.equations:
        outs = equation.outvars
        if through_tangents:
            outs = [] if equation.primitive in FLAT else list(filter(is_inexact, outs))
        if any(not isinstance(a, Literal) and a in found for a in equation.invars):
            found |= set(outs)
    return found


def dependents_in_time(
    program: Program,
    sources: Iterable[Var],
    consts: int,
    carry: int,
    *,
    through_tangents: bool = False,
) -> set[Var]:
    """`dependents` of a scan body, `(consts, carry, x) -> (carry, y)`, at some step or other."""
    carries, found = program.invars[consts : consts + carry], set(sources)
    while True:
        reached = dependents(program, list(found), through_tangents=through_tangents)
        more = {
            old
            for old, new in zip(carries, program.outvars, strict=False)
            if not isinstance(new, Literal) and new in reached and old not in reached
        }
        if not more:
            return reached
        found |= more


def with_derivative(program: Program, active: set[Var]) -> set[Var]:
    """Of what is `active`, has a tangent, what enters into the tangent of a result."""
    wanted = active.intersection(variables(program.outvars))
    for equation in reversed(program.equations):
        if not wanted.isdisjoint(equation.outvars):
            wanted |= active.intersection(variables(equation.invars))
    return wanted


def differentiable(program: Program) -> set[Var]:
    """What enters into the derivative of a result by any of the inputs."""
    sources = list(filter(is_inexact, program.invars))
    return with_derivative(program, dependents(program, sources, through_tangents=True))


def as_function_of(
    places: Sequence[int], f: Callable[..., PyTree], values: Sequence[Any]
) -> Callable[..., PyTree]:
    """`f(*values)` as a function of the values at some `places`."""

    def of(*given: Any) -> PyTree:
        placed = dict(zip(places, given, strict=True))
        return f(*(placed.get(i, value) for i, value in enumerate(values)))

    return of


def parts(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """`values` cut into pieces of the given sizes and a last one with what is left."""
    found, start = [], 0
    for size in sizes:
        found.append(list(values[start : start + size]))
        start += size
    return [*found, list(values[start:])]


def read(env: Mapping[Any, Any], atom: Atom) -> Any:
    """The value of an atom: a literal's own, a variable's in `env`."""
    return atom.val if isinstance(atom, Literal) else env[atom]


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """Those of `atoms` that are variables, each once, in order."""
    return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal)))


def size(atom: Atom) -> int:
    """The number of elements of the array that `atom` stands for; a symbolic axis counts as 64."""
    return math.prod(map(length, shape(atom)))


def size_in_bytes(atom: Atom) -> int:
    """The size of the array that `atom` stands for; a symbolic axis counts as 64."""
    return size(atom) * getattr(dtype(atom), "itemsize", 8)


def shape(atom: Atom) -> tuple[int, ...]:
    """The shape of the array that `atom` stands for."""
    return tuple(atom.aval.shape)  # type: ignore[attr-defined]


def dtype(atom: Atom) -> Any:
    """The dtype of the array that `atom` stands for."""
    return atom.aval.dtype  # type: ignore[attr-defined]


def is_inexact(atom: Atom) -> bool:
    """Whether the array that `atom` stands for holds numbers that have a derivative."""
    return bool(jnp.issubdtype(dtype(atom), jnp.inexact))


def carry_type(atom: Atom) -> tuple[Any, ...]:
    """What a carry must not change: shape, dtype, how it lies on the devices.

    The last is part of the type on meshes with explicit axes, and inside `shard_map`.
    """
    aval = atom.aval
    return shape(atom), dtype(atom), varying(aval), explicit_sharding(aval)


def is_weak(atom: Atom) -> bool:
    """Whether the dtype of `atom` gives way to others, as that of a Python number does."""
    return bool(getattr(atom.aval, "weak_type", False))


def weak_as(value: jax.Array, like: Atom) -> jax.Array:
    """`value`, weakly typed if the array that `like` stands for is."""
    if not is_weak(like) or value.weak_type:
        return value
    params = {"new_dtype": value.dtype, "weak_type": True, "sharding": None}
    return convert_element_type_p.bind(value, **params)


def inner_equations(equation: Equation) -> list[Equation]:
    """The equations of the functions that `equation` calls."""
    return [inner for function in inner_functions(equation) for inner in function]


def inner_functions(equation: Equation) -> list[list[Equation]]:
    """The equations of each function that `equation` calls."""
    return [list(jaxpr.eqns) for jaxpr in core.jaxprs_in_params(equation.params)]


def length(n: Any) -> int:
    """The length of an axis, of a symbolic one as if it were 64."""
    return n if isinstance(n, int) else 64
