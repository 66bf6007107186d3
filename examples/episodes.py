"""Learn by reinforcement to remember a sign: a recurrent policy over episodes packed end to end.

A corridor of unknown length ends in a junction. A sign in its first cell points to where the reward
will be, left or right; the signs in all other cells point anywhere. And an episode may be called
off at any step: a new one begins, and nothing that the agent sees tells it.

A batch of experience is a rectangle, `[mazes, steps]`, in which one episode follows the other:
uneven lengths, no padding. `reset` marks the first step of each, and there the policy forgets.
Without `reset` the same policy, trained the same way, cannot know which sign was a first one.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxrnn import cells, rnn, scan

HERE = Path(__file__).parent
MAZES = 32
STEPS = 64
SHORTEST, LONGEST = 3, 8
CALLED_OFF = 0.2
LEFT, RIGHT, FORWARD = range(3)
DISCOUNT = 0.9
ENTROPY_BONUS = 0.02
LEARNING_RATE = 1e-2
REQUIRED_WITH_RESET = 0.95
ALLOWED_WITHOUT = 0.85
CELL = cells.gru(32)


def main(arguments=None):
    """Trains with and without `reset`, draws, reports; returns 0 if only the former solves it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3, help="training runs of either kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="1 run of either kind, 100 updates")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "episodes.png")
    options = parser.parse_args(arguments)
    if options.short:
        options.updates, options.runs = 100, 1

    keys = jax.random.split(jax.random.key(options.seed), options.runs)
    with_reset, without = train(keys, options.updates)

    draw(with_reset, without, options.output)
    final = slice(-max(1, options.updates // 10), None)
    solved, guessed = with_reset[final].mean(axis=0), without[final].mean(axis=0)
    print(f"right turns over the last tenth, by run: with reset {solved}, without {guessed}")
    print(f"learning curves: {options.output}")
    passed = solved.min() >= REQUIRED_WITH_RESET and guessed.max() <= ALLOWED_WITHOUT
    print(
        f"{'PASS' if passed else 'FAIL'}  right turns with reset {solved.min():.1%} (needs "
        f"{REQUIRED_WITH_RESET:.0%}), without {guessed.max():.1%} (may reach {ALLOWED_WITHOUT:.0%})"
    )
    return 0 if passed else 1


class Maze(NamedTuple):
    """Where an agent is; every field `[MAZES]`."""

    goal: jax.Array  # LEFT or RIGHT
    left_to_go: jax.Array  # cells to the junction, 0 at it
    begins: jax.Array  # whether this is the first step of an episode


class Record(NamedTuple):
    """A batch of experience, episodes packed end to end; every field `[MAZES, STEPS, ...]`."""

    view: jax.Array  # what the agent saw
    action: jax.Array
    reward: jax.Array
    begins: jax.Array
    at_junction: jax.Array


def new_mazes(key):
    """The start of an episode for every agent."""
    goal_key, length_key = jax.random.split(key)
    goal = jax.random.randint(goal_key, (MAZES,), LEFT, RIGHT + 1)
    length = jax.random.randint(length_key, (MAZES,), SHORTEST, LONGEST + 1)
    return Maze(goal, length, jnp.ones(MAZES, bool))


def look(key, maze):
    """What the agents see, `[MAZES, 3]`: a sign, -1 or 1, and whether in corridor or junction."""
    at_junction = maze.left_to_go == 0
    sign = jnp.where(maze.begins, maze.goal, jax.random.randint(key, (MAZES,), LEFT, RIGHT + 1))
    sign = jnp.where(at_junction, 0, 2 * sign - 1)
    return jnp.stack([sign, ~at_junction, at_junction], axis=-1).astype(jnp.float32)


def move(key, maze, action):
    """The reward `[MAZES]`, and the mazes a step later, new ones where an episode ended."""
    at_junction, turns = maze.left_to_go == 0, action != FORWARD
    arrived = at_junction & turns
    # To turn in the corridor, or walk on at the junction, is to bump into a wall.
    reward = jnp.where(arrived, jnp.where(action == maze.goal, 1.0, -1.0), 0.0)
    reward = jnp.where(turns != at_junction, -0.1, reward)
    off_key, maze_key = jax.random.split(key)
    ends = arrived | jax.random.bernoulli(off_key, CALLED_OFF, (MAZES,))
    walked = maze.left_to_go - (~at_junction & ~turns)
    later = Maze(maze.goal, walked, jnp.zeros(MAZES, bool))
    return reward, jax.tree.map(partial(jnp.where, ends), new_mazes(maze_key), later)


def init(key):
    """A cell, and a readout of three action logits and a value."""
    cell_key, readout_key = jax.random.split(key)
    cell = CELL.init(cell_key, 3)
    units = len(cell["recurrent_kernel"])
    readout = 0.1 * jax.nn.initializers.glorot_uniform()(readout_key, (units, 4))
    return {"cell": cell, "readout": readout, "bias": jnp.zeros(4)}


def act(params, use_reset, key):
    """Lets the policy loose in new mazes for `STEPS` steps; returns a `Record`."""
    cell_step = CELL.step(params["cell"])
    fresh = CELL.initial_states(MAZES)

    def step(carry, key):
        (state,), maze = carry
        look_key, action_key, move_key = jax.random.split(key, 3)
        view = look(look_key, maze)
        forgets = (maze.begins & use_reset)[:, None]
        state = jnp.where(forgets, fresh[0], state)
        output, states = cell_step(view, [state])
        logits = (output @ params["readout"] + params["bias"])[:, :3]
        action = jax.random.categorical(action_key, logits)
        reward, later = move(move_key, maze, action)
        return (states, later), Record(view, action, reward, maze.begins, maze.left_to_go == 0)

    start_key, steps_key = jax.random.split(key)
    start = (fresh, new_mazes(start_key))
    _, record = scan(step, start, jax.random.split(steps_key, STEPS))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), record)


def loss(params, use_reset, record):
    """Policy gradient with a learnt value as baseline, over the whole rectangle in one call."""
    _, outputs, _ = rnn(
        CELL.step(params["cell"]),
        record.view,
        CELL.initial_states(MAZES),
        reset=record.begins & use_reset,
    )
    outputs = outputs @ params["readout"] + params["bias"]
    log_policy, value = jax.nn.log_softmax(outputs[..., :3]), outputs[..., 3]
    taken = jnp.take_along_axis(log_policy, record.action[..., None], axis=-1)[..., 0]
    entropy = -(jnp.exp(log_policy) * log_policy).sum(axis=-1)
    advantage = returns(record) - value
    policy_loss = -(jax.lax.stop_gradient(advantage) * taken + ENTROPY_BONUS * entropy)
    return (policy_loss + 0.5 * advantage**2).mean()


def returns(record):
    """Discounted rewards to come in the same episode, `[MAZES, STEPS]`."""

    def step(later, now):
        reward, begins = now
        total = reward + DISCOUNT * later
        return jnp.where(begins, 0, total), total

    by_time = (record.reward.T, record.begins.T)
    return scan(step, jnp.zeros(MAZES), by_time, reverse=True)[1].T


def train(keys, updates):
    """Two training runs for each key, all at once, that differ in `use_reset` alone.

    Returns the share of right turns with and without, two arrays `[updates, len(keys)]`.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))

    @jax.jit
    def start(keys):
        params = jax.vmap(init)(keys)
        return params, jax.vmap(optimizer.init)(params)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
    def update(use_reset, params, optimizer_state, key, number):
        record = act(params, use_reset, jax.random.fold_in(key, number))
        gradient = jax.grad(loss)(params, use_reset, record)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        turns = record.at_junction & (record.action != FORWARD)
        right = (turns & (record.reward > 0)).sum() / jnp.maximum(turns.sum(), 1)
        return optax.apply_updates(params, updates), optimizer_state, right

    keys = jnp.concatenate([keys, keys])
    use_reset = jnp.arange(len(keys)) < len(keys) // 2
    params, optimizer_state = start(keys)
    curves = []
    progress = tqdm(range(updates), desc=f"{len(keys)} training runs", unit="update")
    for number in progress:
        params, optimizer_state, right = update(use_reset, params, optimizer_state, keys, number)
        curves.append(np.split(np.asarray(right), 2))
        if number % 25 == 24:
            with_reset, without = np.mean(curves[-25:], axis=(0, 2))
            progress.set_postfix_str(f"with reset {with_reset:.0%}, without {without:.0%}")
    return np.moveaxis(curves, 1, 0)


def draw(with_reset, without, path):
    """Writes the learning curves of all runs as one PNG."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    window = max(1, len(with_reset) // 40)
    for label, curves, color in [
        ("with reset", with_reset, "#c8502d"),
        ("without reset", without, "#7f8c9b"),
    ]:
        for run, curve in enumerate(curves.T):
            smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
            updates = np.arange(window, len(curve) + 1)
            line = {"color": color, "linewidth": 1.5, "label": None if run else label}
            panel.plot(updates, 100 * smooth, **line)
    panel.axhline(50, color="black", linewidth=0.8, linestyle=":", label="a coin")
    panel.set(xlabel=f"update (mean of the last {window})", ylabel="right turns [%]")
    panel.set(xlim=(0, len(with_reset)), ylim=(45, 101))
    panel.set_title("Episodes packed end to end: a recurrent policy on jaxrnn", weight="bold")
    panel.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.75))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
