"""Time the preparation of data against the bare tokenizer, and the loader.

    python scripts/bench/data.py [--text PATH] [--tokenizer tiktoken:o200k_base] [--megabytes N] [--output results/cpu]

The bare tokenizer encodes documents that are in memory already, `tiktoken.encode_ordinary_batch` on all cores. The
preparation is everything that stands between a parquet file of the same documents and a corpus ready for training:
reading, cleaning, splitting by hash, encoding, writing shards, checksums. They take turns, so that a drifting machine
hits both alike. The loader reads shuffled windows of 8192 tokens, micro batches of 8, in one process, from files that
the page cache holds.
"""

import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch
from measuring import seconds, take_turns
from plots import bars

from flash_stu.arguments import any_path, integer, number, output_directory
from flash_stu.data import BatchLoader, DataConfig, TokenDataset, iter_documents, load_tokenizer, prepare
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.results import environment, finish, page, spread, table

CPU = torch.device("cpu")
LIMIT = 60  # seconds after which something is not repeated
_LENGTH, _BATCH, _STEPS = 8192, 8, 150


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--text", type=any_path, metavar="PATH", default="embedded", help="a local dataset (default: embedded)"
    )
    parser.add_argument("--tokenizer", type=any_path, default="tiktoken:o200k_base", help="an encoding of tiktoken")
    parser.add_argument("--megabytes", type=number(0, 1e6, above=True), default=100, help="of text")
    parser.add_argument("--repeats", type=integer(1, 10000), default=5)
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write data.json and .png there")
    args = parser.parse_args()
    if not args.tokenizer.startswith("tiktoken:"):
        raise UserError(f"--tokenizer is {args.tokenizer!r}; allowed: tiktoken:<name>")
    load_tokenizer(args.tokenizer)  # raises if there is none such
    documents = gather(args.text, args.megabytes * 1e6)
    results = {
        "environment": environment(CPU),
        "tiktoken": tiktoken.__version__,
        "tokenizer": args.tokenizer,
        "text": Path(args.text).name,
        "documents": len(documents),
        "megabytes": sum(len(text.encode()) for text in documents) / 1e6,
        **measure(documents, args),
    }
    finish("data", results, render, plot, args.output)


def measure(documents: list[str], args: Namespace) -> dict:
    """Seconds of the bare tokenizer, the preparation and the loader, and how many tokens were prepared and read."""
    encoding = tiktoken.get_encoding(args.tokenizer.removeprefix("tiktoken:"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder) / "documents.parquet", Path(folder) / "tokens"
        pq.write_table(pa.table({"text": documents}), file, compression="zstd", row_group_size=1000)
        config = DataConfig(dataset=str(file), tokenizer=args.tokenizer, cache_dir=str(cache))

        def whole() -> float:
            shutil.rmtree(cache, ignore_errors=True)
            return seconds(lambda: prepare(config, progress=False), CPU)

        print(f"preparing {len(documents):,} documents on {cores} cores", flush=True)
        bare = {"bare": lambda: seconds(lambda: encoding.encode_ordinary_batch(documents, num_threads=cores or 1), CPU)}
        prepared = take_turns(bare | {"whole": whole}, args.repeats, LIMIT)
        data = prepare(config, progress=False)
        read = take_turns({"read by the caller": lambda: seconds(lambda: load(data.train), CPU)}, args.repeats, LIMIT)
        tokens = len(data.train) + len(data.validation) - len(documents)  # without the ends of text
    return {
        "cores": cores,
        "tokens": tokens,
        **prepared,
        "tokens_read": _STEPS * _BATCH * _LENGTH,
        "loaders": [{"loader": name, "seconds": taken} for name, taken in read.items()],
    }


def render(results: dict) -> str:
    """A table of the preparation and one of the loader."""
    what = (
        f"tiktoken {results['tiktoken']}, {results['cores']} cores, {results['tokenizer']}; {results['documents']:,} "
        f"documents of `{results['text']}`, {results['megabytes']:.0f} MB."
    )
    names, rows = {"bare": "bare encode_ordinary_batch", "whole": "whole preparation"}, []
    for key, name in names.items():
        ratios = [100 * bare / taken for bare, taken in zip(results["bare"], results[key], strict=False)]
        rates = [spread(_rates(amount, results[key]), 1) for amount in (results["megabytes"], results["tokens"] / 1e6)]
        rows.append([name, *rates, spread(ratios, 1)])
    header = ["preparation", "MB/s", "M tokens/s", "% of the bare rate"]
    loaders = [[row["loader"], spread(_loader_rates(results, row), 1)] for row in results["loaders"]]
    return page(results, what, table(header, rows), table(["loader", "M tokens/s"], loaders))


def _rates(amount: float, taken: list[float]) -> list[float]:
    return [amount / second for second in taken]


def _loader_rates(results: dict, row: dict) -> list[float]:
    return _rates(results["tokens_read"] / 1e6, row["seconds"])


def plot(results: dict, path: Path) -> None:
    names = {"bare": "bare tokenizer", "whole": "whole preparation"}
    prepared = {name: _rates(results["tokens"] / 1e6, results[key]) for key, name in names.items()}
    loaders = {row["loader"]: _loader_rates(results, row) for row in results["loaders"]}
    bars({"preparation, M tokens/s": prepared, "loader, M tokens/s": loaders}, path)


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


def load(dataset: TokenDataset) -> None:
    loader = BatchLoader(dataset, _LENGTH, _BATCH, seed=0)
    for step in range(_STEPS):
        loader.batch(step)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
