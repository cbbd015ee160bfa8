"""Tokenize the dataset of a run, so that training finds its tokens.

    python scripts/prepare_data.py --config configs/flash_stu_340m.yaml [data.cache_dir=DIR ...] [--part i/N]

Uses all cores. May be stopped or killed at any moment: the same command resumes there. With --part, N machines that
share data.cache_dir do one part each (i from 1 to N), in any order; the last one to finish joins them.
"""

import re
import signal
import sys

from flash_stu.arguments import input_file
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.settings import shown


def main() -> int:
    """Parse the command line and tokenize; returns the exit status."""
    parser = ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--config", type=input_file, required=True, metavar="YAML", help="a run; only its data section is used"
    )
    parser.add_argument("--part", default="1/1", metavar="i/N", help="do the i-th of N parts (default: everything)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the config's")
    arguments = parser.parse_intermixed_args()
    part, parts = parse_part(arguments.part)

    from flash_stu.data import prepare, prepare_part
    from flash_stu.training.run_config import load_config

    config = load_config(arguments.config, arguments.overrides).data

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        unfinished = prepare_part(config, part - 1, parts)
        if unfinished:
            missing = ", ".join(f"{index + 1}/{parts}" for index in unfinished)
            print(f"part {part} of {parts} is done; still to be finished: --part {missing}")
            return 0
        data = prepare(config)
    except KeyboardInterrupt:
        print("stopped; the same command resumes here", file=sys.stderr)
        return 130
    for name, split in [("train", data.train), ("validation", data.validation)]:
        size = f"{len(split):,} tokens, {split.num_documents:,} documents, {split.num_bytes / 1e6:,.1f} MB of text"
        print(f"{name}: {size}, {len(split.manifest.shards)} shard(s)")
    print(data.directory)
    return 0


def parse_part(text: str) -> tuple[int, int]:
    """Returns i and N of "i/N".

    Raises:
        UserError: unless i is from 1 to N.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part is {shown(text)}; allowed: i/N with i from 1 to N, such as 1/4")
    return part, parts


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
