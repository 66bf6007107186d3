"""The names, the signature and the size of what is public."""

import doctest
import inspect
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

import jaxrnn

PACKAGE = pathlib.Path(jaxrnn.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_public_names_are_listed_in_order():
    assert jaxrnn.__all__ == sorted(jaxrnn.__all__)
    assert {"bidirectional", "cells", "rnn", "scan"} <= set(jaxrnn.__all__)
    assert all(hasattr(jaxrnn, name) for name in jaxrnn.__all__)


def test_the_signature_of_rnn():
    """Keras's eleven in Keras's order; ours after them, by keyword only."""
    parameters = inspect.signature(jaxrnn.rnn).parameters.values()
    empty = inspect.Parameter.empty
    assert [(p.name, p.default) for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == [
        ("step_function", empty),
        ("inputs", empty),
        ("initial_states", empty),
        ("go_backwards", False),
        ("mask", None),
        ("constants", None),
        ("unroll", False),
        ("input_length", None),
        ("time_major", False),
        ("zero_output_for_mask", False),
        ("return_all_outputs", True),
    ]
    assert [(p.name, p.default) for p in parameters if p.kind == p.KEYWORD_ONLY] == [
        ("reset", None),
        ("chunk", "auto"),
        ("remat", False),
        ("method", "auto"),
    ]
    assert len(parameters) == 15


def public_things():
    """Every public function, class and module, with the contents of public modules."""
    for name in jaxrnn.__all__:
        thing = getattr(jaxrnn, name)
        yield name, thing
        if inspect.ismodule(thing):
            for inner in getattr(thing, "__all__", ()):
                yield f"{name}.{inner}", getattr(thing, inner)


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*p, id=p[0]) for p in public_things()])
def test_public_things_have_docstrings(name, thing):
    assert isinstance(thing, str) or len(inspect.getdoc(thing) or "") > 20


def test_the_docstring_of_rnn_names_every_argument():
    docstring = inspect.getdoc(jaxrnn.rnn)
    for name in inspect.signature(jaxrnn.rnn).parameters:
        assert f"{name}:" in docstring


@pytest.mark.parametrize("name", ["rnn", "scan"])
def test_the_example_of_a_docstring_holds(name):
    public = getattr(jaxrnn, name)
    names = {"jnp": jnp, name: public}
    (example,) = doctest.DocTestFinder(recurse=False).find(public, name, globs=names)
    assert example.examples
    assert not doctest.DocTestRunner().run(example).failed


def test_importing_needs_jax_alone():
    """Whatever comes with jaxrnn beyond the standard library came with jax and numpy before it."""
    program = (
        "import sys, jax, numpy\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import jaxrnn\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(after - before - set(sys.stdlib_module_names)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["jaxrnn"]


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(PACKAGE)) for p in SOURCES])
def test_files_stay_short_and_away_from_internals_of_jax(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert "jax._src" not in text
    assert "jax.extend" not in text or path.name in ("_jaxpr.py", "_primitives.py")


def test_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
