"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_EVERY = 30.0  # seconds


class Progress:
    """Reports on stderr how much of some work is done; closed at the end of a `with` block.

    Args:
        title: what the work is called.
        unit: what is counted, such as "tok", "B" or "step".
        unit_scale: whether a bar shortens counts, 12.3M for 12,300,000.
        enabled: whether anything is shown.
        line_every: seconds between lines where stderr is not a terminal; infinity for no lines.
        on_update: called at every update.

    Attributes:
        total: units of the whole work; None if unknown.
        done: units done so far, those of an earlier process included.
        bar: tqdm's, while one is shown.
    """

    def __init__(
        self,
        title: str = "",
        unit: str = "it",
        unit_scale: bool = True,
        enabled: bool = True,
        line_every: float = LINE_EVERY,
        on_update: Callable[[], object] = lambda: None,
    ) -> None:
        self.title, self.unit, self.unit_scale = title, unit, unit_scale
        self.enabled, self.line_every, self.on_update = enabled, line_every, on_update
        self.total: int | None = None
        self.done = self._start = 0
        self.bar: tqdm | None = None
        self._began = self._said = time.monotonic()

    def start(self, total: int | None, done: int = 0) -> None:
        """Begin.

        Args:
            total: units of the whole work; None if unknown.
            done: units done before.
        """
        self.total, self.done, self._start = total, done, done
        self._began = self._said = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=self.title,
                unit=self.unit,
                unit_scale=self.unit_scale,
                leave=False,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    @property
    def seconds(self) -> float:
        """Time since `start`; more than 0."""
        return max(time.monotonic() - self._began, 1e-9)

    def update(self, amount: int, figures: str = "") -> None:
        """Count what was just done.

        Args:
            amount: units.
            figures: shown with it, such as a rate.
        """
        self.done += amount
        self.on_update()
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(amount)
        elif self.enabled and time.monotonic() - self._said >= self.line_every:
            self._said = time.monotonic()
            state = ", ".join(part for part in (self._share(), figures, self._time_left()) if part)
            print(f"{self.title}: {state}", file=sys.stderr, flush=True)

    def over(self, items: Collection[T]) -> Iterator[T]:
        """Yield items, each of them a unit of the work."""
        with self:
            self.start(len(items))
            for item in items:
                yield item
                self.update(1)

    def say(self, text: str) -> None:
        """Print a line on stdout, above the bar if there is one."""
        if self.bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _share(self) -> str:
        return f"{min(self.done / self.total, 1):.0%}" if self.total else ""

    def _time_left(self) -> str:
        if self.total is None or not self._start < self.done < self.total:
            return ""
        left = self.seconds / (self.done - self._start) * (self.total - self.done)
        return f"about {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
