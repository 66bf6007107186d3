"""Forecast the CO2 of the coming twelve months, with a band, by an ensemble of recurrent networks.

The air at Mauna Loa, month by month since 1958, the unmeasured months masked. Every member is a GRU
with weights of its own; `vmap` makes one network of them, and one jitted call trains them all.
Members see the training years under different random weights (a Bayesian bootstrap): where data
decide little they disagree, and that widens the band.

The size of the networks and the number of steps were chosen on the years before 1992; the years
from 1992 on decide nothing.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from jaxrnn import cells, rnn

HERE = Path(__file__).parent
YEAR = 12
FIRST_HELD_OUT_YEAR = 1992
LEARNING_RATE = 3e-3
ROUNDS = 50
BAND = 0.90
BAND_IN_DEVIATIONS = 1.645  # 90 % of a normal distribution
CELL = cells.gru(16)


def main(arguments=None):
    """Trains, forecasts, draws and reports; returns 0 if the forecast beats the naive ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000, help=f"a multiple of {ROUNDS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="8 members, 600 steps")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "ensemble.png")
    options = parser.parse_args(arguments)
    if options.short:
        options.members, options.steps = 8, 600

    months, co2 = load()
    held_out = int(np.searchsorted(months, FIRST_HELD_OUT_YEAR))
    keys = jax.random.split(jax.random.key(options.seed), options.members)
    with tqdm(total=ROUNDS, desc=f"training {options.members} members", unit="round") as progress:
        report = partial(show, progress)
        members, losses = train(report, options.steps, keys, months[:held_out], co2[:held_out])
        jax.block_until_ready(losses)

    # From each December on, the year that follows: what is known then is known to all forecasts.
    origins = np.arange(held_out - 1, len(co2) - YEAR, YEAR)
    mean, deviation = forecast(members, months, co2, origins)
    low, high = mean - BAND_IN_DEVIATIONS * deviation, mean + BAND_IN_DEVIATIONS * deviation
    truth = co2[held_out : held_out + mean.size]
    inside = np.mean((low <= truth) & (truth <= high))
    last_year = co2[held_out - YEAR : held_out - YEAR + len(truth)]
    growth = co2[origins] - co2[origins - YEAR]
    errors = {
        "ensemble": error(mean, truth),
        "persistence": error(np.repeat(co2[origins], YEAR), truth),
        "seasonal-naive": error(last_year, truth),
        "seasonal-naive with growth": error(last_year + np.repeat(growth, YEAR), truth),
    }
    draw(months, co2, held_out, (mean, low, high), losses, errors, inside, options.output)

    print(f"mean absolute error over {len(truth)} held-out months, in ppm:")
    print(", ".join(f"{name} {value:.2f}" for name, value in errors.items()))
    print(f"the {BAND:.0%} band covers {inside:.1%} of the held-out months")
    print(f"forecast, band and learning curves: {options.output}")
    best_naive = min(value for name, value in errors.items() if name != "ensemble")
    passed = errors["ensemble"] < best_naive
    print(
        f"{'PASS' if passed else 'FAIL'}  forecast error {errors['ensemble']:.2f} ppm (needs less "
        f"than the best naive one, {best_naive:.2f}); {BAND:.0%} band covers {inside:.0%}"
    )
    return 0 if passed else 1


def load():
    """Time in years `[T]`, and CO2 in ppm `[T]`, NaN where it was not measured."""
    path = HERE / "data" / "mauna_loa_co2.csv"
    rows = np.genfromtxt(path, delimiter=",", skip_header=1, dtype=["U7", "f8"])
    months = [int(name[:4]) + (int(name[5:]) - 1) / YEAR for name in rows["f0"]]
    return np.array(months), rows["f1"]


def show(progress, loss):
    """Called out of the jitted training once a round."""
    progress.update()
    progress.set_postfix_str(f"loss {loss:.2f}")


@partial(jax.jit, static_argnums=(0, 1))
def train(report, steps, keys, months, co2):
    """Trains one member for each key, all in one program.

    Returns the members, a pytree of arrays `[members, ...]`, and losses `[ROUNDS, members]`.
    """
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=1e-2)
    members = jax.vmap(init)(keys)
    weights = jax.vmap(lambda key: bootstrap_weights(key, len(co2)))(keys)

    def update(member, optimizer_state, weights):
        value, gradient = jax.value_and_grad(loss)(member, weights, months, co2)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, member)
        return optax.apply_updates(member, updates), optimizer_state, value

    def step(carry, _):
        *carry, losses = jax.vmap(update)(*carry, weights)
        return tuple(carry), losses

    def one_round(carry, _):
        carry, losses = jax.lax.scan(step, carry, length=steps // ROUNDS)
        jax.debug.callback(report, losses[-1].mean())
        return carry, losses[-1]

    start = (members, jax.vmap(optimizer.init)(members))
    (members, _), losses = jax.lax.scan(one_round, start, length=ROUNDS)
    return members, losses


def init(key):
    """A cell over three features, and a readout of mean and spread for each coming month."""
    cell_key, readout_key = jax.random.split(key)
    units = CELL.initial_states(1)[0].shape[-1]
    readout = 0.1 * jax.nn.initializers.glorot_uniform()(readout_key, (units, 2 * YEAR))
    return {"cell": CELL.init(cell_key, 3), "readout": readout, "bias": jnp.zeros(2 * YEAR)}


def bootstrap_weights(key, months):
    """`[months]`, of mean 1: one exponential weight for each block of twelve months."""
    return jnp.repeat(jax.random.exponential(key, (-(-months // YEAR),)), YEAR)[:months]


def predict(member, months, co2):
    """From every month: mean and deviation of the rise, in ppm, until each of the next twelve.

    Two arrays `[T, YEAR]`. A month without a measurement, or without one before it, is masked: the
    network waits, and its forecast stays.
    """
    rise = jnp.diff(co2, prepend=jnp.nan)
    phase = 2 * jnp.pi * months
    inputs = jnp.stack([rise, jnp.cos(phase), jnp.sin(phase)], axis=-1)
    _, outputs, _ = rnn(
        CELL.step(member["cell"]),
        inputs[None],
        CELL.initial_states(1),
        mask=jnp.isfinite(rise)[None],
    )
    mean, log_deviation = jnp.split(outputs[0] @ member["readout"] + member["bias"], 2, axis=-1)
    # The ranges of both are those of the series: rises of some ppm, known to some tenths.
    return 3 * mean, jnp.exp(log_deviation)


def loss(member, weights, months, co2):
    """Negative log-likelihood of all rises until up to a year later, where both ends are known."""
    mean, deviation = predict(member, months, co2)
    ahead = jnp.arange(len(co2))[:, None] + jnp.arange(1, YEAR + 1)
    rises = jnp.where(ahead < len(co2), co2[ahead % len(co2)], jnp.nan) - co2[:, None]
    known = jnp.isfinite(rises)
    distance = (jnp.where(known, rises, 0) - mean) / deviation
    likelihood = -0.5 * distance**2 - jnp.log(deviation)
    weights = jnp.where(known, weights[:, None], 0)
    return -(weights * likelihood).sum() / weights.sum()


def forecast(members, months, co2, origins):
    """Mean and deviation `[len(origins) * YEAR]` of the mixture of all members' forecasts."""
    all_members = jax.jit(jax.vmap(predict, in_axes=(0, None, None)))
    means, deviations = all_members(members, months, co2)
    means, deviations = (np.asarray(x[:, origins], np.float64) for x in (means, deviations))
    mean = means.mean(axis=0)
    deviation = np.sqrt((deviations**2 + means**2).mean(axis=0) - mean**2)
    return (co2[origins, None] + mean).ravel(), deviation.ravel()


def error(forecast, truth):
    """Mean absolute error."""
    return float(np.abs(forecast - truth).mean())


def draw(months, co2, held_out, bands, losses, errors, inside, path):
    """Writes the forecasts (top), the errors they make (left) and the learning curves (right)."""
    mean, low, high = bands
    time = months[held_out : held_out + len(mean)]
    truth = co2[held_out : held_out + len(mean)]
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplot_mosaic([["series"] * 2, ["error", "curves"]], height_ratios=[3, 2])

    panel = panels["series"]
    panel.plot(months, co2, color="#7f8c9b", linewidth=1.2, label="measured")
    panel.plot(time, truth, ".", color="black", markersize=4, label="measured, held out")
    panel.fill_between(time, low, high, color="#c8502d", alpha=0.3, label=f"{BAND:.0%} band")
    panel.plot(time, mean, color="#c8502d", linewidth=1.4, label="forecast, made each December")
    panel.set(xlim=(1984, time[-1] + 0.2), ylim=(338, None), ylabel="CO2 [ppm]")
    panel.set_title(f"The {BAND:.0%} band covers {inside:.0%} of {len(truth)} held-out months")
    panel.legend(frameon=False, loc="upper left")

    panel = panels["error"]
    panel.fill_between(time, low - mean, high - mean, color="#c8502d", alpha=0.3)
    panel.plot(time, truth - mean, ".-", color="black", linewidth=0.7, markersize=4)
    panel.axhline(0, color="#c8502d", linewidth=1)
    *_, (name, naive) = errors.items()
    panel.set(ylabel="measured - forecast [ppm]", xlim=(time[0], time[-1] + 0.2))
    panel.set_title(f"Mean absolute error {errors['ensemble']:.2f} ppm; {name} {naive:.2f}")

    panel = panels["curves"]
    panel.plot(np.arange(1, len(losses) + 1), losses, color="#7f8c9b", linewidth=0.6)
    panel.plot(np.arange(1, len(losses) + 1), losses.mean(axis=1), color="black", linewidth=1.5)
    panel.set(xlabel="round", ylabel="negative log-likelihood", xlim=(1, len(losses)))
    panel.set_title(f"{losses.shape[1]} members, trained in one call")
    for name in ("series", "error"):
        panels[name].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
    figure.suptitle("CO2 at Mauna Loa: an ensemble of GRUs on jaxrnn", weight="bold")

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
