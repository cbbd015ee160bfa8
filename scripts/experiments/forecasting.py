"""Forecasting: US macroeconomic series, by closed forms, networks and the usual baselines.

    python scripts/experiments/forecasting.py [--quick | --full] [--output results/experiments]

The data are statsmodels' macrodata, 1959 to 2009, quarterly: growth of seven series, percent, and the changes of two
rates, each scaled by its mean and deviation over the training quarters, to 1989. From every later quarter on, all
models forecast eight quarters from everything before it, with what they learned from the training quarters alone; those
that predict one step read their own predictions. It needs statsmodels: pip install 'flash-stu[experiments]'.

Source: the data are of the Federal Reserve Bank of St. Louis and in the public domain (statsmodels.datasets.macrodata).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prediction_training import Predictor, Settings, nothing, train

from flash_stu import FlashSTUConfig, UserError
from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.model.prediction import FlashSTUForTimeSeriesPrediction
from flash_stu.results import environment, experiment_parser, finish, page, panels, spread, table
from spectralds import distill, identify

GROWING = ("realgdp", "realcons", "realinv", "realgovt", "realdpi", "cpi", "m1")
RATES = ("tbilrate", "unemp")
TRAINING = 123  # quarters, 1959q2 to 1989q4
HORIZON, SHOWN = 8, (1, 4, 8)  # quarters
WINDOW = 64  # quarters of a training sequence of the networks
SIZES = {  # every: how many quarters lie between two that forecasts start from
    "quick": {"seeds": 1, "epochs": 1, "every": 24},
    "default": {"seeds": 3, "epochs": 20, "every": 1},
    "full": {"seeds": 10, "epochs": 20, "every": 1},
}
Forecast = Callable[[np.ndarray], np.ndarray]  # the past (quarters, series) to what follows (HORIZON, series)


def load() -> np.ndarray:
    """Returns the scaled series, (202 quarters, 9).

    Raises:
        UserError: if statsmodels is not installed.
    """
    try:
        from statsmodels.datasets import macrodata
    except ImportError:
        raise UserError("forecasting needs statsmodels: pip install 'flash-stu[experiments]'") from None
    frame: Any = macrodata.load_pandas().data
    growth = 100 * np.diff(np.log(frame[list(GROWING)].to_numpy()), axis=0)
    series = np.concatenate([growth, np.diff(frame[list(RATES)].to_numpy(), axis=0)], axis=1)
    return (series - series[:TRAINING].mean(0)) / series[:TRAINING].std(0)


def baselines(training: np.ndarray) -> dict[str, Forecast]:
    """Returns forecasts without a network: constants, the past repeated, vector autoregressions, and `identify`."""
    from statsmodels.tsa.api import VAR

    def vector_autoregression(**settings: Any) -> Forecast:
        fit = VAR(training).fit(**settings)
        return lambda past: fit.forecast(past[-max(1, fit.k_ar) :], HORIZON)

    return {
        "mean": lambda past: np.zeros((HORIZON, past.shape[1])),
        "naive: the last quarter": lambda past: np.tile(past[-1], (HORIZON, 1)),
        "seasonal naive: a year before": lambda past: np.tile(past[-4:], (HORIZON // 4, 1)),
        "VAR(1)": vector_autoregression(maxlags=1),
        "VAR, lags by AIC": vector_autoregression(maxlags=4, ic="aic"),
        "identify": identified(training),
    }


def identified(training: np.ndarray) -> Forecast:
    """Returns the forecast of a linear system whose inputs are the series and whose outputs are their next values."""
    system = identify(training[:-1], training[1:])

    def forecast(past: np.ndarray) -> np.ndarray:
        predicted, state = system.run(past)
        found = [predicted[-1]]
        for _ in range(HORIZON - 1):
            predicted, state = system.run(found[-1][None], state)
            found.append(predicted[-1])
        return np.array(found)

    return forecast


def networks(training: np.ndarray, seed: int, epochs: int) -> dict[str, tuple[Forecast, dict]]:
    """Train an STU on windows of the training quarters; with it and its distillation the facts of the training."""
    torch.manual_seed(seed)
    series = training.shape[1]
    config = FlashSTUConfig(
        num_input_channels=series,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        num_filters=8,
        stu_branches="separate",
        dropout=0.1,
        max_position_embeddings=256,
    )
    windows = torch.from_numpy(training).float().unfold(0, WINDOW + 1, 1).mT
    settings = Settings(epochs=epochs, batch=8)
    network = FlashSTUForTimeSeriesPrediction(config)
    predictor, facts = train(network, nothing(series), windows[:, :-1], windows[:, 1:], settings, seed)
    fast = Predictor(predictor.base, distill(network))
    return {"STU": (from_predictor(predictor), facts), "distilled STU": (from_predictor(fast), {})}


def from_predictor(predictor: Predictor) -> Forecast:
    def forecast(past: np.ndarray) -> np.ndarray:
        context = torch.from_numpy(past).float()[None]
        return predictor.closed_loop(context, context.new_empty(1, HORIZON - 1, 0))[0].double().numpy()

    return forecast


def errors(forecast: Forecast, series: np.ndarray, every: int) -> list[float]:
    """Returns the mean squared error at each horizon, over all series and the quarters to forecast from."""
    starts = range(TRAINING, len(series) - HORIZON + 1, every)
    found = np.array([forecast(series[:start]) - series[start : start + HORIZON] for start in starts])
    return np.square(found).mean((0, 2)).tolist()


def main() -> None:
    args = experiment_parser(__doc__, "forecasting").parse_args()
    size, series = SIZES[args.size], load()
    torch.set_num_threads(1)
    training = series[:TRAINING]
    rows: list[dict] = [
        {"model": model, "errors": errors(forecast, series, size["every"])}
        for model, forecast in baselines(training).items()
    ]
    for seed in range(size["seeds"]):
        for model, (forecast, facts) in networks(training, seed, size["epochs"]).items():
            rows.append({"model": model, "seed": seed, **facts, "errors": errors(forecast, series, size["every"])})
            print(f"{model}, seed {seed}: {rows[-1]['errors'][0]:.3f} a quarter ahead", flush=True)
    results = {"environment": environment(torch.device("cpu")), "size": args.size, **size}
    finish("forecasting", {**results, "quarters": len(series), "rows": rows}, render, plot, args.output)


def by_model(results: dict) -> dict[str, list[dict]]:
    """Returns the rows of each model, one per seed."""
    found: dict[str, list[dict]] = {}
    for row in results["rows"]:
        found.setdefault(row["model"], []).append(row)
    return found


def render(results: dict) -> str:
    """One table: errors of every model at some horizons."""
    rows = []
    for model, runs in by_model(results).items():
        cells = [spread([run["errors"][horizon - 1] for run in runs], 1) for horizon in SHOWN]
        rows.append([model, *cells, f"{runs[0]['parameters']:,}" if "parameters" in runs[0] else ""])
    what = (
        f"{len(GROWING) + len(RATES)} series of {results['quarters']} quarters, the first {TRAINING} to learn from; "
        f"seeds: {results['seeds']}. Mean squared errors of the scaled series over all later quarters:"
    )
    return page(results, what, table(["model", *(f"{horizon} ahead" for horizon in SHOWN), "parameters"], rows))


def plot(results: dict, path: Path) -> None:
    figure, (axes,) = panels(width=7.5)
    for place, (model, runs) in enumerate(by_model(results).items()):
        median = np.median([run["errors"] for run in runs], axis=0)
        axes.plot(range(1, HORIZON + 1), median, "o-" if "seed" in runs[0] else "--", color=f"C{place}", label=model)
    axes.set(xlabel="quarters ahead", ylabel="mean squared error, scaled series")
    axes.set_title("forecasts of nine macroeconomic series, 1990 to 2009", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
