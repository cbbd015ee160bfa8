"""From tokens to text as it is generated: nothing is shown that a later token could still change."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from flash_stu.errors import UserError


class TextStream:
    """The text of one row, token by token.

    A token that is not yet whole characters waits for the next; so does text that could become a stop string. The text
    ends before the first stop string, wherever token boundaries fall in it, or before the end-of-text token.

    Args:
        tokenizer: a tokenizer of the tokenizers library.
        prompt: token ids that the text continues; some tokenizers write a word differently where a text begins.
        stop: strings that end the text.

    Attributes:
        finished: the text has ended; further tokens change nothing.

    Raises:
        UserError: for an empty stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise UserError("a stop string is empty; allowed: one character or more")
        self.finished = False
        self._tokenizer: Any = tokenizer
        self._stream = DecodeStream(list(prompt), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._undecoded: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Take in a token and return the text that is certain now, often one word, sometimes nothing."""
        if self.finished:
            return ""
        if token == self._tokenizer.eos_token_id:
            return self.finish()
        self._undecoded.append(token)
        text = self._stream.step(self._tokenizer.backend_tokenizer, token)
        if not text:
            return ""
        self._undecoded.clear()
        return self._release(text)

    def finish(self) -> str:
        """End the text and return what was held back."""
        if self.finished:
            return ""
        text = self._release(self._tokenizer.decode(self._undecoded, skip_special_tokens=True))
        if not self.finished:
            text, self._held = text + self._held, ""
        self.finished = True
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [text.find(stop) for stop in self._stop if stop in text]
        if found:
            self.finished = True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
