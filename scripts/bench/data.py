"""Time the preparation of data against the bare tokenizer, and the loader.

    python scripts/bench/data.py [--text PATH] [--tokenizer tiktoken:o200k_base] [--megabytes N] [--repeats 5]

The bare tokenizer encodes documents that are in memory already, `tiktoken.encode_ordinary_batch` on all cores. The
preparation is everything that stands between a parquet file of the same documents and a corpus ready for training:
reading, cleaning, splitting by hash, encoding, writing shards, checksums. They take turns, so that a drifting machine
hits both alike. The loader reads shuffled windows of 8192 tokens, micro batches of 8, in one process, from files that
the page cache holds.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from flash_stu.data import BatchLoader, DataConfig, Prefetcher, TokenDataset, iter_documents, load_tokenizer, prepare
from flash_stu.errors import ArgumentParser, UserError, run_cli

_LENGTH, _BATCH, _STEPS = 8192, 8, 150


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", metavar="PATH", default="embedded", help="a local dataset (default: embedded)")
    parser.add_argument("--tokenizer", default="tiktoken:o200k_base", help="an encoding of tiktoken")
    parser.add_argument("--megabytes", type=float, default=100, help="of text")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not args.tokenizer.startswith("tiktoken:"):
        raise UserError(f"--tokenizer is {args.tokenizer!r}; allowed: tiktoken:<name>")
    load_tokenizer(args.tokenizer)  # raises if there is none such
    encoding = tiktoken.get_encoding(args.tokenizer.removeprefix("tiktoken:"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    documents = gather(args.text, args.megabytes * 1e6)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    print(f"tiktoken {tiktoken.__version__}, Python {platform.python_version()}, {cores} core(s), {args.tokenizer}")
    print(f"{len(documents)} documents of {args.text}, {megabytes:.1f} MB")
    print(f"median (min-max) of {args.repeats}\n")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.parquet"
        pq.write_table(pa.table({"text": documents}), file, compression="zstd", row_group_size=1000)
        raw, whole, ratios = [], [], []
        for number in range(args.repeats):
            config = DataConfig(dataset=str(file), tokenizer=args.tokenizer, cache_dir=f"{folder}/{number}")
            raw.append(seconds(lambda: encoding.encode_ordinary_batch(documents, num_threads=cores)))
            whole.append(seconds(lambda config=config: prepare(config, progress=False)))
            ratios.append(raw[-1] / whole[-1])
        data = prepare(config, progress=False)
        tokens = len(data.train) + len(data.validation) - len(documents)  # without the ends of text
        print(f"| {'preparation':34} | {'MB/s':>18} | {'M tokens/s':>18} | {'of the bare rate':>18} |")
        print(f"|{'-' * 36}|{'-' * 19}:|{'-' * 19}:|{'-' * 19}:|")
        for name, times, share in [
            ("bare encode_ordinary_batch", raw, "100 %"),
            ("whole preparation", whole, spread([100 * ratio for ratio in ratios], "%")),
        ]:
            rates = [spread([amount / time for time in times]) for amount in (megabytes, tokens / 1e6)]
            print(f"| {name:34} | {rates[0]:>18} | {rates[1]:>18} | {share:>18} |")

        print(f"\n| {'loader':34} | {'M tokens/s':>18} |")
        print(f"|{'-' * 36}|{'-' * 19}:|")
        for name, read in {"read by the caller": read_directly, "read ahead by a thread": read_ahead}.items():
            times = [seconds(lambda read=read: read(data.train)) for _ in range(args.repeats)]
            rates = [_STEPS * _BATCH * _LENGTH / 1e6 / time for time in times]
            print(f"| {name:34} | {spread(rates):>18} |")


def gather(dataset: str, num_bytes: float) -> list[str]:
    """Take a dataset's documents, again and again if need be, until they are enough text."""
    texts, size = [], 0
    while size < num_bytes:
        for _, text in iter_documents(DataConfig(dataset=dataset)):
            texts.append(text)
            size += len(text.encode())
            if size >= num_bytes:
                break
        if not texts:
            raise UserError(f"--text {dataset!r} is empty")
    return texts


def read_directly(dataset: TokenDataset) -> None:
    loader = BatchLoader(dataset, _LENGTH, _BATCH, seed=0)
    for step in range(_STEPS):
        loader.batch(step)


def read_ahead(dataset: TokenDataset) -> None:
    with Prefetcher(BatchLoader(dataset, _LENGTH, _BATCH, seed=0), 0, _STEPS - 1) as batches:
        for step in range(_STEPS):
            batches.get(step)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call; what it returns is dropped after the clock has stopped."""
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def spread(samples: list[float], unit: str = "") -> str:
    middle = f"{statistics.median(samples):.2f} ({min(samples):.2f}-{max(samples):.2f})"
    if statistics.median(samples) >= 10:
        middle = f"{statistics.median(samples):.0f} ({min(samples):.0f}-{max(samples):.0f})"
    return f"{middle} {unit}".strip()


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
