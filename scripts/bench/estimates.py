"""Time of a training step on GPUs, by part: estimates from data sheets, until a GPU has measured it.

    python scripts/bench/estimates.py [--config configs/flash_stu_340m.yaml ...] [--output results]

The counts and the rates are those of flash_stu/training/step_time.py; nothing is measured here. `python train.py
--dry-run` prints the same for any config, and for the device at hand.
"""

from pathlib import Path

from plots import bars

from flash_stu.arguments import input_file, output_directory
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.results import finish, table
from flash_stu.training import load_config
from flash_stu.training.step_time import DATA_SHEETS, PARTS, estimates, table_of

CONFIGS = ["configs/flash_stu_340m.yaml", "configs/flash_stu_550m.yaml"]
ONE = ["parallel.strategy=none", "train.global_batch_size=32768", "optimizer.fused=auto"]  # one GPU, one micro batch


def render(results: dict) -> str:
    """Per config a table of the parts."""
    rates = ", ".join(
        f"{name} {sheet.flops / 1e12:,.0f} TFLOP/s and {sheet.bandwidth / 1e12:.2f} TB/s"
        for name, sheet in DATA_SHEETS.items()
    )
    parts = [f"Estimates, not measurements: every product and byte at {rates}, elementwise operators fused."]
    for row in results["rows"]:
        header, *cells = row["table"]
        parts += [f"{Path(row['config']).stem}, a step of {row['tokens']:,} tokens on one GPU.", table(header, cells)]
    return "\n\n".join(parts)


def plot(results: dict, path: Path) -> None:
    first = results["rows"][0]
    columns = first["parts"].items()
    bars({f"{name}, ms": {part: [1e3 * column[part]] for part in PARTS} for name, column in columns}, path)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--config", type=input_file, action="append", help=f"default: {' and '.join(CONFIGS)}")
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write estimates.json and .png there")
    args = parser.parse_args()
    results: dict = {"rows": []}
    for path in args.config or CONFIGS:
        config = load_config(path, ONE)
        columns = estimates(config, 1, None)
        row = {"config": path, "tokens": config.train.global_batch_size, "parts": columns}
        results["rows"].append(row | {"table": table_of(columns, config, 1)})
    finish("estimates", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
