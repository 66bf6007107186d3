"""What is known of JAX's primitives: which are products, which are elementwise, and the like."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p
from jax.extend.random import threefry_prng_impl

add_p = p.add_p
add_any_p = p.add_jaxvals_p
broadcast_in_dim_p = p.broadcast_in_dim_p
concatenate_p = p.concatenate_p
cond_p = p.cond_p
conv_general_dilated_p = p.conv_general_dilated_p
convert_element_type_p = p.convert_element_type_p
copy_p = p.copy_p
custom_lin_p = p.custom_lin_p
custom_vjp_call_p = p.custom_vjp_call_p
div_p = p.div_p
dot_general_p = p.dot_general_p
eq_p = p.eq_p
gather_p = p.gather_p
lu_p = p.lu_p
mul_p = p.mul_p
pad_p = p.pad_p
random_bits_p = p.random_bits_p
reduce_max_p = p.reduce_max_p
reduce_sum_p = p.reduce_sum_p
remat_p = p.remat_p
reshape_p = p.reshape_p
rng_uniform_p = p.rng_uniform_p
scan_p = p.scan_p
select_n_p = p.select_n_p
slice_p = p.slice_p
sort_p = p.sort_p
split_p = lax.split_p
squeeze_p = p.squeeze_p
stop_gradient_p = p.stop_gradient_p
threefry2x32_p = p.threefry2x32_p
transpose_p = p.transpose_p

# Calls, and which of its parameters holds the function of each.
INLINED = {p.jit_p: "jaxpr", p.closed_call_p: "call_jaxpr"}
# Whatever JAX says that it has; of other primitives nothing is known.
LISTED = frozenset(value for name, value in vars(p).items() if name.endswith("_p"))
RANDOM = frozenset(
    {p.random_gamma_p, random_bits_p, p.random_fold_in_p, p.random_split_p, threefry2x32_p}
)
# Not to be run for many steps at once, see `can_run_batched`.
PINNED = frozenset({cond_p, p.while_p, p.rng_bit_generator_p, rng_uniform_p, custom_lin_p})
# Calls of functions that bring their derivative with them.
OWN_RULES = frozenset({p.custom_jvp_call_p, custom_vjp_call_p})
PRODUCTS = frozenset({p.dot_general_p, p.conv_general_dilated_p})
FACTORISATIONS = frozenset({p.cholesky_p, p.eig_p, p.eigh_p, p.lu_p, p.qr_p, p.svd_p})
# What earns a pass of its own over a block of time; an inner loop repeats whatever it holds.
HEAVY = (
    PRODUCTS
    | FACTORISATIONS
    | {gather_p, random_bits_p, scan_p, threefry2x32_p, p.triangular_solve_p, p.fft_p}
)
# The derivative needs of the operands the indices alone.
INDEXED = frozenset(
    {
        gather_p,
        lax.scatter_sub_p,
        p.dynamic_slice_p,
        p.dynamic_update_slice_p,
        p.scatter_add_p,
        p.scatter_p,
    }
)
# A part of an array is read, as of a cache.
READS = frozenset({gather_p, p.dynamic_slice_p, slice_p})
# A part of an array is written, as in a cache.
WRITES = frozenset(
    {
        lax.scatter_sub_p,
        p.dynamic_update_slice_p,
        p.scatter_add_p,
        p.scatter_max_p,
        p.scatter_min_p,
        p.scatter_mul_p,
        p.scatter_p,
    }
)
# The derivative is zero.
FLAT = frozenset({p.ceil_p, p.floor_p, p.round_p, p.sign_p, stop_gradient_p})
# Data is arranged and nothing computed.
FREE = frozenset(
    {
        p.broadcast_in_dim_p,
        p.concatenate_p,
        p.convert_element_type_p,
        p.copy_p,
        p.iota_p,
        p.reshape_p,
        p.slice_p,
        p.squeeze_p,
        p.stop_gradient_p,
        split_p,
        transpose_p,
    }
)
# What gates are made of, element by element: arithmetic and activation functions.
ARITHMETIC = frozenset(
    {
        p.add_p,
        p.add_jaxvals_p,
        p.clamp_p,
        p.cos_p,
        p.div_p,
        p.erf_p,
        p.exp_p,
        p.integer_pow_p,
        p.logistic_p,
        p.max_p,
        p.min_p,
        p.mul_p,
        p.neg_p,
        p.sin_p,
        p.sub_p,
        p.tanh_p,
    }
)
TRIGONOMETRIC = frozenset({p.acos_p, p.asin_p, p.atan2_p, p.cos_p, p.sin_p, p.tan_p})
TRANSCENDENTAL = TRIGONOMETRIC | frozenset(
    {
        p.cosh_p,
        p.erf_inv_p,
        p.erf_p,
        p.erfc_p,
        p.exp2_p,
        p.exp_p,
        p.expm1_p,
        p.log1p_p,
        p.log_p,
        p.logistic_p,
        p.pow_p,
        p.rsqrt_p,
        p.sinh_p,
        p.sqrt_p,
        p.tanh_p,
    }
)
# Ten exponentials and more: measured on a CPU, 5 ns (`pow`, `rem`) to 700 ns for a number, which
# takes 0.5 ns to store and to read again, and an exponential 0.4.
SLOW = frozenset(
    {
        p.acos_p,
        p.asin_p,
        p.atan_p,
        p.atan2_p,
        p.cbrt_p,
        p.digamma_p,
        p.igamma_p,
        p.igamma_grad_a_p,
        p.igammac_p,
        p.lgamma_p,
        p.polygamma_p,
        p.pow_p,
        p.regularized_incomplete_beta_p,
        p.rem_p,
        p.tan_p,
        p.zeta_p,
    }
)
SUMS = frozenset({p.add_p, p.add_jaxvals_p, p.sub_p})
COMPARISONS = frozenset({p.eq_p, p.ge_p, p.gt_p, p.le_p, p.lt_p, p.ne_p})
EXTREMES = frozenset({p.reduce_max_p, p.reduce_min_p})
REDUCTIONS = frozenset(
    {p.argmax_p, p.argmin_p, p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p, p.reduce_sum_p}
)
# Their derivative can be told from their result.
SLOPE_BY_OUTPUT: dict[Any, Callable[[jax.Array, jax.Array], jax.Array]] = {
    p.exp_p: lambda y, dx: dx * y,
    p.logistic_p: lambda y, dx: dx * y * (1 - y),
    p.tanh_p: lambda y, dx: (dx + dx * y) * (1 - y),
}
# What is done with one key of the default generator, as the two numbers that it is, and with which
# parameters.
THREEFRY: dict[Any, tuple[Callable[..., jax.Array], tuple[str, ...]]] = {
    random_bits_p: (threefry_prng_impl.random_bits, ("bit_width", "shape")),
    p.random_fold_in_p: (threefry_prng_impl.fold_in, ()),
    p.random_split_p: (threefry_prng_impl.split, ("shape",)),
}
# The derivative needs none of the operands, but for what a selection is made by.
LINEAR = FREE - {p.iota_p, stop_gradient_p} | {
    p.add_p,
    p.add_jaxvals_p,
    p.neg_p,
    pad_p,
    reduce_sum_p,
    p.rev_p,
    select_n_p,
    p.sub_p,
}
# The derivative is finite wherever the operands are, and the result no larger than their product.
FINITE_SLOPE = (ARITHMETIC | FREE | LINEAR | PRODUCTS) - {p.div_p, p.exp_p, p.integer_pow_p}
# The result is bounded whatever the operand.
BOUNDED = frozenset({p.cos_p, p.erf_p, p.logistic_p, p.sin_p, p.tanh_p})
LINEAR_ELEMENTWISE = frozenset(
    {
        add_p,
        add_any_p,
        convert_element_type_p,
        copy_p,
        p.neg_p,
        stop_gradient_p,
        p.sub_p,
    }
)
# Each element of the results is made of one of each operand.
ELEMENTWISE = (
    ARITHMETIC
    | LINEAR_ELEMENTWISE
    | TRANSCENDENTAL
    | {
        p.abs_p,
        p.and_p,
        p.eq_p,
        p.ge_p,
        p.gt_p,
        p.is_finite_p,
        p.le_p,
        p.lt_p,
        p.ne_p,
        p.not_p,
        p.or_p,
        p.select_n_p,
        p.sign_p,
        p.square_p,
    }
    | {listed for listed in LISTED if listed.name == "one_minus_square"}  # in newer JAX alone
)
# Of these, what the compiler of kernels knows.
IN_KERNELS = ELEMENTWISE - {
    copy_p,
    p.acos_p,
    p.asin_p,
    p.atan2_p,
    p.cosh_p,
    p.erf_inv_p,
    p.erf_p,
    p.erfc_p,
    p.sinh_p,
    p.tan_p,
}


def new_primitive(name: str) -> Any:
    """A primitive with any number of results and no rules yet."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    return primitive


@functools.cache
def key_conversions() -> frozenset[Any]:
    """The primitives between random keys and their numbers, which JAX lists nowhere."""
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    traced = jax.make_jaxpr(lambda key: jax.random.wrap_key_data(jax.random.key_data(key)))(key)
    return frozenset(equation.primitive for equation in traced.jaxpr.eqns)
