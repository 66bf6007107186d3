"""Every example in its short form, in a process of its own, as a user runs it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrnn

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "run")


def run(script, *arguments):
    """Warnings are errors, and programs are compiled to be fast, unlike those of the tests."""
    command = [sys.executable, "-W", "error", script, *arguments]
    of_tests = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")  # see conftest.py
    env = {name: value for name, value in os.environ.items() if name not in of_tests}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=900, check=False
    )


def peers_missing(name):
    """Whether an example is made for libraries that need not be installed, and are not."""
    needs = (EXAMPLES / f"{name}.py").read_text().startswith("# needs peers\n")
    return needs and not importlib.util.find_spec("haiku")


@pytest.mark.parametrize("name", NAMES)
def test_holds_in_its_short_form(name, tmp_path):
    picture = tmp_path / "new_folder" / "picture.png"
    draws = '"--output"' in (EXAMPLES / f"{name}.py").read_text()
    finished = run(EXAMPLES / f"{name}.py", "--short", *(["--output", picture] if draws else []))
    if peers_missing(name):
        assert finished.returncode == 1
        assert re.fullmatch("FAIL  .* pip install .*", finished.stdout.splitlines()[-1])
        return
    assert finished.returncode == 0, finished.stdout + finished.stderr
    line = finished.stdout.splitlines()[-1]
    assert re.fullmatch(r"PASS  \S.*\d.*", line), line
    if draws:
        header = picture.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert np.frombuffer(header[16:], ">u4").min() > 500


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_run_believes_the_line_and_the_exit_status_only_together(tmp_path, monkeypatch, capfd):
    scripts = {
        "a_good": "print('some text'); print('PASS  5 of 5', *sys.argv[1:])",
        "b_modest": "print('FAIL  4 of 5'); sys.exit(1)",
        "c_boastful": "print('PASS  5 of 5'); sys.exit(1)",
        "d_shy": "print('FAIL  4 of 5')",
        "e_broken": "print('progress'); 1 / 0",
        "f_silent": "",
    }
    for name, code in scripts.items():
        (tmp_path / f"{name}.py").write_text(f"import sys\n{code}\n")
    runner = load("run")
    monkeypatch.setattr(runner, "HERE", tmp_path)
    assert runner.main(["--short"]) == 1
    *lines, summary = capfd.readouterr().out.splitlines()
    lines = [re.sub(r"  \(\d+ s\)$", "", line) for line in lines]
    assert lines[0] == "PASS  a_good      5 of 5 --short"
    assert lines[1] == "FAIL  b_modest    4 of 5"
    assert [line[:18].split() for line in lines[2:]] == [["FAIL", name] for name in [*scripts][2:]]
    assert summary == "1 of 6 examples hold"

    assert runner.main(["a_good", "--short"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "1 of 1 examples hold"

    for name in [*scripts][1:]:
        (tmp_path / f"{name}.py").unlink()
    assert runner.main([]) == 0


@pytest.fixture(scope="module")
def ensemble():
    return load("ensemble")


def test_co2_series_has_its_gaps_and_no_others(ensemble):
    months, co2 = ensemble.load()
    np.testing.assert_allclose(months, 1958 + (2 + np.arange(526)) / 12)
    gaps = {(1958, 6), (1958, 10), (1964, 2), (1964, 3), (1964, 4)}
    missing = months[np.isnan(co2)]
    assert {(int(year), round(12 * (year % 1)) + 1) for year in missing} == gaps
    assert co2[0] == 316.1
    assert np.nanmax(np.abs(np.diff(co2))) < 3


def test_forecasts_know_nothing_of_later_months_and_survive_gaps(ensemble):
    months, co2 = ensemble.load()
    member = ensemble.init(jax.random.key(0))
    predict = jax.jit(ensemble.predict)
    mean, deviation = predict(member, months, co2)
    assert mean.shape == deviation.shape == (526, 12)
    assert np.all(np.isfinite(mean))
    assert np.all(deviation > 0)
    changed = np.where(np.arange(526) <= 300, co2, 1e3)
    for before, after in zip((mean, deviation), predict(member, months, changed), strict=True):
        np.testing.assert_array_equal(before[:301], after[:301])
        assert np.all(before[301] != after[301])
    # A gap of three months, and the month after it, whose rise is unknown too.
    first = np.flatnonzero(np.isnan(co2))[2]
    np.testing.assert_array_equal(mean[first : first + 4], np.tile(mean[first - 1], (4, 1)))


def test_ensemble_loss_is_the_likelihood_of_each_known_rise(ensemble):
    months, co2 = (x[:80] for x in ensemble.load())
    member = ensemble.init(jax.random.key(1))
    weights = np.random.default_rng(0).exponential(size=80)
    mean, deviation = (np.asarray(x, float) for x in ensemble.predict(member, months, co2))
    total = weight = 0
    for month in range(80):
        for ahead in range(12):
            later = month + ahead + 1
            if later < 80 and np.isfinite(co2[month]) and np.isfinite(co2[later]):
                distance = (co2[later] - co2[month] - mean[month, ahead]) / deviation[month, ahead]
                density = -(distance**2) / 2 - np.log(deviation[month, ahead])
                total, weight = total - weights[month] * density, weight + weights[month]
    value, gradient = jax.jit(jax.value_and_grad(ensemble.loss))(member, weights, months, co2)
    np.testing.assert_allclose(value, total / weight, rtol=1e-4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_ensemble_fails_if_a_naive_forecast_is_as_good(ensemble, monkeypatch, tmp_path, capsys):
    def last_value(members, months, co2, origins):
        return np.repeat(co2[origins], 12), np.ones(12 * len(origins))

    monkeypatch.setattr(ensemble, "train", lambda *_: (None, np.ones((50, 4))))
    monkeypatch.setattr(ensemble, "forecast", last_value)
    assert ensemble.main(["--short", "--output", str(tmp_path / "picture.png")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL")


@pytest.fixture(scope="module")
def episodes():
    return load("episodes")


def test_the_maze_keeps_its_rules(episodes):
    """Experience with a random policy, replayed step by step."""
    params = episodes.init(jax.random.key(0))
    record = jax.tree.map(np.asarray, episodes.act(params, True, jax.random.key(1)))
    assert np.all(record.begins[:, 0])
    lengths, arrivals = [], 0
    for agent in range(len(record.action)):
        start = 0
        for step in range(record.action.shape[1]):
            view, action, reward, begins, at_junction = (field[agent, step] for field in record)
            if begins:
                start = step
            assert list(view[1:]) == [not at_junction, at_junction]
            assert (view[0] == 0) if at_junction else (abs(view[0]) == 1)
            turned, ended = action != episodes.FORWARD, False
            if at_junction and turned:
                first_sign = record.view[agent, start, 0]
                assert reward == (1 if (action == episodes.RIGHT) == (first_sign == 1) else -1)
                walked = record.action[agent, start:step] == episodes.FORWARD
                corridor = ~record.at_junction[agent, start:step]
                lengths.append((walked & corridor).sum())
                arrivals, ended = arrivals + 1, True
            else:
                np.testing.assert_allclose(reward, -0.1 if turned or at_junction else 0)
            if ended and step + 1 < record.action.shape[1]:
                assert record.begins[agent, step + 1]
    assert arrivals > 20
    assert min(lengths) >= episodes.SHORTEST
    assert max(lengths) <= episodes.LONGEST


def test_the_learner_sees_the_states_that_the_actor_had(episodes):
    """Actions that the actor could hardly have taken by chance are likely to the learner."""
    params = episodes.init(jax.random.key(0))
    params = {**params, "readout": 1e4 * params["readout"]}  # as good as no chance left
    for use_reset in (True, False):
        record = episodes.act(params, use_reset, jax.random.key(2))
        cell = episodes.CELL
        _, outputs, _ = jaxrnn.rnn(
            cell.step(params["cell"]),
            record.view,
            cell.initial_states(episodes.MAZES),
            reset=record.begins & use_reset,
        )
        logits = (outputs @ params["readout"] + params["bias"])[..., :3]
        likely = np.argmax(logits, axis=-1) == record.action
        assert likely.mean() > 0.99


def test_returns_end_with_their_episode(episodes, monkeypatch):
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(32, 20)).astype(np.float32)
    begins = rng.random((32, 20)) < 0.3
    record = episodes.Record(None, None, reward, begins, None)
    expected = np.zeros((32, 20))
    for step in reversed(range(20)):
        later = expected[:, step + 1] * ~begins[:, step + 1] if step < 19 else 0
        expected[:, step] = reward[:, step] + episodes.DISCOUNT * later
    np.testing.assert_allclose(episodes.returns(record), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("with_reset", "without", "status"), [(0.99, 0.7, 0), (0.9, 0.7, 1), (0.99, 0.9, 1)]
)
def test_episodes_hold_only_if_reset_makes_the_difference(
    episodes, monkeypatch, tmp_path, with_reset, without, status
):
    curves = np.full((100, 2), with_reset), np.full((100, 2), without)
    monkeypatch.setattr(episodes, "train", lambda *_: curves)
    assert episodes.main(["--output", str(tmp_path / "picture.png")]) == status


@pytest.fixture(scope="module")
def long_sequence():
    return load("long_sequence")


def test_a_gradient_over_the_budget_is_compiled_and_not_run(long_sequence, monkeypatch):
    monkeypatch.setattr(long_sequence, "watched", lambda *_: pytest.fail("it was run"))
    measurement = long_sequence.measure("jaxrnn", 64, budget=0)
    assert measurement.reserved > 0
    assert measurement[1:] == (None, None, None)


def test_long_sequence_holds_only_if_every_part_of_the_claim_does(long_sequence, capsys):
    gradient = ({"kernel": np.ones((2, 3))}, (np.ones((1, 2)), np.ones((1, 2))))

    def status(plain=200.0, short=1.0, remat=5.0, factor=1.0, carry=1.0):
        other = jax.tree.map(lambda x: factor * x, gradient)
        longest = (gradient[0], (gradient[1][0], carry * gradient[1][1]))
        table = {
            (kind, 64): long_sequence.Measurement(1.0, 1.0, 1.0, gradient)
            for kind in long_sequence.KINDS
        }
        table["jaxrnn, remat", 64] = long_sequence.Measurement(short, 1.0, 1.0, other)
        for kind in ("lax.scan", "jaxrnn"):
            table[kind, 4096] = long_sequence.Measurement(plain)
        fits = (1.0, 1.0, longest) if remat <= 100 else ()
        table["jaxrnn, remat", 4096] = long_sequence.Measurement(remat, *fits)
        result = long_sequence.report(table, [64, 4096], budget=100)
        assert capsys.readouterr().out.splitlines()[-1][:4] == ("FAIL" if result else "PASS")
        return result

    assert status() == 0
    assert status(plain=90.0) == 1
    assert status(remat=150.0) == 1
    assert status(remat=20.0) == 1  # 20 times the memory for 64 times the steps
    assert status(factor=1.01) == 1
    assert status(carry=0.0) == 1
