"""Online convolution: every schedule against the direct sum, however the tokens arrive, and what a step costs."""

import math

import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.ops import futurefill
from flash_stu.ops.futurefill import BACKENDS, ConvState, Taps


def oracle(x, taps, dilation, mixing=None):
    """The sum over lags in float64, as one matrix per filter."""
    length = x.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    used = (lag >= 0) & (lag % dilation == 0) & (lag // dilation < len(taps))
    matrices = taps.double()[(lag // dilation).clamp(0, len(taps) - 1)] * used[:, :, None]
    if mixing is None:
        return torch.einsum("tsd,bsd->btd", matrices, x.double())
    return torch.einsum("tsf,bsd,fde->bte", matrices, x.double(), mixing.double())


def draw(lags, mixed=False, length=None, dilation=1, batch=3, channels=5):
    torch.manual_seed(0)
    x = torch.randn(batch, length or lags * dilation, channels)
    if not mixed:
        return x, torch.randn(lags, channels) / 8, None
    return x, torch.randn(lags, 4) / 8, torch.randn(4, channels, channels)


def run(state, x, first=0):
    outputs = []
    for t in range(first, x.shape[1]):
        y, state = state.step(x[:, t])
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks from four tokens on, so that short sequences have many levels of them."""
    monkeypatch.setattr(futurefill, "_SMALLEST_BLOCK", 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("prompt", [0, 1, 5, 64])
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_after_a_prompt(small_blocks, backend, dilation, prompt, mixed):
    x, taps, mixing = draw(37 if dilation > 1 else 77, mixed, dilation=dilation)
    state = ConvState.empty(x, Taps(taps, mixing), dilation, backend).extend(x[:, :prompt])
    y, _ = run(state, x, prompt)
    torch.testing.assert_close(y.double(), oracle(x, taps, dilation, mixing)[:, prompt:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [1, 2, 3, 127, 129, 300])
def test_filter_lengths_at_the_real_block_size(backend, lags):
    x, taps, _ = draw(lags)
    y, _ = run(ConvState.empty(x, Taps(taps), 1, backend), x)
    torch.testing.assert_close(y.double(), oracle(x, taps, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_filter_keeps_seven_digits(backend):
    x, taps, _ = draw(1500, channels=2, batch=2)
    y, _ = run(ConvState.empty(x, Taps(taps), 1, backend), x)
    exact = oracle(x, taps, 1)
    assert (y - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixed", [False, True])
def test_prompts_in_the_middle_and_rows_picked(small_blocks, backend, mixed):
    x, taps, mixing = draw(50, mixed, dilation=2)
    exact, outputs = oracle(x, taps, 2, mixing), []
    state = ConvState.empty(x, Taps(taps, mixing), 2, backend).extend(x[:, :9])
    y, state = run(state, x[:, :24], 9)
    outputs.append(y)
    state = state.extend(x[:, 24:41])
    y, state = run(state, x[:, :60], 41)
    outputs.append(y)
    stepped = [*range(9, 24), *range(41, 60)]
    torch.testing.assert_close(torch.cat(outputs, 1).double(), exact[:, stepped], atol=1e-5, rtol=1e-5)

    rows = torch.tensor([2, 0, 0, 1])
    picked = state.select(rows)
    y, _ = run(picked, x[rows], 60)
    torch.testing.assert_close(y.double(), exact[rows, 60:], atol=1e-5, rtol=1e-5)
    y, _ = run(state, x, 60)  # the rows that were picked are copies
    torch.testing.assert_close(y.double(), exact[:, 60:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["futurefill", "futurefill_epoched"])
@pytest.mark.parametrize("count", [1, 7, 8, 33, 64])
def test_a_prompt_leaves_the_state_of_its_steps(small_blocks, backend, count):
    x, taps, _ = draw(70)
    at_once = ConvState.empty(x, Taps(taps), 1, backend).extend(x[:, :count])
    _, one_by_one = run(ConvState.empty(x, Taps(taps), 1, backend), x[:, :count])
    width = min(at_once.pending.shape[1], one_by_one.pending.shape[1])
    left, expected = (state.pending[:, count:width] for state in (at_once, one_by_one))
    torch.testing.assert_close(left, expected, atol=1e-6, rtol=1e-5)
    assert at_once.length == one_by_one.length == count


def test_half_precision_inputs_are_summed_in_float32():
    x, taps, _ = draw(300)
    x = x.bfloat16()
    for backend in BACKENDS:
        state = ConvState.empty(x, Taps(taps), 1, backend)
        y, state = run(state, x)
        assert state.inputs.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), oracle(x, taps, 1), atol=1e-5, rtol=1e-5)


class CountedTaps(Taps):
    """Taps that write down how much work was asked of them."""

    def __init__(self, taps):
        super().__init__(taps)
        self.direct, self.transformed = [], []

    def newest(self, inputs):
        self.direct.append(inputs.shape[1])
        return super().newest(inputs)

    def future(self, inputs, count):
        self.transformed.append(inputs.shape[1] + count)
        return super().future(inputs, count)


@pytest.mark.parametrize("length", [1000, 4000])
def test_work_grows_as_stated(length):
    x, taps, _ = draw(length, batch=1, channels=1)
    work = {}
    for backend in BACKENDS:
        counted = CountedTaps(taps)
        run(ConvState.empty(x, counted, 1, backend), x)
        work[backend] = counted
    assert max(work["naive"].direct) == length
    assert not work["naive"].transformed
    epoch = math.sqrt(length * math.log2(length))
    assert max(work["futurefill_epoched"].direct) == round(epoch)
    assert len(work["futurefill_epoched"].transformed) <= length / epoch
    assert max(work["futurefill"].direct) == 128
    assert sum(work["futurefill"].transformed) <= length * math.log2(length / 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_grow_by_doubling_up_to_the_filters(backend):
    x, taps, _ = draw(300, batch=1, channels=1)
    state, addresses = ConvState.empty(x, Taps(taps), 1, backend), set()
    for t in range(300):
        _, state = state.step(x[:, t])
        addresses.add(state.inputs.data_ptr())
    assert state.inputs.shape[1] == 300
    assert len(addresses) <= 10
    with pytest.raises(UserError, match="the sequence has 301 tokens; the spectral filters end at 300"):
        state.step(x[:, 0])
