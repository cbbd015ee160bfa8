"""Progress of tokenising, in bytes of text."""

import sys

from flash_stu import progress


class Progress:
    """Counts documents, bytes of text and tokens, and reports them on stderr; a context manager.

    Args:
        title: what is going on.
        num_bytes: bytes of text to expect; None if unknown.
        enabled: whether anything is reported.
        done: bytes of text that an earlier process has done.
        note: printed after the title at the beginning.
    """

    def __init__(
        self, title: str, num_bytes: int | None, enabled: bool, done: int = 0, note: str | None = None
    ) -> None:
        self._progress = progress.Progress(title, "B", enabled=enabled)
        self._expected, self._done, self._note = num_bytes, done, note
        self._documents = self._bytes = self._tokens = 0

    def __enter__(self) -> "Progress":
        done = f"{self._done / 1e6:.1f} MB are done" if self._done else None
        notes = "; ".join(note for note in (done, self._note) if note)
        self._print(f": {notes}" if notes else "")
        self._progress.start(self._expected, self._done)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._progress.close()
        if kind is None:
            self._print(f": {self._documents:,} documents, {self._figures()}")

    def update(self, num_documents: int, num_bytes: int, num_tokens: int) -> None:
        """Count what was just done."""
        self._documents += num_documents
        self._bytes += num_bytes
        self._tokens += num_tokens
        on_terminal = self._progress.bar is not None
        self._progress.update(num_bytes, self._rate() if on_terminal else self._figures())

    def _rate(self) -> str:
        return f"{self._tokens / self._progress.seconds / 1e6:.2f}M tokens/s"

    def _figures(self) -> str:
        seconds = self._progress.seconds
        return (
            f"{self._bytes / 1e6:.1f} MB -> {self._tokens:,} tokens in {seconds:.1f} s "
            f"({self._bytes / seconds / 1e6:.1f} MB/s, {self._rate()})"
        )

    def _print(self, text: str) -> None:
        if self._progress.enabled:
            print(f"{self._progress.title}{text}", file=sys.stderr, flush=True)
