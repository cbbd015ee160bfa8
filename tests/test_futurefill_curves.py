"""The FutureFill experiment: its counts against calls that were made, and its extrapolation against known costs."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from flash_stu.ops.futurefill import BACKENDS, ConvState, Taps

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "experiments" / "futurefill.py"))


class NotedTaps(Taps):
    """Taps that note how many multiply-adds each call needs: of sums per channel, of transforms by their size."""

    def __init__(self, taps):
        super().__init__(taps)
        self.direct, self.transforms, self.products = 0, [], 0

    def newest(self, inputs):
        self.direct += inputs.shape[1]
        return super().newest(inputs)

    def _spectrum(self, size):
        self.transforms += [size] * (2 if size in self._spectra else 3)  # of inputs, outputs, at first of the filters
        self.products += 4 * (size // 2 + 1)
        return super()._spectrum(size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("lags", "tokens"), [(700, 700), (1000, 517), (600, 1)])
def test_counts_are_those_of_the_calls(backend, dilation, lags, tokens):
    noted, x = NotedTaps(torch.randn(lags, 3)), torch.randn(1, tokens, 3)
    empty = state = ConvState.empty(x, noted, dilation, backend)
    for t in range(tokens):
        _, state = state.step(x[:, t])
    direct, blocks = SCRIPT["stu_work"](empty, tokens, width=3)
    assert direct == 3 * noted.direct
    made = sum(1.25 * n * math.log2(n) for n in noted.transforms) + noted.products
    assert blocks == pytest.approx(3 * made, rel=1e-12) and (blocks > 0) == bool(noted.transforms)


def test_seconds_follow_the_work_still_to_do():
    lengths = SCRIPT["powers_of_two"](2**16)
    assert lengths[0] == 32 and lengths[-1] == 2**16
    work = [7 * n * math.log2(n) for n in lengths]
    exact = [0.5 + 3e-8 * each for each in work]  # an overhead once, a rate
    assert SCRIPT["extrapolate"](exact[:4], work) == pytest.approx(exact, rel=1e-9)
    assert SCRIPT["extrapolate"](exact, work) == exact
    row = {"seconds": exact[:8], "work": [[each / 4, each * 3 / 4] for each in work]}
    assert SCRIPT["check"](row) == pytest.approx(1, rel=1e-9)
    row["seconds"][-1] *= 2
    assert SCRIPT["check"](row) == pytest.approx(1 / 2, rel=1e-9)
