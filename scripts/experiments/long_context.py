"""Long context: byte models trained at 32,768 and read at 131,072: an STU, the same distilled, and attention.

    python scripts/experiments/long_context.py [--quick | --full] [--runs runs/long_context] [--output DIR]

The models learn from sequences of 1,024 bytes first, then of 32,768. Documents fill a sequence each, half of them of
either kind. In one kind every byte is drawn from a distribution of the document's own, so that every byte read tells
more about it; how well that can be done is known: Bayes' rule. In the other, text of the embedded corpus states a pass
key and then asks for it again and again, at gaps of up to half the sequence. The models are read on new documents of
the first kind, and with the tasks passkey_N of evaluate.py. All layers of attention have the same window. Runs that are
finished are not trained again.
"""

import json
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from flash_stu.arguments import output_directory
from flash_stu.data import embedded_corpus
from flash_stu.devices import default_device
from flash_stu.errors import run_cli
from flash_stu.evaluation.definitions import TaskSpec
from flash_stu.evaluation.harness import load_tasks, run_task
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.evaluation.long_context import CHOICES, DEPTHS, NEEDLE, QUESTION
from flash_stu.evaluation.patches import quiet
from flash_stu.evaluation.scoring import Score
from flash_stu.evaluation.text import by_position, score_text
from flash_stu.figures import save_figure
from flash_stu.files import write_text
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from flash_stu.training.trial import run_trial
from spectralds import distill

CONFIG = "configs/quickstart.yaml"
SYMBOLS = "0123456789abcdef"  # fewer than the models are wide
CONCENTRATION = 0.5  # of the Dirichlet distribution that a document's distribution of symbols is drawn from
BATCH = 8192  # bytes in a step, at least a sequence
STATES = 160  # of the distilled model's layers
BAYES = "Bayes' rule"
MODELS: dict[str, dict] = {"STU": {}, "attention": {"layer_types": ["sliding_attention"] * 2}}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "sliding_window": 32,
    "num_filters": 16,
}
SIZES: dict[str, dict] = {  # stages: (bytes in a sequence, steps, peak learning rate)
    "quick": {
        **{"stages": [(128, 2, 1e-2), (256, 1, 3e-3)], "read": 1024, "documents": 2},
        **{"lengths": [256, 1024], "limit": 6},
    },
    "default": {
        **{"stages": [(1024, 360, 1e-2), (32_768, 30, 2e-3)], "read": 131_072, "documents": 4},
        **{"lengths": [512, 2048, 8192, 32_768, 131_072], "limit": 12},
    },
    "full": {
        **{"stages": [(1024, 8000, 1e-2), (32_768, 800, 2e-3)], "read": 131_072, "documents": 16},
        **{"lengths": [512, 2048, 8192, 32_768, 131_072], "limit": 60},
    },
}


def symbols_document(length: int, rng: np.random.Generator) -> str:
    """Returns so many symbols, each drawn from one distribution, which is drawn first."""
    shares = rng.dirichlet([CONCENTRATION] * len(SYMBOLS))
    return "".join(rng.choice(list(SYMBOLS), length, p=shares))


def passkey_document(length: int, rng: random.Random, text: str) -> str:
    """Returns so many bytes of text that state one pass key and ask for it after gaps, log-uniform in their length."""
    key = f" {rng.randrange(10_000, 100_000)}"
    mention, parts, total = NEEDLE.format(key=key), [], 0
    while total < length:
        gap = round(math.exp(rng.uniform(0, math.log(length // 2))))
        start = rng.randrange(len(text) - gap)
        parts += [text[start : start + gap], mention]
        total += gap + len(mention)
        mention = f"{QUESTION}{key}.\n"
    return "".join(parts)[:length]


def write_documents(path: Path, documents: Sequence[str]) -> Path:
    """Write a dataset of documents."""
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def bayes_losses(document: str) -> np.ndarray:
    """Returns the loss in nats of every symbol under the predictive distribution given those before it, (length,).

    Source: the Dirichlet-multinomial distribution: (count + a) / (symbols before + a * alphabet).
    """
    codes = np.array([SYMBOLS.index(symbol) for symbol in document])
    seen = np.cumsum(np.eye(len(SYMBOLS), dtype=np.int32)[codes], axis=0)[np.arange(len(codes)), codes] - 1
    return -np.log((seen + CONCENTRATION) / (np.arange(len(codes)) + CONCENTRATION * len(SYMBOLS)))


def write_data(folder: Path, length: int, count: int) -> Path:
    """Write `count` documents of a sequence each, half of either kind, and a few for validation."""
    text = "\n\n".join(text for text in embedded_corpus()["train"] if text.isascii())
    own, keys = np.random.default_rng(0), random.Random(0)
    for name, pairs in {"train": count // 2 + 1, "validation": 2}.items():
        kinds = ((symbols_document(length - 1, own), passkey_document(length - 1, keys, text)) for _ in range(pairs))
        write_documents(folder / f"{name}.jsonl", [document for pair in kinds for document in pair])
    return folder


def train(runs: Path, stages: list[tuple[int, int, float]], read: int) -> dict[str, list[dict]]:
    """Train every model on the same documents, stage by stage; returns what `run_trial` does of each stage."""
    found: dict[str, list[dict]] = {name: [] for name in MODELS}
    for number, (length, steps, rate) in enumerate(stages):
        sequences = max(1, BATCH // length)
        data = write_data(runs / f"data-{length}-{steps}", length, sequences * steps)
        for name, changes in MODELS.items():
            run = runs / f"{name}-{length}-{steps}".lower()
            print(f"\n{run}", flush=True)
            settings = {f"model.{key}": value for key, value in (SHAPE | changes).items()} | {
                "model.max_position_embeddings": read,
                "data.dataset": str(data),
                "data.cache_dir": str(runs / "cache"),
                "train.sequence_length": length,
                "train.global_batch_size": sequences * length,
                "train.micro_batch_size": min(sequences, max(1, 8192 // length)),
                "train.validation_tokens": 4 * length,
                "train.initial_weights": found[name][-1]["directory"] if number else None,
                "optimizer.learning_rate": rate,
                "optimizer.warmup_steps": steps // 10,
            }
            row = run_trial(CONFIG, run, steps, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
            found[name].append(row | {"length": length, "steps": steps, "directory": str(run / "final")})
    return found


def measure(runs: Path, size: dict[str, Any]) -> dict[str, Any]:
    """Train and distill the models, and read long documents with them."""
    trained = train(runs, size["stages"], size["read"])
    generator = np.random.default_rng(1)
    documents = [symbols_document(size["read"] - 1, generator) for _ in range(size["documents"])]
    path = write_documents(runs / f"held-out-{size['read']}-{size['documents']}.jsonl", documents)
    tasks = load_tasks([TaskSpec(name=f"passkey_{length}") for length in size["lengths"]])  # in bytes: their tokens

    with quiet(logging.ERROR):
        models = {name: EvaluatedLM.load(Path(own[-1]["directory"]), default_device()) for name, own in trained.items()}
        student = EvaluatedLM(distill(models["STU"].model, STATES), models["STU"].tokenizer)
    rows, positions, depths = [], [], []
    for name, lm in {"STU": models["STU"], "STU, distilled": student, "attention": models["attention"]}.items():
        about = [
            {key: row[key] for key in ("length", "steps", "validation", "seconds")} for row in trained.get(name, [])
        ]
        rows.append({"model": name, "parameters": lm.model.num_parameters(), "stages": about})
        for bucket in score_text(lm, path, length=size["read"])["positions"]:
            positions.append({"model": name, **bucket})
        for task in tasks:
            result = run_task(lm, task, size["limit"])
            depths += [{"model": name, "length": task.length, **entry} for entry in result["depths"]]
            print(f"{name}, {task.spec.name}: {result['value']:.2f} ({result['seconds']:.0f} s)", flush=True)
    scores = [Score(-bayes_losses(text).astype(np.float32), False) for text in documents]
    for bucket in by_position(scores, size["read"]):
        positions.append({"model": BAYES, **bucket})
    return {"rows": rows, "positions": positions, "depths": depths}


def main() -> None:
    parser = experiment_parser(__doc__, "long_context")
    parser.add_argument(
        "--runs", type=output_directory, default="runs/long_context", metavar="DIR", help="where the runs are"
    )
    args = parser.parse_args()
    size = SIZES[args.size]
    torch.set_num_threads(1)
    results = {"environment": environment(default_device()), "size": args.size, **size}
    if args.size == "quick":
        with TemporaryDirectory() as folder:
            results |= measure(Path(folder), size)
    else:
        results |= measure(Path(args.runs), size)
    finish("long_context", results, render, plot, args.output)


def of_model(rows: list[dict], model: str) -> list[dict]:
    """Returns the rows of a model."""
    return [row for row in rows if row["model"] == model]


def render(results: dict) -> str:
    """Two tables: loss by position, and pass keys by length."""
    names = [row["model"] for row in results["rows"]]
    lines = [*names, BAYES]
    shown = of_model(results["positions"], BAYES)[::-4][::-1]
    header = ["bytes before", *lines]
    losses = []
    for bucket in shown:
        own = [next(b for b in of_model(results["positions"], line) if b["first"] == bucket["first"]) for line in lines]
        losses.append([f"{bucket['first']:,} to {bucket['last']:,}", *(f"{b['loss']:.3f}" for b in own)])
    keys = []
    for length in results["lengths"]:
        found = [[d for d in of_model(results["depths"], name) if d["length"] == length] for name in names]
        cells = [f"{_mean(own, 'acc'):.0f} / {_mean(own, 'exact_match'):.0f}" for own in found]
        cells += [f"{100 * own[-1]['acc']:.0f} / {100 * own[-1]['exact_match']:.0f}" for own in found]
        keys.append([f"{length:,}", *cells])
    header_of_stages = ["model", "parameters"]
    trained = []
    for row in results["rows"]:
        stages = [cell for stage in row["stages"] for cell in (f"{stage['validation']:.3f}", f"{stage['seconds']:.0f}")]
        trained += [[row["model"], f"{row['parameters']:,}", *stages]] if stages else []
    for length, _, _ in results["stages"]:
        header_of_stages += [f"validation at {length:,}", "seconds"]
    steps = ", then ".join(f"{steps} steps at {length:,}" for length, steps, _ in results["stages"])
    what = (
        f"{steps} bytes, at least {BATCH:,} bytes a step; read at {results['read']:,}. Width {SHAPE['hidden_size']}, "
        f"two layers, window {SHAPE['sliding_window']}, {SHAPE['num_filters']} filters, seed 0. Losses: nats per byte."
    )
    return page(
        results,
        what,
        table(header_of_stages, trained),
        f"Loss on {results['documents']} new documents, nats per byte.",
        table(header, losses),
        f"Pass keys, accuracy of {CHOICES} answers / exact match in percent, {results['limit']} items per length: mean "
        "over the depths, and at depth 100 %.",
        table(["bytes", *names, *(f"{name}, 100 %" for name in names)], keys),
    )


def _mean(rows: list[dict], key: str) -> float:
    return 100 * sum(row[key] * row["items"] for row in rows) / sum(row["items"] for row in rows)


def plot(results: dict, path: Path) -> None:
    names = [row["model"] for row in results["rows"]]
    figure, (losses, *maps) = panels(1 + len(names), 4.4, 4.2)
    for index, name in enumerate([*names, BAYES]):
        buckets = of_model(results["positions"], name)
        style = {"color": "black", "linestyle": ":"} if name == BAYES else {"color": f"C{index}"}
        style |= {"linestyle": "--", "linewidth": 2} if "distilled" in name else {}
        losses.plot(
            [(b["first"] * b["last"]) ** 0.5 for b in buckets], [b["loss"] for b in buckets], label=name, **style
        )
    losses.axvline(results["stages"][-1][0], color="0.5", linestyle="--", linewidth=1)
    losses.set_xscale("log", base=2)
    losses.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    losses.set(xlabel="bytes before; dashed: the length trained on", ylabel="loss, nats per byte")
    losses.set_title("documents with a distribution of their own", loc="left", fontsize=10)
    losses.legend(frameon=False, fontsize=8)
    for axes, name in zip(maps, names, strict=True):
        found = {(d["length"], d["depth"]): d["acc"] for d in of_model(results["depths"], name)}
        cells = [[found.get((length, depth), math.nan) for length in results["lengths"]] for depth in DEPTHS]
        axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (i, row), j in ((row, j) for row in enumerate(cells) for j in range(len(results["lengths"]))):
            color = "black" if row[j] > 0.6 else "white"
            axes.text(j, i, f"{100 * row[j]:.0f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(results["lengths"])), [f"{n:,}" for n in results["lengths"]], fontsize=8)
        axes.set_yticks(range(len(DEPTHS)), [f"{depth} %" for depth in DEPTHS], fontsize=8)
        axes.grid(visible=False)
        axes.set(xlabel="bytes", ylabel="depth of the pass key")
        axes.set_title(f"{name}: pass keys, accuracy in %", loc="left", fontsize=10)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
