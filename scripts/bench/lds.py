"""The LDS layer: prefill against token loops, and one step against computing all filter outputs of every channel.

    python scripts/bench/lds.py [--hidden-size 896] [--state-dim 160] [--length 8192] [--output results/cpu]

All rows compute the same layer, its input projection included. The comparisons are what the literature's
implementation does and what the definition says, both in float64 with 2K filter outputs per channel. Loops are timed on
--loop-tokens tokens and scaled up. Figures are medians with their spread, all taken in turn.
"""

import statistics
from argparse import Namespace
from pathlib import Path

import torch
from measuring import seconds, take_turns
from plots import bars

from flash_stu import FlashSTUConfig, spectral_filters
from flash_stu.arguments import SECONDS, integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.model.config import LARGEST_LENGTH
from flash_stu.model.layers import LDS, STU
from flash_stu.model.layers.context import SequenceContext
from flash_stu.results import environment, finish, page, spread, table
from spectralds.bank import FilterBank
from spectralds.distillation import fold
from spectralds.fit import LDSFit, fit_lds
from spectralds.options import MAX_STATE_DIM


def make_layer(config: FlashSTUConfig, states: int, device: torch.device) -> tuple[LDS, STU, LDSFit]:
    """An STU layer with random weights, its distilled form, and the fit between the two."""
    torch.manual_seed(0)
    _, phi = spectral_filters(config.max_position_embeddings, config.num_filters)
    stu = STU(config)
    torch.nn.init.normal_(stu.in_proj.weight, std=config.hidden_size**-0.5)
    stu.reset_parameters(torch.nn.init)
    fit = fit_lds(FilterBank(phi), states, "quadrature", torch.float32, config.stu_dilation)
    layer = LDS(config)
    layer.load_state_dict(fold(fit, stu) | {"in_proj.weight": stu.in_proj.weight.detach()})
    return layer.to(device), stu.to(device), fit


def recurrence_loop(x: torch.Tensor, stu: STU, fit: LDSFit) -> torch.Tensor:
    """Token by token in float64: all states of every channel, 2K outputs per channel from them, then the weights."""
    decay, out = fit.A.to(x.device), (fit.B[:, None] * fit.C).to(x.device)
    weights = torch.cat([stu.M_filters[0], stu.M_filters[-1]]).double().t().contiguous()
    state, outputs = x.new_zeros(x.shape[2], len(decay), dtype=torch.float64), []
    for t in range(x.shape[1]):
        state = state * decay + stu.in_proj(x[:, t]).double().t()
        outputs.append((state @ out * weights).sum(dim=1))
    return torch.stack(outputs)[None].to(x.dtype)


def definition_step(x: torch.Tensor, past: torch.Tensor, stu: STU, features: torch.Tensor) -> torch.Tensor:
    """One token in float64 from the definition: 2K sums over all lags of every channel, then the weights."""
    weights = torch.cat([stu.M_filters[0], stu.M_filters[-1]]).double()
    past[-1] = stu.in_proj(x[0, 0]).double()
    return ((features @ past) * weights).sum(dim=0)


@torch.inference_mode()
def measure(args: Namespace, device: torch.device) -> dict:
    """Seconds of everything: of the whole sequence by its rows, of one token by its rows."""
    config = FlashSTUConfig(
        hidden_size=args.hidden_size,
        num_attention_heads=1,
        max_position_embeddings=args.length,
        lds_state_dim=args.state_dim,
    )
    layer, stu, fit = make_layer(config, args.state_dim, device)
    context = SequenceContext()
    x = torch.randn(1, args.length, args.hidden_size, device=device)
    short = x[:, : args.loop_tokens]
    layer_y, state = layer.prefill(short, context)
    exact = recurrence_loop(short, stu, fit)

    def step_loop() -> None:
        past = state
        for t in range(short.shape[1]):
            _, past = layer.step(short[:, t : t + 1], context, past)

    def projection_loop() -> None:
        for t in range(short.shape[1]):
            layer.in_proj(short[:, t : t + 1])

    features = fit.impulse_response(args.length).t().contiguous().to(device)
    history = torch.randn(args.length, args.hidden_size, dtype=torch.float64, device=device)
    calls = {
        "prefill": lambda: layer.prefill(x, context),
        "forward": lambda: layer(x, context),
        "steps": step_loop,
        "projection": projection_loop,
        "recurrence": lambda: recurrence_loop(short, stu, fit),
        "definition": lambda: definition_step(x[:, :1], history, stu, features),
    }
    calls = {name: lambda f=f: seconds(f, device) for name, f in calls.items()}
    taken = take_turns(calls, args.repeats, args.seconds)

    def scaled(name: str, tokens: float) -> list[float]:
        return [second * tokens / short.shape[1] for second in taken[name]]

    sequence = {
        "prefill: matrix products over chunks": taken["prefill"],
        "forward: FFT convolution, no state": taken["forward"],
        "loop of this layer's steps": scaled("steps", args.length),
        "loop in float64, 2K outputs per channel": scaled("recurrence", args.length),
    }
    token = {
        "step": scaled("steps", 1),
        "of which the input projection": scaled("projection", 1),
        "2K outputs per channel in float64, by recurrence": scaled("recurrence", 1),
        "2K outputs per channel in float64, by sums over all lags": taken["definition"],
    }
    return {
        "difference": ((layer_y - exact).norm() / exact.norm()).item(),
        "sequence": [{"what": what, "seconds": samples} for what, samples in sequence.items()],
        "token": [{"what": what, "seconds": samples} for what, samples in token.items()],
    }


def render(results: dict) -> str:
    """A table of the whole sequence, and one of one token."""
    shape = (
        f"Width {results['hidden_size']}, {results['state_dim']} states, float32; over {results['loop_tokens']} tokens "
        f"the prefill differs from the loop in float64 by {results['difference']:.1e}, relative."
    )
    parts = [
        table([what, unit, over], _rows(results[key], scale))
        for key, what, unit, over, scale in (
            ("sequence", f"{results['length']:,} tokens", "ms", "over prefill", 1e3),
            ("token", "one token", "µs", "over step", 1e6),
        )
    ]
    return page(results, shape, *parts)


def _rows(rows: list[dict], scale: float) -> list[list[str]]:
    reference, *_ = (statistics.median(row["seconds"]) for row in rows)
    return [
        [row["what"], spread(row["seconds"], scale), f"{statistics.median(row['seconds']) / reference:.1f}x"]
        for row in rows
    ]


def plot(results: dict, path: Path) -> None:
    panels = {("sequence", 1e3): f"{results['length']:,} tokens, ms", ("token", 1e6): "one token, µs"}
    bars(
        {
            title: {row["what"]: [scale * second for second in row["seconds"]] for row in results[key]}
            for (key, scale), title in panels.items()
        },
        path,
        log=True,
    )


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--hidden-size", type=integer(1, 2**17), default=896)
    parser.add_argument("--state-dim", type=integer(2, MAX_STATE_DIM), default=160)
    parser.add_argument(
        "--length", type=integer(8, LARGEST_LENGTH), default=8192, help="tokens of the prefill, lags of the filters"
    )
    parser.add_argument("--loop-tokens", type=integer(), default=256, help="tokens that the loops are timed on")
    parser.add_argument("--repeats", type=integer(1, 10000), default=9)
    parser.add_argument("--seconds", type=SECONDS, default=10, help="what took so long is not repeated")
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write lds.json and .png there")
    args = parser.parse_args()
    device = default_device()
    settings = {key: getattr(args, key) for key in ("hidden_size", "state_dim", "length", "loop_tokens")}
    results = {"environment": environment(device), **settings, **measure(args, device)}
    finish("lds", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
