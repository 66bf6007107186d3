"""The example in a short form: it learns, it repeats itself, and it keeps its word."""

import importlib.util
import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "examples" / "japanese_vowels.py"
EPOCHS = 2


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("japanese_vowels", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, monkeypatch, capsys, output, required):
    monkeypatch.setattr(example, "REQUIRED_ACCURACY", required)
    status = example.main(["--epochs", str(EPOCHS), "--seed", "5", "--output", str(output)])
    printed = capsys.readouterr().out
    (percent,) = re.findall(r"test accuracy: ([\d.]+)%", printed)
    return status, float(percent) / 100


def test_learns_draws_and_exits_by_its_accuracy(example, monkeypatch, capsys, tmp_path):
    output = tmp_path / "new_folder" / "figure.png"
    status, accuracy = run(example, monkeypatch, capsys, output, required=0.5)
    # The most frequent speaker has 88 of the 370 utterances.
    assert accuracy > 0.7
    assert status == 0
    header = output.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = np.frombuffer(header[16:], ">u4")
    assert width > height > 500

    # The same seed again; this time the bar lies just above what was reached.
    required = np.nextafter(accuracy + 5e-5, 1)
    assert run(example, monkeypatch, capsys, output, required) == (1, accuracy)


def test_same_seed_same_parameters(example):
    def trained(seed):
        return example.train(*example.load(), EPOCHS, seed)

    params, history = trained(seed=5)
    assert history.shape == (EPOCHS, 2, 2)
    assert np.all(np.isfinite(history))
    assert history[-1, 0, 0] < history[0, 0, 0]
    chex.assert_trees_all_equal((params, history), trained(seed=5))
    other, _ = trained(seed=6)
    assert not np.allclose(params["readout"], other["readout"])


def test_padding_is_nan_and_changes_no_score(example):
    """The shortest utterance scores the same alone, cut to its length."""
    _, test_set = example.load()
    valid = example.valid_frames(test_set)
    np.testing.assert_array_equal(np.isnan(test_set["inputs"]).any(axis=-1), ~valid)
    row, length = test_set["lengths"].argmin(), test_set["lengths"].min()
    alone = {name: array[row : row + 1] for name, array in test_set.items()}
    alone["inputs"] = alone["inputs"][:, :length]
    assert length < valid.shape[1]

    params = example.init(jax.random.key(0), alone["inputs"].shape[-1])
    padded = jax.jit(example.scores)(params, test_set)
    assert np.all(np.isfinite(padded))
    np.testing.assert_allclose(example.scores(params, alone)[0], padded[row], atol=1e-5)


def test_confusions_count_every_utterance_in_the_row_of_its_speaker(example):
    _, test_set = example.load()
    params = example.init(jax.random.key(0), test_set["inputs"].shape[-1])
    confusion = example.count_confusions(params, test_set)
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(test_set["speakers"]))
    accuracy = np.trace(confusion) / len(test_set["speakers"])
    np.testing.assert_allclose(example.evaluate(params, test_set)[1], accuracy, rtol=1e-6)
