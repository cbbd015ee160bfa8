"""The LDS layer: prefill against token loops, and one step against computing all filter outputs of every channel.

    python scripts/bench/lds.py --hidden-size 896 --state-dim 160 --length 8192

All rows compute the same layer, its input projection included. The comparisons are what the literature's
implementation does and what the definition says, both in float64 with 2K filter outputs per channel. Loops are timed on
--loop-tokens tokens and scaled up. All take turns; a figure is the best of --repeats.
"""

import platform
import time

import torch

from flash_stu import FlashSTUConfig, spectral_filters
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.layers import LDS, STU
from flash_stu.layers.context import SequenceContext
from flash_stu.loading import default_device
from spectralds.bank import FilterBank
from spectralds.distill import fold
from spectralds.fit import LDSFit, fit_lds


def make_layer(config: FlashSTUConfig, device: torch.device) -> tuple[LDS, STU, LDSFit]:
    """An STU layer with random weights, its distilled form, and the fit between the two."""
    torch.manual_seed(0)
    _, phi = spectral_filters(config.max_position_embeddings, config.num_filters)
    stu = STU(config)
    torch.nn.init.normal_(stu.in_proj.weight, std=config.hidden_size**-0.5)
    stu.reset_parameters(torch.nn.init)
    fit = fit_lds(FilterBank(phi), config.lds_state_dim, "quadrature", torch.float32, config.stu_dilation)
    layer = LDS(config)
    layer.load_state_dict(fold(fit, stu) | {"in_proj.weight": stu.in_proj.weight.detach()})
    return layer.to(device), stu.to(device), fit


def recurrence_loop(x, stu: STU, fit: LDSFit) -> torch.Tensor:
    """Token by token in float64: all states of every channel, 2K outputs per channel from them, then the weights."""
    decay, out = fit.A.to(x.device), (fit.B[:, None] * fit.C).to(x.device)
    weights = torch.cat([stu.M_filters[0], stu.M_filters[-1]]).double().t().contiguous()
    state, outputs = x.new_zeros(x.shape[2], len(decay), dtype=torch.float64), []
    for t in range(x.shape[1]):
        state = state * decay + stu.in_proj(x[:, t]).double().t()
        outputs.append((state @ out * weights).sum(dim=1))
    return torch.stack(outputs)[None].to(x.dtype)


def definition_step(x, past, stu: STU, features: torch.Tensor) -> torch.Tensor:
    """One token in float64 from the definition: 2K sums over all lags of every channel, then the weights."""
    weights = torch.cat([stu.M_filters[0], stu.M_filters[-1]]).double()
    past[-1] = stu.in_proj(x[0, 0]).double()
    return ((features @ past) * weights).sum(dim=0)


def best_seconds(functions: dict, repeats: int, device: torch.device) -> dict[str, float]:
    best = dict.fromkeys(functions, float("inf"))
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


@torch.inference_mode()
def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--state-dim", type=int, default=160)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prefill, lags of the filters")
    parser.add_argument("--loop-tokens", type=int, default=256, help="tokens that the loops are timed on")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = default_device()
    config = FlashSTUConfig(
        hidden_size=args.hidden_size, num_attention_heads=1, max_position_embeddings=args.length,
        lds_state_dim=args.state_dim,
    )  # fmt: skip
    layer, stu, fit = make_layer(config, device)
    context = SequenceContext()
    x = torch.randn(1, args.length, args.hidden_size, device=device)
    short = x[:, : args.loop_tokens]
    layer_y, state = layer.prefill(short, context)
    exact = recurrence_loop(short, stu, fit)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {device}, {torch.get_num_threads()} threads")
    print(f"prefill differs from the float64 loop by {((layer_y - exact).norm() / exact.norm()).item():.1e} relative")

    def step_loop() -> None:
        past = state
        for t in range(short.shape[1]):
            _, past = layer.step(short[:, t : t + 1], context, past)

    def projection_loop() -> None:
        for t in range(short.shape[1]):
            layer.in_proj(short[:, t : t + 1])

    features = fit.impulse_response(args.length).t().contiguous().to(device)
    history = torch.randn(args.length, args.hidden_size, dtype=torch.float64, device=device)
    seconds = best_seconds(
        {
            "prefill": lambda: layer.prefill(x, context),
            "forward": lambda: layer(x, context),
            "steps": step_loop,
            "projection": projection_loop,
            "recurrence": lambda: recurrence_loop(short, stu, fit),
            "definition": lambda: definition_step(x[:, :1], history, stu, features),
        },
        args.repeats,
        device,
    )
    steps, projection, recurrence = (seconds[name] / short.shape[1] for name in ("steps", "projection", "recurrence"))
    prefill, definition = seconds["prefill"], seconds["definition"]
    print(f"\n| {args.length} tokens, width {args.hidden_size}, state {args.state_dim} | seconds | over prefill |")
    print("|---|---|---|")
    for name, value in (
        ("prefill: matrix products over chunks", prefill),
        ("forward: FFT convolution, no state", seconds["forward"]),
        ("loop of this layer's steps", steps * args.length),
        ("loop in float64, 2K outputs per channel", recurrence * args.length),
    ):
        print(f"| {name} | {value:.2f} | {value / prefill:.1f} |")
    print("\n| one token | microseconds | over step |")
    print("|---|---|---|")
    for name, value in (
        ("step", steps),
        ("of which the input projection", projection),
        ("2K outputs per channel in float64, by recurrence", recurrence),
        ("2K outputs per channel in float64, by sums over all lags", definition),
    ):
        print(f"| {name} | {1e6 * value:.0f} | {value / steps:.1f} |")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
