"""Forecasting: the United States' economy by quarter, by networks, an identified system, naive and linear models.

    python scripts/experiments/forecasting.py [--quick | --full] [--output results/experiments]

Nine series from 1959 to 2009, in the public domain and in the package statsmodels: rates of growth of product,
consumption, investment, government spending, income, prices and money, and changes of the interest rate and of
unemployment. Models are fitted until 1989 and forecast one to four quarters from every quarter after that, from the 64
quarters before it, feeding their own predictions back. Series have mean 0 and variance 1 until 1989; errors are mean
squares in this scale. It needs statsmodels: pip install 'flash-stu[experiments]'.

`spectralds.identify` has the series as inputs and the series a quarter later as outputs. A network corrects the linear
forecast of each series from its own last value, and begins as that, its head being zero; one predicts the whole
instead. It has the number of epochs, of those on trial, that was best on the last quarters of the fitted time; then it
is trained on all of it.

Source: Federal Reserve Bank of St. Louis and Bureau of Labor Statistics, compiled by statsmodels as `macrodata`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from prediction_training import Base, Predictor, Settings, linear, matched, nothing, parameters, persistence, train

from flash_stu import FlashSTUConfig
from flash_stu.errors import UserError, run_cli
from flash_stu.figures import save_figure
from flash_stu.model.prediction import FlashSTUForTimeSeriesPrediction
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from spectralds import SymmetricLDS, distill, identify

Forecast = Callable[[torch.Tensor], torch.Tensor]  # the past (batch, PAST, series) to (batch, HORIZON, series)

GROWTH = {
    "realgdp": "product",
    "realcons": "consumption",
    "realinv": "investment",
    "realgovt": "government",
    "realdpi": "income",
    "cpi": "prices",
    "m1": "money",
}
CHANGE = {"tbilrate": "interest rate", "unemp": "unemployment"}
SERIES = [*GROWTH.values(), *CHANGE.values()]
FITTED, HELD_OUT = 123, 24  # quarters from 1959 Q2 to 1989 Q4; the last of them, which choose the number of epochs
PAST, HORIZON, STRIDE = 64, 4, 4  # quarters read and forecast; between the starts of training sequences
IDENTIFIED, LINEAR, STU, WHOLE = "identified LDS", "linear, own last value", "STU", "STU, whole value"
DISTILLED = "distilled STU"
SIZES = {
    "quick": {"seeds": 1, "epochs": [1]},
    "default": {"seeds": 3, "epochs": [4, 12, 36]},
    "full": {"seeds": 10, "epochs": [4, 12, 36, 100]},
}


def economy() -> torch.Tensor:
    """Returns the series, (202 quarters from 1959 Q2, 9) float32, of mean 0 and variance 1 over the FITTED first.

    Raises:
        UserError: if statsmodels is missing.
    """
    try:
        from statsmodels.datasets import macrodata  # pyright: ignore[reportMissingImports] - optional
    except ImportError:
        raise UserError("forecasting needs the package statsmodels: pip install 'flash-stu[experiments]'") from None
    data: Any = macrodata.load_pandas().data
    growth, change = (data[list(names)].to_numpy(np.float64) for names in (GROWTH, CHANGE))
    raw = np.concatenate([np.diff(np.log(growth), axis=0), np.diff(change, axis=0)], axis=1)
    fitted = raw[:FITTED]
    return torch.from_numpy((raw - fitted.mean(0)) / fitted.std(0)).float()


def windows(series: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """Returns parts of a series (quarters, series), one every `stride` quarters: (parts, length, series)."""
    return series.unfold(0, length, stride).transpose(1, 2).contiguous()


def errors(forecast: Forecast, series: torch.Tensor, first: int) -> torch.Tensor:
    """Forecast from every quarter of which HORIZON quarters are known.

    Returns:
        the squared errors, (origins, HORIZON, series) float64, the first forecast being of quarter `first`.
    """
    parts = windows(series[first - PAST :], PAST + HORIZON, 1)
    return (forecast(parts[:, :PAST]).double() - parts[:, PAST:].double()).square()


def of_predictor(predictor: Predictor) -> Forecast:
    """Returns a forecast by a predictor in closed loop."""
    return lambda past: predictor.closed_loop(past, past.new_zeros(len(past), HORIZON - 1, 0))


def of_system(system: SymmetricLDS) -> Forecast:
    """Returns a forecast by a system from the series to the series a quarter later, from rest at the past's start."""

    def forecast(past: torch.Tensor) -> torch.Tensor:
        found, state = system.run(past.double())
        steps = [found[:, -1:]]
        for _ in range(HORIZON - 1):
            found, state = system.run(steps[-1], state)
            steps.append(found)
        return torch.cat(steps, dim=1)

    return forecast


def own_last_value(series: torch.Tensor) -> Base:
    """Returns the least-squares prediction of each series from its own last value and a constant: AR(1)."""
    bases = [linear(series[None, :-1, i, None], series[None, 1:, i, None]) for i in range(series.shape[1])]
    return lambda inputs: torch.cat([base(inputs[..., i, None]) for i, base in enumerate(bases)], dim=-1)


def classical(series: torch.Tensor) -> dict[str, tuple[Forecast, str]]:
    """Returns the models that need no training, fitted to the series: forecasts, and what was chosen in fitting."""
    channels = series.shape[1]
    system = identify(series[:-1], series[1:])
    return {
        "mean": (of_predictor(Predictor(nothing(channels))), ""),
        "last value": (of_predictor(Predictor(persistence(channels))), ""),
        "value a year ago": (lambda past: past[:, -4:], ""),
        LINEAR: (of_predictor(Predictor(own_last_value(series))), ""),
        "linear, all last values": (of_predictor(Predictor(linear(series[None, :-1], series[None, 1:]))), ""),
        IDENTIFIED: (of_system(system), f"{system.report['method']}, {len(system.A)} states"),
    }


def networks(channels: int) -> dict[str, Callable[[], torch.nn.Module]]:
    """Returns functions that build the networks; the Transformer has the parameters of the STU."""
    shape = {
        "num_input_channels": channels,
        "num_output_channels": channels,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_filters": 8,
        "stu_branches": "separate",
        "max_position_embeddings": PAST + HORIZON,
        "sliding_window": PAST + HORIZON,
    }
    stu = {**shape, "layer_types": ["linear_attention"] * 2}
    attention = FlashSTUConfig(**shape, layer_types=["sliding_attention"] * 2)

    def build(**settings: Any) -> FlashSTUForTimeSeriesPrediction:
        return FlashSTUForTimeSeriesPrediction(FlashSTUConfig(**settings))

    return {
        STU: lambda: build(**stu),
        WHOLE: lambda: build(**stu),
        "AR-STU": lambda: build(**stu, stu_input_taps=3, stu_output_taps=2),
        "hybrid": lambda: build(**shape),
        "Transformer": lambda: matched(attention, parameters(build(**stu))),
        "Mamba-2": lambda: peers.mamba2(FlashSTUConfig(**shape), state_size=16),
    }


def learn(build: Callable, series: torch.Tensor, epochs: int, seed: int, whole: bool) -> tuple[Predictor, dict]:
    """Train one network on windows of the series; returns the predictor and facts of the training."""
    torch.manual_seed(seed)
    network, base = build(), nothing(series.shape[1])
    if not whole:
        base = own_last_value(series)
        torch.nn.init.zeros_(network.head.weight)
    parts = windows(series, PAST + 1, STRIDE)
    return train(network, base, parts[:, :-1], parts[:, 1:], Settings(epochs=epochs), seed)


def chosen_epochs(build: Callable, fitted: torch.Tensor, choices: list[int], whole: bool) -> int:
    """Returns the number of epochs with the least error one quarter ahead on the HELD_OUT last quarters."""
    if len(choices) == 1:
        return choices[0]
    first = len(fitted) - HELD_OUT

    def error(epochs: int) -> float:
        predictor, _ = learn(build, fitted[:first], epochs, 0, whole)
        return errors(of_predictor(predictor), fitted, first)[:, 0].mean().item()

    return min(choices, key=error)


def main() -> None:
    args = experiment_parser(__doc__, "forecasting").parse_args()
    size = SIZES[args.size]
    torch.set_num_threads(1)
    series = economy()
    fitted, rows = series[:FITTED], []

    def add(model: str, seed: int, forecast: Forecast, **more: Any) -> None:
        found = errors(forecast, series, FITTED)
        row = {"model": model, "seed": seed, "horizons": found.mean((0, 2)).tolist()}
        rows.append(row | {"series": found[:, 0].mean(0).tolist(), "origins": len(found), **more})
        print(f"{model}, seed {seed}: {rows[-1]['horizons'][0]:.3f} one quarter ahead", flush=True)

    for model, (forecast, choice) in classical(fitted).items():
        add(model, 0, forecast, chosen=choice)
    for model, build in networks(series.shape[1]).items():
        start = time.perf_counter()
        whole = model == WHOLE
        epochs = chosen_epochs(build, fitted, size["epochs"], whole)
        for seed in range(size["seeds"]):
            predictor, facts = learn(build, fitted, epochs, seed, whole)
            more = {"parameters": facts["parameters"], "chosen": f"{epochs} epoch" + "s" * (epochs > 1)}
            add(model, seed, of_predictor(predictor), **more, seconds=time.perf_counter() - start)
            if model == STU:
                fast = distill(predictor.network).eval()  # pyright: ignore[reportArgumentType] - a network of ours
                add(DISTILLED, seed, of_predictor(Predictor(predictor.base, fast)), chosen="")
            start = time.perf_counter()
    results = {"environment": environment(torch.device("cpu")), "size": args.size, **size, "rows": rows}
    finish("forecasting", results, render, plot, args.output)


def by_model(results: dict) -> dict[str, list[dict]]:
    """Returns the rows of each model, one per seed."""
    return {
        model: [row for row in results["rows"] if row["model"] == model]
        for model in dict.fromkeys(row["model"] for row in results["rows"])
    }


def render(results: dict) -> str:
    """One table: the errors of all models, one to HORIZON quarters ahead."""
    rows = []
    for model, runs in by_model(results).items():
        horizons = [_figures([run["horizons"][i] for run in runs]) for i in range(HORIZON)]
        count = f"{runs[0]['parameters']:,}" if "parameters" in runs[0] else ""
        rows.append([model, *horizons, count, runs[0]["chosen"]])
    what = (
        f"Mean squared errors over nine series and {results['rows'][0]['origins']} quarters from 1990 Q1 on, in units "
        f"of the variance before; seeds: {results['seeds']}."
    )
    ahead = ["1 quarter ahead", *(f"{i + 1} ahead" for i in range(1, HORIZON))]
    return page(results, what, table(["model", *ahead, "parameters", "chosen"], rows))


def _figures(values: list[float]) -> str:
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.3f}" if len(values) == 1 else f"{middle:.3f} ({low:.3f}-{high:.3f})"


def plot(results: dict, path: Path) -> None:
    figure, (axes, series) = panels(2, 7)
    shown = by_model(results)
    quarters, trained, fitted = range(1, HORIZON + 1), 0, 0
    for model, runs in shown.items():
        if model == DISTILLED or "parameters" in runs[0]:
            style, trained = {"color": f"C{trained}", "marker": "o", "markersize": 4}, trained + 1
        else:
            style, fitted = {"color": "0.45", "linestyle": "--", "marker": "sv^Dx*"[fitted]}, fitted + 1
        axes.plot(quarters, np.median([run["horizons"] for run in runs], axis=0), label=model, **style)
    axes.set(xlabel="quarters ahead", ylabel="mean squared error", xticks=quarters)
    axes.set_title("forecasts from 1990 Q1 on; grey: without a network", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    compared = [LINEAR, IDENTIFIED, STU]
    for place, model in enumerate(compared):
        heights = np.median([run["series"] for run in shown[model]], axis=0)
        series.bar(np.arange(len(SERIES)) + (place - 1) * 0.27, heights, 0.27, label=model)
    series.set_xticks(range(len(SERIES)), SERIES, rotation=30, ha="right")
    series.set_title("one quarter ahead, by series", loc="left", fontsize=10)
    series.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
