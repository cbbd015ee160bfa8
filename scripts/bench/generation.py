"""Seconds against generated length, token by token: the exact STU, its distilled LDS, and attention.

    python scripts/bench/generation.py [--config configs/quickstart.yaml] [--lengths 512 1024 2048 4096] [--output DIR]
    python scripts/bench/generation.py --model runs/quickstart --model runs/quickstart/distilled
    python scripts/bench/generation.py --long 1000000 --compile [--model DIR]

The first form times random weights of the config's shape: one layer alone, a model of STU layers only, and the hybrid,
each decoded naively, by epoched and by continuous FutureFill, and distilled to several state dimensions; beside them
attention. Decoding is greedy after a prompt of one token. Tokens/s stand beside what the weights allow when they are
read once per token at the bandwidth of a large copy, measured in the same run. The second form times finished models.
The third generates one long text, and exits with 1 if its last thousand tokens take 15 % longer than its first. On a
GPU use --config configs/flash_stu_340m.yaml --compile --lengths 4096 16384 131072.

Source of the comparison: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), figure 3.
"""

import os
import statistics
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from measuring import device_rates, seconds
from torch import nn

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.arguments import any_path, integer, output_directory
from flash_stu.devices import choose_device, default_dtype
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.figures import save_figure
from flash_stu.filters.spectral import spectral_filters
from flash_stu.generation.loop import generate_tokens
from flash_stu.generation.sampling import Sampling
from flash_stu.model.config import LARGEST_LENGTH
from flash_stu.model.layers import LDS, STU, SlidingWindowAttention
from flash_stu.model.layers.context import Ring, SequenceContext
from flash_stu.model.loading import load_model
from flash_stu.ops.positions import rotary_angles
from flash_stu.results import environment, finish, page, panels, spread, table
from flash_stu.settings import read_yaml
from spectralds import distill
from spectralds.options import MAX_STATE_DIM

EXACT = {"naive": "naive", "epoched FutureFill": "futurefill_epoched", "FutureFill": "futurefill"}
PANELS = {"layer": "one layer", "stu": "STU layers only", "hybrid": "hybrid"}
SHARE = 0.15  # by how much the last tokens of a long text may take longer than the first
_RECENT = 128  # tokens over which a rate is taken


def main() -> int:
    args = parse()
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    if args.long:
        return long_text(args, device, dtype)
    if args.model:
        groups = {"model": {path: lambda path=path: load_model(path, device, dtype) for path in args.model}}
    else:
        groups = {name: panel(name, args, device, dtype) for name in args.panels}
    rate = device_rates(device, dtype)["bytes"]
    results = {
        "environment": environment(device),
        "shape": None if args.model else Path(args.config).stem,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": args.batch,
        "bandwidth": rate,
        "lengths": args.lengths,
        "rows": [],
    }
    for name, makers in groups.items():
        print(PANELS.get(name, name), flush=True)
        rows = measure({label: make() for label, make in makers.items()}, args, rate)
        results["rows"] += [{"panel": name, **row} for row in rows]
    finish("generation", results, render, plot, args.output)
    return 0


def parse() -> Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add(
        "--config",
        type=any_path,
        default="configs/quickstart.yaml",
        help="run config whose model section gives the shape",
    )
    add(
        "--model",
        type=any_path,
        action="append",
        metavar="DIR",
        help="time this model directory instead; may be repeated",
    )
    add(
        "--lengths",
        type=integer(2, LARGEST_LENGTH - 1),
        nargs="+",
        default=[512, 1024, 2048, 4096],
        metavar="N",
        help="tokens to generate",
    )
    add("--state-dims", type=integer(2, MAX_STATE_DIM), nargs="+", default=[40, 80, 160], metavar="H")
    add("--panels", nargs="+", choices=PANELS, default=list(PANELS))
    add("--batch", type=integer(1, 2**16), default=1)
    add("--repeats", type=integer(1, 10000), default=3, help="generations by each")
    add("--long", type=integer(3000), metavar="N", help="generate one text of N tokens from a distilled model")
    add("--compile", action="store_true", help="compile the step of models without STU layers")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on the CPU")
    add("--output", type=output_directory, metavar="DIR", help="write generation.json and generation.png there")
    args = parser.parse_args()
    args.lengths = sorted(set(args.lengths))
    return args


def panel(name: str, args: Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], nn.Module]]:
    """Returns the subjects of one panel: per label, a function that builds the layer or model."""
    settings = read_yaml(args.config, "--config")
    section = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"--config {args.config} has no model section")
    values = FlashSTUConfig.from_user(section).to_user()
    values["max_position_embeddings"] = max(args.lengths[-1] + 1, values["max_position_embeddings"])
    layers = values["num_hidden_layers"]
    if name != "hybrid":
        values["layer_types"] = ["linear_attention"] * layers
    if name == "layer":
        values |= {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "vocab_size": 64}
    attention = values | {"layer_types": ["sliding_attention"] * values["num_hidden_layers"]}

    def build(changes: dict, state_dim: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = FlashSTUForCausalLM(FlashSTUConfig.from_user(changes)).eval()
        model = model if state_dim is None else distill(model, state_dim)
        nn.Module.to(model, device, dtype)
        return model.get_submodule("model.layers.0.mixer") if name == "layer" else model

    makers: dict[str, Callable[[], nn.Module]] = {
        label: partial(build, values | {"decode_backend": backend}) for label, backend in EXACT.items()
    }
    makers |= {f"LDS, {dim} states": partial(build, values, dim) for dim in args.state_dims}
    makers["attention" if name == "layer" else "attention only"] = partial(build, attention)
    return makers


def measure(subjects: dict, args: Namespace, rate: float) -> list[dict]:
    """Time generations by each layer or model.

    Returns:
        a row for each: seconds at some fifty lengths, [length, median]; at those asked for, [length, samples], and the
        tokens/s just before them; and the tokens/s that reading the weights allows.
    """
    runs = [one_generation(subjects, args) for _ in range(args.repeats)]
    before = {n: max(1, n - _RECENT) for n in args.lengths}
    rows = []
    for label, subject in subjects.items():
        mine = [times[label] for times in runs]
        rates = {n: [args.batch * (n - m) / (times[n] - times[m]) for times in mine] for n, m in before.items()}
        rows.append(
            {
                "label": label,
                "curve": [[n, statistics.median(times[n] for times in mine)] for n in mine[0]],
                "seconds": [[n, [times[n] for times in mine]] for n in args.lengths],
                "rates": [[n, samples] for n, samples in rates.items()],
                "limit": args.batch * rate / weights(subject),
            }
        )
    return rows


def one_generation(subjects: dict, args: Namespace) -> dict[str, dict[int, float]]:
    """Seconds by label and length of one generation, in turns of a few tokens, so that a drifting machine hits all."""
    last = args.lengths[-1]
    before = {max(1, n - _RECENT) for n in args.lengths}
    wanted = sorted({max(1, round(last * part / 48)) for part in range(1, 49)} | {*args.lengths} | before)
    runs = {label: steps(subject, args) for label, subject in subjects.items()}
    times = {label: {0: 0.0} for label in runs}
    done = 0
    for count in wanted:
        for label, run in runs.items():
            device = next(subjects[label].parameters()).device
            turn = partial(deque, islice(run, count - done), maxlen=0)
            times[label][count] = times[label][done] + seconds(turn, device)
        done = count
    return times


def steps(subject: nn.Module, args: Namespace) -> Iterator:
    """Something happens for every token that is taken from it; what has to be compiled is compiled before."""
    if isinstance(subject, STU | LDS | SlidingWindowAttention):
        return layer_steps(subject, args.batch)
    assert isinstance(subject, FlashSTUForCausalLM)
    deque(model_steps(subject, args.batch, 8, args.compile), maxlen=0)
    return model_steps(subject, args.batch, args.lengths[-1], args.compile)


def model_steps(model: FlashSTUForCausalLM, batch: int, count: int, compile: bool) -> Iterator:
    compile = compile and not model.config.uses_stu
    prompt = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    return generate_tokens(model, prompt, count, Sampling(temperature=0), compile=compile)


@torch.inference_mode()
def layer_steps(layer: STU | LDS | SlidingWindowAttention, batch: int) -> Iterator:
    """Step a layer alone, with the same random input over and over."""
    example = next(p for p in layer.parameters() if p.dim() == 2)
    size = example.shape[1]
    x = torch.randn(batch, 1, size, device=example.device).to(layer_dtype(layer))
    filters, rotary = None, None
    if isinstance(layer, STU):
        config = layer.config
        filters = spectral_filters(config.max_position_embeddings, config.num_filters, config.filter_basis)[1]
        filters = filters.float().to(example.device)
    if isinstance(layer, SlidingWindowAttention):
        rotary = rotary_angles(torch.zeros(1, 1, dtype=torch.long, device=example.device), layer.head_dim, 1e4)
    context = SequenceContext(filters, rotary)
    step: Callable = layer.step  # of a state of the layer's own kind
    _, state = layer.prefill(x, context)
    yield
    past = 0
    while True:
        past += 1
        if isinstance(layer, SlidingWindowAttention):
            context = context._replace(seen=past, ring=Ring.at(past, None, layer.window, x.device))
        _, state = step(x, context, state)
        yield


def layer_dtype(layer: nn.Module) -> torch.dtype:
    return next(m.weight.dtype for m in layer.modules() if isinstance(m, nn.Linear))


def weights(subject: nn.Module) -> int:
    """Bytes of parameters that a token has to read; of an embedding that is not also the head, only a row."""
    tied = getattr(getattr(subject, "config", None), "tie_word_embeddings", True)
    skipped = () if tied else ("model.embed_tokens.weight",)
    return sum(p.nbytes for name, p in subject.named_parameters() if name not in skipped)


def render(results: dict) -> str:
    """One table: what generates, seconds at each length, and its last tokens/s beside what the weights allow."""
    shape = f"{results['shape']} shape, " if results["shape"] else ""
    what = (
        f"{shape}batch {results['batch']}, {results['dtype']}; a large copy reads and writes "
        f"{results['bandwidth'] / 1e9:.1f} GB/s."
    )
    header = ["seconds to generate", *(f"{n:,}" for n in results["lengths"]), "tokens/s at the end"]
    rows = []
    for row in results["rows"]:
        cells = [f"{statistics.median(samples):.2f}" for _, samples in row["seconds"]]
        _, rates = row["rates"][-1]
        share = statistics.median(rates) / row["limit"]
        rows.append([_name(row), *cells, spread(rates, 1), f"{row['limit']:,.0f}", f"{share:.0%}"])
    return page(results, what, table([*header, "weights allow", "share"], rows))


def _name(row: dict) -> str:
    return f"{PANELS.get(row['panel'], row['panel'])}: {row['label']}"


def long_text(args: Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Generate one long text and compare its beginning with its end; 1 if it slows down."""
    if args.model:
        model = load_model(args.model[0], device, dtype)
    else:
        model = panel("hybrid", args, device, dtype)[f"LDS, {args.state_dims[-1]} states"]()
    assert isinstance(model, FlashSTUForCausalLM)
    if model.config.uses_stu:
        raise UserError(f"--long needs a distilled model; {args.model[0]} has STU layers")
    warm, window = 1000, 1000
    first, latest, memory = [], deque(maxlen=window), 0
    started = previous = time.perf_counter()
    for count, token in enumerate(model_steps(model, args.batch, args.long, args.compile), start=1):
        int(token[0])  # the token is there, on a GPU too
        moment = time.perf_counter()
        (first if warm < count <= warm + window else latest).append(moment - previous)
        previous = moment
        if count == warm + window:
            memory = resident(device)
        if count % 100_000 == 0:
            print(f"{count} tokens, {statistics.median(latest) * 1e6:.0f} us per token", flush=True)
    total = time.perf_counter() - started
    start, end = statistics.median(first), statistics.median(latest)
    print(f"{args.long} tokens in {total:.0f} s, {args.long / total:.0f} tokens/s")
    print(f"median of tokens {warm + 1} to {warm + window}: {start * 1e6:.0f} us")
    print(f"median of the last {window}: {end * 1e6:.0f} us")
    print(f"ratio {end / start:.3f}; allowed: at most {1 + SHARE}")
    print(
        f"memory after {warm + window} tokens: {memory / 2**20:.1f} MiB, at the end: {resident(device) / 2**20:.1f} MiB"
    )
    return int(end > (1 + SHARE) * start)


def resident(device: torch.device) -> int:
    """Bytes of memory in use: on a GPU by tensors, else by this process (read where Linux says it)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def plot(results: dict, path: Path) -> None:
    """Draw seconds against generated length, a panel for each group."""
    names = list(dict.fromkeys(row["panel"] for row in results["rows"]))
    figure, grid = panels(len(names), 4.6)
    for axes, name in zip(grid, names, strict=True):
        for row in (row for row in results["rows"] if row["panel"] == name):
            style = "-." if row["label"] in EXACT else "--" if "attention" in row["label"] else "-"
            axes.plot(*zip(*row["curve"], strict=True), style, label=row["label"], linewidth=1.6)
        axes.set_title(PANELS.get(name, name), loc="left", fontsize=11)
        axes.set(xlabel="tokens generated", ylabel="seconds")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
