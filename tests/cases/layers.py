"""The cells that people write, and what becomes of their output."""

from cases.table import (
    FEATURES,
    HEIGHT,
    OUTPUTS,
    UNITS,
    WIDTH,
    case,
    dense,
    lstm_update,
    one_state,
    sigmoid,
    two_states,
)


@case(params=dense, states=one_state)
def simple_rnn(xp, p):
    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0] @ p["u"] + p["b"])
        return h, [h]

    return step


@case(params=lambda d: dense(d, 4), states=two_states)
def lstm(xp, p):
    def step(x, states):
        h, c = lstm_update(xp, x @ p["w"] + states[0] @ p["u"] + p["b"], states[1])
        return h, [h, c]

    return step


@case(params=lambda d: dense(d, 3), states=one_state)
def gru(xp, p):
    def step(x, states):
        (h,) = states
        xz, xr, xh = xp.split(x @ p["w"] + p["b"], 3, axis=-1)
        hz, hr, hh = xp.split(h @ p["u"], 3, axis=-1)
        z, r = sigmoid(xp, xz + hz), sigmoid(xp, xr + hr)
        h = z * h + (1.0 - z) * xp.tanh(xh + r * hh)
        return h, [h]

    return step


@case(
    params=lambda d: {gate: dense(d) for gate in "ifgo"},
    states=lambda d: tuple(two_states(d)),
)
def four_matmul_lstm(xp, p):
    """One pair of matmuls for each gate; states in a tuple, returned as a list."""

    def step(x, states):
        h, c = states
        z = [x @ p[gate]["w"] + h @ p[gate]["u"] + p[gate]["b"] for gate in "ifgo"]
        h, c = lstm_update(xp, xp.concatenate(z, axis=-1), c)
        return h, [h, c]

    return step


@case(
    params=lambda d: {"k": d.normal(FEATURES + UNITS, 4 * UNITS), "b": d.normal(4 * UNITS)},
    states=two_states,
)
def concatenating_lstm(xp, p):
    """One matmul over ``[x, h]``; states in a list, returned as a tuple."""

    def step(x, states):
        h, c = states
        h, c = lstm_update(xp, xp.concatenate([x, h], axis=-1) @ p["k"] + p["b"], c)
        return h, (h, c)

    return step


# What becomes of the output.


@case(params=lambda d: dense(d) | {"v": d.normal(UNITS, OUTPUTS)}, states=one_state)
def readout(xp, p):
    """The output is no state and has another shape: before the first valid step it is zero."""

    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0] @ p["u"] + p["b"])
        return h @ p["v"], [h]

    return step


@case(params=dense, states=one_state)
def scaled_output(xp, p):
    """The output has the first state's shape but is another value."""

    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0] @ p["u"] + p["b"])
        return 2.0 * h + 1.0, [h]

    return step


@case(params=dense, states=one_state)
def output_ignores_state(xp, p):
    def step(x, states):
        return xp.tanh(x @ p["w"]), [0.5 * states[0] + x @ p["w"]]

    return step


@case(params=lambda d: {"w": d.normal(FEATURES, UNITS)}, states=one_state)
def no_output(xp, p):
    def step(x, states):
        return None, [xp.tanh(states[0] + x @ p["w"])]

    return step


@case(
    params=dense,
    inputs=lambda d: {
        "flat": d.normal(d.batch, d.time, FEATURES),
        "deep": {"grid": d.normal(d.batch, d.time, HEIGHT, WIDTH)},
    },
    states=one_state,
)
def nested_inputs_and_outputs(xp, p):
    def step(x, states):
        pooled = xp.tanh(x["deep"]["grid"]).sum(axis=-2)
        h = xp.tanh((x["flat"] + pooled) @ p["w"] + states[0] @ p["u"] + p["b"])
        return (h, {"grid": x["deep"]["grid"] * h[:, :1, None], "mean": h.mean(axis=-1)}), [h]

    return step
