"""Measure a distilled model against its original: logits and loss on real text, outputs layer by layer."""

import torch
from torch.nn import functional as F
from tqdm import tqdm

from flash_stu.layers import LDS, STU
from flash_stu.layers.context import SequenceContext
from flash_stu.model import FlashSTUForCausalLM

_LOGITS = 2**24  # held at once per model


@torch.inference_mode()
def compare_models(original: FlashSTUForCausalLM, distilled: FlashSTUForCausalLM, windows: torch.Tensor) -> dict:
    """Compare two models' predictions on the same tokens.

    Args:
        original, distilled: on one device, in evaluation mode, the same dtype.
        windows: token ids (windows, length + 1); each token but a window's first is predicted.

    Returns:
        tokens, windows, window_length; max_abs_logit_difference and mean_abs_logit_difference;
        validation_loss_before and validation_loss_after, nats per token; argmax_agreement, the fraction of
        tokens for which both think the same next token likeliest.
    """
    device = original.device
    step = max(1, _LOGITS // original.config.vocab_size)
    largest = total = agree = 0.0
    losses = {"before": 0.0, "after": 0.0}
    for window in tqdm(windows, desc="comparing", unit="window", leave=False, disable=None):
        ids, targets = window[None, :-1].to(device), window[1:].to(device)
        hidden = [model.model(ids).last_hidden_state[0] for model in (original, distilled)]
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            before, after = (
                original.lm_head(hidden[0][part]).float(),
                distilled.lm_head(hidden[1][part]).float(),
            )
            difference = (before - after).abs()
            largest = max(largest, float(difference.max()))
            total += float(difference.sum(dtype=torch.float64))
            agree += float((before.argmax(dim=1) == after.argmax(dim=1)).sum())
            for key, logits in (("before", before), ("after", after)):
                losses[key] += float(F.cross_entropy(logits, targets[part], reduction="none").sum(dtype=torch.float64))
    count, length = windows.shape[0] * (windows.shape[1] - 1), windows.shape[1] - 1
    return {
        "tokens": count,
        "windows": len(windows),
        "window_length": length,
        "max_abs_logit_difference": largest,
        "mean_abs_logit_difference": total / (count * original.config.vocab_size),
        "validation_loss_before": losses["before"] / count,
        "validation_loss_after": losses["after"] / count,
        "argmax_agreement": agree / count,
    }


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
    context = SequenceContext(filters=original.model.filters())
    layers, recurrence = [], None
    pairs = zip(original.model.layers, distilled.model.layers, strict=True)
    for index, (before, after) in enumerate(pairs):
        if isinstance(before.mixer, STU):
            expected = before.mixer(x, context)
            layers.append({"layer": index, "relative_difference": _relative(after.mixer(x, context), expected)})
            if recurrence is None:
                recurrence = _relative(_run_token_by_token(after.mixer, x), expected)
    return {"length": length, "layers": layers, "recurrence_relative_difference": recurrence}


def _run_token_by_token(layer: LDS, x: torch.Tensor) -> torch.Tensor:
    context = SequenceContext()
    output, state = layer.prefill(x[:, :1], context)
    outputs = [output]
    for t in tqdm(range(1, x.shape[1]), desc="running a layer token by token", leave=False, disable=None):
        output, state = layer.step(x[:, t : t + 1], context, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))
