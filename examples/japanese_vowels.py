"""Tell nine speakers apart by how they say /ae/: a masked, bidirectional GRU on real speech.

Utterances are 7 to 29 frames long. Each is padded to 29, and the padding is filled with NaN: were a
single padded frame to reach a result or a gradient, training would end there.

The number of epochs is fixed beforehand; the test set decides nothing.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from jaxrnn import bidirectional, cells

HERE = Path(__file__).parent
SPEAKERS = 9
BATCH = 27
NOISE = 0.2
LEARNING_RATE = 3e-3
REQUIRED_ACCURACY = 0.96
CELL = cells.gru(64)


def main(arguments=None):
    """Trains, draws and reports; returns 0 if the test accuracy is what this script promises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="8 epochs, and a lower bar")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "japanese_vowels.png")
    options = parser.parse_args(arguments)
    required = REQUIRED_ACCURACY
    if options.short:
        options.epochs, required = 8, 0.9

    train_set, test_set = load()
    start = time.perf_counter()
    params, history = train(train_set, test_set, options.epochs, options.seed)
    seconds = time.perf_counter() - start

    confusion = count_confusions(params, test_set)
    draw(history, confusion, options.output)
    correct, total = np.trace(confusion), confusion.sum()
    print(f"trained on {len(train_set['speakers'])} utterances in {seconds:.0f} s")
    print(f"test accuracy: {correct / total:.2%} ({correct} of {total} utterances)")
    print(f"learning curve and confusion matrix: {options.output}")
    passed = correct / total >= required
    print(
        f"{'PASS' if passed else 'FAIL'}  {correct / total:.1%} of unheard utterances "
        f"given to their speakers (needs {required:.0%})"
    )
    return 0 if passed else 1


def load():
    """Training and test set: `inputs` `[B, T, D]`, `lengths` `[B]`, `speakers` `[B]`."""
    with np.load(HERE / "data" / "japanese_vowels.npz") as data:
        train_set, test_set = (
            {name: data[f"{part}_{name}"] for name in ("inputs", "lengths", "speakers")}
            for part in ("train", "test")
        )
    frames = train_set["inputs"][valid_frames(train_set)]
    mean, deviation = frames.mean(axis=0), frames.std(axis=0)
    for part in (train_set, test_set):
        standardised = (part["inputs"] - mean) / deviation
        part["inputs"] = np.where(valid_frames(part)[..., None], standardised, np.float32(np.nan))
    return train_set, test_set


def valid_frames(part):
    """`[B, T]`, true where a frame is speech and not padding."""
    return np.arange(part["inputs"].shape[1]) < part["lengths"][:, None]


def train(train_set, test_set, epochs, seed):
    """Returns the parameters and, for each epoch, loss and accuracy on both sets."""
    count, _, features = train_set["inputs"].shape
    steps = count // BATCH
    params_key, order_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    params = init(params_key, features)
    optimizer_state = make_optimizer(epochs * steps).init(params)

    history = []
    progress = tqdm(range(epochs), desc="training", unit="epoch")
    for epoch in progress:
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), count)
        for step, rows in enumerate(np.asarray(order)[: steps * BATCH].reshape(steps, BATCH)):
            batch = {name: array[rows] for name, array in train_set.items()}
            key = jax.random.fold_in(noise_key, epoch * steps + step)
            params, optimizer_state = update(epochs * steps, params, optimizer_state, batch, key)
        history.append([evaluate(params, part)[:2] for part in (train_set, test_set)])
        (_, train_accuracy), (_, test_accuracy) = history[-1]
        progress.set_postfix_str(f"train {train_accuracy:.1%}, test {test_accuracy:.1%}")
    return params, np.array(history)


def init(key, features):
    """Two cells, one for each direction, and a linear readout of both."""
    forward_key, backward_key, readout_key = jax.random.split(key, 3)
    forward, backward = CELL.init(forward_key, features), CELL.init(backward_key, features)
    units = len(forward["recurrent_kernel"])
    readout = jax.nn.initializers.glorot_uniform()(readout_key, (2 * units, SPEAKERS))
    bias = jnp.zeros(SPEAKERS)
    return {"forward": forward, "backward": backward, "readout": readout, "bias": bias}


def make_optimizer(total_steps):
    """Adam with weight decay; the learning rate falls to zero along a cosine."""
    return optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, total_steps))


@partial(jax.jit, static_argnums=0)
def update(total_steps, params, optimizer_state, batch, key):
    """One step of the optimiser on a batch with Gaussian noise added to its inputs."""
    noise = NOISE * jax.random.normal(key, batch["inputs"].shape)
    noisy = batch | {"inputs": batch["inputs"] + noise}
    gradient = jax.grad(lambda params: cross_entropy(scores(params, noisy), noisy))(params)
    optimizer = make_optimizer(total_steps)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state


def scores(params, part):
    """Logits `[B, SPEAKERS]`, read where either direction has seen the whole utterance."""
    start = CELL.initial_states(len(part["lengths"]))
    last_outputs, _, _ = bidirectional(
        CELL.step(params["forward"]),
        CELL.step(params["backward"]),
        part["inputs"],
        start,
        start,
        input_length=part["lengths"],
        return_all_outputs=False,
    )
    return jnp.concatenate(last_outputs, axis=-1) @ params["readout"] + params["bias"]


def cross_entropy(logits, part):
    """Mean over the utterances."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, part["speakers"]).mean()


@jax.jit
def evaluate(params, part):
    """Loss, accuracy and the speakers recognised `[B]`, without noise."""
    logits = scores(params, part)
    recognised = jnp.argmax(logits, axis=-1)
    return cross_entropy(logits, part), jnp.mean(recognised == part["speakers"]), recognised


def count_confusions(params, part):
    """`[SPEAKERS, SPEAKERS]`: how often the speaker of a row was taken for that of a column."""
    _, _, recognised = evaluate(params, part)
    confusion = np.zeros((SPEAKERS, SPEAKERS), int)
    np.add.at(confusion, (part["speakers"], np.asarray(recognised)), 1)
    return confusion


def draw(history, confusion, path):
    """Writes learning curves (left) and the confusion matrix (right) as one PNG."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    panels = figure.subplot_mosaic([["loss", "confusion"], ["accuracy", "confusion"]])
    epochs = np.arange(1, len(history) + 1)
    styles = [("training set", "#7f8c9b", 1.6), ("test set", "#c8502d", 2.0)]
    for part, (label, color, width) in enumerate(styles):
        line = {"color": color, "linewidth": width, "label": label}
        panels["loss"].plot(epochs, history[:, part, 0], **line)
        panels["accuracy"].plot(epochs, 100 * history[:, part, 1], **line)

    panels["loss"].set(yscale="log", ylabel="cross-entropy", title="Learning curves")
    panels["loss"].legend(frameon=False)
    panels["accuracy"].set(xlabel="epoch", ylabel="accuracy [%]")
    panels["accuracy"].set_ylim(top=100.5)
    panels["accuracy"].yaxis.set_major_locator(MaxNLocator(integer=True))
    promise = {"color": "black", "linewidth": 0.8, "linestyle": ":"}
    line = panels["accuracy"].axhline(100 * REQUIRED_ACCURACY, **promise)
    panels["accuracy"].legend([line], [f"promised: {REQUIRED_ACCURACY:.0%}"], frameon=False)
    for name in ("loss", "accuracy"):
        panels[name].spines[["top", "right"]].set_visible(False)
        panels[name].grid(axis="y", alpha=0.25)
        panels[name].set_xlim(1, max(2, len(history)))

    panel = panels["confusion"]
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
        color = "white" if shares[row, column] > 0.5 else "#c8502d"
        weight = "normal" if row == column else "bold"
        count = confusion[row, column]
        panel.text(column, row, count, ha="center", va="center", color=color, weight=weight)
    names = range(1, SPEAKERS + 1)
    panel.set_xticks(range(SPEAKERS), names)
    panel.set_yticks(range(SPEAKERS), names)
    panel.set_xticks(np.arange(0.5, SPEAKERS - 1), minor=True)
    panel.set_yticks(np.arange(0.5, SPEAKERS - 1), minor=True)
    panel.grid(which="minor", color="#e4e8ee", linewidth=0.8)
    panel.tick_params(which="both", length=0)
    accuracy = np.trace(confusion) / confusion.sum()
    panel.set(xlabel="recognised speaker", ylabel="true speaker")
    panel.set_title(f"Test set: {accuracy:.1%} of {confusion.sum()} utterances right")
    figure.suptitle("Japanese Vowels: a bidirectional GRU on jaxrnn", weight="bold")

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
