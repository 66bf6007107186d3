"""The steps of `never_slower`: what people put into a loop over time, small and large.

Every step is written for `lax.scan`, with time first, and says nothing of speed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.steps import gated, language, made_weights, memories, networks, noisy, other, rounds
from benchmarks.steps.forms import Draw, Loop, Size, gradient_of

__all__ = ["STEPS", "Draw", "Loop", "Size", "Step", "gradient_of", "random_step"]


@dataclass(frozen=True)
class Step:
    """A step and the sizes at which it is measured."""

    name: str
    make: Callable[[Draw, Size], Loop]
    sizes: tuple[Size, ...]


TINY = Size(1, 100, 4, 4)
ONE = Size(1, 512, 128, 128)
SMALL = Size(8, 128, 32, 32)
NARROW = Size(16, 256, 8, 64)
MEDIUM = Size(32, 128, 64, 128)
LARGE = Size(32, 100, 256, 512)
LONG = Size(8, 2048, 32, 32)

STEPS = (
    Step("Elman", gated.elman, (TINY, ONE, NARROW, MEDIUM, LARGE)),
    Step("Elman, dilated", memories.dilated, (SMALL, MEDIUM)),
    Step("LSTM", gated.lstm, (TINY, ONE, NARROW, MEDIUM, LARGE)),
    Step("LSTM under a checkpoint", gated.lstm_checkpointed, (NARROW, MEDIUM)),
    Step("LSTM, checkpoint in part", gated.lstm_checkpointed_in_part, (NARROW, MEDIUM)),
    Step("LSTM, four matmuls", gated.lstm_four_matmuls, (TINY, MEDIUM)),
    Step("LSTM, concatenating", gated.lstm_concatenating, (TINY, MEDIUM)),
    Step("LSTM, columns under vmap", gated.lstm_columns, (ONE, NARROW, MEDIUM)),
    Step("LSTM, vmap around the loop", gated.lstm_mapped, (NARROW, MEDIUM)),
    Step("GRU", gated.gru, (TINY, ONE, NARROW, MEDIUM, LARGE, LONG)),
    Step("GRU, einsum over gates", gated.gru_einsum, (ONE, MEDIUM)),
    Step("minGRU", other.min_gru, (MEDIUM,)),
    Step("diagonal", other.diagonal, (TINY, MEDIUM)),
    Step("diagonal, complex", other.complex_diagonal, (MEDIUM,)),
    Step("moving average", other.moving_average, (TINY, MEDIUM)),
    Step("two LSTM layers", gated.two_layers, (SMALL, MEDIUM)),
    Step("LSTM, attention readout", gated.attention_readout, (MEDIUM,)),
    Step("GRU, attention decoder", language.attention_decoder, (Size(8, 64, 32, 64), MEDIUM)),
    Step("LSTM, layer norm", gated.layer_norm_lstm, (MEDIUM,)),
    Step("LSTM, phased", gated.phased_lstm, (SMALL, MEDIUM)),
    Step("HyperLSTM", gated.hyper_lstm, (MEDIUM,)),
    Step("Elman, weight norm", made_weights.weight_norm, (MEDIUM,)),
    Step("Elman, spectral norm", made_weights.spectral_norm, (SMALL, MEDIUM)),
    Step("GRU, masked weights", made_weights.masked_weights, (SMALL, MEDIUM)),
    Step("GRU, low-rank corrections", made_weights.low_rank, (SMALL, MEDIUM)),
    Step("GRU under cond", gated.cond, (MEDIUM,)),
    Step("GRU, cond of each sample", gated.cond_per_sample, (MEDIUM,)),
    Step("inner scan", rounds.inner_scan, (MEDIUM,)),
    Step("convolutional LSTM", gated.conv_lstm, (Size(4, 64, 8, 16),)),
    Step("integer count", other.count, (MEDIUM,)),
    Step("Kalman filter", other.kalman, (Size(8, 128, 2, 4),)),
    Step("GRU, tokens to logits", language.logits, (MEDIUM,)),
    Step("LSTM over tokens", language.embedding, (MEDIUM,)),
    Step("GRU, loss over tokens", language.token_loss, (MEDIUM, LONG)),
    Step("dropout key in state", noisy.dropout, (TINY, ONE, MEDIUM)),
    Step("LSTM, zoneout", noisy.zoneout, (NARROW, MEDIUM)),
    Step("Langevin dynamics", noisy.langevin, (ONE, MEDIUM)),
    Step("fast weights", memories.fast_weights, (Size(8, 128, 64, 32), Size(8, 128, 64, 128))),
    Step("delta rule", memories.delta_rule, (Size(8, 128, 64, 32), Size(16, 128, 64, 64))),
    Step("matrix LSTM", memories.matrix_lstm, (Size(16, 128, 64, 128),)),
    Step("retention", memories.retention, (Size(1, 128, 64, 64), Size(16, 128, 64, 128))),
    Step(
        "retention, rotated keys",
        memories.rotated_retention,
        (Size(1, 128, 64, 64), Size(16, 128, 64, 64), Size(16, 128, 64, 128)),
    ),
    Step(
        "selective state space",
        memories.selective,
        (Size(1, 128, 64, 64), Size(16, 128, 64, 128)),
    ),
    Step("Mamba", memories.mamba, (Size(1, 256, 64, 64), Size(8, 64, 64, 64))),
    Step("attention, blocks of keys", memories.blocks_of_keys, (Size(8, 64, 1, 64),)),
    Step("key-value cache", memories.key_value_cache, (Size(8, 128, 64, 64),)),
    Step(
        "HiPPO, a solve each step",
        memories.polynomial_memory,
        (Size(8, 128, 4, 32), Size(8, 128, 4, 64)),
    ),
    Step("mixture of experts", other.experts, (Size(16, 128, 64, 64),)),
    Step("Elman, sparsemax", other.sparsemax, (NARROW, MEDIUM)),
    Step("CTC", other.ctc, (Size(16, 128, 64, 20), Size(64, 64, 64, 20))),
    Step("Viterbi", other.viterbi, (Size(16, 64, 32, 32),)),
    Step("hidden Markov model", other.hidden_markov, (Size(16, 128, 64, 64),)),
    Step("test-time training", memories.test_time_training, (Size(16, 128, 64, 64),)),
    Step("adaptive computation time", rounds.adaptive, (SMALL, MEDIUM)),
    Step("Euler, two-layer network", rounds.euler, (SMALL, MEDIUM)),
    Step("Runge-Kutta", rounds.runge_kutta, (SMALL, MEDIUM)),
    Step("GRU, substeps between", rounds.ode_gru, (SMALL, MEDIUM)),
    Step("masked LSTM through rnn", gated.masked, (TINY, NARROW, MEDIUM)),
)


def random_step(number: int) -> Step:
    """A network of usual parts, put together at random, at a random size."""
    make = partial(networks.network, number)
    return Step(f"network {number}", make, (networks.size_of(number),))
