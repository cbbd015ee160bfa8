"""Recall: which models learn to copy, reverse, look up and follow, by the kind of their STU layers.

    python scripts/experiments/recall.py [--quick | --full] [--output results/experiments]

Small models learn one synthetic task each from fresh random sequences; the loss is that of the answers alone, and the
accuracy is theirs on sequences not seen before. Pure models have STU layers only, in hybrids attention follows. A
training ends early once all answers of a check are right. Two trainings run beside each other, on one thread each.

Source: tasks after Arora et al. 2023 (arXiv 2312.04927; MQAR), Olsson et al. 2022 (2209.11895; induction) and Gu and
Dao 2023 (2312.00752; selective copying); input taps: Agarwal et al. 2023 (2312.06837), eq. 4.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.results import environment, experiment_parser, finish, page, panels, spread, table

BLANK, MARK, VOCABULARY, IGNORED = 0, 1, 64, -100
FIRST, MIDDLE = 2, 33  # of the symbols, and of the values that MQAR looks up
Sequences = tuple[torch.Tensor, torch.Tensor]  # inputs and answers, (batch, length); IGNORED where none is wanted

ATTENTION = "attention alone"
STU_KINDS = {
    "shared": {"stu_branches": "shared"},
    "separate": {"stu_branches": "separate"},
    "shared + 3 taps": {"stu_branches": "shared", "stu_input_taps": 3},
}
MODELS = {
    **{f"pure, {kind}": {**STU_KINDS[kind], "layer_types": ["linear_attention"] * 2} for kind in STU_KINDS},
    **{f"hybrid, {kind}": STU_KINDS[kind] for kind in STU_KINDS},
    ATTENTION: {"layer_types": ["sliding_attention"] * 2},
}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_filters": 24,
    "max_position_embeddings": 32,
    "sliding_window": 32,
}
RATE, WARMUP, BATCH, CHECK = 4e-3, 50, 32, 50  # the learning rate's peak, its first steps; steps between checks
SIZES = {
    "quick": {"seeds": 1, "steps": 2, "tests": 16, "processes": 1},
    "default": {"seeds": 3, "steps": 1200, "tests": 512, "processes": 2},
    "full": {"seeds": 5, "steps": 10_000, "tests": 4096, "processes": 2},
}


def copy(count: int, batch: int, generator: torch.Generator) -> Sequences:
    """Symbols, then blanks: every blank's answer is the symbol `count` positions before it."""
    symbols = torch.randint(FIRST, VOCABULARY, (batch, count), generator=generator)
    return torch.cat([symbols, torch.full_like(symbols, BLANK)], 1), _answers_last(symbols, count)


def reverse_copy(count: int, batch: int, generator: torch.Generator) -> Sequences:
    """As `copy`, the last symbol first: lags 1, 3, 5 …"""
    inputs, answers = copy(count, batch, generator)
    return inputs, torch.cat([answers[:, :count], inputs[:, :count].flip(1)], 1)


def mqar(pairs: int, batch: int, generator: torch.Generator) -> Sequences:
    """Pairs of key and value, then the keys in another order among as many blanks: a key's answer is its value."""
    keys = _distinct(pairs, FIRST, MIDDLE, batch, generator)
    values = torch.randint(MIDDLE, VOCABULARY, (batch, pairs), generator=generator)
    order = _distinct(pairs, 0, pairs, batch, generator)
    places = _distinct(pairs, 0, 2 * pairs, batch, generator)
    asked = torch.full((batch, 2 * pairs), BLANK).scatter(1, places, keys.gather(1, order))
    answers = torch.full_like(asked, IGNORED).scatter(1, places, values.gather(1, order))
    return torch.cat([torch.stack([keys, values], 2).flatten(1), asked], 1), _answers_last(answers, 2 * pairs)


def induction(count: int, batch: int, generator: torch.Generator) -> Sequences:
    """Different symbols, then all but the last in another order: a symbol's answer is what followed it before."""
    symbols = _distinct(count, FIRST, VOCABULARY, batch, generator)
    order = _distinct(count - 1, 0, count - 1, batch, generator)
    return torch.cat([symbols, symbols.gather(1, order)], 1), _answers_last(symbols.gather(1, order + 1), count)


def selective_copy(count: int, batch: int, generator: torch.Generator) -> Sequences:
    """Symbols at random places among as many blanks, then marks: their answers are the symbols in order."""
    symbols = torch.randint(FIRST, VOCABULARY, (batch, count), generator=generator)
    places = _distinct(count, 0, 2 * count, batch, generator).sort(1).values
    shown = torch.full((batch, 2 * count), BLANK).scatter(1, places, symbols)
    return torch.cat([shown, torch.full_like(symbols, MARK)], 1), _answers_last(symbols, 2 * count)


def _distinct(count: int, low: int, high: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers from low to high - 1, all of a row different, (batch, count)."""
    return torch.rand(batch, high - low, generator=generator).argsort(1)[:, :count] + low


def _answers_last(answers: torch.Tensor, before: int) -> torch.Tensor:
    return torch.nn.functional.pad(answers, (before, 0), value=IGNORED)


TASKS: dict[str, tuple[Callable[[int, int, torch.Generator], Sequences], int]] = {
    "copy, lag 11": (copy, 11),
    "copy, lag 12": (copy, 12),
    "reverse copy": (reverse_copy, 12),
    "MQAR, 8 pairs": (mqar, 8),
    "induction": (induction, 16),
    "selective copy": (selective_copy, 8),
}


def train(task: str, model_name: str, seed: int, steps: int, tests: int) -> dict:
    """Train one model on one task.

    Returns:
        its accuracy on `tests` fresh sequences, the steps taken, parameters and seconds.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    make, count = TASKS[task]
    model = FlashSTUForCausalLM(FlashSTUConfig(**SHAPE | MODELS[model_name]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    examples, checks = (torch.Generator().manual_seed(2 * seed + which) for which in (0, 1))
    start, step = time.perf_counter(), 0
    for step in range(1, steps + 1):
        inputs, answers = make(count, BATCH, examples)
        model(input_ids=inputs, shift_labels=answers, skip_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % CHECK == 0 and accuracy(model, *make(count, 128, checks)) == 1:
            break
    found = accuracy(model, *make(count, tests, checks))
    parameters = sum(p.numel() for p in model.parameters())
    row = {"task": task, "model": model_name, "seed": seed, "accuracy": found, "steps": step}
    return row | {"parameters": parameters, "seconds": time.perf_counter() - start}


@torch.no_grad()
def accuracy(model: FlashSTUForCausalLM, inputs: torch.Tensor, answers: torch.Tensor) -> float:
    """Returns the share of the answers that the model finds the likeliest."""
    wanted = answers != IGNORED
    return (model(input_ids=inputs, use_cache=False).logits.argmax(-1) == answers)[wanted].float().mean().item()


def main() -> None:
    args = experiment_parser(__doc__, "recall").parse_args()
    size = SIZES[args.size]
    torch.set_num_threads(1)
    runs = [
        (task, model, seed, size["steps"], size["tests"])
        for task, model, seed in itertools.product(TASKS, MODELS, range(size["seeds"]))
    ]
    if size["processes"] == 1:
        rows = list(itertools.starmap(train, runs))
    else:
        with ProcessPoolExecutor(size["processes"], get_context("spawn")) as pool:
            rows = []
            for row in pool.map(train, *zip(*runs, strict=True)):
                print("{task}, {model}, seed {seed}: {accuracy:.3f} after {steps} steps".format(**row), flush=True)
                rows.append(row)
    results = {"environment": environment(torch.device("cpu")), "size": args.size, **size, "rows": rows}
    finish("recall", results, render, plot, args.output)


def samples(results: dict, task: str, model: str, key: str = "accuracy") -> list[float]:
    """Returns one number per seed."""
    return [row[key] for row in results["rows"] if row["task"] == task and row["model"] == model]


def render(results: dict) -> str:
    """One table: accuracy of every model on every task."""
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    tasks = list(dict.fromkeys(row["task"] for row in results["rows"]))
    rows = []
    for model in models:
        parameters = next(row["parameters"] for row in results["rows"] if row["model"] == model)
        rows.append([model, *(spread(samples(results, task, model), 1) for task in tasks), f"{parameters:,}"])
    what = (
        f"Accuracy on {results['tests']:,} fresh sequences; seeds: {results['seeds']}. At most {results['steps']:,} "
        f"steps of {BATCH} sequences, fewer once all answers of a check were right."
    )
    return page(results, what, table(["model", *tasks, "parameters"], rows))


def plot(results: dict, path: Path) -> None:
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    tasks = list(dict.fromkeys(row["task"] for row in results["rows"]))
    figure, (axes,) = panels(width=2 + 1.3 * len(tasks), height=1 + 0.5 * len(models))
    medians = [[statistics.median(samples(results, task, model)) for task in tasks] for model in models]
    axes.imshow(medians, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (i, model), (j, task) in itertools.product(enumerate(models), enumerate(tasks)):
        found = samples(results, task, model)
        text = f"{medians[i][j]:.2f}\n{min(found):.2f}-{max(found):.2f}"
        color = "white" if medians[i][j] > 0.6 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(models)), models)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("answers found: median and range over the seeds", loc="left", fontsize=10)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
