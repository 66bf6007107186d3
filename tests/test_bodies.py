"""Every body of the table gives under `scan` what it gives under `lax.scan`, in every setting.

The bodies are small: `method="sequential"` has them taken apart nevertheless.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bodies import BODIES
from helpers import assert_same
from jax import lax
from structure import is_inexact, over_floats

import jaxrnn

TIME = 6  # two blocks of 3, or a shorter one after one of 4 or 5
SPLIT = {"method": "sequential"}
SETTINGS = {
    "plain": {},
    "reverse": {"reverse": True},
    "even_chunks_unrolled_by_two": {"chunk": 3, "unroll": 2},
    "uneven_chunks": {"chunk": 5},
    "single_steps": {"chunk": 1},
    "one_block_unrolled_by_two": {"chunk": None, "unroll": 2},
    "remat": {"remat": True},
    "uneven_chunks_reverse_remat": {"chunk": 4, "reverse": True, "remat": True},
    "unrolled": {"unroll": True, "chunk": 4},
}


def scalar_of(tree):
    """A real number in which every element of every float leaf has a weight of its own."""
    total = jnp.zeros(())
    for number, leaf in enumerate(filter(is_inexact, map(jnp.asarray, jax.tree.leaves(tree)))):
        weights = np.cos(np.arange(leaf.size) + number).reshape(leaf.shape)
        weighted = jnp.sin(leaf) * weights.astype(leaf.real.dtype)
        total += jnp.sum(weighted.real + 2 * weighted.imag).astype(total.dtype)
    return total


def value_and_gradient(case, scan, operands):
    """The results, and the gradient with respect to every float among consts, init and xs."""

    def scalar_and_results(operands):
        results = case.run(scan, operands, TIME)
        return scalar_of(results), results

    run, floats = over_floats(scalar_and_results, operands)
    return (jax.value_and_grad(run, has_aux=True) if case.reverse_mode else run)(floats)


@functools.cache
def reference(name):
    """The same by `lax.scan`, `(operands, reverse) -> ...`: both ways are compiled once."""

    def run(operands, reverse):
        def turned(rows):
            return jax.tree.map(lambda row: jnp.where(reverse, row[::-1], row), rows)

        def scan(body, init, xs, length):
            last, ys = lax.scan(body, init, turned(xs), length)
            return last, turned(ys)

        return value_and_gradient(BODIES[name], scan, operands)

    return jax.jit(run)


def check(name, setting):
    case, flags = BODIES[name], SETTINGS[setting]
    operands = case.operands(TIME)
    scan = functools.partial(jaxrnn.scan, **flags, **SPLIT)
    actual = jax.jit(functools.partial(value_and_gradient, case, scan))(operands)
    expected = reference(name)(operands, flags.get("reverse", False))
    assert_same(actual, expected, case.compute_dtype, scale=10)


# Two settings that have everything between them, or every body would be compiled nine times.
OF_EVERY_BODY = ["even_chunks_unrolled_by_two", "uneven_chunks_reverse_remat"]


@pytest.mark.parametrize("setting", OF_EVERY_BODY)
@pytest.mark.parametrize("name", BODIES)
def test_values_and_gradients_of_every_body(name, setting):
    check(name, setting)


# No loop of theirs can hold its samples last, so that they would run as they do above.
OTHERWISE = [
    "sums_in_many_roles",
    "concatenations_in_many_roles",
    "products_of_one_state",
    "products_the_other_way_round",
    "matrix_memory",
    "no_samples",
    "lstm_einsum",
    "lstm_peephole_clipped",
    "vectors",
    "scalars",
    "einsum_forms",
    "products_with_a_number",
    "block_heads",
    "convolutional",
    "attention",
    "inner_scan",
    "inner_cond",
    "inner_while",
    "inner_checkpoint",
    "inner_fori_and_updates",
    "vmapped_inside",
    "branches_per_sample",
    "params_as_carry",
    "params_passed_as_carry",
    "stateless",
    "complex_state",
    "linear_recurrent_unit",
]


@pytest.mark.parametrize("name", [name for name in BODIES if name not in OTHERWISE])
def test_values_and_gradients_with_the_samples_last(name, samples_last_everywhere):
    check(name, "plain")


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in OF_EVERY_BODY])
@pytest.mark.parametrize("name", ["integers_and_booleans", "affine_with_readout"])
def test_values_and_gradients_in_every_other_setting(name, setting):
    check(name, setting)
