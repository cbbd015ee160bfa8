"""How far a long task is and how long it will still take: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

_SILENCE = 30.0  # seconds between lines


class Progress:
    """Counts tokens of one task.

    Args:
        title: what the work is called.
        enabled: show anything at all.
        on_advance: called at every step of the way.
    """

    def __init__(self, title: str = "", enabled: bool = False, on_advance: Callable[[], object] = lambda: None) -> None:
        self.title, self.enabled, self.on_advance = title, enabled, on_advance
        self._bar = None

    def start(self, tokens: int) -> None:
        """Begin with so many tokens to run."""
        self._total, self._done = tokens, 0
        self._began = self._said = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=tokens, desc=self.title, unit="tok", unit_scale=True, leave=False, dynamic_ncols=True
            )

    def advance(self, tokens: int) -> None:
        """So many more are done."""
        self._done += tokens
        self.on_advance()
        if self._bar is not None:
            self._bar.update(tokens)
            return
        now = time.monotonic()
        if self.enabled and now - self._said >= _SILENCE and 0 < self._done < self._total:
            self._said = now
            left = (now - self._began) / self._done * (self._total - self._done)
            print(
                f"{self.title}: {self._done / self._total:.0%}, about {_duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """The work is done."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
