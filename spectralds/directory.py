"""Distill a model on disk into a model directory: model, tokenizer, report and figure, all of it or nothing."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate

from flash_stu.devices import default_device
from flash_stu.errors import UserError
from flash_stu.files import check_output, replacing_directory
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.model.pretrained import FlashSTUPreTrainedModel
from flash_stu.training.model_source import find_source
from spectralds.comparison import compare_generation, compare_layers, compare_models
from spectralds.comparison_text import ComparisonText, comparison_text
from spectralds.curve import error_curve
from spectralds.distillation import model_filters, replace_stu_layers, require_stu_layers
from spectralds.fit import check_arguments, fit_lds
from spectralds.options import AUTO, DTYPES, TOLERANCE
from spectralds.original import Original
from spectralds.plots import plot_fit

_KIND = "distilled model"
REPORT, FIGURE = "distillation.json", "distillation.png"


def distill_directory(
    checkpoint: str | Path,
    output: str | Path,
    state_dim: int | str = 160,
    method: str = AUTO,
    tolerance: float = TOLERANCE,
    dtype: str | None = None,
    verify: float | None = None,
    text: str | None = None,
    say: Callable[[str], object] | None = None,
) -> dict:
    """Distill a model on disk, and on request measure what that changed.

    Args:
        checkpoint: a transformers model directory with STU layers, a training run with final/, or a training
            checkpoint RUN/checkpoints/step-N.
        output: directory to write: the distilled model and its tokenizer, distillation.json,
            distillation.png. An earlier distillation there, if nobody changed it, is replaced once the new one is
            complete; the same arguments write the same files.
        state_dim: see `fit_lds`, like method and tolerance.
        method: how the decays are chosen.
        tolerance: relative error that state_dim "auto" reaches.
        dtype: "float32" or "bfloat16", of the weights written; None: as they are. Decays and readouts of the LDS
            layers are float32 in any case.
        verify: compare the models, and call the distillation verified if relative_logit_difference (see
            `compare_models`) is at most this. None: only the fit is measured.
        text: what to compare the models on, see `comparison_text`.
        say: called with a line at the beginning of each part of the work.

    Returns:
        the content of distillation.json: source; state_dim, method and tolerance as asked for; dtype; fit (see
        `fit_lds`), eigenvalues (the positive half), curve (see `error_curve`); layers, comparison and generation
        (see `compare_layers`, `compare_models` with its text, `compare_generation`) and verified, which are None
        without `verify`. Also seconds, the time of each part, which is not written.

    Raises:
        UserError: for a checkpoint that is not a model or has no STU layers, a model without a tokenizer that is to be
            verified, an output that was not created by this program, and as `fit_lds` and `comparison_text`.
    """
    check_arguments(state_dim, method, tolerance=tolerance)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    directory, output = find_source(checkpoint, "distilled"), Path(output)
    check_output(output, _KIND)
    if directory.resolve().is_relative_to(output.resolve()):
        raise UserError(f"output {output} holds the model to distill, {directory}; choose another directory")
    say = say or (lambda _: None)
    seconds, lap = {}, _stopwatch()
    original = Original.load(directory)
    model = require_stu_layers(original.model)
    bank = model_filters(model)
    seconds["load"] = lap()
    sample = None if verify is None else _sample(original, text)
    seconds["text"] = lap()

    states = "the fewest states" if state_dim == AUTO else f"{state_dim} states"
    say(f"fitting {bank.num_filters} filters of length {bank.length} with {states}, method {method}")
    fit = fit_lds(bank, state_dim, method, dilation=model.config.stu_dilation, tolerance=tolerance)
    curve = error_curve(bank, torch.float32, model.config.stu_dilation)
    distilled = replace_stu_layers(model, fit)
    if dtype is not None:
        cast(torch.nn.Module, distilled).to(getattr(torch, dtype))
    seconds["distill"] = lap()
    del fit.report["seconds"]
    report = {
        "source": str(checkpoint),
        "state_dim": state_dim,
        "method": method,
        "tolerance": tolerance,
        "dtype": str(distilled.dtype).removeprefix("torch."),
        "fit": fit.report,
        "eigenvalues": fit.A[: len(fit.A) // 2].tolist(),
        "curve": curve,
        **dict.fromkeys(("layers", "comparison", "generation", "verified")),
    }
    with replacing_directory(output, _KIND) as temporary:
        distilled.save_pretrained(temporary)
        original.save_tokenizer(temporary)
        seconds["save"] = lap()
        if sample is not None and verify is not None:
            report |= _compare(model, distilled, sample, verify, say)
            seconds["compare"] = lap()
        plot_fit(bank, fit, curve, temporary / FIGURE)
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        seconds["plot"] = lap()
    return report | {"seconds": seconds}


def summary(report: dict) -> str:
    """Returns the few lines of a report that a user looks for first."""
    fit, layers, comparison = report["fit"], report["layers"], report["comparison"]
    rows = {
        "state dimension": f"{fit['state_dim']}, method {fit['method']}",
        "filters": f"mean squared error {fit['mse']:.2e}, largest error {fit['max_abs_error']:.2e}, "
        f"relative error in {fit['dtype']} {fit['run_time_error']:.1e}",
    }
    if comparison is not None:
        worst = max(entry["relative_difference"] for entry in layers["layers"])
        before, after = comparison["validation_loss_before"], comparison["validation_loss_after"]
        generation = report["generation"]
        rows |= {
            "layers": f"relative difference at most {worst:.2e} over {layers['length']} tokens, "
            f"{layers['recurrence_relative_difference']:.2e} token by token",
            "logits": f"relative difference {comparison['relative_logit_difference']:.2e}, largest "
            f"{comparison['max_abs_logit_difference']:.2e}, "
            f"same first choice at {comparison['argmax_agreement']:.2%} of tokens",
            "validation loss": f"{before:.6f} before, {after:.6f} after, in nats per token "
            f"({comparison['tokens']} tokens)",
            "generation": f"{generation['identical']} of {generation['prompts']} continuations of "
            f"{generation['tokens']} tokens are identical",
        }
    seconds = report["seconds"].items()
    rows["time"] = ", ".join(f"{value:.1f} s to {part}" for part, value in seconds if part != "text")
    return tabulate(rows.items(), tablefmt="plain", disable_numparse=True)


def _sample(original: Original, text: str | None) -> ComparisonText:
    """Returns the text to compare on, checked against the model."""
    if not isinstance(original.model, FlashSTUForCausalLM):
        raise UserError(f"verify compares texts and needs a language model, not a {type(original.model).__name__}")
    if not original.has_tokenizer:
        raise UserError(f"verify needs a tokenizer; there is no tokenizer beside the model in {original.directory}")
    config = original.model.config
    sample = comparison_text(original.load_tokenizer, original.run, text, config.max_position_embeddings)
    if int(sample.windows.max()) >= config.vocab_size:
        raise UserError(
            f"{original.directory}: the tokenizer's ids exceed the model's vocabulary of {config.vocab_size}"
        )
    return sample


def _compare(
    model: FlashSTUPreTrainedModel,
    distilled: FlashSTUPreTrainedModel,
    sample: ComparisonText,
    allowed: float,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Returns the report's entries on what distillation changed; both models are moved and become float32."""
    assert isinstance(model, FlashSTUForCausalLM) and isinstance(distilled, FlashSTUForCausalLM)  # see _sample
    for moved in (model, distilled):
        cast(torch.nn.Module, moved).to(default_device(), torch.float32)
    say(f"comparing the layers on {model.config.max_position_embeddings} tokens of noise")
    layers = compare_layers(model, distilled)
    say(f"comparing the models on {sample.windows[:, 1:].numel()} tokens: {sample.source}")
    comparison = {"text": sample.source, **compare_models(model, distilled, sample.windows)}
    return {
        "layers": layers,
        "comparison": comparison,
        "generation": compare_generation(model, distilled, sample.windows),
        "verified": comparison["relative_logit_difference"] <= allowed,
    }


def _stopwatch() -> Callable[[], float]:
    """Returns a function that returns the seconds since its last call."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        before, last = last, time.perf_counter()
        return last - before

    return lap
