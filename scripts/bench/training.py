"""Training speed on one device: tokens/s, MFU and peak memory of a step, its parts, and what other kernels make of it.

    python scripts/bench/training.py [--config configs/flash_stu_340m.yaml] [--output DIR] [section.key=value ...]

A step is the trainer's: micro batches forward and backward, gradient clipping, optimizer; the tokens are random, so no
data is needed. Variants take the same step with the two-branch FFT of the published code, with one back end changed at
a time as far as it is available, and as the config has it; one that fails says so in its row. The parts are timed
alone, forward and backward, at the step's shapes, so they need not add up to it. The rate of a large matrix product is
measured between the steps, and the model's FLOPs (flash_stu/training/flops.py) are given as a share of it; beside the
measured step stands its estimate by part (step_time.py there). On a CPU: --config configs/quickstart.yaml.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from conv import two_branch_fft
from measuring import attempt, seconds
from plots import bars

from flash_stu.arguments import input_file, integer, output_directory
from flash_stu.devices import default_device
from flash_stu.distributed import World
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.model.layers import STU, SlidingWindowAttention
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.model.pretrained import Block
from flash_stu.ops.attention.choice import sliding_window_attention
from flash_stu.ops.backends import why_not
from flash_stu.ops.conv.choice import spectral_conv
from flash_stu.ops.cross_entropy import BACKENDS
from flash_stu.ops.cross_entropy.choice import linear_cross_entropy
from flash_stu.results import environment, failure_cells, finish, page, save, spread, table
from flash_stu.training import RunConfig, join_world, load_config
from flash_stu.training.flops import forward_flops, peak_flops, train_flops
from flash_stu.training.initialization import build_model
from flash_stu.training.metrics import peak_memory
from flash_stu.training.optimizer import build_optimizers
from flash_stu.training.parallel import clip_gradients, parallelize
from flash_stu.training.step import train_step
from flash_stu.training.step_time import PARTS, estimates, measured, milliseconds

TWO_BRANCH = "two-branch FFT (published)"
WARM_UP = 2
CONFIGS = ["configs/flash_stu_340m.yaml", "configs/flash_stu_550m.yaml"]
CHOICES = {
    "chunked convolution": {"conv_backend": "chunked"},
    "with triton": {"conv_backend": "triton"},
    "with flashfftconv": {"conv_backend": "flashfftconv"},
    "with flash_attn": {"attention_backend": "flash_attn"},
    **{f"with {name} loss": {"loss_backend": name} for name in BACKENDS if name not in ("auto", "chunked")},
}


class Bench:
    """The measurements of one config.

    Args:
        config: the run's.
        world: of a single process.
        repeats: steps measured of each variant, and runs of each part.
    """

    def __init__(self, config: RunConfig, world: World, repeats: int) -> None:
        self.config, self.world, self.repeats = config, world, repeats
        self.device = world.device
        self.dtype = getattr(torch, config.train.dtype)
        self.shape = (config.train.micro_batch_size, config.train.sequence_length)
        self.micro_batches = config.sequences_per_step(1) // self.shape[0]
        generator = torch.Generator().manual_seed(config.seed)
        shape = (self.micro_batches * self.shape[0], self.shape[1] + 1)
        self.tokens = torch.randint(0, config.model["vocab_size"], shape, generator=generator).to(self.device)

    def variants(self) -> dict[str, dict[str, str]]:
        """Changes of the model section by name."""
        attention = "flex_attention" if self.device.type == "cuda" else "banded"
        plain = {"conv_backend": "fft", "attention_backend": attention, "loss_backend": "chunked"}
        model = self.config.architecture()
        published = model.uses_stu and model.stu_type == "tensordot" and model.stu_branches == "shared"
        result = ({TWO_BRANCH: plain} if published else {}) | {"one FFT": plain}
        for name, choice in CHOICES.items():
            ((key, backend),) = choice.items()
            if (backend == "chunked" or why_not(backend) is None) and (model.uses_stu or key != "conv_backend"):
                result[name] = plain | choice
        return result | {"as configured": {}}

    def build(self, name: str, changes: dict[str, str]) -> tuple[FlashSTUForCausalLM, list[torch.optim.Optimizer]]:
        """Returns model and optimizers as the trainer makes them."""
        torch.compiler.reset()
        config = self.config.model_copy(update={"model": self.config.model | changes})
        model = build_model(config.architecture())
        if name == TWO_BRANCH:
            for module in model.modules():
                if isinstance(module, STU):
                    module.whole = partial(_two_branch_forward, module)
        model = cast(FlashSTUForCausalLM, parallelize(model, config, self.world))  # of one process: not wrapped
        return model.train(), build_optimizers(model, config.optimizer)

    def step(self, model: FlashSTUForCausalLM, optimizers: list[torch.optim.Optimizer]) -> None:
        """Take one optimizer step, as the trainer does."""
        train_step(model, optimizers, self.tokens, self.config, self.world)

    def update(self, model: FlashSTUForCausalLM, optimizers: list[torch.optim.Optimizer]) -> None:
        """Clip the gradients and update the weights, as the end of a step does."""
        clip_gradients(model, self.config.train.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()

    def samples(self, function: Callable[[], None], times: int = 1) -> list[float]:
        """Seconds of `times` calls, after those that compile and warm up."""
        for _ in range(WARM_UP):
            function()
        return [times * seconds(function, self.device) for _ in range(self.repeats)]

    def product_rate(self) -> float:
        """FLOP/s of a large square matrix product, in the dtype of the run's products."""
        side = 8192 if self.device.type == "cuda" else 1024
        a, b, c = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(3))

        def products() -> None:
            for _ in range(10):
                torch.mm(a, b, out=c)

        return 10 * 2 * side**3 / seconds(products, self.device)

    def run(self, row: dict) -> Iterator[None]:
        """Add all variants to a row, and the parts of the last one, the config's own; yields when there is more."""
        row |= {
            "parameters": build_model(self.config.architecture()).num_parameters(),
            "tokens": self.micro_batches * self.shape[0] * self.shape[1],
            "shape": self.shape,
            "micro_batches": self.micro_batches,
            "train_flops": train_flops(self.config.architecture(), self.shape[1]),
            "forward_flops": forward_flops(self.config.architecture(), self.shape[1]),
            "peak_flops": peak_flops(self.device, self.dtype),
            "variants": [],
            "parts": [],
            "estimate": estimates(self.config, 1, measured(self.device, self.dtype)),
        }
        variants = self.variants()
        for name, changes in variants.items():
            last = name == list(variants)[-1]
            figures, reason = attempt(lambda n=name, c=changes, last=last: self.variant(n, c, last))
            row["variants"].append({"variant": name, **({"failed": reason} if reason else figures[0])})
            if last and not reason:
                row["parts"] = figures[1]
            yield

    def variant(self, name: str, changes: dict[str, str], parts: bool) -> tuple[dict, list[dict]]:
        """Returns the steps' seconds, products' rates and peak memory, and if wanted the parts."""
        cuda = self.device.type == "cuda"
        gc.collect()  # the model before
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model, optimizers = self.build(name, changes)
        for _ in range(WARM_UP):
            self.step(model, optimizers)
            self.product_rate()
        taken, rates = [], []
        for _ in range(self.repeats):  # in turn, so that a drifting clock hits both alike
            taken.append(seconds(lambda: self.step(model, optimizers), self.device))
            rates.append(self.product_rate())
        # of a CPU's process, the variants before count too
        memory = peak_memory(self.device) if cuda else None
        row = {"seconds": taken, "product_rates": rates, "peak_memory_gib": memory}
        return row, self.parts(model, optimizers) if parts else []

    def parts(self, model: FlashSTUForCausalLM, optimizers: list[torch.optim.Optimizer]) -> list[dict]:
        """Seconds that each part of the model would take in a step if every call took as long as it does alone."""
        captured = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: captured.append(inputs))
        with torch.no_grad():
            model(input_ids=self.tokens[: self.shape[0], :-1], use_cache=False)
        hook.remove()
        ((x, context, *_),) = captured
        compiled = torch.compile if self.config.train.compile else lambda function: function
        layers, parts = [cast(Block, block) for block in model.model.layers], []

        def add(name: str, of: str | None, count: int, function: Callable, *inputs: torch.Tensor) -> None:
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            function = compiled(function)

            def there_and_back() -> None:
                with self.autocast():
                    y = function(*leaves)
                y.backward(torch.ones_like(y))

            taken = self.samples(there_and_back, count * self.micro_batches)
            parts.append({"part": name, "of": of, "seconds": taken})

        mixers = {type(block.mixer): block.mixer for block in layers}
        with self.autocast(), torch.no_grad():
            normed = layers[0].mixer_norm(x)
        for kind, name in ((STU, "STU layers"), (SlidingWindowAttention, "attention layers")):
            if kind not in mixers:
                continue
            mixer = mixers[kind]
            count = sum(isinstance(block.mixer, kind) for block in layers)
            add(name, None, count, lambda u, mixer=mixer: mixer.forward(u, context), normed)
            if isinstance(mixer, STU) and mixer.tensordot:
                convolve = partial(_convolve, mixer, mixer.features(context.filters))
                add("convolution", name, count, convolve, normed.to(self.dtype))
            elif isinstance(mixer, SlidingWindowAttention):
                heads = [
                    torch.randn(x.shape[0], n, x.shape[1], mixer.head_dim, device=self.device, dtype=self.dtype)
                    for n in (mixer.heads, mixer.kv_heads, mixer.kv_heads)
                ]
                attend = partial(
                    sliding_window_attention,
                    window=mixer.window,
                    softcap=mixer.softcap,
                    backend=mixer.backend,
                    band=context.band,
                )
                add("attention", name, count, lambda q, k, v, attend=attend: attend(q, k, v), *heads)
        add("MLPs", None, len(layers), layers[0].mlp.forward, normed)

        labels = self.tokens[: self.shape[0], 1:]
        head, backend = model.lm_head, model.config.loss_backend
        hidden = normed.detach().requires_grad_()

        def loss() -> None:
            with self.autocast():
                linear_cross_entropy(hidden, head.weight, labels, head.bias, backend).backward()

        parts.append({"part": "head + loss", "of": None, "seconds": self.samples(loss, self.micro_batches)})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        taken = self.samples(lambda: self.update(model, optimizers))
        return [*parts, {"part": "optimizer", "of": None, "seconds": taken}]

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _convolve(stu: STU, features: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Returns the convolution of an STU-T layer's projected inputs."""
    return spectral_conv(inputs, features, stu.M_filters.flatten(0, 1), stu.backend, stu.dilation, stu.oscillating)


def _two_branch_forward(stu: STU, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
    """Returns an STU layer's outputs with both branches convolved in full, as published."""
    assert context.filters is not None  # the model has STU layers
    with torch.autocast(x.device.type, enabled=False):
        filters = context.filters.float() @ stu.M_filters[0].float()
    return two_branch_fft(stu.in_proj(x), filters[: x.shape[1]])


def render(results: dict) -> str:
    """Per config a table of the variants' steps and one of the parts."""
    return page(results, *(part for row in results["rows"] for part in _tables(row)))


def _tables(row: dict) -> list[str]:
    batch, length = row["shape"]
    variants = [variant for variant in row["variants"] if "failed" not in variant]
    rates = [rate for variant in variants for rate in variant["product_rates"]]
    shape = (
        f"{Path(row['config']).stem}, {row['dtype']}: {row['parameters']:,} parameters, "
        f"{row['train_flops'] / 1e9:.3g} GFLOPs a token; a step is {row['micro_batches']} x {batch} x {length:,} "
        f"tokens"
    )
    shape += f"; a matrix product runs at {spread(rates, 1e-9)} GFLOP/s." if rates else "."
    reference = row["variants"][0].get("seconds")
    steps = []
    for variant in row["variants"]:
        if "failed" in variant:
            steps.append([variant["variant"], *failure_cells(variant, 5)])
            continue
        speeds = [row["tokens"] / taken for taken in variant["seconds"]]
        achieved = statistics.median(speeds) * row["train_flops"]
        memory, peak = variant["peak_memory_gib"], row["peak_flops"]
        faster = reference and statistics.median(reference) / statistics.median(variant["seconds"])
        steps.append(
            [
                variant["variant"],
                spread(speeds, 1),
                "" if memory is None else f"{memory:.1f} GiB",
                "" if peak is None else f"{achieved / peak:.1%}",
                f"{achieved / statistics.median(variant['product_rates']):.1%}",
                "" if faster is None else f"{faster:.2f}x",
            ]
        )
    header = ["step", "tokens/s", "peak memory", "MFU", "of product rate", "speed-up"]
    tables = [shape, table(header, steps)]
    if row["parts"]:
        step = statistics.median(row["variants"][-1]["seconds"])
        shares = [
            [_label(part), spread(part["seconds"]), f"{statistics.median(part['seconds']) / step:.1%}"]
            for part in row["parts"]
        ]
        tables.append(table(["part, run alone", "ms", "over the last step above"], shares))
    if columns := row.get("estimate"):
        cells = [[part, *(milliseconds(column[part]) for column in columns.values())] for part in PARTS]
        cells.append(["step", *(milliseconds(sum(column.values())) for column in columns.values())])
        if taken := row["variants"][-1].get("seconds"):
            cells.append(["measured", milliseconds(statistics.median(taken)), *[""] * (len(columns) - 1)])
        tables.append(table(["estimate, ms", *columns], cells))
    return tables


def _label(part: dict) -> str:
    return f"{part['of']}: {part['part']}" if part["of"] else part["part"]


def plot(results: dict, path: Path) -> None:
    bars(
        {
            f"{Path(row['config']).stem}: ms of a step": {
                _label(part): [1000 * taken for taken in part["seconds"]] for part in row["parts"]
            }
            for row in results["rows"]
            if row["parts"]
        },
        path,
    )


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--config", type=input_file, action="append", help=f"run config; default: {' and '.join(CONFIGS)}"
    )
    parser.add_argument("--repeats", type=integer(1, 10000), default=9)
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write training.json and .png there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every config")
    args = parser.parse_args()

    results = {"environment": environment(default_device()), "rows": []}
    for path in args.config or CONFIGS:
        config = load_config(path, [*args.overrides, "parallel.strategy=none"])
        print(path, flush=True)
        row = {"config": path, "dtype": config.train.dtype}
        results["rows"].append(row)
        with join_world(config) as world:
            for _ in Bench(config, world, args.repeats).run(row):
                print(row["variants"][-1]["variant"], flush=True)
                save("training", results, args.output)
    finish("training", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
