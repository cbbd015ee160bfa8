"""An estimate of an optimizer step's time, by part, from counted work and a device's ceilings: one that can be wrong.

The work of a part is its matrix products by shape, the bytes that everything else reads and writes, the elements that
pass through tanh or exp, its FFTs, and its operator calls. Ceilings turn each into seconds, and the seconds add up:
nothing is thought to overlap. `Measured` times short calls of the very shapes on the device at hand; `DATA_SHEETS` has
rates of GPUs, where kernels are thought fused, calls free and every product at the rate of the largest, so that a run
there will be slower. Communication is not counted.

Traffic is in vectors of a token, read or written: eager operators count as PyTorch's CPU kernels run one by one, fused
ones as torch.compile joins them. The constants say which operators they are.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from flash_stu.model.config import FlashSTUConfig
from flash_stu.ops.rms_norm import rms_norm
from flash_stu.training.flops import DATA_SHEET_RATES, mean_keys, train_flops
from flash_stu.training.run_config import RunConfig

PARTS = (
    "embedding",
    "projections",
    "convolution",
    "attention",
    "MLP",
    "head + loss",
    "norms + residuals",
    "optimizer",
)
_NEWTON_SCHULZ = 5  # iterations of Muon
_LARGEST = 4e8  # FLOPs of a product that is timed; of a larger one a part of that size is
_CALLS = 3  # of everything that is timed
_RATES = ("byte", "strided", "cached", "special", "gelu", "call")  # methods of Measured
_TILE = 128  # queries of a tile of banded attention, about


@dataclass
class Work:
    """The work of a part of the model in one micro batch, or the optimizer in a step.

    Attributes:
        linears: (tokens, inputs, outputs) of linear layers: their outputs, and the gradients of inputs and weight.
        products: (batch, m, k, n): (m, k) @ (k, n), `batch` of them in one call.
        flops: of products inside a fused kernel, whose factors and results stay on the chip.
        bytes: read and written by everything else.
        strided: in another order than they lie in memory, as when heads or phases are put side by side.
        cached: in tiles that stay in a CPU's caches.
        special: elements of which tanh or exp is taken.
        gelu: elements of which GELU is taken, and its gradient.
        norms: (rows, size) that RMSNorm normalises, and its gradients; not counted where they are fused.
        transforms: (signals, size) of real FFTs, there or back, with a product of spectra for every two.
        calls: of operators, forward and backward.
    """

    linears: list[tuple[int, int, int]] = field(default_factory=list)
    products: list[tuple[int, int, int, int]] = field(default_factory=list)
    flops: float = 0.0
    bytes: float = 0.0
    strided: float = 0.0
    cached: float = 0.0
    special: float = 0.0
    gelu: float = 0.0
    norms: list[tuple[int, int]] = field(default_factory=list)
    transforms: list[tuple[int, int]] = field(default_factory=list)
    calls: float = 0.0


class Ceilings(Protocol):
    """Seconds that a device needs for work at least. `fused`: elementwise operators are joined, and calls free."""

    @property
    def name(self) -> str: ...

    @property
    def fused(self) -> bool: ...

    def seconds(self, work: Work) -> float: ...


class DataSheet(NamedTuple):
    """A GPU by its rates.

    Attributes:
        name: of the GPU.
        flops: of a large bf16 product, per second.
        bandwidth: bytes per second of a large copy.
    """

    name: str
    flops: float
    bandwidth: float
    fused: bool = True

    def seconds(self, work: Work) -> float:
        """Products by the larger of arithmetic and traffic in bf16, all else by traffic."""
        total = (work.bytes + work.strided + work.cached) / self.bandwidth + work.flops / self.flops
        linears = [(1, tokens, inputs, outputs) for tokens, inputs, outputs in work.linears for _ in range(3)]
        for batch, m, k, n in [*work.products, *linears]:
            moved = 2 * batch * (m * k + k * n + m * n)
            total += max(2 * batch * m * k * n / self.flops, moved / self.bandwidth)
        return total + sum(4 * signals * size * 2 / self.bandwidth for signals, size in work.transforms)


# The shares of the data sheet that one H100 reached: 798 TFLOP/s in a bf16 product of 8192-cubes, 3.0 TB/s in a copy.
_PRODUCT_SHARE, _COPY_SHARE = 798 / 989.5, 3.0 / 3.35
DATA_SHEETS = {
    name: DataSheet(name, DATA_SHEET_RATES[name] * 1e12 * _PRODUCT_SHARE, bandwidth * 1e12 * _COPY_SHARE)
    for name, bandwidth in {"A100": 2.039, "H100": 3.35, "H200": 4.8}.items()  # TB/s; SXM, 80 GB
}


class Measured:
    """The device at hand: short calls of the work's own shapes are timed, each once, the best of a few counts.

    Args:
        device: where the calls run.
        dtype: of the products.
        clock: seconds; time.process_time leaves out what other processes take.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self.dtype, self.clock = device, dtype, clock
        self.name, self.fused = device.type, device.type == "cuda"
        self._timers: dict[tuple, Callable[[], list[float]]] = {}
        self._times: dict[tuple, list[float]] = {}

    def again(self) -> None:
        """Time everything once more, beside a step that is measured: a busy machine is slow for both."""
        for key, timer in self._timers.items():
            self._times[key] += timer()

    def seconds(self, work: Work) -> float:
        """The sum of everything's own time, each the median of its calls."""
        rate = {kind: self._time((kind,), getattr(self, f"_{kind}")) for kind in _RATES}
        total = work.bytes * rate["byte"] + work.strided * rate["strided"] + work.cached * rate["cached"]
        total += work.special * max(0.0, rate["special"] - 8 * rate["cached"])
        total += work.gelu * rate["gelu"]
        if work.flops:
            total += work.flops * self._time(("flop",), self._flop)
        total += work.calls * rate["call"] * (not self.fused)
        total += sum(self._time(shape, partial(self._norm, *shape)) for shape in work.norms)
        total += sum(self._time(shape, partial(self._linear, *shape)) for shape in work.linears)
        total += sum(self._time(shape, partial(self._product, *shape)) for shape in work.products)
        return total + sum(self._time(shape, partial(self._transform, *shape)) for shape in work.transforms)

    def _time(self, key: tuple, timer: Callable[[], list[float]]) -> float:
        if key not in self._times:
            self._timers[key], self._times[key] = timer, timer()
        return statistics.median(self._times[key])

    def _calls(self, function: Callable[[], object], scale: float, calls: int = _CALLS) -> list[float]:
        times = []
        for _ in range(calls + 1):  # the first warms up
            self._wait()
            start = self.clock()
            function()
            self._wait()
            times.append((self.clock() - start) * scale)
        return times[1:]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _linear(self, tokens: int, inputs: int, outputs: int) -> list[float]:
        shape, scale = self._part(tokens, inputs, outputs)
        x, weight, y = (
            torch.randn(rows, columns, device=self.device).to(self.dtype).requires_grad_()
            for rows, columns in ((shape[0], shape[1]), (shape[2], shape[1]), (shape[0], shape[2]))
        )
        return self._calls(lambda: torch.autograd.grad(F.linear(x, weight), (x, weight), y), scale)

    def _part(self, *shape: int) -> tuple[list[int], float]:
        """Returns a shape of less work, its longest sides halved, and how many times as much work the whole is."""
        part, limit = list(shape), _LARGEST * (1000 if self.device.type == "cuda" else 1)
        if self.device.type == "cpu" and self.dtype != torch.float32:
            limit /= 4  # a CPU may emulate it
        while 2.0 * math.prod(part) > limit:
            longest = part.index(max(part))
            part[longest] = -(-part[longest] // 2)
        return part, math.prod(shape) / math.prod(part)

    def _product(self, batch: int, m: int, k: int, n: int) -> list[float]:
        (batch, m, k, n), scale = self._part(batch, m, k, n)
        a, b = (torch.randn(batch, *of, device=self.device).to(self.dtype) for of in ((m, k), (k, n)))
        return self._calls((lambda: a[0] @ b[0]) if batch == 1 else (lambda: torch.bmm(a, b)), scale)

    def _flop(self) -> list[float]:
        a = torch.randn(2048, 2048, device=self.device).to(self.dtype)
        return self._calls(lambda: a @ a, 1 / (2 * 2048**3))

    def _transform(self, signals: int, size: int) -> list[float]:
        blocks = max(1, min(signals // 64, 2**14 // size))
        data = torch.randn(blocks, 64, size, device=self.device)  # as the FFT convolution has them
        other = torch.fft.rfft(data[0])

        def there() -> None:
            for block in data:
                torch.fft.irfft(torch.fft.rfft(block, n=size).mul_(other), n=size)

        return self._calls(there, signals / (2 * blocks * 64))

    def _byte(self) -> list[float]:
        """Per byte of an operator that allocates its result, and results are kept, as activations are."""
        count = 2**24 if self.device.type == "cuda" else 2**19
        large = torch.randn(count, device=self.device)
        return self._calls(lambda: [large * large for _ in range(16)], 1 / (16 * 12 * count))

    def _gelu(self) -> list[float]:
        """Per element there and back, the traffic included."""
        x = torch.randn(2**18, device=self.device, requires_grad=True)
        return self._calls(lambda: torch.autograd.grad(F.gelu(x, approximate="tanh"), x, x), 1 / len(x))

    def _strided(self) -> list[float]:
        """Per byte of a transposing copy."""
        count = 2**11 if self.device.type == "cuda" else 2**8
        large = torch.randn(8, count, count, device=self.device)
        return self._calls(lambda: [part.t().contiguous() for part in large], 1 / (2 * large.nbytes))

    def _norm(self, rows: int, size: int) -> list[float]:
        part = min(rows, max(64, 2**20 // size))
        x = torch.randn(part, size, device=self.device, requires_grad=True)
        weight = torch.ones(size, device=self.device, requires_grad=True)
        return self._calls(lambda: torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), x), rows / part)

    def _cached(self) -> list[float]:
        small = torch.randn(2**16, device=self.device)
        return self._calls(lambda: small.mul_(1.0), 1 / (8 * len(small)), 20)

    def _special(self) -> list[float]:
        """Per element of tanh, its traffic in the caches included."""
        small = torch.randn(2**16, device=self.device)
        return self._calls(small.tanh_, 1 / len(small), 20)

    def _call(self) -> list[float]:
        """Per operator on next to nothing, forward and backward."""
        few = torch.ones(8, device=self.device, requires_grad=True)

        def calls() -> None:
            y = few
            for _ in range(50):
                y = y * few
            y.backward(few.detach())

        return self._calls(calls, 1 / 200)  # three operators backward for one forward


def count_work(config: RunConfig, fused: bool) -> dict[str, Work]:
    """Returns what every part does in one micro batch of a process, and "optimizer" in a step, by name.

    Args:
        config: the run's.
        fused: see `Ceilings`; back ends are then those that suit a GPU.
    """
    model, train = config.architecture(), config.train
    tokens, size, inner = train.micro_batch_size * train.sequence_length, model.hidden_size, model.intermediate_size
    item = 2 if train.dtype == "bfloat16" else 4
    vector = tokens * size * item
    parts = {name: Work() for name in PARTS}
    table = model.vocab_size * size * 4

    # gathered and written; backward zeros the gradient, adds to its rows, and adds it to the head's
    parts["embedding"].bytes = 5 * vector + 4 * table
    parts["embedding"].calls = 6
    _norms(parts["norms + residuals"], model, tokens, item, fused)
    grouped = (model.num_key_value_heads or model.num_attention_heads) / model.num_attention_heads
    for kind in model.block_types:
        if kind == "sliding_attention":
            parts["projections"].linears += [(tokens, size, int(size + 2 * grouped * size)), (tokens, size, size)]
            _attend(parts["attention"], model, train.micro_batch_size, train.sequence_length, item, fused)
        else:
            parts["projections"].linears.append((tokens, size, size))
            _convolve(parts["convolution"], model, train.micro_batch_size, train.sequence_length, item, fused)
        parts["MLP"].linears += [(tokens, size, 2 * inner), (tokens, inner, size)]
        # beside GELU a product 3, backward 3 and 3, the two gradients put together 4. Fused: all 3 and 5
        parts["MLP"].bytes += tokens * inner * item * (8 if fused else 13)
        parts["MLP"].gelu += tokens * inner
        parts["MLP"].calls += 10
    _loss(parts["head + loss"], model, tokens, item, fused)
    _update(parts["optimizer"], config, fused)
    return parts


def _norms(work: Work, model: FlashSTUConfig, tokens: int, item: int, fused: bool) -> None:
    """A residual sum is 3 vectors, and 3 where its two gradients meet; fused, with the norm, 4 and 6."""
    norms = 2 * model.num_hidden_layers + 1
    work.bytes = norms * tokens * model.hidden_size * item * (10 if fused else 6)
    work.norms = [] if fused else [(tokens, model.hidden_size)] * norms


def _attend(work: Work, model: FlashSTUConfig, batch: int, length: int, item: int, fused: bool) -> None:
    heads, dim, window = model.num_attention_heads, model.hidden_size // model.num_attention_heads, model.sliding_window
    vector = batch * length * model.hidden_size * item
    if model.position_embedding == "rope":
        # of queries and keys each: four half products, two half sums or differences, a joint; the same backward
        work.bytes += (8 if fused else 2 * 2 * 5) * vector
        work.strided += 0 if fused else 2 * 2 * 5 * vector
        work.calls += 40
    if fused:  # scores never leave the chip: two products forward, five backward
        work.flops += 7 * 2 * batch * heads * length * dim * mean_keys(length, window)
        work.bytes += 12 * vector
        return
    tile = min(length, _TILE)
    for start in range(0, length, tile):
        rows = min(tile, length - start)
        keys = min(start + rows, window + rows - 1)
        both = (batch * heads, rows, dim, keys), (batch * heads, rows, keys, dim)
        work.products += [*both, both[0], both[0], both[1], *2 * [(batch * heads, keys, rows, dim)]]
        scores = batch * heads * rows * keys
        # tanh, exp2 and their like: forward 2, backward 2. Passes: forward mask 2, maximum 1, shift 2, exp2 2, sum 1,
        # tanh 2; backward tanh 2, shift 2, mask 2, exp2 2, difference 2, product 3, tanh 3
        work.special += 4 * scores
        work.cached += 26 * scores * 4
        work.calls += 30
    # operands and their gradients, heads side by side or not
    work.bytes += 8 * vector
    work.strided += 16 * vector


def _convolve(work: Work, model: FlashSTUConfig, batch: int, length: int, item: int, fused: bool) -> None:
    size, dilation = model.hidden_size, model.stu_dilation
    features = model.num_filters * (2 if model.stu_branches == "separate" else 1)
    steps = -(-length // dilation)
    vector = batch * length * size * 4
    work.products += [(1, steps, features, size), (1, features, steps, size)]  # filters of all channels, and backward
    if fused:  # as one kernel: bands of the features and exponentials in registers
        work.flops += 2 * 2 * 32 * batch * length * size * features
        work.bytes += 5 * vector * item / 4
        return
    if model.conv_backend == "chunked" or (model.conv_backend == "auto" and length >= 1024):
        chunk, states = 32, 32
        chunks = batch * dilation * -(-steps // chunk)
        # the band of a channel; the exponentials that all share
        work.products += [(size, chunk, 2 * chunk, chunks)] * 3 + [(1, states, chunk, chunks * size)] * 4
        work.bytes += 30 * vector
        work.calls += 20 * math.log2(max(2, chunks)) + 200
        return
    padded, signals = 2 * steps, batch * dilation * size
    work.transforms += [(5 * signals + 4 * size, padded)]
    # transposed before and after, copies of what is kept
    work.bytes += 3 * 2 * vector
    work.strided += 5 * 2 * vector
    work.cached += 6 * signals * padded * 4  # conjugates, and a sum over sequences
    work.calls += 20 * size / 64 + 4 * batch


def _loss(work: Work, model: FlashSTUConfig, tokens: int, item: int, fused: bool) -> None:
    size, vocabulary = model.hidden_size, model.vocab_size
    work.linears.append((tokens, size, vocabulary))
    logits, weight = tokens * vocabulary, vocabulary * size
    # fused: logits and their gradients written and read once each, the maximum and sum read once.
    # Else, in float32: maximum 1, difference 2, exp 2, sum 1, scaling 2, and narrower copies
    work.bytes += logits * (5 * 2 if fused else 8 * 4 + (0 if item == 4 else 2 * 6)) + 4 * weight * 4
    work.special += logits
    work.calls += 30


def _update(work: Work, config: RunConfig, fused: bool) -> None:
    """Clipping: the norm reads gradients 1, the scaling 2. AdamW: fused 7; else decay 2, means 3 and 2 + 3, root 2,
    quotients 2 + 2, update 4."""
    model = config.architecture()
    size, inner = model.hidden_size, model.intermediate_size
    grouped = (model.num_key_value_heads or model.num_attention_heads) / model.num_attention_heads
    matrices = []
    for kind in model.block_types:
        attention = [(size, size), (size, int(grouped * size)), (size, int(grouped * size)), (size, size)]
        matrices += attention if kind == "sliding_attention" else [(size, size)]
        matrices += 3 * [(size, inner)]
    weights = model.count_weights() - (model.max_position_embeddings * model.num_filters if model.uses_stu else 0)
    by_muon = sum(a * b for a, b in matrices) if config.optimizer.name == "muon" else 0
    work.bytes = 4 * (3 * weights + (7 if fused else 20) * (weights - by_muon) + 13 * by_muon)
    work.calls = 40 * model.num_hidden_layers
    if by_muon:
        for few, many in map(sorted, matrices):
            steps = [(1, few, many, few), (1, few, few, few), (1, few, few, many)]
            work.products += steps * _NEWTON_SCHULZ
            work.bytes += _NEWTON_SCHULZ * 4 * (2 * few * few + 2 * few * many)  # addmm copies what it adds to


def estimate_step(config: RunConfig, processes: int, ceilings: Ceilings) -> dict[str, float]:
    """Returns the seconds of one optimizer step by part; their sum is the step's."""
    # processes that share a sequence have a part of a micro batch each
    micro_batches = config.sequences_per_step(processes) / (processes * config.train.micro_batch_size)
    work = count_work(config, ceilings.fused)
    return {name: ceilings.seconds(part) * (1 if name == "optimizer" else micro_batches) for name, part in work.items()}


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Measured:
    """Returns the ceilings of a device at hand; what they have timed stays."""
    return Measured(device, dtype)


def estimates(config: RunConfig, processes: int, here: Ceilings | None) -> dict[str, dict[str, float]]:
    """Returns the seconds of a step by part, on this device ("this cpu") if given, and on GPUs by their data sheets."""
    columns = {} if here is None else {f"this {here.name}": estimate_step(config, processes, here)}
    return columns | {name: estimate_step(config, processes, sheet) for name, sheet in DATA_SHEETS.items()}


def table_of(columns: dict[str, dict[str, float]], config: RunConfig, processes: int) -> list[list[str]]:
    """Returns `estimates` as a table: a header, a row for each part in ms, the step, tokens/s and MFU."""
    totals = {name: sum(column.values()) for name, column in columns.items()}
    tokens, flops = config.train.global_batch_size, train_flops(config.architecture(), config.train.sequence_length)
    peaks = {name: DATA_SHEET_RATES[name] * 1e12 * processes for name in DATA_SHEETS}
    shares = [f"{flops * tokens / total / peaks[name]:.0%}" if name in peaks else "" for name, total in totals.items()]
    return [
        ["estimate, ms", *columns],
        *([part, *(milliseconds(column[part]) for column in columns.values())] for part in PARTS),
        ["step", *map(milliseconds, totals.values())],
        ["tokens/s", *(f"{tokens / total:,.0f}" for total in totals.values())],
        ["MFU", *shares],
    ]


def milliseconds(seconds: float) -> str:
    """Returns milliseconds as text, of small ones more digits."""
    return f"{1e3 * seconds:,.{1 if seconds >= 0.01 else 2}f}"
