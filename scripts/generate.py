"""Generate text from a model directory, streaming it as it comes.

python scripts/generate.py --model runs/quickstart/final --prompt "The function returns" --max-new-tokens 200
"""

import sys
import time

import torch

from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.generation import generate_tokens
from flash_stu.loading import default_device, default_dtype, load_model, load_model_tokenizer


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory or training run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu; by default a GPU if there is one")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; allowed: 1 or more")

    device = torch.device(args.device) if args.device else default_device()
    tokenizer = load_model_tokenizer(args.model)
    model = load_model(args.model, device, default_dtype(device))
    prompt = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False).input_ids.long().to(device)

    print(args.prompt, end="", flush=True)
    count, pending, started = 0, [], time.perf_counter()
    for token in generate_tokens(
        model,
        prompt,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        tokenizer.eos_token_id,
        args.seed,
    ):
        count += 1
        pending.append(int(token))
        text = tokenizer.decode(pending, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # an unfinished UTF-8 sequence waits for its next token
            print(text, end="", flush=True)
            pending = []
    seconds = time.perf_counter() - started
    print(f"\n[{count} tokens, {count / seconds:.1f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
