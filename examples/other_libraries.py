# needs peers
"""Cells of Flax, Equinox and Haiku inside `jaxrnn.rnn`, and Keras weights inside `jaxrnn.cells`.

Each cell is built by its own library and run twice over the same sequences: by that library's own
loop, and by `rnn` around a step function of a few lines. Keras layers hand over their weights and
nothing else, and their sequences are of uneven length. Outputs have to agree, and so have the
gradients with respect to all parameters.

Needs the four libraries; from a clone: pip install '.[peers]'
"""

import argparse
import os
import sys
from functools import partial

import jax
import jax.numpy as jnp

from jaxrnn import cells, rnn

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported
try:
    import equinox as eqx
    import haiku as hk
    import keras
    from flax import nnx
    from tqdm import tqdm
except ModuleNotFoundError as error:
    print(f"FAIL  {error.name} is not installed; from a clone: pip install '.[peers]'")
    sys.exit(1)

TOLERANCE = 1e-5
FEATURES = 5


def main(arguments=None):
    """Runs every cell twice and compares; returns 0 if they all agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="small cells, short sequences")
    options = parser.parse_args(arguments)
    batch, time, units = (3, 24, 32) if options.short else (6, 120, 128)
    inputs = jax.random.normal(jax.random.key(0), (batch, time, FEATURES))
    apart = {}
    for name, make in tqdm(CASES.items(), desc="comparing", unit="cell"):
        apart[name] = compare(*make(inputs, units))
    return report(apart)


def flax_cell(kind, inputs, units):
    """A Flax nnx cell, against `nnx.RNN`."""
    cell = getattr(nnx, kind)(FEATURES, units, rngs=nnx.Rngs(0))
    graph, params = nnx.split(cell)
    start = cell.initialize_carry((len(inputs), FEATURES), nnx.Rngs(0))

    def theirs(params):
        return nnx.RNN(nnx.merge(graph, params))(inputs, initial_carry=start)

    def ours(params):
        def step(input_t, states):
            carry, output = nnx.merge(graph, params)(states[0], input_t)
            return output, [carry]

        return rnn(step, inputs, [start])[1]

    return params, theirs, ours


def equinox_cell(kind, inputs, units):
    """An Equinox cell, written for one sample, against `lax.scan` of it under `vmap`."""
    cell = getattr(eqx.nn, kind)(FEATURES, units, key=jax.random.key(1))
    params, static = eqx.partition(cell, eqx.is_array)
    zeros = jnp.zeros((len(inputs), units))
    start = (zeros, zeros) if kind == "LSTMCell" else zeros

    def output_of(state):
        return state[0] if kind == "LSTMCell" else state

    def theirs(params):
        def body(state, input_t):
            state = eqx.combine(params, static)(input_t, state)
            return state, output_of(state)

        return jax.vmap(lambda state, sample: jax.lax.scan(body, state, sample)[1])(start, inputs)

    def ours(params):
        def step(input_t, states):
            state = jax.vmap(eqx.combine(params, static))(input_t, states[0])
            return output_of(state), [state]

        return rnn(step, inputs, [start])[1]

    return params, theirs, ours


def haiku_core(kind, inputs, units):
    """A Haiku core, against `hk.dynamic_unroll`."""

    def unroll():
        core = getattr(hk, kind)(units)
        start = core.initial_state(len(inputs))
        return hk.dynamic_unroll(core, inputs, start, time_major=False)[0], start

    def advance(input_t, state):
        return getattr(hk, kind)(units)(input_t, state)

    whole = hk.without_apply_rng(hk.transform(unroll))
    core = hk.without_apply_rng(hk.transform(advance))
    params = whole.init(jax.random.key(2))
    _, start = whole.apply(params)

    def theirs(params):
        return whole.apply(params)[0]

    def ours(params):
        def step(input_t, states):
            output, state = core.apply(params, input_t, states[0])
            return output, [state]

        return rnn(step, inputs, [start])[1]

    return params, theirs, ours


def keras_layer(kind, cell_of, inputs, units):
    """The weights of a Keras layer in the cell of `jaxrnn.cells`, on sequences of uneven length."""
    layer = getattr(keras.layers, kind)(units, return_sequences=True)
    layer.build(inputs.shape)
    names = ("kernel", "recurrent_kernel", "bias")
    params = dict(zip(names, map(jnp.asarray, layer.get_weights()), strict=True))
    state_free = [variable.value for variable in layer.non_trainable_variables]

    batch, time, _ = inputs.shape
    lengths = time - 2 * jnp.arange(batch)
    mask = jnp.arange(time) < lengths[:, None]

    def theirs(params):
        weights = [params[name] for name in names]
        return layer.stateless_call(weights, state_free, inputs, mask=mask)[0]

    def ours(params):
        cell = cell_of(units)
        start = cell.initial_states(batch)
        return rnn(cell.step(params), inputs, start, input_length=lengths)[1]

    return params, theirs, ours


CASES = {
    "Flax nnx.LSTMCell": partial(flax_cell, "LSTMCell"),
    "Flax nnx.OptimizedLSTMCell": partial(flax_cell, "OptimizedLSTMCell"),
    "Flax nnx.GRUCell": partial(flax_cell, "GRUCell"),
    "Flax nnx.SimpleCell": partial(flax_cell, "SimpleCell"),
    "Equinox nn.LSTMCell": partial(equinox_cell, "LSTMCell"),
    "Equinox nn.GRUCell": partial(equinox_cell, "GRUCell"),
    "Haiku LSTM": partial(haiku_core, "LSTM"),
    "Haiku GRU": partial(haiku_core, "GRU"),
    "Haiku VanillaRNN": partial(haiku_core, "VanillaRNN"),
    "Keras LSTM": partial(keras_layer, "LSTM", cells.lstm),
    "Keras GRU": partial(keras_layer, "GRU", cells.gru),
    "Keras SimpleRNN": partial(keras_layer, "SimpleRNN", cells.simple_rnn),
}


def compare(params, theirs, ours):
    """How far apart outputs and gradients are, relative to the largest entry of theirs."""

    def with_gradient(run):
        def loss(params):
            outputs = run(params)
            return jnp.mean(
                outputs * jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
            ), outputs

        gradient, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
        return outputs, gradient

    return [
        max(map(relative_distance, jax.tree.leaves(actual), jax.tree.leaves(expected)))
        for actual, expected in zip(with_gradient(ours), with_gradient(theirs), strict=True)
    ]


def relative_distance(actual, expected):
    """The largest difference between two arrays over the largest entry of the second."""
    assert actual.shape == expected.shape
    return float(jnp.max(jnp.abs(actual - expected)) / jnp.max(jnp.abs(expected)))


def report(apart):
    """Prints the figures and, last, whether they are what this script claims; returns 0 or 1."""
    print(f"{'cell':<27} outputs  gradients")
    for name, (outputs, gradients) in apart.items():
        print(f"{name:<27} {outputs:.1e}  {gradients:.1e}")
    outputs, gradients = (max(column) for column in zip(*apart.values(), strict=True))
    good = max(outputs, gradients) < TOLERANCE
    print(
        f"{'PASS' if good else 'FAIL'}  {len(apart)} cells of four libraries: outputs equal the "
        f"library's own to {outputs:.1e}, gradients to {gradients:.1e}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
