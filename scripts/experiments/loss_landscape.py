"""The loss around trained weights: a plane of two random filter-normalised directions, and slices along more of them.

    python scripts/experiments/loss_landscape.py [--quick | --full] [--output results/experiments]
    python scripts/experiments/loss_landscape.py --model runs/quickstart --model runs/other [--text FILE]

A direction is normal in every matrix, each of its filters scaled to the norm of the filter that it moves, and zero in
biases and norms. A filter is all that makes one output: a row of a linear layer or an embedding, and of an STU layer
the coefficients of one channel. Constants stay: the spectral filters, and the systems of a distilled layer. So a
distance of 1 moves every filter by its own norm. All models of a run see the same seeds.

Without --model it trains two small models first, STU layers only and attention only, by the quickstart's settings at
half the width and half the steps, on the embedded corpus; runs that are finished are not trained again. The loss is
that of held-out text, of the embedded corpus by default, in nats per byte.

Source: Li et al. 2018, Visualizing the Loss Landscape of Neural Nets (arXiv 1712.09913), sections 3 and 4; for STU
layers Liu et al. 2024, Flash STU (arXiv 2409.10489).
"""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import LogNorm
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_stu.arguments import any_path, input_file, output_directory
from flash_stu.data import embedded_corpus
from flash_stu.data.formats import file_format, read_texts
from flash_stu.devices import default_device
from flash_stu.errors import UserError, run_cli
from flash_stu.figures import save_figure
from flash_stu.reading import read_text
from flash_stu.results import environment, experiment_parser, finish, page, panels, spread, table
from flash_stu.training import Trainer, join_world, load_config
from flash_stu.training.model_source import load_source

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
KINDS = {
    "STU": {"layer_types": ["linear_attention"], "stu_branches": "separate"},
    "attention": {"layer_types": ["sliding_attention"], "sliding_window": 256},
}
SCALED = {"hidden_size": 96, "intermediate_size": 256}


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        points: of the plane along each direction.
        directions: slices, the first two of them along the plane's axes.
        windows: held-out sequences.
        length: of each, in tokens.
        steps: of the models that are trained here.
        layers: of those models.
        width: settings of their width.
    """

    points: int
    directions: int
    windows: int
    length: int
    steps: int
    layers: int
    width: dict[str, int]


SIZES = {
    "quick": Size(5, 2, 2, 64, 2, 1, {"hidden_size": 16, "intermediate_size": 32}),
    "default": Size(21, 8, 16, 256, 400, 4, SCALED),
    "full": Size(51, 32, 128, 256, 800, 4, {}),
}
SLICE = [i / 10 for i in range(-10, 11)]  # distances
REPORTED = (0.1, 0.5, 1.0)
LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # contours, nats per byte above the centre
TICKS = (-1, -0.5, 0, 0.5, 1)
LARGEST_TEXT = 1 << 30  # bytes


def direction(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Returns a random filter-normalised direction: by name, a tensor like each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _like(name, weight.detach(), generator) for name, weight in model.named_parameters()}


def _like(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if weight.dim() < 2:
        return torch.zeros_like(weight)
    output = weight.dim() - 1 if name.endswith(("M_filters", "M_phi")) else 0
    others = [axis for axis in range(weight.dim()) if axis != output]
    drawn = torch.randn(weight.shape, generator=generator).to(weight)
    return drawn * (_squares(weight, others) / _squares(drawn, others)).sqrt()


def _squares(tensor: torch.Tensor, axes: list[int]) -> torch.Tensor:
    return tensor.square().sum(axes, keepdim=True)


def held_out_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> tuple[torch.Tensor, float]:
    """Cut texts, each followed by the tokenizer's end-of-text token if it has one, into windows.

    Returns:
        `count` windows spread evenly over the text, or as many as there are, (windows, length), and the tokens in a
        byte of text.

    Raises:
        UserError: if there is less text than one window.
    """
    ids, num_bytes = [], 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False) + end
        num_bytes += len(text.encode())
    available = len(ids) // length
    if not available:
        raise UserError(f"the held-out text has {len(ids)} tokens; at least {length} are needed")
    starts = [i * available // min(count, available) * length for i in range(min(count, available))]
    return torch.tensor([ids[start : start + length] for start in starts]), len(ids) / num_bytes


class Landscape:
    """The loss of a model on fixed windows as a function of a point around its weights.

    Args:
        model: in eval mode; its weights are moved, and are back in place after every call.
        windows: token ids, (windows, length); every token but a window's first is predicted.
        scale: what the loss in nats per token is multiplied by.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, scale: float = 1.0) -> None:
        self.model, self.windows, self.scale = model, windows, scale
        self.weights = dict(model.named_parameters())
        self.centre = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def losses(self, directions: Sequence[dict[str, torch.Tensor]], points: Iterable[Sequence[float]]) -> list[float]:
        """Returns the loss at each of the points, whose coordinates are along the directions."""
        try:
            return [self._loss(directions, point) for point in points]
        finally:
            for name, weight in self.weights.items():
                weight.copy_(self.centre[name])

    def _loss(self, directions: Sequence[dict[str, torch.Tensor]], point: Sequence[float]) -> float:
        for name, weight in self.weights.items():
            weight.copy_(self.centre[name])
            for distance, moved in zip(point, directions, strict=True):
                weight.add_(moved[name], alpha=distance)
        batches = self.windows.to(self.model.device).split(8)
        nats = sum(len(batch) * float(self.model(input_ids=batch, labels=batch).loss) for batch in batches)
        return self.scale * nats / len(self.windows)


def explore(landscape: Landscape, size: Size) -> dict:
    """Returns the loss at the centre, on the plane (second direction, first direction) and along each direction."""
    axes = [direction(landscape.model, seed) for seed in range(2)]
    line = np.linspace(-1, 1, size.points)
    plane = landscape.losses(axes, [(x, y) for y in line for x in line])
    slices = []
    for seed in range(size.directions):
        slices.append(landscape.losses([direction(landscape.model, seed)], [[distance] for distance in SLICE]))
    return {
        "centre": landscape.losses([], [[]])[0],
        "plane": np.reshape(plane, (size.points, size.points)).tolist(),
        "slices": slices,
    }


def train(run: Path, size: Size, changes: dict) -> Path:
    """Train a small model, unless it is trained already; returns its run directory."""
    layers = changes["layer_types"] * size.layers
    model = size.width | changes | {"num_hidden_layers": size.layers, "layer_types": layers}
    settings = {f"model.{key}": value for key, value in model.items()} | {"output_dir": run, "wandb.mode": "disabled"}
    settings |= {f"train.{key}": size.steps for key in ("steps", "validation_every", "checkpoint_every")}
    settings |= {"optimizer.name": "adamw", "optimizer.learning_rate": 3e-3}
    settings["optimizer.warmup_steps"] = min(30, size.steps)
    config = load_config(CONFIG, [f"{key}={value}" for key, value in settings.items()])
    with join_world(config) as world:
        Trainer(config, world).fit()
    return run


def rows(models: dict[str, Path], text: str | None, size: Size) -> list[dict]:
    """Returns a row for each model: its name, its parameters and what `explore` finds.

    Raises:
        UserError: for a model that cannot be loaded, before anything is measured.
    """
    loaded = {name: load_source(path, default_device()) for name, path in models.items()}
    result = []
    for name, (model, tokenizer) in loaded.items():
        print(f"{name}: {size.points**2} points and {size.directions} slices", flush=True)
        length = min(size.length, getattr(model.config, "max_position_embeddings", size.length))
        windows, scale = held_out_windows(held_out_texts(text), tokenizer, size.windows, length)
        parameters = sum(weight.numel() for weight in model.parameters())
        result.append({"model": name, "parameters": parameters, **explore(Landscape(model, windows, scale), size)})
    return result


def held_out_texts(path: str | None) -> Iterable[str]:
    """Returns the documents of a file, or the embedded corpus' validation split."""
    if path is None:
        return embedded_corpus()["validation"]
    return read_texts(Path(path), "text") if file_format(path) else [read_text(path, "text", LARGEST_TEXT)]


def increases(row: dict, distance: float) -> list[float]:
    """Returns by how much the loss rises at a distance along each direction, both ways."""
    return [line[SLICE.index(at)] - row["centre"] for line in row["slices"] for at in (-distance, distance)]


def render(results: dict) -> str:
    """The loss of every model and its rise at some distances."""
    what = (
        f"{results['windows']} windows of {results['length']} tokens of {results['text']}, nats per byte; rise of the "
        f"loss along {results['directions']} filter-normalised directions, both ways: median (least-greatest)."
    )
    header = ["model", "parameters", "loss", *(f"rise at {distance}" for distance in REPORTED)]
    lines = [
        [
            row["model"],
            f"{row['parameters']:,}",
            f"{row['centre']:.3f}",
            *(spread(increases(row, distance), 1) for distance in REPORTED),
        ]
        for row in results["rows"]
    ]
    return page(results, what, table(header, lines))


def plot(results: dict, path: Path) -> None:
    figure, axes = panels(len(results["rows"]) + 1, width=4.4, height=4.2)
    for i, (axis, row) in enumerate(zip(axes, results["rows"], strict=False)):
        line = np.linspace(-1, 1, results["points"])
        rise = np.clip(np.array(row["plane"]) - row["centre"], LEVELS[0] / 2, None)
        axis.contourf(line, line, rise, LEVELS, norm=LogNorm(LEVELS[0], LEVELS[-1]), cmap="viridis_r", extend="both")
        drawn = axis.contour(line, line, rise, LEVELS, colors="black", linewidths=0.6)
        axis.clabel(drawn, fontsize=7, fmt="%g")
        axis.set(xlabel="first direction", ylabel="second direction", aspect="equal", xticks=TICKS, yticks=TICKS)
        axis.set_title(f"{row['model']}: {row['centre']:.3f}, and the rise above it", loc="left", fontsize=10)
        for moved in row["slices"]:
            axes[-1].plot(SLICE, moved, color=f"C{i}", linewidth=0.6, alpha=0.5)
        axes[-1].plot(SLICE, np.median(row["slices"], axis=0), color=f"C{i}", linewidth=2, label=row["model"])
    axes[-1].set(xlabel="distance", xticks=TICKS)
    axes[-1].set_title("loss, nats per byte; thick: median", loc="left", fontsize=10)
    axes[-1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = experiment_parser(__doc__, "loss_landscape")
    add = parser.add_argument
    add("--model", type=any_path, action="append", metavar="DIR", help="a run or model directory; may be repeated")
    add("--text", type=input_file, metavar="FILE", help="held-out text; default: that of the embedded corpus")
    add("--runs", type=output_directory, default="runs/landscape", metavar="DIR", help="where models are trained")
    args = parser.parse_args()
    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as scratch:
        if args.model:
            models = {name: Path(name) for name in args.model}
        else:
            runs = Path(scratch if args.size == "quick" else args.runs)
            models = {kind: train(runs / f"{kind}-{args.size}", size, changes) for kind, changes in KINDS.items()}
        found = rows(models, args.text, size)
    results = {
        "environment": environment(default_device()),
        "size": args.size,
        "steps": None if args.model else size.steps,
        "seeds": {"training": None if args.model else 0, "directions": list(range(size.directions))},
        "text": args.text or "the embedded corpus",
        **{key: getattr(size, key) for key in ("points", "directions", "windows", "length")},
        "rows": found,
    }
    finish("loss_landscape", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
