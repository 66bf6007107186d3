"""Train a recurrent model, export it, and serve it from a process that knows only two files.

The model listens to speech without end and says, frame by frame, which of nine speakers is heard.
It is trained on utterances of the Japanese Vowels data strung together. Then it leaves home: the
weights as a safetensors file, the program as a `jax.export` file with batch and time left open. A
fresh process that imports no training code (`server/stream.py`) feeds it the test utterances in
blocks as they come, one frame to sixteen, and hands the states on from block to block. What it
answers has to be what one call over the whole stream answers.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxrnn import cells, rnn

HERE = Path(__file__).parent
SPEAKERS = 9
STREAMS, BATCH, FRAMES = 4, 32, 96
BLOCK_LENGTHS = (1, 2, 4, 8, 16)
LEARNING_RATE = 3e-3
TOLERANCE = 1e-5
TIMEOUT = 300
CELL = cells.gru(64)


def main(arguments=None):
    """Trains, exports, serves, compares; returns 0 if streaming answers what one call does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="60 steps")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "serving.png")
    options = parser.parse_args(arguments)
    if options.short:
        options.steps = 60

    train_set, test_set = load()
    params = train(train_set, options.steps, options.seed)

    rng = np.random.default_rng(options.seed)
    frames, speakers = (np.stack(rows) for rows in conversations(test_set, rng))
    cuts = cut_into_blocks(frames.shape[1], rng)
    with tempfile.TemporaryDirectory() as folder:
        export(params, frames.shape[2], Path(folder))
        start = np.stack(CELL.initial_states(STREAMS))
        np.savez(Path(folder) / "frames.npz", frames=frames, cuts=cuts, start=start)
        serve(Path(folder))
        with np.load(Path(folder) / "served.npz") as data:
            served = dict(data)

    draw(served, speakers, cuts, options.output)
    print(f"speakers as heard, and latencies: {options.output}")
    return report(params, frames, speakers, cuts, served)


def load():
    """Training and test set, each a list of pairs: frames `[T, D]` of an utterance, its speaker."""
    with np.load(HERE / "data" / "japanese_vowels.npz") as data:
        parts = [
            [
                (inputs[:length], speaker)
                for inputs, length, speaker in zip(
                    data[f"{part}_inputs"],
                    data[f"{part}_lengths"],
                    data[f"{part}_speakers"],
                    strict=True,
                )
            ]
            for part in ("train", "test")
        ]
    frames = np.concatenate([frames for frames, _ in parts[0]])
    mean, deviation = frames.mean(axis=0), frames.std(axis=0)
    return [[((frames - mean) / deviation, who) for frames, who in part] for part in parts]


def train(train_set, steps, seed):
    """The parameters after `steps` batches of utterances strung together at random."""
    rng = np.random.default_rng(seed)
    params, optimizer_state = init(steps, jax.random.key(seed), train_set[0][0].shape[1])
    progress = tqdm(range(steps), desc="training", unit="step")
    for step in progress:
        batch = [string_together(train_set, rng, FRAMES) for _ in range(BATCH)]
        inputs, speakers = (np.stack(rows) for rows in zip(*batch, strict=True))
        params, optimizer_state, loss = update(steps, params, optimizer_state, inputs, speakers)
        if step % 20 == 0:
            progress.set_postfix_str(f"cross-entropy {loss:.3f}")
    return params


def string_together(utterances, rng, length):
    """Utterances in random order, end to end: frames `[length, D]`, and who speaks `[length]`."""
    frames, speakers, total = [], [], 0
    while total < length:
        spoken, speaker = utterances[rng.integers(len(utterances))]
        frames.append(spoken)
        speakers.append(np.full(len(spoken), speaker))
        total += len(spoken)
    return np.concatenate(frames)[:length], np.concatenate(speakers)[:length]


def init(steps, key, features):
    """Parameters, flat by name as safetensors has them, and the optimiser's state."""
    readout = jax.nn.initializers.glorot_uniform()(key, (64, SPEAKERS))
    params = CELL.init(key, features) | {"readout": readout, "readout_bias": jnp.zeros(SPEAKERS)}
    return params, make_optimizer(steps).init(params)


def make_optimizer(steps):
    """Adam; the learning rate falls to zero along a cosine."""
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps))


@partial(jax.jit, static_argnums=0)
def update(steps, params, optimizer_state, inputs, speakers):
    """One step of the optimiser on the mean cross-entropy over all frames."""

    def cross_entropy(params):
        logits, _ = model(params, inputs, jnp.stack(CELL.initial_states(len(inputs))))
        return optax.softmax_cross_entropy_with_integer_labels(logits, speakers).mean()

    loss, gradient = jax.value_and_grad(cross_entropy)(params)
    updates, optimizer_state = make_optimizer(steps).update(gradient, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss


def model(params, frames, states):
    """What is trained and what is served: frames `[B, T, D]` and states, to logits and states."""
    cell_params = {name: params[name] for name in ("kernel", "recurrent_kernel", "bias")}
    _, outputs, states = rnn(CELL.step(cell_params), frames, list(states))
    return outputs @ params["readout"] + params["readout_bias"], jnp.stack(states)


def conversations(test_set, rng):
    """The test utterances, each heard once, as `STREAMS` streams of one length."""
    order = rng.permutation(len(test_set))
    streams = []
    for rows in np.array_split(order, STREAMS):
        frames = np.concatenate([test_set[row][0] for row in rows])
        speakers = np.concatenate(
            [np.full(len(test_set[row][0]), test_set[row][1]) for row in rows]
        )
        streams.append((frames, speakers))
    length = min(len(frames) for frames, _ in streams)
    return zip(*((frames[:length], speakers[:length]) for frames, speakers in streams), strict=True)


def cut_into_blocks(length, rng):
    """Where blocks of random length begin and end: `[0, ..., length]`."""
    cuts = [0]
    while cuts[-1] < length:
        left = length - cuts[-1]
        cuts.append(cuts[-1] + rng.choice([n for n in BLOCK_LENGTHS if n <= left]))
    return np.array(cuts)


def export(params, features, folder):
    """Writes weights and program; the program takes any batch and any number of frames."""
    save_file(
        {name: np.asarray(array) for name, array in params.items()}, folder / "params.safetensors"
    )
    batch, time = jax.export.symbolic_shape("batch, time")
    exported = jax.export.export(jax.jit(model))(
        jax.eval_shape(lambda: params),
        jax.ShapeDtypeStruct((batch, time, features), jnp.float32),
        jax.ShapeDtypeStruct((1, batch, 64), jnp.float32),
    )
    (folder / "model.jax").write_bytes(exported.serialize())
    for path in sorted(folder.iterdir()):
        print(f"exported {path.name}: {path.stat().st_size / 1024:.0f} KiB")


def serve(folder):
    """Runs the server in a process of its own; `-I` keeps this script's folder out of its sight."""
    command = [sys.executable, "-I", HERE / "server" / "stream.py", folder]
    subprocess.run(command, check=True, timeout=TIMEOUT)


def draw(served, speakers, cuts, path):
    """Writes what was heard in one stream (top) and latency by block length (bottom) as one PNG."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    shown = min(240, speakers.shape[1])
    logits = served["streamed"][0, :shown]
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    top.imshow(
        (odds / odds.sum(axis=-1, keepdims=True)).T,
        aspect="auto",
        cmap="Blues",
        interpolation="nearest",
        extent=(0, shown, SPEAKERS + 0.5, 0.5),
    )
    edges = np.arange(shown + 1)
    top.stairs(speakers[0, :shown] + 1, edges, color="#c8502d", linewidth=1.4, baseline=None)
    top.vlines(cuts[cuts < shown], SPEAKERS + 0.5, SPEAKERS + 0.8, color="black", linewidth=0.6)
    top.set_ylim(SPEAKERS + 0.8, 0.5)
    top.set_yticks(range(1, SPEAKERS + 1))
    top.set(xlabel="frame (ticks: where a block ends)", ylabel="speaker")
    top.set_title("Probability of each speaker as the stream was heard; red: who spoke")

    lengths = np.diff(cuts)
    times = [1e3 * served["latencies"][lengths == n] for n in BLOCK_LENGTHS]
    bottom.boxplot(times, orientation="horizontal", showfliers=False, whis=(5, 95), widths=0.6)
    bottom.set_yticks(range(1, len(BLOCK_LENGTHS) + 1), BLOCK_LENGTHS)
    bottom.set_xlim(left=0)
    bottom.set(
        xlabel="latency [ms]; box: quartiles, whiskers: 5 % and 95 %", ylabel="frames in block"
    )
    bottom.set_title(f"{STREAMS} streams at once, block by block")
    for panel in (top, bottom):
        panel.spines[["top", "right"]].set_visible(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(params, frames, speakers, cuts, served):
    """Prints the figures and, last, whether they are what this script claims; returns 0 or 1."""
    start = jnp.stack(CELL.initial_states(STREAMS))
    expected, expected_states = jax.jit(model)(params, frames, start)
    apart = max(
        float(np.max(np.abs(served[name] - reference)))
        for name, reference in [
            ("streamed", served["whole"]),
            ("streamed_states", served["whole_states"]),
            ("streamed", expected),
            ("streamed_states", expected_states),
        ]
    )
    foreign = sorted({"jaxrnn", "optax"} & set(served["imported"]))
    right = np.mean(np.argmax(served["streamed"], axis=-1) == speakers)
    median, ninety_five, ninety_nine = 1e3 * np.percentile(served["latencies"], [50, 95, 99])

    blocks = len(cuts) - 1
    print(
        f"{STREAMS} streams of {frames.shape[1]} frames in {blocks} blocks: "
        f"speaker recognised in {right:.1%} of frames"
    )
    print(
        f"latency per block: {median:.2f} ms median, {ninety_five:.2f} 95 %, {ninety_nine:.2f} 99 %"
    )
    if foreign:
        print(f"the server imported {', '.join(foreign)}")
    good = apart < TOLERANCE and not foreign
    print(
        f"{'PASS' if good else 'FAIL'}  {blocks} blocks streamed by a process without the training "
        f"code equal one whole call to {apart:.1e}; latency {median:.2f} ms median, "
        f"{ninety_nine:.2f} ms 99 %"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
