"""`explain` says what became of a step, and says the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrnn
from jaxrnn import _device, _gains

B, T, D, H, V = 8, 24, 16, 32, 4
# `jnp.ones` is compiled for each shape.
ones = functools.partial(np.ones, dtype=np.float32)


def lstm_with_readout(x, states):
    h, c = states
    z = x @ jnp.ones((D, 4 * H)) + h @ jnp.ones((H, 4 * H))
    i, f, g, o = jnp.split(z, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h @ jnp.ones((H, V)), [h, c]


INPUTS, STATES = ones((B, T, D)), [ones((B, H))] * 2


def zero_params(cell, features):
    """What a cell draws takes some time, and is in no report."""
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), features))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def explain(**options):
    options.setdefault("method", "sequential")
    return jaxrnn.explain(lstm_with_readout, INPUTS, STATES, **options)


def section(report, title):
    """The lines under the first title that contains `title`."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if title in line) + 1
    stop = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return "\n".join(lines[start:stop])


def figure(report, title):
    """The number at the start of the line after `title`, thousands separated by commas."""
    (line,) = (line for line in report.splitlines() if line.startswith(title))
    return line.removeprefix(title).split()[0].replace(",", "")


def test_every_operation_is_where_it_runs():
    report = explain()
    assert section(report, "prologue").count(f"@ float32[{D}, {4 * H}]") == 1
    assert section(report, "recurrence").count("dot_general") == 1
    assert f"@ float32[{H}, {4 * H}]" in section(report, "recurrence")
    assert f"@ float32[{H}, {V}]" in section(report, "epilogue")


def test_multiply_adds_are_those_of_the_formulas():
    report = explain()
    assert int(figure(report, "multiply-adds per step")) == B * H * 4 * H
    outside = B * D * 4 * H + B * H * V
    assert f"{outside:,} outside" in report
    assert f"{B * H * 4 * H + outside:,} in the loop" in report


def test_rematerialisation_keeps_less():
    whole = float(figure(explain(chunk=4), "kept for the gradient"))
    blocks = float(figure(explain(chunk=4, remat=True), "kept for the gradient"))
    assert blocks < whole / 2
    assert "in blocks of 4 (rematerialised)" in explain(chunk=4, remat=True)


def test_a_mask_leaves_one_product_in_the_loop():
    report = explain(mask=jnp.ones((B, T)))
    assert section(report, "recurrence").count("dot_general") == 1


def test_products_in_branches_and_loops_count_in_the_loop_and_with_lax_scan():
    def step(x, states):
        (h,) = states
        kernel = jnp.ones((H, H))
        h = jax.lax.cond(x[0, 0] > 0, lambda h: h @ kernel @ kernel, lambda h: h @ kernel, h)
        h = jax.lax.fori_loop(0, 5, lambda _, h: jnp.tanh(h @ kernel), h)
        return h, [jnp.tanh(h + x @ jnp.ones((D, H)))]

    report = jaxrnn.explain(step, INPUTS, STATES[:1], method="sequential")
    inside, outside = (2 + 5) * B * H * H, B * D * H  # the longer branch
    assert int(figure(report, "multiply-adds per step")) == inside
    assert f"{outside:,} outside" in report
    assert f"{inside + outside:,} in the loop" in report


def test_without_a_gpu_a_kernel_is_said_to_be_a_loop():
    report = explain(method="fused")
    assert section(report, "step by step (on an NVIDIA GPU as one kernel): recurrence")


def test_standing_aside_is_said():
    def count(x, states):
        return states[0], [states[0] + 1]

    def printing(x, states):
        jax.debug.print("{}", x[0, 0])
        return lstm_with_readout(x, states)

    reasons = {
        "asked for": explain(method="lax"),
        "no matmul and draws no random bits": jaxrnn.explain(count, INPUTS, STATES[:1]),
        "the step has effects": jaxrnn.explain(printing, INPUTS, STATES),
        "not be faster: one step": jaxrnn.explain(lstm_with_readout, INPUTS[:, :1], STATES),
        "one sample and few steps": jaxrnn.explain(
            lstm_with_readout, INPUTS[:1, :5], [state[:1] for state in STATES]
        ),
    }
    for reason, report in reasons.items():
        assert report.startswith("plain lax.scan over ")
        assert reason in report
        assert sum(other in report for other in reasons) == 1


@pytest.mark.parametrize("options", [{}, {"method": "lax"}])
def test_rematerialisation_is_said_where_nothing_is_taken_apart(options):
    def count(x, states):
        return states[0], [states[0] + 1]

    report = jaxrnn.explain(count, INPUTS, STATES[:1], remat=True, chunk=6, **options)
    assert f"plain lax.scan over {T} steps, in blocks of 6 (rematerialised)" in report


@pytest.mark.parametrize(("chunk", "block"), [(None, T), (T, T), (T + 1, T), (7, 7), ("auto", 4)])
def test_a_block_that_was_asked_for_is_taken_when_the_last_output_is_selected(chunk, block):
    """By itself `rnn` takes blocks of sqrt(T) then, of whose outputs that one is selected."""
    report = explain(mask=jnp.ones((B, T)), return_all_outputs=False, chunk=chunk)
    assert report.splitlines()[0].endswith(f"in blocks of {block}")


def test_lines_fit_a_terminal_and_nothing_is_computed():
    def loud(x, states):
        jax.debug.callback(lambda: pytest.fail("the step ran"))
        return lstm_with_readout(x, states)

    remade = jax.checkpoint(lstm_with_readout)
    long = ones((B, 10**5, D))
    for report in (
        explain(mask=jnp.ones((B, T))),
        jaxrnn.explain(remade, long, STATES, method="sequential"),
        jaxrnn.explain(lambda x, s: (x + s[0], s), long, [long[:, 0]], remat=True),
    ):
        assert all(len(line) <= 80 for line in report.splitlines())
    assert "effects" in jaxrnn.explain(loud, INPUTS, STATES)


def test_mistakes_are_named_as_rnn_names_them():
    with pytest.raises(ValueError, match="mask has shape"):
        explain(mask=jnp.ones((B, T + 1)))


def body(carry, x):
    y, states = lstm_with_readout(x, carry)
    return tuple(states), y


def explain_scan(*args, **options):
    return jaxrnn.explain_scan(body, tuple(STATES), *args, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk": 4, "remat": True}, {"method": "lax"}, {"method": "sequential"}],
    ids=str,
)
def test_a_scan_is_explained_as_the_rnn_that_it_is_part_of(options):
    of_rnn = jaxrnn.explain(lstm_with_readout, INPUTS, STATES, **options)
    assert explain_scan(INPUTS.swapaxes(0, 1), **options) == of_rnn


def test_a_scan_without_xs_or_steps():
    generated = jaxrnn.explain_scan(
        lambda h, _: (jnp.tanh(h) @ jnp.ones((H, H)), jnp.cos(h) @ jnp.ones((H, V))),
        STATES[0],
        length=T,
        method="sequential",
    )
    assert generated.startswith(f'method "sequential" over {T} steps')
    assert f"@ float32[{H}, {V}]" in section(generated, "epilogue")
    assert explain_scan(ones((0, B, D))) == "plain lax.scan over 0 steps: there is nothing to do"


def test_mistakes_in_a_scan_are_named_as_scan_names_them():
    for mistake, error in (
        (lambda scan: scan(body, tuple(STATES), INPUTS.swapaxes(0, 1), length=T + 1), ValueError),
        (lambda scan: scan(lambda h, x: (h[:1], x), STATES[0], INPUTS), TypeError),
        (lambda scan: scan(body, tuple(STATES), INPUTS.swapaxes(0, 1), unroll=-1), ValueError),
        (lambda scan: scan(body, tuple(STATES), 1.0), ValueError),
        (lambda scan: scan(body, tuple(STATES), INPUTS, chunk=0), ValueError),
    ):
        messages = []
        for function in (jaxrnn.scan, jaxrnn.explain_scan):
            with pytest.raises(error) as raised:
                mistake(function)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_one_block_where_that_takes_little_memory():
    """Its passes may make two MiB in all; the cell decides."""

    def blocks(cell, time):
        step = cell.step(zero_params(cell, 1))
        report = jaxrnn.explain(step, ones((B, time, 1)), cell.initial_states(B))
        return int(report.splitlines()[0].rsplit(maxsplit=1)[1])

    two_mib = 2 * 2**20 // (4 * B * H)  # steps of one array [B, H] each
    assert blocks(jaxrnn.cells.simple_rnn(H), two_mib) == two_mib
    assert blocks(jaxrnn.cells.simple_rnn(H), 2 * two_mib) == two_mib
    assert blocks(jaxrnn.cells.lstm(H), two_mib // 4) == two_mib // 4
    assert blocks(jaxrnn.cells.lstm(H), two_mib) == two_mib // 4


def test_results_are_in_longer_blocks_than_gradients():
    """One up to 8 MiB of what passes and the loop hand on to each other, else of 4 MiB."""

    def blocks(time, features=2, readout=False):
        cell = jaxrnn.cells.lstm(H)  # 2 MiB in 512 steps
        params = zero_params(cell, features)

        def step(x, states):
            h, states = cell.step(params)(x, states)
            return h @ jnp.ones((H, 1)) if readout else h, states

        states, inputs = cell.initial_states(B), ones((B, time, features))
        report = jaxrnn.explain(step, inputs, states, method="sequential").splitlines()
        assert report[0].startswith(f'method "sequential" over {time} steps, in blocks of 5')
        return int(report[1].removeprefix("for gradients; without one in blocks of "))

    assert blocks(2048, features=16) == 2048
    assert blocks(3072, features=16) == 1024
    assert blocks(3072, features=16, readout=True) == 768
    # What one core has done soon: 2**16 numbers of a pass.
    assert blocks(1024, features=2) == 64


@pytest.mark.parametrize(
    ("units", "wide", "longer"), [(128, True, True), (256, True, False), (256, False, True)]
)
def test_results_are_in_no_longer_blocks_where_the_loop_takes_all_cores(
    units, wide, longer, monkeypatch
):
    """XLA shares out a product with more than 2**16 weights; then no core is idle in the loop."""
    monkeypatch.setattr(_device, "has_wide_vectors", lambda: wide)
    cell = jaxrnn.cells.lstm(units)
    params, states = zero_params(cell, units), cell.initial_states(8)
    report = jaxrnn.explain(cell.step(params), ones((8, 512, units)), states).splitlines()
    assert report[0].endswith(f"in blocks of {2**14 // units}")
    assert report[1].startswith("for gradients; without one in blocks of ") == longer


def test_blocks_of_large_steps_are_short_but_no_single_steps():
    cell = jaxrnn.cells.lstm(512)  # which makes 4 MiB a step for 512 samples
    report = jaxrnn.explain(
        cell.step(zero_params(cell, 1)), ones((512, 32, 1)), cell.initial_states(512)
    )
    assert "in blocks of 4" in report.splitlines()[0]


def test_which_gates_are_one_array():
    """All that are small, that get a bias, or that are split after their activation alone."""

    def product(batch, biased):
        w, u, b = ones((D, 2 * H)), ones((H, 2 * H)), ones(2 * H)

        def step(x, states):
            z = x @ w + states[0] @ u
            f, g = jnp.split(z + b if biased else z, 2, axis=-1)
            h = jax.nn.sigmoid(f) * states[0] + jnp.tanh(g)
            return h, [h]

        return prologue_product(step, ones((batch, T, D)), [ones((batch, H))])

    def prologue_product(*operands):
        report = jaxrnn.explain(*operands, method="sequential")
        return section(report, "prologue").splitlines()[0].split("@ ")[1]

    samples = 2**15 // (4 * H)  # for which one gate takes 32 KiB
    assert product(samples, biased=False) == f"float32[{D}, {H}] x2"
    assert product(samples, biased=True) == f"float32[{D}, {2 * H}]"
    assert product(samples // 2, biased=False) == f"float32[{D}, {2 * H}]"

    lstm = jaxrnn.cells.lstm(H, use_bias=False)
    step = lstm.step(zero_params(lstm, D))
    whole = prologue_product(step, ones((samples, T, D)), lstm.initial_states(samples))
    assert whole == f"float32[{D}, {4 * H}]"


def test_what_comes_from_plain_lax_scan_without_a_gradient():
    """32 rows with a small matrix, two of several layers, a small convolution, short sums.

    Half of a product of a concatenation, unless it is one row.

    And what is little beside the rest: a tenth of the work, or rows for a state of matrices. And
    what is decomposed one by one. And what is little in all.
    """
    steps = 512

    def layers(batch):
        def step(x, states):
            h = jnp.tanh(x @ jnp.ones((64, H)) + states[0] @ jnp.ones((H, H)))
            y = jnp.tanh(h @ jnp.ones((H, H)) + states[1] @ jnp.ones((H, H)))
            return y, [h, y]

        return jaxrnn.explain(step, ones((batch, steps, 64)), [ones((batch, H))] * 2)

    def convolution(places):
        dimensions = ("NWC", "WIO", "NWC")

        def convolve(x):
            kernel = jnp.ones((3, D, D))
            return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", None, None, dimensions)

        def step(x, states):
            h = jnp.tanh(convolve(x) + convolve(states[0]))
            return h, [h]

        shape = (2, steps, places, D)
        return jaxrnn.explain(step, ones(shape), [ones((2, places, D))])

    def report(batch, units=H, features=64, steps=steps, **options):
        def step(x, states):
            h = jnp.tanh(x @ jnp.ones((features, units)) + states[0] @ jnp.ones((units, units)))
            return h, [h]

        states = [ones((batch, units))]
        return jaxrnn.explain(step, ones((batch, steps, features)), states, **options)

    def concatenated(batch, features, units=H):
        def step(x, states):
            joined = jnp.concatenate([x, states[0]], axis=-1)
            h = jnp.tanh(joined @ jnp.ones((features + units, units)))
            return h, [h]

        return jaxrnn.explain(step, ones((batch, steps, features)), [ones((batch, units))])

    def matrices(features):
        def step(x, states):
            row = jnp.tanh(x @ jnp.ones((features, H)))
            state = 0.9 * states[0] + row[:, :, None] * row[:, None, :]
            return row, [state]

        return jaxrnn.explain(step, ones((B, steps, features)), [ones((B, H, H))])

    def read_matrices(batch):
        def step(x, states):
            row = x @ jnp.ones((64, H))
            state = 0.9 * states[0] + row[:, :, None] * row[:, None, :]
            return jnp.einsum("bi,bij->bj", row, state) @ jnp.ones((H, H)), [state]

        return jaxrnn.explain(step, ones((batch, steps, 64)), [ones((batch, H, H))])

    def solved(batch):
        def step(x, states):
            matrix = jnp.eye(H) + x[:, :, None] * x[:, None, :]
            h = jnp.tanh(jnp.linalg.solve(matrix, states[0][..., None])[..., 0] @ jnp.ones((H, H)))
            return h, [h]

        return jaxrnn.explain(step, ones((batch, steps, H)), [ones((batch, H))])

    aside = "without one plain lax.scan runs"
    assert aside in report(32)
    assert aside not in report(31)
    assert [aside in report(2, steps=n) for n in (15, 16)] == [True, False]
    assert aside in report(128, units=1024, features=256)
    assert aside not in report(31, units=1024, features=256)
    assert aside not in report(128, method="sequential")
    assert (aside in layers(1), aside in layers(2)) == (False, True)
    assert [aside in report(8, features=n) for n in (1, 2, 63, 64)] == [False, True, True, False]
    assert [aside in report(1, 64, features=n) for n in (1, 2, 63, 64)] == [True, True, True, False]
    assert [aside in report(8, units=n) for n in (512, 1024)] == [False, True]
    assert [aside in report(32, units=n) for n in (512, 513)] == [True, False]
    assert [aside in report(32, units=n, features=128) for n in (64, 65)] == [True, False]
    assert [aside in report(n, units=256, features=100) for n in (81, 82)] == [True, False]
    halves = [(1, 127, 128), (2, 63, H), (2, 64, H), (1, 256, 256), (1, 512, 512)]
    expected = [False, True, False, False, True]
    assert [aside in concatenated(*sizes) for sizes in halves] == expected
    assert aside in matrices(64)
    fewest = 2**15 // H**2  # of which the state takes 128 KiB
    assert (aside in read_matrices(fewest - 1), aside in read_matrices(fewest)) == (False, True)
    assert (aside in solved(1), aside in solved(2)) == (True, False)
    assert aside in convolution(places=8)
    assert aside not in convolution(places=256)


@pytest.mark.parametrize("are_kernels", [True, False])
def test_few_numbers_drawn_in_a_loop_that_is_one_kernel(monkeypatch, are_kernels):
    """Of such a loop nothing is gained by passes until 2**12 numbers are drawn in all."""
    monkeypatch.setattr(_gains, "LOOPS_ARE_KERNELS", are_kernels)

    def stands_aside(steps):
        def body(carry, _):
            key, h = carry
            key, now = jax.random.split(key)
            return (key, h + jax.random.normal(now, h.shape)), h

        init = (jax.random.key(0), jnp.zeros((B, H)))
        report = jaxrnn.explain_scan(body, init, length=steps)
        return "without one plain lax.scan runs" in report

    few = 2**12 // (B * H)
    assert [stands_aside(n) for n in (few - 1, few)] == [are_kernels, False]
