"""What is kept for the backward pass, and what is never stacked over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn

BATCH, UNITS = 2, 64


def step_of(params):
    """Features are one wide only, so that inputs weigh nothing beside states."""

    def step(x, states):
        h = jnp.tanh(x + states[0] @ params)
        return h, [h]

    return step


def loss(params, x, state, **flags):
    last_output, _, _ = jaxrnn.rnn(step_of(params), x, [state], **flags)
    return last_output.sum()


def operands(time):
    return jnp.eye(UNITS), jnp.ones((BATCH, time, 1)), jnp.ones((BATCH, UNITS))


def compiled_bytes(time, **flags):
    """Scratch memory of the compiled gradient."""
    gradient = jax.jit(jax.grad(lambda *a: loss(*a, **flags)))
    return gradient.lower(*operands(time)).compile().memory_analysis().temp_size_in_bytes


def saved_bytes(time, **flags):
    """Bytes that wait for the backward pass outside jit."""
    params, x, state = operands(time)
    _, backward = jax.vjp(lambda p, s: loss(p, x, s, **flags), params, state)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize("measure", [compiled_bytes, saved_bytes])
@pytest.mark.parametrize("masked", [False, True])
def test_rematerialised_memory_grows_like_the_root_of_time(measure, masked):
    def flags(time):
        return {"mask": np.ones((BATCH, time), bool)} if masked else {}

    short = measure(256, remat=True, return_all_outputs=False, **flags(256))
    long = measure(4096, remat=True, return_all_outputs=False, **flags(4096))
    plain = measure(4096, return_all_outputs=False, **flags(4096))
    # 16 times the steps: root-like growth is 4 times, linear growth 16 times.
    assert long < 6 * short
    assert long < plain / 8


def largest_of_all(jaxpr):
    """The number of elements of the largest array that a program names, inner programs included."""
    sizes = [getattr(variable.aval, "size", 0) for eqn in jaxpr.eqns for variable in eqn.outvars]
    for eqn in jaxpr.eqns:
        for parameter in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes.append(largest_of_all(inner))
    return max(sizes, default=0)


@pytest.mark.parametrize("mask", [None, np.ones((2, 50), bool)], ids=["plain", "masked"])
@pytest.mark.parametrize("remat", [False, True])
def test_the_last_output_alone_allocates_no_buffer_over_time(mask, remat):
    """The outputs are by far the widest arrays of the program, so that size tells them."""
    time, width = 50, 300

    def step(x, states):
        h = jnp.tanh(states[0] + x)
        return jnp.sin(h) @ jnp.ones((1, width)), [h]

    def run(x, return_all_outputs):
        return jaxrnn.rnn(
            step, x, [x[:, 0]], mask=mask, return_all_outputs=return_all_outputs, remat=remat
        )

    def largest(return_all_outputs):
        x = jnp.ones((2, time, 1))
        return largest_of_all(jax.make_jaxpr(run, static_argnums=1)(x, return_all_outputs).jaxpr)

    assert largest(True) >= 2 * time * width
    assert largest(False) <= 2 * time * width // 4


@pytest.mark.parametrize("flags", [{}, {"zero_output_for_mask": True}])
def test_the_compiled_program_without_outputs_is_smaller_by_the_outputs(flags):
    time, width = 64, 512
    mask = np.ones((2, time), bool)

    def step(x, states):
        h = jnp.tanh(states[0] + x)
        return jnp.sin(h) @ jnp.ones((1, width)), [h]

    def last(x, return_all_outputs):
        return jaxrnn.rnn(
            step, x, [x[:, 0]], mask=mask, return_all_outputs=return_all_outputs, **flags
        )[0::2]

    def scratch(return_all_outputs):
        compiled = jax.jit(last, static_argnums=1).lower(jnp.ones((2, time, 1)), return_all_outputs)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert scratch(False) < 2 * time * width * 4 // 4
