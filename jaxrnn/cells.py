"""The classic cells as pure functions over parameter pytrees, in Keras's weight layout.

A cell is made once, from its size and options, and holds no arrays::

    cell = cells.lstm(128)
    params = cell.init(key, features=12)
    last_output, outputs, states = rnn(cell.step(params), inputs, cell.initial_states(batch))

Parameters are a dict under Keras's names, so that the weights of a Keras layer load as they are::

    params = dict(zip(("kernel", "recurrent_kernel", "bias"), layer.get_weights()))

Letters: B samples (batch), D input features, H units.

Dtypes: `param_dtype` is what `init` and `initial_states` make. `dtype` is what matmuls and gates
compute in and the dtype of the output; None stands for the dtype of the parameters as passed.
States keep the dtype in which they came, and they are updated in the wider of the two: with
`dtype=jnp.bfloat16` over float32 states, an LSTM's cell state accumulates in float32.
"""

from collections.abc import Callable, Sequence
from operator import index
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxrnn._eager import PureStep

__all__ = ["Cell", "gru", "lstm", "simple_rnn"]

Params = dict[str, Array]
Step = Callable[[Array, Sequence[Array]], tuple[Array, list[Array]]]


class Cell(NamedTuple):
    """A recurrent cell: three pure functions.

    Attributes:
        init: `(key, features) -> params`, the parameters for inputs of that many features.
        step: `(params) -> step_function`, where `step_function(input_t, states)` takes an input
            `[B, D]` and a list of states `[B, H]`, the first of which is the previous output, and
            returns `(output, new_states)`: what `jaxrnn.rnn` expects. The step function is a
            pytree of arrays: outside `jit`, a call with new parameters compiles nothing anew.
        initial_states: `(batch) -> states`, a list of zeros `[B, H]`, one for each state.
    """

    init: Callable[[Array, int], Params]
    step: Callable[[Params], Step]
    initial_states: Callable[[int], list[Array]]


def simple_rnn(
    units: int,
    activation: Callable[[Array], Array] = jnp.tanh,
    *,
    use_bias: bool = True,
    param_dtype: DTypeLike = jnp.float32,
    dtype: DTypeLike | None = None,
) -> Cell:
    """The fully connected cell: `h = activation(x @ kernel + h @ recurrent_kernel + bias)`.

    Args:
        units: H, the size of the output and of the one state, `[h]`.
        activation: elementwise function of the pre-activation `[B, H]`.
        use_bias: whether there is a bias. Without it the parameters have no `"bias"`.
        param_dtype: dtype of the parameters and initial states that the cell makes.
        dtype: dtype of the computation and of the output; None: that of the parameters.

    Returns:
        A `Cell` with parameters `kernel` `[D, H]`, `recurrent_kernel` `[H, H]` and `bias` `[H]`.

    Raises:
        ValueError: if `units` is no positive integer.
        TypeError: if a dtype is not floating, or `activation` no function.
    """
    if not callable(activation):
        raise TypeError(f"activation is {activation!r}; expected a function, such as jnp.tanh.")
    form = _form(
        "simple_rnn",
        units,
        gates=1,
        state_count=1,
        use_bias=use_bias,
        param_dtype=param_dtype,
        dtype=dtype,
    )

    def simple_rnn_step(
        weights: Sequence[Array], input_t: Array, states: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        kernel, recurrent_kernel, bias = weights
        x, (h,) = form.arguments(kernel, input_t, states)
        z = _affine(x, kernel, bias) + h.astype(kernel.dtype) @ recurrent_kernel
        output = activation(z).astype(kernel.dtype)
        return output, [output.astype(h.dtype)]

    def step(params: Params) -> Step:
        return PureStep(simple_rnn_step, form.read(params))

    return Cell(form.init, step, form.initial_states)


def gru(
    units: int,
    *,
    use_bias: bool = True,
    param_dtype: DTypeLike = jnp.float32,
    dtype: DTypeLike | None = None,
) -> Cell:
    """The gated recurrent unit, with the reset gate applied after the matmul.

    Keras's `GRU(units, reset_after=True)`, the default there and the form that cuDNN runs::

        z = sigmoid(x @ W_z + b_z + h @ U_z + d_z)
        r = sigmoid(x @ W_r + b_r + h @ U_r + d_r)
        h = z * h + (1 - z) * tanh(x @ W_h + b_h + r * (h @ U_h + d_h))

    Args:
        units: H, the size of the output and of the one state, `[h]`.
        use_bias: whether there are biases. Without them the parameters have no `"bias"`.
        param_dtype: dtype of the parameters and initial states that the cell makes.
        dtype: dtype of the computation and of the output; None: that of the parameters.

    Returns:
        A `Cell` with parameters `kernel` `[D, 3H]` (W), `recurrent_kernel` `[H, 3H]` (U) and
        `bias` `[2, 3H]` (b, then d), columns in the order z, r, h.

    Raises:
        ValueError: if `units` is no positive integer.
        TypeError: if a dtype is not floating.
    """
    form = _form(
        "gru",
        units,
        gates=3,
        state_count=1,
        bias_rows=(2,),
        use_bias=use_bias,
        param_dtype=param_dtype,
        dtype=dtype,
    )
    units = form.units

    def gru_step(
        weights: Sequence[Array], input_t: Array, states: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        kernel, recurrent_kernel, input_bias, recurrent_bias = weights
        x, (h,) = form.arguments(kernel, input_t, states)
        from_input = _affine(x, kernel, input_bias)
        from_state = _affine(h.astype(kernel.dtype), recurrent_kernel, recurrent_bias)
        input_gates, input_candidate = jnp.split(from_input, [2 * units], axis=-1)
        state_gates, state_candidate = jnp.split(from_state, [2 * units], axis=-1)
        z, r = map(_sigmoid, jnp.split(jnp.tanh(input_gates + state_gates), 2, axis=-1))
        candidate = jnp.tanh(input_candidate + r * state_candidate)
        wide = _wider(kernel.dtype, h.dtype)
        z, candidate = z.astype(wide), candidate.astype(wide)
        h_new = z * h.astype(wide) + (1 - z) * candidate
        return h_new.astype(kernel.dtype), [h_new.astype(h.dtype)]

    def step(params: Params) -> Step:
        kernel, recurrent_kernel, bias = _halved((0.5, 0.5, 1.0), units, *form.read(params))
        biases = jnp.broadcast_to(bias, (2, 3 * units))
        return PureStep(gru_step, (kernel, recurrent_kernel, *biases))

    return Cell(form.init, step, form.initial_states)


def lstm(
    units: int,
    *,
    use_bias: bool = True,
    unit_forget_bias: bool = True,
    param_dtype: DTypeLike = jnp.float32,
    dtype: DTypeLike | None = None,
) -> Cell:
    """The long short-term memory cell, Keras's `LSTM(units)`.

    With each gate's own columns of W, U and b::

        i, f, o = sigmoid(x @ W + h @ U + b)
        g = tanh(x @ W + h @ U + b)
        c = f * c + i * g
        h = o * tanh(c)

    Args:
        units: H, the size of the output and of both states, `[h, c]`.
        use_bias: whether there is a bias. Without it the parameters have no `"bias"`.
        unit_forget_bias: whether `init` sets the forget gate's bias to one.
        param_dtype: dtype of the parameters and initial states that the cell makes.
        dtype: dtype of the computation and of the output; None: that of the parameters.

    Returns:
        A `Cell` with parameters `kernel` `[D, 4H]` (W), `recurrent_kernel` `[H, 4H]` (U) and `bias`
        `[4H]` (b), columns in the order i, f, g, o (Keras calls the third c).

    Raises:
        ValueError: if `units` is no positive integer.
        TypeError: if a dtype is not floating.
    """
    form = _form(
        "lstm",
        units,
        gates=4,
        state_count=2,
        use_bias=use_bias,
        param_dtype=param_dtype,
        dtype=dtype,
    )
    units = form.units

    def init(key: Array, features: int) -> Params:
        """Keras's defaults, as of the other cells, and `unit_forget_bias`."""
        params = form.init(key, features)
        if use_bias and unit_forget_bias:
            params["bias"] = params["bias"].at[units : 2 * units].set(1)
        return params

    def lstm_step(
        weights: Sequence[Array], input_t: Array, states: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        kernel, recurrent_kernel, bias = weights
        x, (h, c) = form.arguments(kernel, input_t, states)
        z = _affine(x, kernel, bias) + h.astype(kernel.dtype) @ recurrent_kernel
        wide = _wider(kernel.dtype, c.dtype)
        i, f, g, o = (gate.astype(wide) for gate in jnp.split(jnp.tanh(z), 4, axis=-1))
        i, f, o = map(_sigmoid, (i, f, o))
        c_new = f * c.astype(wide) + i * g
        h_new = o * jnp.tanh(c_new)
        return h_new.astype(kernel.dtype), [h_new.astype(h.dtype), c_new.astype(c.dtype)]

    def step(params: Params) -> Step:
        return PureStep(lstm_step, _halved((0.5, 0.5, 1.0, 0.5), units, *form.read(params)))

    return Cell(init, step, form.initial_states)


class _Form(NamedTuple):
    """What the cells have in common: the form of their parameters and states."""

    name: str
    units: int
    columns: int
    bias_shape: tuple[int, ...] | None
    state_count: int
    param_dtype: DTypeLike
    dtype: DTypeLike | None

    def init(self, key: Array, features: int) -> Params:
        """Keras's defaults: Glorot uniform, orthogonal, zeros."""
        features = _positive("features", features)
        # The QR decomposition behind the orthogonal matrix knows no dtype below float32.
        drawn = _wider(self.param_dtype, jnp.float32)
        glorot_uniform = jax.nn.initializers.glorot_uniform()
        orthogonal = jax.nn.initializers.orthogonal()
        kernel_key, recurrent_key = jax.random.split(key)
        kernel = glorot_uniform(kernel_key, (features, self.columns), drawn)
        recurrent_kernel = orthogonal(recurrent_key, (self.units, self.columns), drawn)
        params = {
            "kernel": kernel.astype(self.param_dtype),
            "recurrent_kernel": recurrent_kernel.astype(self.param_dtype),
        }
        if self.bias_shape is not None:
            params["bias"] = jnp.zeros(self.bias_shape, self.param_dtype)
        return params

    def initial_states(self, batch: int) -> list[Array]:
        """Zeros, one array for each state."""
        shape = (batch, self.units)
        return [jnp.zeros(shape, self.param_dtype) for _ in range(self.state_count)]

    def read(self, params: Params) -> tuple[Array, Array, Array]:
        """Checks parameters; returns kernel, recurrent kernel and bias in the compute dtype."""
        names = ["kernel", "recurrent_kernel"] + ["bias"] * (self.bias_shape is not None)
        if not hasattr(params, "keys"):
            raise TypeError(
                f"{self.name}: params is a {type(params).__name__}, expected a dict with keys "
                f"{names}; a list in this order becomes one by dict(zip({names}, params))"
            )
        if sorted(params) != sorted(names):
            raise ValueError(
                f"{self.name}: params has {sorted(params)}, expected {sorted(names)}; "
                "use_bias must be what it was when the parameters were made."
            )
        arrays = {name: jnp.asarray(params[name]) for name in names}
        if arrays["kernel"].ndim != 2:
            shape = arrays["kernel"].shape
            raise ValueError(
                f"{self.name}: params['kernel'] has shape {shape}, "
                f"expected [features, {self.columns}]"
            )
        expected = {
            "kernel": (arrays["kernel"].shape[0], self.columns),
            "recurrent_kernel": (self.units, self.columns),
            "bias": self.bias_shape,
        }
        for name, array in arrays.items():
            self.check_dtype(f"params[{name!r}]", array)
            if array.shape != expected[name]:
                raise ValueError(
                    f"{self.name}: params[{name!r}] has shape {array.shape}, "
                    f"expected {expected[name]} for units={self.units}"
                )
        compute = arrays["kernel"].dtype if self.dtype is None else self.dtype
        kernel = arrays["kernel"].astype(compute)
        recurrent_kernel = arrays["recurrent_kernel"].astype(compute)
        bias = arrays["bias"].astype(compute) if "bias" in arrays else jnp.zeros(1, compute)
        return kernel, recurrent_kernel, bias

    def arguments(
        self, kernel: Array, input_t: ArrayLike, states: Sequence[Array]
    ) -> tuple[Array, Sequence[Array]]:
        """Checks a step's arguments; returns the input in the compute dtype, and the states."""
        x = jnp.asarray(input_t, kernel.dtype)
        if x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"{self.name}: the input at one step has shape {x.shape}, but the parameters are "
                f"for {kernel.shape[0]} features on the last axis; init the cell with the number "
                "of features of the inputs"
            )
        if len(states) != self.state_count:
            raise ValueError(
                f"{self.name}: got {len(states)} states, expected {self.state_count}; start from "
                "cell.initial_states(batch), without constants"
            )
        for position, state in enumerate(states):
            self.check_dtype(f"states[{position}]", state)
            if state.ndim == 0 or state.shape[-1] != self.units:
                raise ValueError(
                    f"{self.name}: states[{position}] has shape {state.shape}, expected "
                    f"{self.units} units on the last axis; start from cell.initial_states(batch)"
                )
        return x, states

    def check_dtype(self, what: str, array: Array) -> None:
        """Raises the TypeError that numbers deserve in which no gate could be held."""
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{self.name}: {what} has dtype {array.dtype}, expected a floating one; cast it: "
                f"astype('{jnp.dtype(self.param_dtype)}')"
            )


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    # No ranks are left to promotion, which `jax_numpy_rank_promotion` may forbid.
    y = x @ kernel
    return y + lax.broadcast_to_rank(bias, y.ndim)


def _wider(a: DTypeLike, b: DTypeLike) -> DTypeLike:
    # Under strict promotion promote_types would refuse two dtypes.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def _halved(gates: tuple[float, ...], units: int, *weights: Array) -> list[Array]:
    """Weights of which some gates' columns are halved, as `_sigmoid` wants them."""
    columns = [jnp.repeat(jnp.array(gates, w.dtype), units) for w in weights]
    return [w * lax.broadcast_to_rank(c, w.ndim) for w, c in zip(weights, columns, strict=True)]


def _sigmoid(tanh_of_half: Array) -> Array:
    """sigmoid(z) = tanh(z / 2) / 2 + 1/2.

    With the halves in the weights one tanh over all gates, before they are split, is enough.
    """
    return tanh_of_half * 0.5 + 0.5


def _form(
    name: str,
    units: int,
    *,
    gates: int,
    state_count: int,
    use_bias: bool,
    bias_rows: tuple[int, ...] = (),
    param_dtype: DTypeLike,
    dtype: DTypeLike | None,
) -> _Form:
    units = _positive("units", units)
    for argument, value in (("param_dtype", param_dtype), ("dtype", dtype)):
        if value is not None and not jnp.issubdtype(value, jnp.floating):
            raise TypeError(f"{argument} is {jnp.dtype(value)}; expected a floating dtype.")
    columns = gates * units
    bias_shape = (*bias_rows, columns) if use_bias else None
    return _Form(name, units, columns, bias_shape, state_count, param_dtype, dtype)


def _positive(name: str, value: int | Array) -> int:
    try:
        number = index(value)
    except TypeError:
        number = 0
    if number < 1:
        got = f"an array {jax.typeof(value)}" if isinstance(value, Array) else repr(value)
        raise ValueError(f"{name} is {got}; expected a positive integer.")
    return number
