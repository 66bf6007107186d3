"""The step functions of the golden configurations, each written once for both libraries.

An entry of `STEPS` is `make(ops, w) -> step_function`. `ops` is the library, reduced to what
operators can't express: `tanh`, `sigmoid`, `sum(x, axis)`, `concat(xs, axis)`, `cast(x, dtype)`,
`column(x)` (`[B]` or `[B, 1]` as `[B, 1]`). `w` is a dict of that library's arrays.
"""


def simple_rnn(ops, w):
    """Elman's network: the output is the state."""

    def step(x, states):
        (h,) = states
        h = ops.tanh(x @ w["W"] + h @ w["U"] + w["b"])
        return h, [h]

    return step


def _lstm_update(ops, w, x, h, c):
    n = w["U"].shape[0]
    z = x @ w["W"] + h @ w["U"] + w["b"]
    i, f, o = (ops.sigmoid(z[:, k * n : (k + 1) * n]) for k in (0, 1, 3))
    c = f * c + i * ops.tanh(z[:, 2 * n : 3 * n])
    return o * ops.tanh(c), c


def lstm(ops, w):
    """Two states, of which the first is the output."""

    def step(x, states):
        h, c = _lstm_update(ops, w, x, *states)
        return h, [h, c]

    return step


def lstm_memory(ops, w):
    """An LSTM that puts out its second state: an output shaped like `states[0]`, but not it."""

    def step(x, states):
        h, c = _lstm_update(ops, w, x, *states)
        return c, (h, c)

    return step


def gru(ops, w):
    """Gates that reuse the state before and after the reset."""

    def step(x, states):
        (h,) = states
        n = w["U"].shape[0]
        xs = x @ w["W"] + w["b"]
        gates = ops.sigmoid(xs[:, : 2 * n] + h @ w["U"][:, : 2 * n])
        z, r = gates[:, :n], gates[:, n:]
        h = z * h + (1.0 - z) * ops.tanh(xs[:, 2 * n :] + (r * h) @ w["U"][:, 2 * n :])
        return h, (h,)

    return step


def attention(ops, w):
    """Two constants: a memory `[B, S, H]` that the state reads from, and a gain `[H]`."""

    def step(x, states):
        h, memory, gain = states
        weights = ops.sigmoid(ops.sum(memory * h[:, None, :], -1))
        read = ops.sum(memory * weights[:, :, None], 1)
        h = ops.tanh(x @ w["W"] + gain * read)
        return h, [h]

    return step


def scaled_output(ops, w):
    """An output that is shaped like the state and differs from it in value."""

    def step(x, states):
        (h,) = states
        h = ops.tanh(x @ w["W"] + h @ w["U"])
        return 2.0 * h + 1.0, [h]

    return step


def readout(ops, w):
    """An output of another width than the state."""

    def step(x, states):
        (h,) = states
        h = ops.tanh(x @ w["W"] + h @ w["U"])
        return h @ w["V"], [h]

    return step


def affine(ops, w):
    """A recurrence that is affine in its state."""

    def step(x, states):
        (h,) = states
        h = w["decay"] * h + x @ w["W"] + w["b"]
        return h, [h]

    return step


def delay(ops, w):
    """Puts out what it was given one step before: a masked step shifts it by nothing."""

    def step(x, states):
        previous, before = states
        return ops.concat([previous, before], -1), [x, previous]

    return step


def running_mean(ops, w):
    """A float sum and an int32 count; a count that a masked step moved would show from then on."""

    def step(x, states):
        total, count = states
        total, count = total + x, count + 1
        return total / ops.cast(count, "float32"), [total, count]

    return step


def event_counter(ops, w):
    """Integers throughout: inputs, state and output are int32."""

    def step(x, states):
        (seen,) = states
        seen = seen + x
        return 2 * seen - x, [seen]

    return step


def clock(ops, w):
    """Keeps time in a second state, which may be `[B]` or `[B, 1]`."""

    def step(x, states):
        h, time = states
        time = time + 1.0
        h = ops.tanh(x @ w["W"] + h @ w["U"] + ops.column(time) * w["v"])
        return h, [h, time]

    return step


def grid(ops, w):
    """Inputs `[B, T, D1, D2]`, state and output `[B, D1, H]`."""

    def step(x, states):
        (h,) = states
        h = ops.tanh(x @ w["W"] + h @ w["U"])
        return h, [h]

    return step


def two_inputs(ops, w):
    """A pair of inputs of different rank, one output."""

    def step(xs, states):
        x, y = xs
        (h,) = states
        h = ops.tanh(x @ w["W"] + h @ w["U"] + ops.sum(y, 1) @ w["Y"])
        return h, [h]

    return step


def nested_states(ops, w):
    """A state that is itself a pair, one output."""

    def step(x, states):
        h, (total, count) = states
        h = ops.tanh(x @ w["W"] + h @ w["U"] + total)
        return h, [h, (total + h, count + 1)]

    return step


def nested(ops, w):
    """Inputs, outputs and states that are all nested, in dicts and tuples, with an int32 leaf."""

    def step(xs, states):
        h, (inner, count) = states
        h = ops.tanh(xs["flat"] @ w["W"] + h @ w["U"])
        inner = 0.5 * inner + xs["deep"]
        return {"hidden": h, "rest": (inner, 3 * count)}, [h, (inner, count + 1)]

    return step


def two_outputs(ops, w):
    """A pair of outputs of one shape."""

    def step(x, states):
        (h,) = states
        h = ops.tanh(x @ w["W"] + h @ w["U"] + w["b"])
        return (h, -2.0 * h), [h]

    return step


def stateless(ops, w):
    """No state at all."""

    def step(x, states):
        assert len(states) == 0
        return ops.tanh(x @ w["W"]), []

    return step


STEPS = {
    make.__name__: make
    for make in (
        simple_rnn,
        lstm,
        lstm_memory,
        gru,
        attention,
        scaled_output,
        readout,
        affine,
        delay,
        running_mean,
        event_counter,
        clock,
        grid,
        two_inputs,
        nested_states,
        nested,
        two_outputs,
        stateless,
    )
}
