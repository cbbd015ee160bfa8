"""Distill a model directory into another: model, tokenizer, report and figure, all of it or nothing."""

import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from flash_stu.errors import UserError
from flash_stu.loading import default_device, load_model, resolve_model_dir
from spectralds.distill import model_filters, replace_stu_layers
from spectralds.fit import check_arguments, fit_lds
from spectralds.plots import plot_fit
from spectralds.report import compare_layers, compare_models
from spectralds.text import comparison_text

REPORT, FIGURE = "distillation.json", "distillation.png"
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    "chat_template*",
)


def distill_directory(
    checkpoint: str | Path,
    output: str | Path,
    state_dim: int = 160,
    method: str = "quadrature",
    text: str | None = None,
    say=lambda line: None,
) -> dict:
    """Distill the model of a run or model directory and measure what that changed.

    Args:
        checkpoint: a transformers model directory with STU layers, or a training run with final/.
        output: directory to write: the distilled model and its tokenizer, distillation.json,
            distillation.png. An earlier distillation there is replaced once the new one is complete.
        state_dim, method: see `distill`.
        text: what to compare the models on, see `comparison_text`.
        say: told what is being done, a line at a time.

    Returns:
        the content of distillation.json: source, state_dim, method, fit (see `fit_lds`), layers (see
        `compare_layers`), comparison (see `compare_models`, with its text; None without a tokenizer), and
        the seconds that each part took.

    Raises:
        UserError: for a checkpoint that is none or has no STU layers, an output that is something else's,
            and as `fit_lds` and `comparison_text`.
    """
    check_arguments(state_dim, method)
    directory, output = resolve_model_dir(checkpoint), Path(output)
    _check_output(output, directory)
    seconds, lap = {}, _stopwatch()
    model = load_model(directory, dtype="auto")
    bank = model_filters(model)
    seconds["load"] = lap()
    sample = comparison_text(directory, text, model.config.max_position_embeddings)
    if sample is not None and int(sample.windows.max()) >= model.config.vocab_size:
        raise UserError(f"{directory}: the tokenizer's ids exceed the model's vocabulary of {model.config.vocab_size}")
    seconds["text"] = lap()

    say(f"fitting {bank.num_filters} filters of length {bank.length} with {state_dim} states, {method}")
    fit = fit_lds(bank, state_dim, method, dilation=model.config.stu_dilation)
    distilled = replace_stu_layers(model, fit)
    seconds["distill"] = lap()
    with _replacing(output) as temporary:
        distilled.save_pretrained(temporary)
        for name in {path.name for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)}:
            shutil.copy2(directory / name, temporary / name)
        seconds["save"] = lap()

        report = {"source": str(checkpoint), "state_dim": state_dim, "method": method, "fit": fit.report}
        model, distilled = (m.float().to(default_device()) for m in (model, distilled))
        say(f"comparing the layers on {bank.length} tokens of noise")
        report["layers"] = compare_layers(model, distilled)
        if sample is None:
            say("no tokenizer beside the model: no comparison on text")
            report["comparison"] = None
        else:
            say(f"comparing the models on {sample.windows[:, 1:].numel()} tokens: {sample.source}")
            report["comparison"] = {"text": sample.source, **compare_models(model, distilled, sample.windows)}
        seconds["compare"] = lap()
        plot_fit(bank, fit, temporary / FIGURE)
        report["seconds"] = {**seconds, "plot": lap()}
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def summary(report: dict) -> str:
    """The few lines of a report that a user looks for first."""
    fit, layers, comparison = report["fit"], report["layers"], report["comparison"]
    worst = max(entry["relative_difference"] for entry in layers["layers"])
    lines = [
        f"filters          mean squared error {fit['mse']:.2e}, largest error {fit['max_abs_error']:.2e}",
        f"layers           relative difference at most {worst:.2e} over {layers['length']} tokens, "
        f"{layers['recurrence_relative_difference']:.2e} token by token",
    ]
    if comparison is not None:
        before, after = comparison["validation_loss_before"], comparison["validation_loss_after"]
        lines += [
            f"logits           largest difference {comparison['max_abs_logit_difference']:.2e}, "
            f"mean {comparison['mean_abs_logit_difference']:.2e}, "
            f"same first choice at {comparison['argmax_agreement']:.2%} of tokens",
            f"validation loss  {before:.6f} before, {after:.6f} after, in nats per token "
            f"({comparison['tokens']} tokens)",
        ]
    parts = (f"{value:.1f} s to {part}" for part, value in report["seconds"].items() if part != "text")
    lines.append(f"time             {', '.join(parts)}")
    return "\n".join(lines)


def _check_output(output: Path, source: Path) -> None:
    """Refuse to write over anything but an earlier distillation, and over what is to be distilled."""
    free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not free and not (output / REPORT).is_file():
        raise UserError(f"--output {output} exists and is not a distillation; choose another directory")
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--output {output} holds the model to distill, {source}; choose another directory")


def _stopwatch():
    """A function that returns the seconds since its last call."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        before, last = last, time.perf_counter()
        return last - before

    return lap


@contextmanager
def _replacing(output: Path):
    """A temporary directory beside `output`: it takes its place if the block ends well, or is removed."""
    temporary = output.parent / f".{output.name}.tmp-{os.getpid()}"
    previous = temporary.with_suffix(".previous")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            os.rename(output, previous)
        os.rename(temporary, output)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
