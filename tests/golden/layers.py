"""Writes layers.npz: the recurrent layers of tf_keras on random weights, states and inputs.

Run by hand, where TensorFlow 2.21 and tf_keras 2.21 are installed: `python tests/golden/layers.py`.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras

BATCH, TIME, FEATURES, UNITS = 2, 5, 3, 4
LAYERS = {
    "simple_rnn": (tf_keras.layers.SimpleRNN, 1),
    "gru": (tf_keras.layers.GRU, 1),
    "lstm": (tf_keras.layers.LSTM, 2),
}


def main():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {"inputs": draw(BATCH, TIME, FEATURES)}
    for name, (layer_class, state_count) in LAYERS.items():
        layer = layer_class(UNITS, return_sequences=True, return_state=True)
        layer.build((BATCH, TIME, FEATURES))
        layer.set_weights([draw(*weight.shape) for weight in layer.get_weights()])
        initial = [draw(BATCH, UNITS) for _ in range(state_count)]
        outputs, *states = layer(
            tf.constant(arrays["inputs"]), initial_state=[tf.constant(s) for s in initial]
        )
        groups = {"weights": layer.get_weights(), "initial": initial, "states": states}
        for group, members in groups.items():
            arrays |= {f"{name}/{group}/{i}": np.asarray(a) for i, a in enumerate(members)}
        arrays[f"{name}/outputs"] = np.asarray(outputs)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
