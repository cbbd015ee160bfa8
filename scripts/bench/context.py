"""Long sequences in parts: tokens/s, memory and bytes sent, in pieces on one device and in shards over processes.

    python scripts/bench/context.py [--lengths 8192 32768] [--processes 1 2 4] [--long 131072] [--output results/cpu]

Trains the quickstart's model at these lengths on random tokens, one sequence a step, on CPUs with gloo: one process
that takes it whole, one that takes longer ones in pieces, and several that share it. Processes share the machine's
cores, so their tokens/s say what the exchange costs, not what more machines gain. Of the repeats, each round taking all
in turn, the best is shown.

Bytes are counted while they are sent. Beside them is what the model of the cost says, which for the configuration of a
million tokens also says what the exchange takes on H100s: an estimate from its makers' rates.
"""

import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plots import bars
from torch.multiprocessing.spawn import spawn

from flash_stu.arguments import integer, output_directory
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.model.config import LARGEST_LENGTH, FlashSTUConfig
from flash_stu.ops import exchange
from flash_stu.results import environment, finish, page, table
from flash_stu.training import join_world, load_config
from flash_stu.training.flops import train_flops
from flash_stu.training.initialization import build_model
from flash_stu.training.optimizer import build_optimizers
from flash_stu.training.parallel import parallelize
from flash_stu.training.run_size import handed_on
from flash_stu.training.step import train_step

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = {"flops": 0.4 * 989.5e12, 8: 450e9, 64: 50e9}  # products as trained; bytes/s by NVLink and InfiniBand, one way


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--lengths", type=integer(256, LARGEST_LENGTH), nargs="+", default=[8192, 32768])
    parser.add_argument("--processes", type=integer(1, 64), nargs="+", default=[1, 2, 4])
    parser.add_argument("--long", type=integer(256, LARGEST_LENGTH), nargs="*", default=[131072], help="run in pieces")
    parser.add_argument("--piece", type=integer(256, LARGEST_LENGTH), default=8192, help="tokens of a piece")
    parser.add_argument("--repeats", type=integer(1, 1000), default=2)
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write context.json and .png there")
    args = parser.parse_args()
    runs = [(length, count, 1) for length in args.lengths for count in args.processes]
    runs += [(length, 1, -(-length // args.piece)) for length in args.long]
    rows = {run: measure(*run) for run in runs}
    for _ in range(args.repeats - 1):
        for run in runs:
            again = measure(*run)
            rows[run]["tokens_per_second"] = max(rows[run]["tokens_per_second"], again["tokens_per_second"])
    results = {
        "environment": environment(torch.device("cpu")),
        "rows": list(rows.values()),
        "estimates": [estimate(ranks) for ranks in (8, 64)],
    }
    finish("context", results, render, plot, args.output)


def measure(length: int, processes: int, pieces: int) -> dict[str, Any]:
    """One row: the second of two steps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_train, (processes, port, length, pieces, queue), nprocs=processes)
    found = [queue.get() for _ in range(processes)]
    return {
        "length": length,
        "processes": processes,
        "pieces": pieces,
        "tokens_per_second": length / max(row["seconds"] for row in found),
        "peak_bytes": max(row["peak"] for row in found),
        "sent_bytes": max(row["sent"] for row in found),
    } | {"modelled_bytes": modelled_bytes(load_quickstart(length).architecture(), processes, 4)}


def load_quickstart(length: int, *overrides: str) -> Any:
    """The quickstart's model for sequences of this length, one a step."""
    lengths = [f"{key}={length}" for key in ("model.max_position_embeddings", "train.sequence_length")]
    batch = [f"train.global_batch_size={length}", "train.micro_batch_size=1"]
    return load_config(CONFIGS / "quickstart.yaml", [*lengths, *batch, *overrides])


def _train(rank: int, processes: int, port: int, length: int, pieces: int, queue: Any) -> None:
    torch.set_num_threads(1)
    launch = {
        "WORLD_SIZE": processes,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({key: str(value) for key, value in launch.items()})
    config = load_quickstart(length, f"parallel.context={processes}", f"train.sequence_chunks={pieces}")
    with join_world(config) as world:
        model = parallelize(build_model(config.architecture()), config, world)
        optimizers = build_optimizers(model, config.optimizer)
        batch = torch.randint(config.model["vocab_size"], (1, length + 1), generator=torch.Generator().manual_seed(0))
        sent, seconds = [0], 0.0
        for _ in range(2):
            sent = _count_sent() if world.context > 1 else [0]
            start = time.perf_counter()
            train_step(model, optimizers, batch, config, world)
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        linear = config.architecture().block_types.count("linear_attention")
        queue.put({"seconds": seconds, "peak": peak, "sent": sum(sent) / linear})


def _count_sent() -> list[int]:
    """Returns a list that gets the bytes of everything that this process sends for its layers from now on."""
    sent: list[int] = []
    start = getattr(dist.batch_isend_irecv, "plain", dist.batch_isend_irecv)
    gather = getattr(exchange.gather, "plain", exchange.gather)

    def counted_start(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return start(operations)

    def counted_gather(own: torch.Tensor, group: Any) -> torch.Tensor:
        sent.append(2 * own.nbytes * (dist.get_world_size(group) - 1))  # as much in the backward pass
        return gather(own, group)

    counted_start.plain, counted_gather.plain = start, gather  # pyright: ignore[reportFunctionMemberAccess]
    dist.batch_isend_irecv, exchange.gather = counted_start, counted_gather
    return sent


def modelled_bytes(config: FlashSTUConfig, ranks: int, size: int) -> float:
    """Returns the bytes that a rank sends in a step for a pair of an STU and an attention layer, one sequence.

    Forward and backward: a halo of a chunk of inputs and of window - 1 keys and values, in numbers of `size` bytes, and
    the states of the exponentials, in float32, to every other rank. The first rank has no backward halo to send, the
    last no forward one.
    """
    if ranks == 1:
        return 0.0
    backend = "chunked" if size == 4 else "triton"
    kinds = ("linear_attention", "sliding_attention")
    halos, states = map(sum, zip(*(handed_on(config, kind, size, backend) for kind in kinds), strict=True))
    return min(ranks - 1, 2.0) * halos + 2.0 * (ranks - 1) * states


def estimate(ranks: int) -> dict[str, float]:
    """What the exchange takes beside the products in a step of configs/flash_stu_340m_1m.yaml on H100s."""
    config = load_config(CONFIGS / "flash_stu_340m_1m.yaml")
    model, length = config.architecture(), config.train.sequence_length
    pairs = model.block_types.count("linear_attention")
    sent = pairs * modelled_bytes(model, ranks, 2)
    return {
        "ranks": ranks,
        "sent_bytes": sent,
        "exchange_seconds": sent / H100[ranks],
        "product_seconds": train_flops(model, length) * length / ranks / H100["flops"],
    }


def render(results: dict) -> str:
    """The tables."""
    rows = [
        [
            f"{row['length']:,}",
            str(row["processes"]),
            str(row["pieces"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['sent_bytes'] / 2**10:,.0f}",
            f"{row['modelled_bytes'] / 2**10:,.0f}",
        ]
        for row in results["rows"]
    ]
    header = ["tokens", "processes", "pieces", "tokens/s", "GiB a process", "KiB sent a layer pair", "modelled"]
    on_gpus = [
        [
            str(row["ranks"]),
            f"{row['sent_bytes'] / 2**20:.0f}",
            f"{1000 * row['exchange_seconds']:.2f}",
            f"{row['product_seconds']:.2f}",
        ]
        for row in results["estimates"]
    ]
    columns = ["H100s (estimate)", "MiB sent a step and rank", "ms at full rate", "s of products"]
    return page(results, table(header, rows), table(columns, on_gpus))


def plot(results: dict, path: Path) -> None:
    """Draw rates and memory of every way of running a length."""
    rates, memory = {}, {}
    for row in results["rows"]:
        name = f"{row['length']:,} tokens, {row['processes']} processes"
        name += f", {row['pieces']} pieces" if row["pieces"] > 1 else ""
        rates[name], memory[name] = [row["tokens_per_second"]], [row["peak_bytes"] / 2**30]
    bars({"tokens/s": rates, "GiB a process": memory}, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
