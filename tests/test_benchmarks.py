"""The benchmarks' parts that no peer and no clock is needed for."""

import itertools
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure import is_inexact, over_floats

from benchmarks import cases, clock, gpu_tables, machine, peers, problem, render, results
from benchmarks.naive import NAIVE, STATES
from benchmarks.pool import WorkerError, workers
from benchmarks.steps import STEPS, Draw, Size, gradient_of, random_step
from jaxrnn import cells, rnn

# Five steps, in which the longest of `never_slower`'s patterns (every third step) shows twice.
TINY = Size(2, 5, 3, 4)


@pytest.mark.parametrize("step", [*STEPS, *map(random_step, range(4))], ids=lambda step: step.name)
def test_a_step_computes_the_same_in_both_loops(step):
    loop = step.make(Draw(), TINY)
    gradient, arguments = gradient_of(loop.ours, loop.arguments)
    of, floats = over_floats(lambda arguments: loop.plain(*arguments), loop.arguments)

    def loss(floats, weights):
        results = of(floats)
        weighted = zip(filter(is_inexact, jax.tree.leaves(results)), weights, strict=True)
        return sum(jnp.mean((x.real + x.imag) * weight) for x, weight in weighted), results

    def compiled(function):
        # Unoptimised code takes a third less to compile, and the values are all that counts here.
        return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})

    got = compiled(lambda a, b: (gradient(*b), loop.ours(*a)))(loop.arguments, arguments)
    # `lax.scan` makes the same results whether its gradient is asked for or not.
    expected = compiled(jax.grad(loss, has_aux=True))(floats, arguments[-1])
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, plain in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == plain.dtype
        np.testing.assert_allclose(numbers(ours), numbers(plain), rtol=2e-5, atol=2e-6)


def numbers(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def test_never_slower_has_enough_steps_under_names_of_their_own():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names) >= 16


def tiny_case(cell):
    (case,) = (
        case for case in cases.cases(True, [TINY], ["lax.scan", "jaxrnn"]) if case.cell == cell
    )
    return case


@pytest.mark.parametrize(("cell", "variant"), NAIVE)
def test_naive_steps_compute_what_the_reference_does(cell, variant):
    made = problem.make(tiny_case(cell))
    naive = NAIVE[cell, variant]
    states = [jnp.zeros((TINY.B, TINY.H))] * STATES[cell]
    params = jax.tree.map(jnp.asarray, naive.arrange(made.weights))
    _, outputs, _ = rnn(naive.step(params), made.inputs, states)
    np.testing.assert_allclose(outputs, made.reference, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("lstm", cells.lstm(TINY.H)),
        ("gru", cells.gru(TINY.H)),
        ("elman", cells.simple_rnn(TINY.H)),
    ],
)
def test_own_cells_compute_what_the_reference_does(name, cell):
    made = problem.make(tiny_case(name))
    params = jax.tree.map(jnp.asarray, made.weights)
    _, outputs, _ = rnn(cell.step(params), made.inputs, cell.initial_states(TINY.B))
    np.testing.assert_allclose(outputs, made.reference, rtol=2e-5, atol=2e-6)


def test_a_problem_survives_its_file(tmp_path):
    made = problem.make(tiny_case("gru"))
    path = tmp_path / "problem.npz"
    problem.save(made, path)
    jax.tree.map(np.testing.assert_array_equal, made, problem.load(str(path)))


def test_a_worker_prepares_measures_and_reports_its_errors(tmp_path):
    path = tmp_path / "problem.npz"
    problem.save(problem.make(tiny_case("elman")), path)
    with workers(["lax.scan"]) as pool:
        worker = pool["lax.scan"]
        assert set(worker.ask("describe")["versions"]) == {"jax", "jaxlib"}
        reply = worker.ask("prepare", case="elman", variant="naive", path=str(path))
        assert reply["output_error"] < 1e-5
        assert reply["input_gradient_norm"] > 0
        assert reply["calls"]["gradient"]["temp_bytes"] > 0
        for kind in ("forward", "gradient"):
            measured = worker.ask(
                "measure", candidate=reply["candidate"], kind=kind, repeats=2, warm_up=True
            )
            assert measured["seconds"] > 0
            compiled = worker.ask("compile", candidate=reply["candidate"], kind=kind)
            assert compiled["seconds"] > 0
        with pytest.raises(WorkerError, match=r"lax\.scan failed on .*no such step"):
            worker.ask("prepare", case="elman", variant="no such step", path=str(path))


def test_a_worker_that_dies_says_why():
    with workers(["no.such.library"]) as pool, pytest.raises(WorkerError, match="No module named"):
        pool["no.such.library"].ask("describe")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"output_error": 0.1}, "outputs are off by 0.1"),
        ({"output_error": float("nan")}, "outputs are off by nan"),
        ({"input_gradient_norm": 2.1}, "gradient by the inputs has norm 2.1, others 2"),
    ],
)
def test_a_library_that_computes_something_else_is_not_compared(fault, message):
    right = {"output_error": 1e-7, "input_gradient_norm": 2.0, "math": "reference"}
    other_form = right | {"input_gradient_norm": 3.0, "math": "reset_before"}
    prepared = {
        ("lax.scan", "gemm"): {},
        ("lax.scan", "naive"): right,
        ("haiku", "layer"): other_form,
        ("flax", "layer"): right,
    }
    case = tiny_case("gru")
    peers.check_results(case, prepared, tolerance=1e-4)
    prepared["flax", "layer"] = right | fault
    with pytest.raises(WorkerError, match=rf"flax \(layer\) on gru 2,5,3,4: .*{message}"):
        peers.check_results(case, prepared, tolerance=1e-4)


def test_plan_gives_long_calls_few_rounds_and_short_calls_many_repeats():
    effort = {"budget_s": 2.0, "visit_s": 0.05, "max_rounds": 20}
    assert clock.plan([1e-4, 1e-3], **effort) == (20, [500, 50])
    assert clock.plan([0.2, 0.01], **effort) == (10, [1, 5])
    assert clock.plan([3.0], **effort) == (clock.MIN_ROUNDS, [1])


@pytest.fixture
def machine_that_loses(monkeypatch):
    """Has every round take a second on two cores, of which those are lost that it is given."""

    def losing(per_round):
        now = itertools.count()
        total = itertools.accumulate(per_round, initial=0.0)
        readings = itertools.chain.from_iterable(itertools.pairwise(total))
        monkeypatch.setattr(clock, "perf_counter", lambda: float(next(now)))
        monkeypatch.setattr(clock, "_stolen_s", lambda: next(readings))
        monkeypatch.setattr(clock.os, "cpu_count", lambda: 2)

    return losing


def test_rounds_in_which_time_is_stolen_are_measured_again(machine_that_loses):
    machine_that_loses([0.5, 0.0, 0.01, 0.3, 0.0])
    visits = []
    seconds, stolen = clock.measure("ab", 3, lambda name: visits.append(name) or len(visits))
    assert "".join(visits) == "abbaabbaab"  # five rounds, of which the second, third and last count
    assert seconds == [[4, 5, 9], [3, 6, 10]]
    assert stolen == pytest.approx(0.005 / 3)


def test_a_machine_that_is_never_left_alone_is_measured_all_the_same(machine_that_loses):
    machine_that_loses([0.5, 0.4, 0.3, 0.2, *[0.6] * 20])
    rounds = itertools.count()
    seconds, stolen = clock.measure(["a"], 2, lambda _: float(next(rounds)))
    assert seconds == [[2.0, 3.0]]
    assert stolen == pytest.approx(0.125)


def test_speedup_is_taken_within_rounds():
    # The machine slows down tenfold after two rounds; the ratio does not notice.
    assert results.speedup([2, 2, 20, 20, 20], [1, 1, 10, 10, 10]) == 2


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_operations_are_those_of_the_matmuls(kind):
    made = tiny_case("lstm")
    per_step = 2 * TINY.B * (TINY.D + TINY.H) * 4 * TINY.H
    assert made.operations(kind) == TINY.T * per_step * {"forward": 1, "gradient": 3}[kind]


# Milliseconds per candidate in the synthetic result, times three for the gradient.
MILLISECONDS = {
    ("lax.scan", "naive"): 12.0,
    ("lax.scan", "four_matmuls"): 18.0,
    ("flax", "layer"): 8.0,
    ("haiku", "layer"): 10.0,
    ("jaxrnn", "naive"): 5.0,
    ("jaxrnn", "cell"): 4.0,
}


def test_machines_that_call_themselves_the_same_have_files_of_their_own():
    def slug(model):
        cpu = f"Maker(R) Chip(TM) 9 Processor @ 2.20GHz (family 25, model {model})"
        return machine.slug({"device": "cpu", "cpu": cpu})

    assert slug(1) == "cpu-maker-chip-9-family-25-model-1"
    assert slug(17) == "cpu-maker-chip-9-family-25-model-17"


MACHINE = {"device": "cpu", "cpu": "Example 9000", "cores": 2, "system": "Linux", "python": "3"}


def synthetic_results():
    """A result without PyTorch whose rounds differ by the machine's moods alone."""
    moods = [random.Random(0).uniform(1, 2) for _ in range(5)] + [1.0] * 6

    def figures(candidate, kind):
        library, variant = candidate
        milliseconds = MILLISECONDS.get(candidate, 6.0) * (3 if kind == "gradient" else 1)
        return {
            "median_ms": milliseconds,
            "us_per_step": 1.0,
            "gflops": 50.0,
            "gemm_share": 0.125,
            "compile_s": 0.3 if library == "jaxrnn" else 0.2,
            "temp_bytes": 2**20 if variant == "naive_remat" else 2**24,
            "rounds_ms": [milliseconds * mood for mood in moods],
        }

    def measured(case):
        candidates = [
            {"library": candidate[0], "variant": candidate[1], "output_error": 0.0}
            | {kind: figures(candidate, kind) for kind in ("forward", "gradient")}
            for candidate in case.candidates
            if candidate != cases.GEMM
        ]
        return case.as_dict() | {"gemm_gflops": 400.0, "candidates": candidates}

    def compared(speedup):
        sides = {"plain_ms": 3.0, "ours_ms": 2.0, "plain_compile_s": 0.1, "ours_compile_s": 0.2}
        sizes = {"plain_temp_bytes": 2**22, "ours_temp_bytes": 2**21}
        ratios = {"speedup": speedup, "speedups": [speedup, speedup - 0.5, speedup + 0.5]}
        return ratios | {"rounds": 5, "same_program": False} | sides | sizes

    heading = {"date": "2030-01-01", "commit": "abc", "quick": False, "machine": MACHINE}
    libraries = [library for library in cases.LIBRARIES if library != "torch"]
    steps = [
        {"name": step.name, "size": str(size)}
        | {"forward": compared(1.0 + 0.01 * i), "gradient": compared(2.0 - 0.01 * i)}
        for i, step in enumerate(STEPS)
        for size in step.sizes
    ]
    return (
        heading | {"cases": [measured(case) for case in cases.cases(False, [], libraries)]},
        heading | {"steps": steps},
    )


def save_synthetic_results(root, facts, jax_version="1.0.3"):
    """Both benchmarks' results of one setting, where a repository has them; their folder."""
    directory = root / "benchmarks" / "results"
    directory.mkdir(parents=True, exist_ok=True)
    for name, result in zip(("peers", "never_slower"), synthetic_results(), strict=True):
        result |= {"machine": facts, "versions": {"jax": jax_version}}
        path = directory / f"{name}-{results.setting(result)}.json"
        path.write_text(json.dumps(result))
    return directory


@pytest.fixture
def rendered(tmp_path):
    """A repository with synthetic results in it: its README and its tables as rendered."""
    directory = save_synthetic_results(tmp_path, MACHINE)
    (tmp_path / "README.md").write_text(
        f"before\n{render.BEGIN}\nstale text\n{render.END}\nafter\n"
    )
    documents = render.documents(tmp_path)
    return documents[tmp_path / "README.md"], documents[directory / "tables.md"]


def test_readme_keeps_what_stands_around_the_section(rendered):
    readme, _ = rendered
    assert readme.startswith(f"before\n{render.BEGIN}\n### CPU: Example 9000, 2 cores, JAX 1.0.3\n")
    assert readme.endswith(f"\n{render.END}\nafter\n")
    assert "stale text" not in readme


def test_readme_shows_milliseconds_with_the_fastest_in_bold(rendered):
    readme, _ = rendered
    row = "| 16,512,128,256 | 12 / 36 | 8 / 24 | 10 / 30 | 6 / 18 | - | 5 / 15 | **4** / **12** |"
    assert readme.count(row) == 2  # LSTM and GRU


def test_readme_shows_ratios_within_rounds(rendered):
    readme, _ = rendered
    assert "| LSTM, naive | 2.40 / 2.40 |" in readme
    assert "| LSTM, four matmuls | 3.00 / 3.00 |" in readme
    assert "against the fastest JAX peer: 1.50 times as fast (1.50)" in readme
    assert "1.50 times as long (1.50 at most)" in readme
    assert "against PyTorch:" not in readme
    assert "| 16,8192,64,128 | 16 / 36 | 16 / 15 | 1 / 18 | 1/16.0 | 2.00 |" in readme


def test_readme_names_the_slowest_step(rendered):
    readme, _ = rendered
    last = STEPS[-1]
    assert f"{2.0 - 0.01 * (len(STEPS) - 1):.2f} at least ({last.name}, " in readme
    assert "1.00 at least (Elman, 1,100,4,4)" in readme


def test_tables_show_how_far_processes_are_apart(rendered):
    _, full = rendered
    assert "| Elman | 1,100,4,4 | 1.00 (0.50 to 1.50) |" in full


def test_tables_hold_every_candidate_and_step(rendered):
    _, full = rendered
    lstm, gru, elman, remat = (3 + 3 + 4), (1 + 3 + 2), (1 + 2 + 2), 3
    candidates = [line for line in full.splitlines() if line.count(" | ") == 12]
    headings = [line for line in candidates if line.startswith(("| candidate", "| ---"))]
    assert len(candidates) - len(headings) == 5 * (lstm + gru + elman) + 2 * remat
    assert all(f"| {step.name} | {size} |" in full for step in STEPS for size in step.sizes)


def test_a_second_setting_of_a_kind_is_a_row(tmp_path):
    cpus = "Example 9000", "Sample(R) 1 CPU @ 2 GHz"
    for device, cpu, jax_version in (
        ("cpu", cpus[0], "1.0.3"),
        ("cpu", cpus[0], "1.2.0.1"),
        ("cpu", cpus[1], "1.0.3"),
        ("Accelerator X", cpus[0], "1.0.3"),
    ):
        facts = MACHINE | {"device": device, "cpu": cpu}
        directory = save_synthetic_results(tmp_path, facts, jax_version)
    assert {path.stem for path in directory.glob("peers-*")} == {
        "peers-accelerator-x-jax-1.0",
        "peers-cpu-example-9000-jax-1.0",
        "peers-cpu-example-9000-jax-1.2",
        "peers-cpu-sample-1-cpu-jax-1.0",
    }
    (tmp_path / "README.md").write_text(f"{render.BEGIN}\n{render.END}")
    readme = render.documents(tmp_path)[tmp_path / "README.md"]
    sections = readme.split("### ")[1:]
    titles = [section.splitlines()[0] for section in sections]
    assert titles == [
        f"CPU: {cpus[0]}, 2 cores, JAX 1.0.3",
        "GPU: Accelerator X, JAX 1.0.3",
        "Each machine and version of JAX",
    ]
    assert ["| GRU, naive |" in section for section in sections] == [True, True, False]
    rows = [line for line in sections[-1].splitlines() if line.startswith("| [")]
    assert [re.match(r"\| \[(.*?)\]", row)[1] for row in rows] == [
        f"CPU: {cpus[0]}, 2 cores, JAX 1.0.3",
        f"CPU: {cpus[0]}, 2 cores, JAX 1.2.0.1",
        f"CPU: {cpus[1]}, 2 cores, JAX 1.0.3",
        "GPU: Accelerator X, JAX 1.0.3",
    ]
    assert all("| 1.50 (1.50) | - |" in row and "/never_slower-" in row for row in rows)


def test_the_table_of_a_gpu_shows_what_was_measured():
    def figures(library, variant, forward, gradient):
        both = {
            kind: {"us_per_step": us, "rounds_ms": [us, 2 * us], "temp_bytes": held}
            for kind, us, held in (("forward", forward, 3 << 20), ("gradient", gradient, None))
        }
        return {"library": library, "variant": variant} | both

    def case(batch, **more):
        candidates = [
            figures("lax.scan", "naive", 8.0, 32.0),
            figures("torch", "layer", 1.0, 16.0),
            figures("jaxrnn", "naive", 4.0, 4.0 * batch),
        ]
        sizes = {"cell": "gru", "dtype": "float32", "B": batch, "T": 9, "D": 64, "H": 64}
        return sizes | {"candidates": candidates} | more

    result = {
        "machine": MACHINE | {"device": "Accelerator X", "gpu": "Accelerator X", "driver": "1.2"},
        "versions": {"jax": "1.0.3"},
        "date": "2026-01-01",
        "commit": "abc",
        "cases": [case(16), case(1, commit="def")],
    }
    shown = gpu_tables.section(result)
    assert "GPU: Accelerator X, driver 1.2, JAX 1.0.3" in shown
    assert "| GRU, float32, H | 64 |" in shown
    assert "| `lax.scan` | 8 / 32 |" in shown
    assert "| PyTorch | **1** / **16** |" in shown
    assert "cuDNN, by JAX |" not in shown
    assert "- against `lax.scan`, float32: 2.00 (2.00) / 2.00 (0.50)" in shown
    assert "- against PyTorch, float32: 0.25 (0.25) / 1.00 (0.25)" in shown
    everything = gpu_tables.in_full(result)
    assert "| GRU, float32, 1, 64 | 8 / 32 |" in everything
    assert "1 of the 2 cases are from a run at def" in everything


def test_a_readme_without_markers_is_an_error(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("nothing here")
    assert render.documents(tmp_path) == {}
    save_synthetic_results(tmp_path, MACHINE)
    with pytest.raises(ValueError, match="speed:begin"):
        render.documents(tmp_path)


def test_readme_and_tables_are_what_the_committed_results_say():
    for path, text in render.documents().items():
        assert path.read_text() == text, f"{path.name} is stale: python -m benchmarks.render"
