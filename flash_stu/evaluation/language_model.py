"""A model directory, or a model in memory, as the harness sees it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_stu.devices import default_dtype
from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.evaluation.resume import Journal
from flash_stu.evaluation.scoring import Budget, Counters, Score, Window, score_windows, split_windows
from flash_stu.generation.loop import pad_left
from flash_stu.model.layers import SlidingWindowAttention
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.ops import backends
from flash_stu.progress import Progress
from flash_stu.training.model_source import load_source

_HFLM: Any = huggingface.HFLM  # its registration hides its type from type checkers
_UNLIMITED = 2**31  # what the harness is told where there is no longest input
_GENERATED_AT_ONCE = 32  # sequences, where no batch size is set


class EvaluatedLM(_HFLM):
    """The harness's Hugging Face model with our scoring: bounded memory, shared beginnings, several processes.

    Attributes:
        counters: work done so far; the owner may replace it.
        progress: shown while it scores; the owner may replace it.
        journal: where scores are noted as they come; None by default.
        trained_length: in tokens, as the model's config says it.
        longest: the longest input the model can take; None if its state takes any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        world: World | None = None,
    ) -> None:
        """Wrap a causal language model in eval mode; without a batch_size a budget of tokens decides."""
        ours = isinstance(model, FlashSTUForCausalLM)
        self.trained_length = resolve_max_length(model.config, tokenizer)
        self.longest = None if ours and not model.config.uses_stu else self.trained_length
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size or _GENERATED_AT_ONCE,
            max_length=_UNLIMITED if self.longest is None else self.longest,
        )
        self.budget = Budget.automatic(model.device, batch_size)
        self.world = world or World()
        self.counters = Counters()
        self.progress = Progress(enabled=False)
        self.journal: Journal | None = None
        if ours and model.device.type == "cuda":
            _avoid_compilation(model)

    @classmethod
    def load(
        cls, directory: Path, device: str | torch.device, batch_size: int | None = None, world: World | None = None
    ) -> "EvaluatedLM":
        """Load a model directory or a checkpoint, float32 on the CPU and bfloat16 on a GPU.

        Raises:
            UserError: if the directory does not hold a complete model and a tokenizer that fits it.
        """
        model, tokenizer = load_source(directory, device, default_dtype(torch.device(device)))
        if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
            raise UserError(f"{directory}: the tokenizer has no end-of-text token to start a text with")
        return cls(model, tokenizer, batch_size, world)

    def loglikelihood(self, requests: list[Instance], **_options: Any) -> list[tuple[float, bool]]:
        """Score (context, continuation): log-likelihood in nats of the continuation, and whether it is greedy."""
        return super().loglikelihood(requests, disable_tqdm=True)  # ours is the only progress shown

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        """Score (strings, context ids, continuation ids): what the harness's `loglikelihood` calls."""
        windows = []
        for _, context, continuation in requests:
            windows.append(split_windows(context, continuation, self.longest))
            self._count_length(len(context) + len(continuation) - 1)
        return self._score(windows)

    def loglikelihood_rolling(self, requests: list[Instance], **_options: Any) -> list[float]:
        """Log-likelihood in nats of whole texts, each after one end-of-text (or beginning-of-text) token."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        for text in texts:  # what is too long comes in stretches here, nothing is cut
            self.counters.beyond_trained_length += self.longest is None and len(text) > self.trained_length
        windows = [split_windows([self.prefix_token_id], text, self.longest) for text in texts]
        return [log_likelihood for log_likelihood, _ in self._score(windows)]

    def generate_until(self, requests: list[Instance], **_options: Any) -> list[str]:
        """Generate as the harness does, each process a part.

        Raises:
            UserError: for a number of new tokens that leaves no room for a prompt.
        """
        counters = self.counters
        counters.requests += len(requests)
        for request in requests:
            prompt, options = request.args  # pyright: ignore[reportAssignmentType]  (typed as (), set to two)
            self._count_length(len(self._prompt(prompt)) + self._new_tokens(options))
        mine = requests[self.world.rank :: self.world.size]
        self._generated = 0
        own = super().generate_until(mine, disable_tqdm=True) if mine else []
        parts = self.world.gather((own, self._generated))
        texts = [""] * len(requests)
        for rank, (part, tokens) in enumerate(parts):
            texts[rank :: self.world.size] = part
            counters.forward_tokens += tokens
            counters.forward_tokens_unshared += tokens
        return texts

    def tok_batch_encode(
        self, strings: Sequence[str], left_truncate_len: int | None = None, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts to generate from; each is cut from the left, and padded on the left."""
        return pad_left([self._prompt(text)[-(left_truncate_len or 0) :] for text in strings])

    def _prompt(self, text: str) -> list[int]:
        """Token ids of a prompt; one of no tokens is the prefix token, as an empty context is in `loglikelihood`."""
        return self.tok_encode(text) or [self.prefix_token_id]

    def _new_tokens(self, options: dict[str, Any]) -> int:
        new = normalize_gen_kwargs(options, self.max_gen_toks).get("max_gen_toks")
        most = _UNLIMITED if self.longest is None else self.longest - 1
        if not isinstance(new, int) or not 1 <= new <= most:
            raise UserError(
                f"max_gen_toks is {new!r}; this model takes {most + 1} tokens, one of them the prompt's; allowed: 1 to "
                f"{most} (in the task's generation_kwargs)"
            )
        return new

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Generate for one batch and count the tokens that are run: the prompts, and all new ones but the last."""
        found = super()._model_generate(context, max_length, stop, **options)
        self._generated += int(options["attention_mask"].sum()) + len(found) * (found.shape[1] - context.shape[1] - 1)
        return found

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Returns the scores of windows, cut in any way."""
        own = self.budget, self.counters, self.progress, self.world, self.journal
        return score_windows(self.model, windows, *own)

    def _count_length(self, length: int) -> None:
        """Note an input that is longer than what the model was trained on."""
        if self.longest is None:
            self.counters.beyond_trained_length += length > self.trained_length
        elif length > self.longest:
            self.counters.truncated += 1
            self.counters.truncated_tokens += length - self.longest

    def _score(self, requests: Sequence[Sequence[Window]]) -> list[tuple[float, bool]]:
        """Score the windows of every request and put them together again."""
        self.counters.requests += len(requests)
        scores = iter(self.score([window for windows in requests for window in windows]))
        results = []
        for windows in requests:
            parts = [next(scores) for _ in windows]
            results.append((sum(part.log_likelihood for part in parts), all(part.greedy for part in parts)))
        return results


def _avoid_compilation(model: FlashSTUForCausalLM) -> None:
    """Keep attention from flex_attention, which is compiled anew for every length of a batch."""
    if backends.why_not("flash_attn") is None and model.dtype != torch.float32:
        return
    layers = (module for module in model.modules() if isinstance(module, SlidingWindowAttention))
    if any(layer.backend in ("auto", "flex_attention") for layer in layers):
        model.set_attn_implementation("eager")
