"""Train on eight devices, then on two processes of four: the losses of one device, few collectives.

The task is the adding problem: out of 128 random numbers two are marked, and their sum is wanted.
Nothing in the model or in the training step speaks of devices. The batch is laid over a mesh, the
parameters are whole on every device, and the compiler does the rest: a device works on its own
samples, and gradients are summed over devices. How often they are summed is counted in the compiled
program, beside that of the same program on plain `lax.scan`.

The devices are simulated on the CPU; on real ones leave out `simulate_devices`.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxrnn import cells, rnn

HERE = Path(__file__).parent
DEVICES, PROCESSES = 8, 2
BATCH, TIME = 64, 128
CELL = cells.gru(48)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
TOLERANCE = 1e-3  # of losses; what rounding in another order comes to after some hundred steps
TIMEOUT = 300


def main(arguments=None):
    """Trains thrice, draws, compares; returns 0 if losses agree and collectives are few."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--short", action="store_true", help="20 steps")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "many_devices.png")
    parser.add_argument("--process", type=int, help="which of the processes this is; set by itself")
    parser.add_argument("--coordinator", help="address of the first process; set by itself")
    options = parser.parse_args(arguments)
    if options.short:
        options.steps = 20
    if options.process is not None:
        return join(options)

    simulate_devices(DEVICES)
    losses, counts = {}, {}
    losses["1 device"], _ = train(jax.devices()[:1], options.steps, "1 device")
    losses["8 devices"], counts["8 devices"] = train(jax.devices(), options.steps, "8 devices")
    losses["2 processes"], counts["2 processes"] = spawn(options.steps)
    counts["lax.scan"] = count_collectives(compiled_update(jax.devices(), "lax"))
    draw(losses, counts, options.output)
    print(f"loss curves and collectives per step: {options.output}")
    return report(losses, counts)


def simulate_devices(count):
    """Lets the CPU pass for `count` devices; before any other use of JAX."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def train(devices, steps, label):
    """Trains on `devices`, those of other processes among them.

    Returns:
        The losses `[steps]`, and how many collectives of each kind run in one step.
    """
    whole, by_batch = layouts(devices)
    run = compiled_update(devices, "auto")
    params, optimizer_state = jax.jit(init, out_shardings=whole)(jax.random.key(0))
    losses = []
    quiet = jax.process_index() > 0
    for step in tqdm(range(steps), desc=f"{label:>11}", unit="step", disable=quiet):
        batch = jax.tree.map(
            partial(jax.make_array_from_process_local_data, by_batch), make_samples(step)
        )
        params, optimizer_state, loss = run(params, optimizer_state, batch)
        losses.append(float(loss))
    return np.array(losses), count_collectives(run)


def layouts(devices):
    """Where arrays lie: whole on every device, and cut along the batch axis."""
    mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))


def init(key):
    """Parameters and the optimiser's state."""
    params = {"cell": CELL.init(key, 2), "readout": jnp.zeros(48), "bias": jnp.zeros(())}
    return params, OPTIMIZER.init(params)


def make_samples(step):
    """This process's rows of a batch: inputs `[B, T, 2]`, numbers and marks, and sums `[B]`."""
    rng = np.random.default_rng(step)
    inputs = np.zeros((BATCH, TIME, 2), np.float32)
    inputs[..., 0] = rng.random((BATCH, TIME))
    rows = np.arange(BATCH)
    for half in (0, TIME // 2):
        inputs[rows, half + rng.integers(TIME // 2, size=BATCH), 1] = 1
    sums = (inputs[..., 0] * inputs[..., 1]).sum(axis=1)
    mine = np.array_split(rows, jax.process_count())[jax.process_index()]
    return inputs[mine], sums[mine]


def compiled_update(devices, method):
    """`update`, compiled for `devices`."""
    whole, by_batch = layouts(devices)
    state = jax.jit(init, out_shardings=whole).eval_shape(jax.random.key(0))
    shapes = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((BATCH, TIME, 2), (BATCH,)))

    def place(sharding, tree):
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    return update.lower(method, *place(whole, state), place(by_batch, shapes)).compile()


@partial(jax.jit, static_argnums=0)
def update(method, params, optimizer_state, batch):
    """One step of the optimiser; the loss is the mean over the whole batch, wherever it lies."""
    inputs, sums = batch

    def mean_squared_error(params):
        step, start = CELL.step(params["cell"]), CELL.initial_states(BATCH)
        last_output, _, _ = rnn(step, inputs, start, return_all_outputs=False, method=method)
        predicted = last_output @ params["readout"] + params["bias"]
        return jnp.mean((predicted - sums) ** 2)

    loss, gradient = jax.value_and_grad(mean_squared_error)(params)
    updates, optimizer_state = OPTIMIZER.update(gradient, optimizer_state)
    return optax.apply_updates(params, updates), optimizer_state, loss


def spawn(steps):
    """Runs this script in `PROCESSES` processes; returns what the first of them found."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, f"--steps={steps}", f"--coordinator={coordinator}"]
    processes = [
        subprocess.Popen([*command, f"--process={i}"], stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    try:
        answers = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"exit codes {[process.returncode for process in processes]}")
    found = json.loads(answers[0].splitlines()[-1])
    return np.array(found["losses"]), Counter(found["collectives"])


def join(options):
    """One of the processes: its share of the devices, and the same `train`."""
    simulate_devices(DEVICES // PROCESSES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, PROCESSES, options.process)
    losses, counts = train(jax.devices(), options.steps, f"{PROCESSES} processes")
    found = {"losses": losses.tolist(), "collectives": counts}
    jax.distributed.shutdown()
    print(json.dumps(found))
    return 0


def count_collectives(compiled):
    """Collectives that a compiled function runs: those in a loop count once per iteration."""
    computations = {}
    for line in compiled.as_text().splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations[header[2]] = []
            if header[1]:
                entry = header[2]
        elif computations:
            lines.append(line)

    def count(name, times):
        total = Counter()
        for line in computations[name]:
            kind = re.search(
                r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
                r"(?:-start)?\(",
                line,
            )
            if kind:
                total[kind[1]] += times
            elif " while(" in line:
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                total += count(re.search(r"body=%?([\w.-]+)", line)[1], times * int(trips[1]))
            elif called := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
                total += count(called[1], times)
        return total

    return count(entry, 1)


def draw(losses, counts, path):
    """Writes the three loss curves (left) and the collectives per step (right) as one PNG."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    styles = [("#c9d3df", 7, "-"), ("#c8502d", 3, "-"), ("black", 1, "--")]
    for (label, curve), (color, width, dash) in zip(losses.items(), styles, strict=True):
        left.plot(curve, color=color, linewidth=width, linestyle=dash, label=label)
    left.set(yscale="log", xlabel="step", ylabel="mean squared error", title="One curve, thrice")
    left.legend(frameon=False)

    names = ["lax.scan,\n8 devices", "jaxrnn,\n2 processes of 4", "jaxrnn,\n8 devices"]
    totals = [counts[key].total() for key in ("lax.scan", "2 processes", "8 devices")]
    bars = right.barh(names, totals, color=["#7f8c9b", "#c8502d", "#c8502d"], height=0.6)
    right.bar_label(bars, padding=4)
    right.set(title=f"Collectives per training step (T = {TIME})")
    right.set_xlim(0, 1.15 * max(totals))
    right.set_xticks([])
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    right.spines["bottom"].set_visible(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(losses, counts):
    """Prints the figures and, last, whether they are what this script claims; returns 0 or 1."""
    alone = losses["1 device"]
    for label, curve in losses.items():
        apart = np.max(np.abs(curve - alone) / alone)
        print(f"{label:>11}: loss {curve[0]:.4f} -> {curve[-1]:.4f}, off by {apart:.1e} at most")
    for label, kinds in counts.items():
        print(f"{label:>11}: {kinds.total()} collectives per training step {dict(kinds)}")

    apart = max(np.max(np.abs(curve - alone) / alone) for curve in losses.values())
    ours = max(counts["8 devices"].total(), counts["2 processes"].total())
    plain = counts["lax.scan"].total()
    good = apart < TOLERANCE and ours < plain / 10
    print(
        f"{'PASS' if good else 'FAIL'}  losses on 8 devices and on 2 processes are those of one "
        f"device to {apart:.1e}; {ours} collectives per step, {plain} with lax.scan"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
