"""Training speed on one device: tokens/s, MFU and peak memory of a step, its parts, and what other kernels make of it.

    python scripts/bench/train.py [--config configs/flash_stu_340m.yaml] [--output FILE] [section.key=value ...]

A step is the trainer's: micro batches forward and backward, gradient clipping, optimizer; the tokens are random, so no
data is needed. Variants take the same step with the two-branch FFT of the published code, and with each optional
package that is installed. The parts are timed alone, forward and backward, at the step's shapes. The rate of a large
matrix product is measured between the steps, and the model's FLOPs (flash_stu/training/flops.py) are given as a share
of it. On a CPU: --config configs/quickstart.yaml.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from conv import two_branch_fft
from torch import nn

from flash_stu.backends import why_not
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.layers import STU, SlidingWindowAttention
from flash_stu.ops.attention import sliding_window_attention
from flash_stu.ops.causal_conv import causal_conv
from flash_stu.ops.cross_entropy import linear_cross_entropy
from flash_stu.training import RunConfig, join_world, load_config
from flash_stu.training.flops import forward_flops, peak_flops, train_flops
from flash_stu.training.metrics import peak_memory
from flash_stu.training.optimizer import build_optimizers
from flash_stu.training.parallel import World, clip_gradients, parallelize, set_gradient_sync
from flash_stu.training.trainer import build_model

TWO_BRANCH = "two-branch FFT (published)"
WARM_UP = 2
CONFIGS = ["configs/flash_stu_340m.yaml", "configs/flash_stu_550m.yaml"]
PACKAGES = {"conv_backend": "flashfftconv", "attention_backend": "flash_attn", "loss_backend": "liger"}


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
        shape = (self.micro_batches, self.shape[0], self.shape[1] + 1)
        self.tokens = torch.randint(0, config.model["vocab_size"], shape, generator=generator).to(self.device)

    def variants(self) -> dict[str, dict[str, str]]:
        """Changes of the model section by name."""
        attention = "flex_attention" if self.device.type == "cuda" else "banded"
        plain = {"conv_backend": "fft", "attention_backend": attention, "loss_backend": "chunked"}
        usable = {key: package for key, package in PACKAGES.items() if why_not(package) is None}
        model = self.config.architecture()
        published = model.uses_stu and model.stu_type == "tensordot" and model.stu_branches == "shared"
        result = ({TWO_BRANCH: plain} if published else {}) | {"PyTorch alone": plain}
        result |= {f"with {package}": plain | {key: package} for key, package in usable.items()}
        if len(usable) > 1:
            result["with all of them"] = plain | usable
        return result

    def build(self, name: str, changes: dict[str, str]) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        """Model and optimizers as the trainer makes them."""
        torch.compiler.reset()
        config = self.config.model_copy(update={"model": self.config.model | changes})
        model = build_model(config)
        if name == TWO_BRANCH:
            for module in model.modules():
                if isinstance(module, STU):
                    module.forward = partial(_two_branch_forward, module)
        model = parallelize(model, config, self.world)
        return model.train(), build_optimizers(model, config.optimizer)

    def step(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """One optimizer step, as the trainer's."""
        for index, windows in enumerate(self.tokens):
            set_gradient_sync(model, index == self.micro_batches - 1)
            outputs = model(input_ids=windows[:, :-1], shift_labels=windows[:, 1:], skip_logits=True)
            (outputs.loss / self.micro_batches).backward()
        self.update(model, optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()

    def update(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """What a step does once its gradients are there."""
        clip_gradients(model, self.config.train.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()

    def time(self, function: Callable[[], None]) -> float:
        """Seconds of a call, all of the device's work included."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def median(self, function: Callable[[], None]) -> float:
        """Median seconds of a call, after those that compile and warm up."""
        for _ in range(WARM_UP):
            function()
        return statistics.median(self.time(function) for _ in range(self.repeats))

    def product_rate(self) -> float:
        """FLOP/s of a large square matrix product, in the dtype of the run's products."""
        side = 8192 if self.device.type == "cuda" else 1024
        a, b, c = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(3))

        def products() -> None:
            for _ in range(10):
                torch.mm(a, b, out=c)

        return 10 * 2 * side**3 / self.time(products)

    def run(self) -> dict:
        """All variants; the parts of the last one, which has every package that is installed."""
        variants = {}
        for name, changes in self.variants().items():
            gc.collect()  # the model before
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            model, optimizers = self.build(name, changes)
            for _ in range(WARM_UP):
                self.step(model, optimizers)
                self.product_rate()
            seconds, rates = [], []
            for _ in range(self.repeats):  # in turn, so that a drifting clock hits both alike
                seconds.append(self.time(lambda m=model, o=optimizers: self.step(m, o)))
                rates.append(self.product_rate())
            variants[name] = {
                "seconds": seconds,
                "product_rates": rates,
                # of a CPU's process, the variants before count too
                "peak_memory_gib": peak_memory(self.device) if self.device.type == "cuda" else None,
            }
            parameters = model.num_parameters()
            parts = self.parts(model, optimizers) if name == list(self.variants())[-1] else None
            del model, optimizers
        return {
            "parameters": parameters,
            "tokens": self.micro_batches * self.shape[0] * self.shape[1],
            "shape": self.shape,
            "micro_batches": self.micro_batches,
            "train_flops": train_flops(self.config.architecture(), self.shape[1]),
            "forward_flops": forward_flops(self.config.architecture(), self.shape[1]),
            "peak_flops": peak_flops(self.device, self.dtype),
            "variants": variants,
            "parts": parts,
        }

    def parts(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, float]:
        """Seconds that each part of the model takes in a step, by its median time alone."""
        captured = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: captured.append(inputs))
        with torch.no_grad():
            model(input_ids=self.tokens[0, :, :-1])
        hook.remove()
        ((x, context, *_),) = captured
        compiled = torch.compile if self.config.train.compile else lambda function: function
        layers, parts = model.model.layers, {}

        def add(name: str, count: int, function: Callable, *inputs: torch.Tensor) -> None:
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            function = compiled(function)

            def there_and_back() -> None:
                with self.autocast():
                    y = function(*inputs)
                y.backward(torch.ones_like(y))

            parts[name] = self.median(there_and_back) * count * self.micro_batches

        blocks = {type(block.mixer): block for block in layers}
        with self.autocast(), torch.no_grad():
            normed = layers[0].mixer_norm(x)
        for kind, name in ((STU, "STU layers"), (SlidingWindowAttention, "attention layers")):
            if kind not in blocks:
                continue
            mixer = blocks[kind].mixer
            count = sum(isinstance(block.mixer, kind) for block in layers)
            add(name, count, lambda u, mixer=mixer: mixer.forward(u, context), normed)
            if kind is STU and mixer.tensordot:
                inputs = normed.to(self.dtype)
                add(
                    "  of which convolution",
                    count,
                    lambda u, m=mixer: causal_conv(u, m.taps(context.filters), m.backend, m.dilation),
                    inputs,
                )
            elif kind is SlidingWindowAttention:
                heads = [
                    torch.randn(x.shape[0], n, x.shape[1], mixer.head_dim, device=self.device, dtype=self.dtype)
                    for n in (mixer.heads, mixer.kv_heads, mixer.kv_heads)
                ]
                attend = partial(
                    sliding_window_attention, window=mixer.window, softcap=mixer.softcap, backend=mixer.backend
                )
                add("  of which attention", count, lambda q, k, v, attend=attend: attend(q, k, v), *heads)
        add("MLPs", len(layers), layers[0].mlp.forward, normed)

        labels = self.tokens[0, :, 1:]
        head, backend = model.lm_head, model.config.loss_backend
        hidden = normed.detach().requires_grad_()

        def loss() -> None:
            with self.autocast():
                linear_cross_entropy(hidden, head.weight, labels, head.bias, backend).backward()

        parts["head + loss"] = self.median(loss) * self.micro_batches
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        parts["optimizer"] = self.median(lambda: self.update(model, optimizers))
        return parts

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _two_branch_forward(stu: STU, x: torch.Tensor, context) -> torch.Tensor:
    """An STU layer's forward pass with both branches convolved in full, as published."""
    with torch.autocast(x.device.type, enabled=False):
        filters = context.filters.float() @ stu.M_filters[0].float()
    return two_branch_fft(stu.in_proj(x), filters[: x.shape[1]])


def print_tables(name: str, result: dict) -> None:
    """One table of the variants' steps, one of the parts."""
    batch, length = result["shape"]
    print(
        f"\n{name}: {result['parameters']:,} parameters, {result['train_flops'] / 1e9:.3g} GFLOPs a token; "
        f"a step is {result['micro_batches']} x {batch} x {length} tokens\n"
    )
    print(f"| {'step':31} | {'tokens/s':>24} | {'peak memory':>11} | {'MFU':>6} | of product rate | speed-up |")
    print(f"|{'-' * 33}|{'-' * 25}:|{'-' * 12}:|{'-' * 7}:|----------------:|---------:|")
    reference = statistics.median(next(iter(result["variants"].values()))["seconds"])
    for variant, measured in result["variants"].items():
        seconds = measured["seconds"]
        speeds = [result["tokens"] / s for s in seconds]
        median = statistics.median(speeds)
        achieved = median * result["train_flops"]
        spread = f"{median:,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"
        memory = "" if measured["peak_memory_gib"] is None else f"{measured['peak_memory_gib']:.1f} GiB"
        mfu = "" if result["peak_flops"] is None else f"{achieved / result['peak_flops']:.1%}"
        share = f"{achieved / statistics.median(measured['product_rates']):.1%}"
        ratio = f"{reference / statistics.median(seconds):.2f}x"
        print(f"| {variant:31} | {spread:>24} | {memory:>11} | {mfu:>6} | {share:>15} | {ratio:>8} |")
    rates = [rate / 1e12 for measured in result["variants"].values() for rate in measured["product_rates"]]
    print(f"\nmatrix products: {statistics.median(rates):.3g} ({min(rates):.3g}-{max(rates):.3g}) TFLOP/s")

    step = statistics.median(list(result["variants"].values())[-1]["seconds"])
    print(f"\n| {'part of a step, the last above':31} | {'ms':>9} | share |")
    print(f"|{'-' * 33}|{'-' * 10}:|------:|")
    parts = result["parts"]
    rest = step - sum(seconds for part, seconds in parts.items() if not part.startswith(" "))
    for part, seconds in (parts | {"rest (norms, residuals, ...)": rest}).items():
        print(f"| {part:31} | {1000 * seconds:9.1f} | {seconds / step:5.1%} |")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="append", help=f"run config; default: {' and '.join(CONFIGS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="bench-train.json", help="where the figures are written")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every config")
    args = parser.parse_args()

    results = {}
    for path in args.config or CONFIGS:
        config = load_config(path, [*args.overrides, "parallel.strategy=none"])
        with join_world(config) as world:
            if not results:
                cuda = world.device.type == "cuda"
                name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
                print(f"torch {torch.__version__}, Python {platform.python_version()}, {name}, {config.train.dtype}")
            results[path] = Bench(config, world, args.repeats).run()
        print_tables(Path(path).stem, results[path])
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
