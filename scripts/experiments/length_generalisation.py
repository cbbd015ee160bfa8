"""Length generalisation: trained on short sequences, or with a short context, how well are long ones predicted?

    python scripts/experiments/length_generalisation.py [--quick | --full] [--output results/experiments]

Two questions about linear dynamical systems of eight positive poles, 1 - a from 0.09 to 2e-4, one input, one output.

Left: trained on sequences of some length, with the same number of tokens for every length, what is the error on one of
T tokens? Forms: spectral filters that see sqrt(T) tokens, tensor filters of T (k^2 of them), spectral filters of T, all
by least squares on their features and the input, without autoregression, small singular values cut off where that
predicts sequences of the same length better that were held out; and an explicit LDS, spectralds.identify, by the ridge
regression on fixed poles or with refined ones.

Right: the asymmetric regret. An online predictor that sees L' tokens of the input, its weights at each token the ridge
regression on the tokens before, loses against the best weights in hindsight for filters that see all T tokens; the
regret is the difference of their squared errors, per token and over the output's power. With and without two past
outputs among the features, which is what the theorem speaks of.
"""

import math
import statistics
from pathlib import Path

import numpy as np
import torch
from scipy.signal import oaconvolve

from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.filters.spectral import compute_filters
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from spectralds import identify

STATES, FILTERS = 8, 24
INPUT_TAPS = 3
OUTPUT_TAPS = {"no past outputs": 0, "two past outputs": 2}
CONTEXTS = {"T^(1/4)": 0.25, "T^(1/2)": 0.5, "T": 1.0}  # L' of the online predictor
BUDGET = 2  # tokens trained on, in sequences of T
CUTS = tuple(10.0**-n for n in range(1, 14))  # of singular values, relative to the largest
RIDGE = 1e-4  # of the online predictor, on features of unit power
LDS = {method: f"explicit LDS, by {method}" for method in ("grid", "refine")}
SIZES = {  # T, lengths trained on, k of the tensor filters, T of the regret, noise of the outputs there, seeds
    "quick": (256, (16, 64), (3,), (64, 256), (0.0,), 2),
    "default": (4096, (64, 256, 4096), (6, 12), (256, 1024, 4096, 16384), (0.0, 0.1), 8),
    "full": (16384, (128, 512, 16384), (6, 12), (256, 1024, 4096, 16384, 65536), (0.0, 0.1), 8),
}


class System:
    """A random linear dynamical system: y_t = sum_j c_j s_{t, j}, s_{t, j} = a_j s_{t - 1, j} + u_t."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.poles = 1 - np.geomspace(0.09, 2e-4, STATES)
        self.weights = self.draw.standard_normal(STATES)

    def sequences(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns white inputs and the outputs to them from rest, both (count, length)."""
        inputs = self.draw.standard_normal((count, length))
        return inputs, convolve(inputs, self.poles ** np.arange(length)[:, None] @ self.weights)


def convolve(inputs: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Returns the causal convolution over the last axis with taps (lags,), as long as the inputs."""
    length = inputs.shape[-1]
    taps = taps[:length].reshape((1,) * (inputs.ndim - 1) + (-1,))
    return oaconvolve(inputs, taps, axes=-1)[..., :length]


def features(inputs: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Returns the inputs' convolutions with filters (lags, K), and the inputs themselves, (..., length, K + 1)."""
    return np.stack([*(convolve(inputs, column) for column in filters.T), inputs], axis=-1)


def least_squares(design: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the weights (columns,) of least squared error, of least norm on columns of unit length."""
    scale = np.linalg.norm(design, axis=0)
    return np.linalg.lstsq(design / scale, targets, rcond=1e-13)[0] / scale


def regularised(design: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """As `least_squares`, small singular values left out as far as that predicts sequences that are held out better.

    Args:
        design: features, (sequences, length, columns); the last quarter of the sequences is held out.
        targets: (sequences, length).
    """
    held = max(1, len(design) // 4)

    def solutions(design: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        rows, triangle = np.linalg.qr(design.reshape(-1, design.shape[-1]))
        left, singular, right = np.linalg.svd(triangle)
        parts = left.T @ (rows.T @ targets.reshape(-1)) / singular
        return [(parts * (singular > cut * singular[0])) @ right for cut in CUTS]

    tried = solutions(design[:-held], targets[:-held])
    best = np.argmin([relative(design[-held:] @ weights, targets[-held:]) for weights in tried])
    return solutions(design, targets)[best]


def spectral(length: int, count: int, basis: str = "hankel") -> np.ndarray:
    """Returns filters (length, at most `count`)."""
    count = count if basis == "tensor" else min(count, length)
    return compute_filters(length, count, basis)[1].numpy()


def after_training(seed: int, length: int, lengths: tuple[int, ...], factors: tuple[int, ...]) -> list[dict]:
    """Returns the relative squared error on a sequence of `length` tokens, for every form and length trained on."""
    short = math.isqrt(length)
    forms = {f"spectral filters of {short}": spectral(short, FILTERS)}
    forms |= {f"tensor filters, k = {k}": spectral(length, k * k, "tensor") for k in factors}
    forms |= {f"spectral filters of {length}": spectral(length, FILTERS)}
    system = System(seed)
    test, truth = system.sequences(1, length)
    rows = []
    for trained in lengths:
        inputs, outputs = system.sequences(BUDGET * length // trained, trained)
        errors = {}
        for name, filters in forms.items():
            weights = regularised(features(inputs, filters), outputs)
            errors[name] = relative(features(test, filters) @ weights, truth)
        for method, name in LDS.items():
            lds = identify(inputs[..., None], outputs[..., None], method=method)
            errors[name] = relative(np.asarray(lds.simulate(test[..., None]))[..., 0], truth)
        rows += [{"form": name, "trained": trained, "seed": seed, "error": error} for name, error in errors.items()]
    return rows


def relative(outputs: np.ndarray, truth: np.ndarray) -> float:
    """Returns the squared error over the power of the truth."""
    return float(np.square(outputs - truth).sum() / np.square(truth).sum())


def regret(seed: int, length: int, noise: float) -> list[dict]:
    """Returns the asymmetric regret per token, over the outputs' power, of every context and form."""
    system = System(seed)
    (inputs,), (outputs,) = system.sequences(1, length)
    outputs = outputs + noise * outputs.std() * system.draw.standard_normal(length)
    rows = []
    for form, taps in OUTPUT_TAPS.items():
        past = [delayed(inputs, lag) for lag in range(1, INPUT_TAPS)]
        past += [delayed(outputs, lag) for lag in range(1, taps + 1)]

        def design(context: int, past: list[np.ndarray] = past) -> np.ndarray:
            columns = features(inputs, spectral(context, FILTERS))
            columns = np.column_stack([columns, *past])
            return columns / np.sqrt(np.square(columns).mean(axis=0))

        best = outputs - design(length) @ least_squares(design(length), outputs)
        for name, exponent in CONTEXTS.items():
            loss = online(design(max(2, round(length**exponent))), outputs)
            excess = (loss.sum() - np.square(best).sum()) / np.square(outputs).sum()
            rows.append({"form": form, "context": name, "T": length, "noise": noise, "seed": seed, "regret": excess})
    return rows


def delayed(values: np.ndarray, lag: int) -> np.ndarray:
    """Returns values (length,) `lag` tokens later, after zeros."""
    return np.concatenate([np.zeros(lag), values[:-lag]])


def online(design: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the squared errors (length,) of recursive least squares: ridge regression on the tokens before each.

    Args:
        design: features (length, columns); targets: (length,).
    """
    inverse = np.eye(design.shape[1]) / RIDGE
    weights, errors = np.zeros(design.shape[1]), np.empty(len(targets))
    for t, row in enumerate(design):
        errors[t] = targets[t] - row @ weights
        gain = inverse @ row
        gain /= 1 + row @ gain
        weights += gain * errors[t]
        inverse -= np.outer(gain, row @ inverse)
    return np.square(errors)


def middle(rows: list[dict], key: str) -> float:
    """Returns the median over seeds."""
    return statistics.median(row[key] for row in rows)


def where(rows: list[dict], **values: object) -> list[dict]:
    """Returns the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def distinct(rows: list[dict], key: str) -> list:
    """Returns the values of a key, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def render(results: dict) -> str:
    """Errors against the length trained on, how far below tensor filters an explicit LDS is, and regrets."""
    errors, regrets = results["errors"], results["regrets"]
    lengths = distinct(errors, "trained")
    what = (
        f"Medians of {results['seeds']} systems. Relative squared error on {results['length']:,} tokens after training "
        f"on {BUDGET * results['length']:,} tokens in sequences of a length; noise-free."
    )
    trained = [
        [form, *(f"{middle(where(errors, form=form, trained=n), 'error'):.1e}" for n in lengths)]
        for form in distinct(errors, "form")
    ]
    fourfold = {
        form: middle(where(errors, form=form, trained=lengths[1]), "error") for form in distinct(errors, "form")
    }
    lds = min(fourfold[name] for name in LDS.values())
    tensor = min(error for form, error in fourfold.items() if form.startswith("tensor"))
    below = (
        f"On sequences of {lengths[1]}, 4 sqrt(T), the better explicit LDS is {tensor / lds:,.0f} times below the "
        f"better tensor filters."
    )
    sizes = distinct(regrets, "T")
    lines = [
        [f"{form}, L' = {context}, noise {noise:g}"]
        + [f"{middle(where(regrets, form=form, context=context, noise=noise, T=T), 'regret'):.1e}" for T in sizes]
        for noise in distinct(regrets, "noise")
        for form in OUTPUT_TAPS
        for context in CONTEXTS
    ]
    return page(
        results,
        what,
        table(["trained on sequences of", *(f"{n:,}" for n in lengths)], trained),
        below,
        table(["asymmetric regret per token, T =", *(f"{T:,}" for T in sizes)], lines),
    )


def plot(results: dict, path: Path) -> None:
    errors, regrets = results["errors"], results["regrets"]
    figure, axes = panels(2, width=6)
    for form in distinct(errors, "form"):
        curve = [(n, middle(where(errors, form=form, trained=n), "error")) for n in distinct(errors, "trained")]
        axes[0].plot(*zip(*curve, strict=True), marker="o", markersize=4, linewidth=1.6, label=form)
    axes[0].set(xscale="log", yscale="log", xlabel="length of the sequences trained on, tokens")
    axes[0].set_ylabel(f"relative squared error on {results['length']:,} tokens")
    for form, style in zip(OUTPUT_TAPS, ("--", "-"), strict=True):
        for i, context in enumerate(CONTEXTS):
            mine = where(regrets, form=form, context=context, noise=regrets[0]["noise"])
            curve = [(T, middle(where(mine, T=T), "regret")) for T in distinct(mine, "T")]
            label = f"L' = {context}, {form}"
            axes[1].plot(*zip(*curve, strict=True), style, color=f"C{i}", marker="o", markersize=4, label=label)
    axes[1].set(xscale="log", yscale="log", xlabel="T, tokens")
    axes[1].set_ylabel("asymmetric regret per token / power, noise-free")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = experiment_parser(__doc__, "length_generalisation").parse_args()
    length, lengths, factors, sizes, noises, seeds = SIZES[args.size]
    results = {
        "environment": environment(torch.device("cpu")),
        "size": args.size,
        "length": length,
        "seeds": seeds,
        "errors": [row for seed in range(seeds) for row in after_training(seed, length, lengths, factors)],
        "regrets": [row for noise in noises for T in sizes for seed in range(seeds) for row in regret(seed, T, noise)],
    }
    finish("length_generalisation", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
