"""`explain` where there are no numbers yet, and where a step has no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn

B, T, D, H = 2, 6, 3, 32
W, U = np.ones((D, H), np.float32), np.ones((H, H), np.float32)


def elman(x, states):
    h = jnp.tanh(x @ W + states[0] @ U)
    return h @ U, [h]


def test_types_stand_for_arrays():
    arrays = jnp.ones((B, T, D)), [jnp.ones((B, H))]
    mask = jnp.ones((B, T), bool)
    types, mask_type = jax.eval_shape(lambda *x: x, arrays, mask)
    expected = jaxrnn.explain(elman, *arrays, mask=mask, chunk=3)
    assert jaxrnn.explain(elman, *types, mask=mask_type, chunk=3) == expected
    time_first = jnp.moveaxis(arrays[0], 1, 0)
    scanned = jax.eval_shape(lambda *x: x, arrays[1], time_first)
    expected = jaxrnn.explain_scan(lambda h, x: elman(x, h)[::-1], arrays[1], time_first)
    assert jaxrnn.explain_scan(lambda h, x: elman(x, h)[::-1], *scanned) == expected
    with pytest.raises(TypeError, match=r"inputs is a type of shape \(2, 6, 3\)"):
        jaxrnn.rnn(elman, *types)


def through_the_host(x, states):
    output, states = elman(x, states)
    return jax.pure_callback(np.sin, jax.typeof(output), output, vmap_method="expand_dims"), states


def through_eigenvectors(x, states):
    output, states = elman(x, states)
    return jnp.linalg.eig(output[:, :4].reshape(B, 2, 2))[1].real, states


@pytest.mark.parametrize("step", [through_the_host, through_eigenvectors])
def test_a_step_without_a_derivative_is_explained_all_the_same(step):
    arguments = jnp.ones((B, T, D)), [jnp.ones((B, H))]
    report = jaxrnn.explain(step, *arguments, method="sequential")
    assert "step by step: recurrence" in report
    assert "no gradient: " in report
    assert "kept for the gradient" not in report
    assert max(map(len, report.splitlines())) <= 80
