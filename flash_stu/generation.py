"""The decoding loop: prefill once, then one token at a time from the model's cache.

model.generate() of transformers works too and has every strategy there is; this loop has the plain ones, streams,
and adds nothing to the cost of a step.
"""

from collections.abc import Iterator

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flash_stu.cache import FlashSTUCache
from flash_stu.errors import UserError
from flash_stu.model import FlashSTUForCausalLM


@torch.inference_mode()
def generate_tokens(
    model: FlashSTUForCausalLM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
) -> Iterator[torch.Tensor]:
    """Generate tokens after a prompt and yield each as soon as it is known.

    Args:
        model: in eval mode, with STU or LDS layers.
        input_ids: prompts of one length, (batch, length) with at least one token.
        max_new_tokens: tokens to generate at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens whose probabilities add up to p.
        eos_token_id: stop when every row has produced it; a row that has goes on repeating it.
        seed: of the sampling; None leaves torch's global generator in charge.

    Yields:
        the next token of every row, (batch,).

    Raises:
        UserError: for an empty prompt, a setting outside its range, or when prompt and new tokens together are longer
            than an undistilled model's filters.
    """
    if input_ids.shape[1] == 0:
        raise UserError("the prompt is empty; at least one token is needed")
    total = input_ids.shape[1] + max_new_tokens
    if model.config.uses_stu and total > model.config.max_position_embeddings:
        raise UserError(
            f"prompt and new tokens are {total} together; this model's spectral filters end at "
            f"{model.config.max_position_embeddings}; distill the model to go further"
        )
    choose = _sampler(temperature, top_k, top_p, seed, input_ids.device)
    cache = FlashSTUCache(model.config.num_hidden_layers)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    tokens = input_ids
    for _ in range(max_new_tokens):
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        token = choose(logits.float())
        if eos_token_id is not None:
            token = torch.where(ended, eos_token_id, token)
            ended = ended | (token == eos_token_id)
        yield token
        if eos_token_id is not None and bool(ended.all()):
            return
        tokens = token[:, None]


def _sampler(temperature, top_k, top_p, seed, device):
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; allowed: 0 (greedy) or positive")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k is {top_k}; allowed: 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p is {top_p}; allowed: above 0, up to 1")
    if temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    warp = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k is not None:
        warp.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warp.append(TopPLogitsWarper(top_p))
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(warp(None, logits).softmax(dim=-1), 1, generator=generator)[:, 0]

    return sample
