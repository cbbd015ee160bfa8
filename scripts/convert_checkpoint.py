"""Convert a checkpoint of the published code into a model directory of this project.

    python scripts/convert_checkpoint.py --checkpoint model.safetensors --config config.json --output DIR \
        [--filters spectral_filters.npy] [--tokenizer tiktoken:o200k_base]

The result gives the published logits, quirks included (see flash_stu/model/published.py); --positions rope asks for
standard rotary positions instead.
"""

import numpy as np
import torch
from transformers.utils import logging

from flash_stu.arguments import any_path, input_file, output_directory
from flash_stu.data import load_tokenizer
from flash_stu.errors import ArgumentParser, UserError, reason, run_cli
from flash_stu.files import check_output, replacing_directory
from flash_stu.model.published import POSITIONS, convert, read_config
from flash_stu.model.weights import check_finite

_KIND = "converted model"


def main() -> None:
    parser = ArgumentParser(description="Convert a checkpoint of the published code into a model directory.")
    parser.add_argument("--checkpoint", type=input_file, required=True, help=".safetensors file")
    parser.add_argument("--config", type=input_file, required=True, help="its config.json, in the published layout")
    parser.add_argument(
        "--output", type=output_directory, required=True, help="model directory to write; replaces a conversion"
    )
    parser.add_argument(
        "--filters", type=input_file, help=".npy (seq_len, num_filters): the filters it was trained with"
    )
    parser.add_argument("--positions", choices=POSITIONS, default="published")
    parser.add_argument("--tokenizer", type=any_path, help="to put beside the weights, such as tiktoken:o200k_base")
    args = parser.parse_args()

    logging.disable_progress_bar()
    check_output(args.output, _KIND, "--output")
    config = read_config(args.config, args.positions)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    filters = None if args.filters is None else _read_filters(args.filters)
    if config.uses_stu and filters is None:
        print(
            f"no --filters: unless the checkpoint holds them, numpy's eigh is asked for the filters of length "
            f"{config.max_position_embeddings}"
        )
    model = convert(args.checkpoint, config, filters)
    if tokenizer is not None:
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id

    with replacing_directory(args.output, _KIND, "--output") as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.to_transformers().save_pretrained(temporary)
    print(f"wrote {args.output}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}")


def _read_filters(path: str) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--filters {path}: not a .npy array: {reason(error)}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iuf":
        found = f"shape {array.shape}, dtype {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"--filters {path}: {found}; a matrix (seq_len, num_filters) of real numbers is needed")
    filters = torch.from_numpy(array.astype(np.float64))
    check_finite({"the matrix": filters}, f"--filters {path}")
    return filters


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
