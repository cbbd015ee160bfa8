"""How far tokenising has come: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

_LINE_EVERY = 30  # seconds between plain lines


class Progress:
    """Counts documents, bytes of text and tokens, and reports them on stderr.

    Args:
        title: what is going on.
        num_bytes: bytes of text to expect; None if unknown.
        enabled: say nothing if False.
        done: bytes of text that an earlier process has done.
        note: printed after the title at the beginning.
    """

    def __init__(self, title: str, num_bytes: int | None, enabled: bool, done: int = 0, note: str | None = None):
        self._title = title
        self._expected = num_bytes
        self._enabled = enabled
        self._done = done
        self._note = note
        self._documents = self._bytes = self._tokens = 0

    def __enter__(self) -> "Progress":
        if self._enabled:
            done = f"{self._done / 1e6:.1f} MB are done" if self._done else None
            notes = "; ".join(note for note in (done, self._note) if note)
            self._print(f"{self._title}: {notes}" if notes else self._title)
        on_terminal = self._enabled and sys.stderr.isatty()
        self._bar = tqdm(
            total=self._expected,
            initial=self._done,
            desc=self._title,
            unit="B",
            unit_scale=True,
            disable=not on_terminal,
            leave=False,
        )
        self._plain = self._enabled and not on_terminal
        self._start = self._last_line = time.monotonic()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.close()
        if self._enabled and kind is None:
            self._print(f"{self._title}: {self._documents:,} documents, {self._figures()}")

    def update(self, num_documents: int, num_bytes: int, num_tokens: int) -> None:
        """Count what was just done."""
        self._documents += num_documents
        self._bytes += num_bytes
        self._tokens += num_tokens
        self._bar.set_postfix_str(f"{self._tokens / self._seconds() / 1e6:.2f}M tokens/s", refresh=False)
        self._bar.update(num_bytes)
        if self._plain and time.monotonic() - self._last_line >= _LINE_EVERY:
            self._last_line = time.monotonic()
            done = f"{min((self._done + self._bytes) / self._expected, 1):.0%}, " if self._expected else ""
            self._print(f"{self._title}: {done}{self._figures()}")

    def _figures(self) -> str:
        seconds = self._seconds()
        return (
            f"{self._bytes / 1e6:.1f} MB -> {self._tokens:,} tokens in {seconds:.1f} s "
            f"({self._bytes / seconds / 1e6:.1f} MB/s, {self._tokens / seconds / 1e6:.2f}M tokens/s)"
        )

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
