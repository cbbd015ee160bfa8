"""Loss spikes are measured against the recent losses."""

import math
import random

import pytest

from flash_stu.training.metrics import SpikeDetector


def test_a_spike_is_far_above_the_recent_losses():
    generator = random.Random(0)
    detector = SpikeDetector()
    losses = [3 + generator.gauss(0, 0.1) for _ in range(150)]
    assert [detector.check(loss) for loss in losses] == [None] * 150
    mean = sum(losses[-100:]) / 100
    assert detector.check(3.4) is None
    assert detector.check(4.5) == pytest.approx(mean, abs=0.01)
    assert detector.check(math.nan) is None
    assert detector.check(2.0) is None  # good news is no spike


def test_a_detector_made_from_the_losses_so_far_goes_on_like_the_first():
    losses = [5 - 0.01 * step + 0.05 * (step % 7) for step in range(130)]
    first = SpikeDetector()
    for loss in losses:
        first.check(loss)
    second = SpikeDetector([*losses[:60], None, *losses[60:]])  # null: a step that was skipped
    assert second.check(9.0) == first.check(9.0) is not None


def test_the_first_steps_have_nothing_to_be_measured_against():
    detector = SpikeDetector()
    assert [detector.check(loss) for loss in [1.0] * 19 + [50.0]] == [None] * 20
