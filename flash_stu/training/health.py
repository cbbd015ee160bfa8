"""The health of a run: steps that must not be taken, and losses that stand out."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from flash_stu.errors import UserError

_WINDOW = 100  # steps that say what a usual loss is
_FEWEST = 20
_SPIKE = 6.0  # standard deviations


class SkippedSteps:
    """Counts the optimizer steps left out because the loss or the gradient was not finite.

    A skipped step uses up its batch and its place in the schedule, and leaves weights and moments as they were.

    Args:
        limit: so many in a row are tolerated.
        total: skipped so far in the run.
        in_a_row: how many of them last.
    """

    def __init__(self, limit: int, total: int = 0, in_a_row: int = 0) -> None:
        self.limit, self.total, self.in_a_row = limit, total, in_a_row

    def count(self, loss: float, norm: float) -> bool:
        """Say whether a step is to be skipped, and count it if so."""
        skip = not (math.isfinite(loss) and math.isfinite(norm))
        self.total += skip
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    @property
    def too_many(self) -> bool:
        """Whether the run should end."""
        return self.in_a_row > self.limit

    def end_run(self, step: int, place: object) -> None:
        """Raise the error that ends the run.

        Args:
            step: the last one.
            place: where the weights are.
        """
        raise UserError(
            f"loss or gradient not finite in {self.in_a_row} steps in a row, the last of them step {step} "
            f"(train.max_skipped_steps is {self.limit}); {place} has the weights from before them. A lower "
            "learning rate or float32 helps; the same command tries the next batches"
        )


class SpikeDetector:
    """Notices losses far above those of the last 100 steps: more than 6 standard deviations.

    Args:
        losses: of the steps so far.
    """

    def __init__(self, losses: Iterable[float | None] = ()) -> None:
        self.recent = deque((loss for loss in losses if loss is not None), maxlen=_WINDOW)

    def check(self, loss: float) -> float | None:
        """Take in the next step's loss.

        Returns:
            the usual loss, the mean of the last 100, if this one is a spike.
        """
        if not math.isfinite(loss):
            return None
        usual = None
        if len(self.recent) >= _FEWEST:
            mean = statistics.fmean(self.recent)
            if loss > mean + _SPIKE * statistics.pstdev(self.recent, mean):
                usual = mean
        self.recent.append(loss)
        return usual
