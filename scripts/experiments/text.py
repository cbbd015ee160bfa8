"""Which model to train: the kinds of STU layers and attention alone on real text, with AdamW and with Muon.

    python scripts/experiments/text.py [--quick | --full] [--steps N] [--runs runs/text] [--output DIR]
        [--name NAME] [--bpe TOKENS] [section.key=value ...]

The quickstart's settings, text and order of the data. Three hybrids, whose STU layers alternate with attention, and
attention alone have the same number of parameters (the width of the MLP makes up for the mixers'), see the same tokens,
and are trained from the same seeds. Settings as train.py takes them replace the config's for all: another text or
tokenizer, for example, with --bpe one that is trained on the text. With --name the runs are in runs/text-NAME, and the
results are text-NAME.json. Runs that are finished are not trained again.
"""

import itertools
import json
import re
import statistics
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from bpe import bpe_tokenizer

from flash_stu import FlashSTUConfig
from flash_stu.arguments import integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.results import environment, experiment_parser, finish, page, panels, spread, table
from flash_stu.training import load_config
from flash_stu.training.trial import STRETCH, run_trial

CONFIG = "configs/quickstart.yaml"
FORMS: dict[str, dict] = {
    "hybrid, shared": {"stu_branches": "shared"},
    "hybrid, separate": {"stu_branches": "separate"},
    "hybrid, shared + 3 taps": {"stu_branches": "shared", "stu_input_taps": 3},
    "attention alone": {},  # and its layer types
}
RATES = {"adamw": 3e-3, "muon": 1e-2}  # the best of scripts/bench/optimizers.py, found with shared branches
SIZES = {"quick": {"seeds": 1, "steps": 2}, "default": {"seeds": 2, "steps": 250}, "full": {"seeds": 2, "steps": 800}}
TINY = [
    "model.num_hidden_layers=2",
    *("model.hidden_size=16", "model.num_attention_heads=2", "model.max_position_embeddings=64", "model.num_filters=4"),
    *("train.sequence_length=32", "train.global_batch_size=64", "train.micro_batch_size=2"),
    *("train.validation_tokens=64", "optimizer.warmup_steps=0", "data.max_documents=5"),
]


def forms(settings: list[str]) -> dict[str, dict]:
    """Returns the model settings and "parameters" of every form, as many as those of the first but for a rounding."""
    base = load_config(CONFIG, settings).model
    found, wanted = {}, None
    for name, changes in FORMS.items():
        model = FlashSTUConfig.from_user(base | changes)
        if name == "attention alone":
            changes = {"layer_types": ["sliding_attention"] * model.num_hidden_layers}
            model = FlashSTUConfig.from_user(base | changes)
        wanted = wanted or parameters(model)
        unit = 3 * model.hidden_size * model.num_hidden_layers  # parameters per unit of the MLPs' inner width
        model.intermediate_size += round((wanted - parameters(model)) / unit)
        changes = changes | {"intermediate_size": model.intermediate_size}
        found[name] = {"settings": changes, "parameters": parameters(model)}
    return found


def parameters(model: FlashSTUConfig) -> int:
    """Returns the number of trained weights: all but the spectral filters."""
    return model.count_weights() - model.uses_stu * model.max_position_embeddings * model.num_filters


def compare(runs: Path, seeds: int, steps: int, settings: list[str]) -> list[dict]:
    """Train every form with every optimizer from every seed."""
    rows = []
    for (name, form), optimizer, seed in itertools.product(forms(settings).items(), RATES, range(seeds)):
        own = {f"model.{key}": value for key, value in form["settings"].items()} | {
            "seed": seed,
            "optimizer.name": optimizer,
            "optimizer.learning_rate": RATES[optimizer],
        }
        run = runs / "-".join([*re.findall(r"\w+", name), optimizer, str(seed), str(steps)])
        print(f"\n{run}", flush=True)
        words = [f"{key}={json.dumps(value)}" for key, value in own.items()]
        row = {"model": name, "optimizer": optimizer, "seed": seed, "parameters": form["parameters"]}
        rows.append(row | run_trial(CONFIG, run, steps, [*settings, *words]))
    return rows


def main() -> None:
    args = parse()
    name = f"text-{args.name}" if args.name else "text"
    size = SIZES[args.size] | ({"steps": args.steps} if args.steps else {})
    results = {"environment": environment(default_device()), "size": args.size, **size, "bpe": args.bpe}
    results["settings"] = [shown(setting) for setting in args.settings]
    with TemporaryDirectory() as folder:
        quick = args.size == "quick"
        runs = Path(folder if quick else args.runs or f"runs/{name}")
        settings = [f"data.cache_dir={folder}/cache", *TINY, *args.settings] if quick else args.settings
        if args.bpe:
            tokenizer = bpe_tokenizer(runs / f"bpe-{args.bpe}", load_config(CONFIG, settings).data, args.bpe)
            settings = [*settings, f"data.tokenizer={tokenizer}", f"model.vocab_size={args.bpe}"]
        results["rows"] = compare(runs, **size, settings=settings)
    finish(name, results, render, plot, args.output)


def parse() -> Namespace:
    """Returns the command line."""
    parser = experiment_parser(__doc__, "text")
    add = parser.add_argument
    add("--steps", type=integer(), metavar="N", help="of a training, in place of the size's")
    add("--runs", type=output_directory, metavar="DIR", help="where the run directories are (default: runs/text)")
    add("--name", type=word, metavar="NAME", help="of another text's runs and results, text-NAME")
    add("--bpe", type=integer(320, 2**17), metavar="TOKENS", help="train a tokenizer of so many tokens on the text")
    add("settings", nargs="*", metavar="section.key=value", help="settings that replace the config's")
    return parser.parse_intermixed_args()


def word(value: str) -> str:
    """Returns a name of letters, digits and dashes."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", value):
        raise ArgumentTypeError(f"{value!r}: allowed are up to 40 letters, digits and dashes")
    return value


def shown(setting: str) -> str:
    """Returns a setting as the page shows it, the path of a dataset by its last part."""
    key, _, value = setting.partition("=")
    return f"{key}={Path(value).name}" if key == "data.dataset" else setting


def groups(results: dict) -> dict[tuple[str, str], list[dict]]:
    """Returns the rows of each model and optimizer, one per seed."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in results["rows"]:
        found.setdefault((row["model"], row["optimizer"]), []).append(row)
    return found


def render(results: dict) -> str:
    """One table: loss, parameters and time of every model and optimizer."""
    tokens = results["rows"][0]["tokens"]
    tokenizer = f"a BPE of {results['bpe']:,} tokens trained on the text; " if results.get("bpe") else ""
    what = (
        f"{results['steps']} steps ({tokens:,} tokens) of {' '.join([CONFIG, *results['settings']])}; {tokenizer}"
        f"seeds: {results['seeds']}; peak learning rates {', '.join(f'{r:g} ({n})' for n, r in RATES.items())}."
    )
    cells = []
    for (model, optimizer), rows in groups(results).items():
        losses, seconds = ([row[key] for row in rows] for key in ("validation", "seconds"))
        best = f"{statistics.median(losses):.4f}"
        reach = f"{best} ({min(losses):.4f}-{max(losses):.4f})" if len(losses) > 1 else best
        cells.append([f"{model}, {optimizer}", reach, f"{rows[0]['parameters']:,}", spread(seconds, 1)])
    return page(results, what, table(["model, optimizer", "validation, nats per byte", "parameters", "seconds"], cells))


def plot(results: dict, path: Path) -> None:
    figure, (ends, curves) = panels(2, 6)
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    for (model, optimizer), rows in groups(results).items():
        place, losses = models.index(model), [row["validation"] for row in rows]
        marker, style = ("o", "-") if optimizer == "adamw" else ("s", "--")
        ends.plot(losses, [place] * len(losses), marker, color=f"C{place}", markersize=6, fillstyle="none")
        ends.plot(statistics.median(losses), place, marker, color=f"C{place}", markersize=6)
        points = zip(*rows[0]["curve"], strict=True)
        curves.plot(*points, style, color=f"C{place}", linewidth=1.4, label=f"{model}, {optimizer}")
    ends.set_yticks(range(len(models)), models)
    ends.invert_yaxis()
    ends.set(xlabel="validation loss, nats per byte")
    ends.set_title("circles: AdamW, squares: Muon; filled: median of the seeds", loc="left", fontsize=10)
    curves.set(xlabel="step", ylabel="training loss, nats per token")
    curves.set_title(f"means of {STRETCH} steps, first seed", loc="left", fontsize=10)
    curves.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
