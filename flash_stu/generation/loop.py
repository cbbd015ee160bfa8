"""The decoding loop: prefill once, then one token at a time from the model's cache.

model.generate() of transformers works too and has every strategy there is; this loop streams, its steps cost the same
however long the text is, and on a GPU they are one CUDA graph.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_stu.errors import UserError
from flash_stu.generation.sampling import Sampler, Sampling
from flash_stu.generation.static_step import StaticStep
from flash_stu.generation.streaming import TextStream
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.modeling import FlashSTUForCausalLM


@torch.inference_mode()
def generate_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    attention_mask: torch.Tensor | None = None,
    eos_token_id: int | None = None,
    compile: bool = False,
) -> Iterator[torch.Tensor]:
    """Generate tokens after a batch of prompts and yield each as soon as it is known.

    Args:
        model: a FlashSTUForCausalLM in eval mode.
        input_ids: prompts, (batch, length) with at least one token, shorter ones padded.
        max_new_tokens: tokens to generate at most.
        sampling: how to choose a token; by default from the model's own distribution.
        attention_mask: (batch, length), 0 at padding; None if there is none.
        eos_token_id: stop when every row has produced it; further tokens of a row that has are the same one.
        compile: see flash_stu.generation.static_step; for a model without STU layers.

    Yields:
        the next token of every row, (batch,), up to the last row's end. With an end token a GPU's come 16 at a time:
        looking whether all have ended means to wait for it.

    Raises:
        UserError: for another kind of model, an empty prompt, an invalid mask, prompt and new tokens that together are
            longer than an undistilled model's filters, or logits that are not finite after the prompt.
    """
    if not isinstance(model, FlashSTUForCausalLM):
        raise UserError(f"a {type(model).__name__} cannot be run here; allowed: FlashSTUForCausalLM")
    _check_prompt(model, input_ids, max_new_tokens)
    cache = FlashSTUCache(model.config.num_hidden_layers)
    logits = model(input_ids, attention_mask=attention_mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    choose = Sampler(sampling or Sampling(), input_ids, real, model.config.vocab_size)
    if not bool(logits.isfinite().all()):
        raise UserError(f"the model's logits are not finite in {model.dtype}; its weights are damaged, or too large")
    step = None
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    held, over = [], []  # tokens not yielded yet, and whether all rows have ended with each
    for number in range(1, max_new_tokens + 1):
        token = choose(logits)
        if eos_token_id is None:
            yield token
        else:
            token = torch.where(ended, eos_token_id, token)
            ended = ended | (token == eos_token_id)
            held.append(token)
            over.append(ended.all())
            if number == max_new_tokens or len(held) == _tokens_between_looks(model.device):
                running = torch.stack(over).tolist().count(False)
                yield from held[: running + 1]
                if running < len(held):
                    return
                held, over = [], []
        if number == max_new_tokens:
            return
        step = step or _step_function(model, cache, compile)
        logits = step(token[:, None])


def _tokens_between_looks(device: torch.device) -> int:
    return 1 if device.type == "cpu" else 16


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    compile: bool = False,
) -> Iterator[list[str]]:
    """Continue a batch of prompts and yield the text as it comes.

    Args:
        model: a FlashSTUForCausalLM in eval mode.
        tokenizer: the model's; its end-of-text token ends a row.
        prompts: one per row, of any lengths.
        max_new_tokens: tokens to generate at most per row.
        sampling: how to choose a token.
        stop: strings that end a row; the row's text stops before them.
        compile: see flash_stu.generation.static_step; for a model without STU layers.

    Yields:
        for every token generated, the text that each row gained; often empty, all of it joined is the row's text.

    Raises:
        UserError: for an empty prompt or stop string, and as generate_tokens.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=False).input_ids
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise UserError(f"prompt {prompt!r} is empty; at least one token is needed")
    rows = [TextStream(tokenizer, ids, stop) for ids in encoded]
    input_ids, mask = pad_left(encoded, model.device)
    eos = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
    tokens = generate_tokens(model, input_ids, max_new_tokens, sampling, mask, eos, compile)
    for number, token in enumerate(tokens, start=1):
        pieces = [row.push(value) for row, value in zip(rows, token.tolist(), strict=True)]
        if number == max_new_tokens:
            pieces = [piece + row.finish() for piece, row in zip(pieces, rows, strict=True)]
        yield pieces
        if all(row.finished for row in rows):
            return


def pad_left(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Put token ids of different lengths into one batch: ids and mask (batch, longest), 0 at padding in both."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _check_prompt(model: FlashSTUForCausalLM, input_ids: torch.Tensor, max_new_tokens: int) -> None:
    if input_ids.shape[1] == 0:
        raise UserError("the prompt is empty; at least one token is needed")
    total = input_ids.shape[1] + max_new_tokens
    if model.config.uses_stu and total > model.config.max_position_embeddings:
        raise UserError(
            f"prompt and new tokens are {total} together; this model's spectral filters end at "
            f"{model.config.max_position_embeddings}; distill the model to go further"
        )


def _step_function(
    model: FlashSTUForCausalLM, cache: FlashSTUCache, compile: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that turns the newest tokens (batch, 1) into logits (batch, vocab_size)."""
    if compile or (model.device.type == "cuda" and not model.config.uses_stu):
        return StaticStep(model, cache, compile)
    return lambda tokens: model(tokens, past_key_values=cache).logits[:, -1]
