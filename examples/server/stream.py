"""Serve a model exported by `serving.py`: feed blocks of frames as they come, hand the states on.

This process knows neither the cell nor the library that trained it. All it has are two files:
`model.jax`, the program, and `params.safetensors`, the weights. It answers with `served.npz`.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file


def main(folder):
    """Streams `frames.npz` from the folder block by block, and then once more in one call."""
    exported = jax.export.deserialize((folder / "model.jax").read_bytes())
    params = jax.device_put(load_file(folder / "params.safetensors"))
    model = jax.jit(exported.call)
    with np.load(folder / "frames.npz") as data:
        frames, cuts, start = data["frames"], data["cuts"], data["start"]

    # A shape is compiled when it is first met, and states from outside are not quite those handed
    # on: a server meets all of them before it opens.
    for length in np.unique(np.diff(cuts)):
        _, states = model(params, frames[:, :length], start)
        jax.block_until_ready(model(params, frames[:, :length], states))

    states, pieces, latencies = start, [], []
    for first, last in pairwise(cuts):
        clock = time.perf_counter()
        outputs, states = model(params, frames[:, first:last], states)
        pieces.append(np.asarray(outputs))
        latencies.append(time.perf_counter() - clock)

    whole, whole_states = model(params, frames, start)
    np.savez(
        folder / "served.npz",
        streamed=np.concatenate(pieces, axis=1),
        streamed_states=states,
        whole=whole,
        whole_states=whole_states,
        latencies=latencies,
        imported=sorted({name.partition(".")[0] for name in sys.modules}),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
