"""Measure a distilled model against its original: logits and loss on real text, outputs layer by layer."""

import math
from typing import Any, cast

import torch
from torch import nn

from flash_stu.model.layers import LDS, STU
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.progress import Progress

_LOGITS = 2**24  # held at once per model


@torch.inference_mode()
def compare_models(original: FlashSTUForCausalLM, distilled: FlashSTUForCausalLM, windows: torch.Tensor) -> dict:
    """Compare two models' predictions on the same tokens.

    Args:
        original, distilled: on one device, in evaluation mode, the same dtype.
        windows: token ids (windows, length + 1); each token but a window's first is predicted.

    Returns:
        tokens, windows, window_length; max_abs_logit_difference and mean_abs_logit_difference;
        relative_logit_difference (Frobenius, to the logits less their mean over the vocabulary);
        validation_loss_before and validation_loss_after, nats per token; argmax_agreement, the fraction of
        tokens for which the likeliest next token is the same.
    """
    device = original.device
    step = max(1, _LOGITS // original.config.vocab_size)
    rows = min(step, windows.shape[1] - 1)
    heads = [_Head(model.lm_head, rows) for model in (original, distilled)]
    space = torch.empty(rows, original.config.vocab_size, device=device)
    largest = total = agree = error = size = 0.0
    losses = {"before": 0.0, "after": 0.0}
    for window in Progress("comparing", "window", unit_scale=False, line_every=math.inf).over(windows):
        ids, targets = window[None, :-1].to(device), window[1:].to(device)
        hidden = [model.model(ids, use_cache=False).last_hidden_state[0] for model in (original, distilled)]
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            before, after = (head(states[part]) for head, states in zip(heads, hidden, strict=True))
            work = space[: len(before)]
            agree += float((before.argmax(dim=1) == after.argmax(dim=1)).sum())
            for key, logits in (("before", before), ("after", after)):
                losses[key] += _loss(logits, targets[part], work)
            # a constant added to all logits changes no prediction
            size += _sum(torch.sub(before, before.mean(dim=1, keepdim=True), out=work).square_())
            difference = torch.sub(before, after, out=work).abs_()
            largest = max(largest, float(difference.max()))
            total += _sum(difference)
            error += _sum(difference.square_())
    count, length = windows.shape[0] * (windows.shape[1] - 1), windows.shape[1] - 1
    return {
        "tokens": count,
        "windows": len(windows),
        "window_length": length,
        "max_abs_logit_difference": largest,
        "mean_abs_logit_difference": total / (count * original.config.vocab_size),
        "relative_logit_difference": math.sqrt(error / size) if size > 0 else 0.0,
        "validation_loss_before": losses["before"] / count,
        "validation_loss_after": losses["after"] / count,
        "argmax_agreement": agree / count,
    }


class _Head:
    """Applies a head to as many rows as it has memory for, which every call writes anew.

    Fresh memory for so many logits would come from the system every time, which takes as long as to calculate them.
    """

    def __init__(self, head: nn.Linear, rows: int) -> None:
        self.head = head
        self.product = head.weight.new_empty(rows, head.out_features)
        self.logits = self.product.float()  # the same memory if this is their dtype

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits (rows, vocab_size) in float32 of hidden (rows, hidden_size); overwritten by the next call."""
        product, logits = self.product[: len(hidden)], self.logits[: len(hidden)]
        torch.mm(hidden, self.head.weight.T, out=product)
        if self.head.bias is not None:
            product += self.head.bias
        return logits if self.head.weight.dtype == torch.float32 else logits.copy_(product)


def _loss(logits: torch.Tensor, targets: torch.Tensor, work: torch.Tensor) -> float:
    """Returns the cross entropy summed over rows; work has the shape of logits and is overwritten."""
    largest = logits.amax(dim=1, keepdim=True)
    partition = torch.sub(logits, largest, out=work).exp_().sum(dim=1).double().log()
    return float((partition - (logits.gather(1, targets[:, None]) - largest)[:, 0]).sum())


def _sum(rows: torch.Tensor) -> float:
    """Returns the sum; each row's is taken in float32, for summing in float64 would copy all of it."""
    return float(rows.sum(dim=1).double().sum())


@torch.inference_mode()
def compare_layers(original: FlashSTUForCausalLM, distilled: FlashSTUForCausalLM) -> dict:
    """Compare each STU layer with its LDS layer on white noise as long as the filters.

    Args:
        original, distilled: on one device, in evaluation mode; run in the dtype they have.

    Returns:
        length, the noise's, in tokens; layers, for each pair its index in the model and relative_difference
        (Frobenius) of the outputs over the whole sequence; recurrence_relative_difference, the same for the
        first pair with the LDS layer run token by token, as in generation.
    """
    length, size = original.config.max_position_embeddings, original.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, size, generator=generator).to(original.device, original.dtype)
    filters = original.model.filters
    context = SequenceContext(None if filters is None else filters.phi)
    layers, recurrence = [], None
    pairs = zip(original.model.layers, distilled.model.layers, strict=True)
    for index, (before, after) in enumerate(pairs):
        if isinstance(before.mixer, STU) and isinstance(after.mixer, LDS):
            expected = before.mixer(x, context)
            layers.append({"layer": index, "relative_difference": _relative(after.mixer(x, context), expected)})
            if recurrence is None:
                recurrence = _relative(_run_token_by_token(after.mixer, x), expected)
    return {"length": length, "layers": layers, "recurrence_relative_difference": recurrence}


@torch.inference_mode()
def compare_generation(
    original: FlashSTUForCausalLM, distilled: FlashSTUForCausalLM, windows: torch.Tensor, prompts: int = 4
) -> dict:
    """Continue pieces of real text with both models, always with the likeliest token.

    Args:
        original, distilled: on one device, in evaluation mode, the same dtype.
        windows: token ids (windows, length); prompts are spread over them, each at most 64 tokens and half a window.
        prompts: how many, at most.

    Returns:
        prompts, prompt_length, tokens (generated per prompt, at most 32), identical (prompts after which every token
        is the same) and agreement (the fraction of tokens before the first that differs).
    """
    length = max(1, min(64, windows.shape[1] // 2))
    count = max(1, min(32, original.config.max_position_embeddings - length))
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    ids = pieces[:: max(1, len(pieces) // prompts)][:prompts].to(original.device)
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    before, after = (
        cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, length:]
        for model in (original, distilled)
    )
    same = (before == after).long().cumprod(dim=1)
    return {
        "prompts": len(ids),
        "prompt_length": length,
        "tokens": count,
        "identical": int(same[:, -1].sum()),
        "agreement": float(same.double().mean()),
    }


def _run_token_by_token(layer: LDS, x: torch.Tensor) -> torch.Tensor:
    context = SequenceContext()
    output, state = layer.prefill(x[:, :1], context)
    outputs = [output]
    progress = Progress("running a layer token by token", unit_scale=False, line_every=math.inf)
    for t in progress.over(range(1, x.shape[1])):
        output, state = layer.step(x[:, t : t + 1], context, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))
