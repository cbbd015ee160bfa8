"""A model directory as the harness sees it."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from flash_stu.errors import UserError
from flash_stu.evaluation.scoring import Counters, Window, score_windows, split_windows
from flash_stu.loading import default_dtype, load_model, load_model_tokenizer


class DirectoryLM(HFLM):
    """The harness's Hugging Face model with our scoring: bounded memory, shared inputs, rolling windows.

    Attributes:
        counters: work done so far; the owner may replace it.
        title: what the progress bar says.
    """

    def __init__(self, model, tokenizer, batch_size: int, progress: bool = True) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.counters = Counters()
        self.title = ""
        self._progress = progress and sys.stderr.isatty()

    @classmethod
    def load(cls, directory: Path, device: str, batch_size: int, progress: bool = True) -> "DirectoryLM":
        """Load a transformers model directory, float32 on the CPU and bfloat16 on a GPU.

        Raises:
            UserError: if the directory does not hold a complete model and a tokenizer that fits it.
        """
        tokenizer = load_model_tokenizer(directory)
        model = load_model(directory, device, default_dtype(torch.device(device)))
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary "
                f"{model.config.vocab_size}"
            )
        if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
            raise UserError(f"{directory}: the tokenizer has no end-of-text token to start a text with")
        return cls(model, tokenizer, batch_size, progress)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the progress bar is in _score

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score (strings, context ids, continuation ids): what the harness's `loglikelihood` ends in."""
        windows = []
        for _, context, continuation in requests:
            windows.append(split_windows(context, continuation, self.max_length))
            self.counters.truncated += len(context) + len(continuation) - 1 > self.max_length
        return self._score(windows)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of whole texts, each after one end-of-text (or beginning-of-text) token."""
        windows = [
            split_windows([self.prefix_token_id], self.tok_encode(request.args[0]), self.max_length)
            for request in requests
        ]
        return [log_likelihood for log_likelihood, _ in self._score(windows)]

    def _score(self, requests: Sequence[Sequence[Window]]) -> list[tuple[float, bool]]:
        """Score the windows of every request and put them together again."""
        self.counters.requests += len(requests)
        flat = [window for windows in requests for window in windows]
        with tqdm(total=len(flat), desc=self.title, leave=False, disable=not self._progress) as bar:
            scores = iter(score_windows(self.model, flat, self.batch_size, self.counters, bar.update))
        results = []
        for windows in requests:
            parts = [next(scores) for _ in windows]
            results.append((sum(value for value, _ in parts), all(greedy for _, greedy in parts)))
        return results
