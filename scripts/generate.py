"""Generate text from a model directory; one prompt streams as it comes, several make a batch.

python scripts/generate.py --model runs/quickstart/final --prompt "The function returns" --max-new-tokens 200
"""

import sys
import time
from argparse import Namespace

from flash_stu.arguments import SEED, any_path, integer, number
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.reading import decode, read_text

_DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    args = parse()

    import torch

    from flash_stu.devices import choose_device, default_dtype
    from flash_stu.generation import Sampling, generate_text
    from flash_stu.training.model_source import load_source

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    prompts = args.prompt + (read_prompts(args.prompt_file) if args.prompt_file else [])
    if not prompts:
        raise UserError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    for text in prompts + args.stop:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{text!r} is not UTF-8 text")
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    model, tokenizer = load_source(args.model, device, dtype)

    alone = len(prompts) == 1
    texts = list(prompts)
    count, started = 0, time.perf_counter()
    for pieces in generate_text(model, tokenizer, prompts, args.max_new_tokens, sampling, args.stop, args.compile):
        if alone:
            print((texts[0] if count == 0 else "") + pieces[0], end="", flush=True)
        else:
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        count += 1
    seconds = time.perf_counter() - started
    if not alone:
        print("\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1)), end="")
    batch = "" if alone else f" x {len(prompts)} prompts"
    print(flush=True)
    print(f"[{count} tokens{batch}, {count * len(prompts) / seconds:.1f} tokens/s]", file=sys.stderr)


def parse() -> Namespace:
    """Returns the command line."""
    parser = ArgumentParser(description="Generate text from a model directory.")
    add = parser.add_argument
    add("--model", type=any_path, required=True, help="model directory, training run, or its checkpoints/step-N")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add("--prompt-file", type=any_path, metavar="FILE", help="one prompt per line; - reads standard input")
    add("--max-new-tokens", type=integer(), default=200, metavar="N")
    add("--temperature", type=number(0, 1e6), default=0.8, metavar="T", help="0: the likeliest token; default 0.8")
    add("--top-k", type=integer(), metavar="K", help="sample among the K most likely tokens")
    top_p = number(0, 1, above=True)
    add("--top-p", type=top_p, default=0.95, metavar="P", help="among the fewest that add up to P; default 0.95")
    add("--min-p", type=number(0, 1), metavar="P", help="among those at least P times as likely as the likeliest")
    penalty = number(1e-3, 1e3)
    add("--repetition-penalty", type=penalty, default=1.0, metavar="R", help="above 1: repeat less; default 1")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=SEED, default=0, help="the same seed gives the same text; default 0")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    add("--dtype", choices=_DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add("--compile", action="store_true", help="compile the step: faster for long texts, after a minute or so")
    return parser.parse_args()


def read_prompts(name: str) -> list[str]:
    """Returns the lines of a file, blank ones left out; a line ends at a newline and nowhere else.

    Raises:
        UserError: for a file that cannot be read or holds no prompt.
    """
    text = decode(sys.stdin.buffer.read(), "--prompt-file -") if name == "-" else read_text(name, "--prompt-file")
    prompts = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {name}: no prompt in it; needed: one per line")
    return prompts


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
