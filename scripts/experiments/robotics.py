"""Robotics: the next state of walking bodies, one step ahead and in closed loop, by networks and linear models.

    python scripts/experiments/robotics.py [--env ant | halfcheetah | walker2d] [--data runs/robotics] [--collect]
        [--search] [--trajectories N] [--seeds N] [--quick | --full] [--output results/experiments]

The states are positions and velocities of a body in MuJoCo, with the torques beside them; bodies.py makes them walk. A
model reads states and torques and predicts the next state; in closed loop it reads its own predictions and the true
torques. Trajectories are collected into the --data folder if they are not there: --collect does that alone, and anew,
--search with a gait that is searched anew. The results are robotics-ENV.json and .png. It needs MuJoCo: pip install
'flash-stu[robotics]'.

Where a body is grows without bound, so that the entries for it say how far it moved in the last step instead. All
entries have mean 0, and variance 1 over each group of entries (angles, joint rates ...) on the training trajectories;
errors are mean squares in this scale. The networks predict what the linear model leaves, but for the one that predicts
the whole state.

Source: Liu et al. 2024, Flash STU (arXiv 2409.10489), section 4, for task, shapes and training.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from bodies import BODIES, GAITS, Body, Trajectories, collect, read, search, write
from prediction_training import (
    Predictor,
    Settings,
    linear,
    matched,
    nothing,
    parameters,
    persistence,
    squared_errors,
    train,
)

from flash_stu import FlashSTUConfig
from flash_stu.arguments import integer, output_directory
from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.model.cache import state_tensors
from flash_stu.model.prediction import FlashSTUForTimeSeriesPrediction
from flash_stu.results import environment, experiment_parser, finish, page, panels, save, spread, table
from spectralds import distill

LENGTH, CONTEXT = 512, 256  # of a training sequence; steps before a closed loop
WHOLE, LINEAR, PERSISTENCE = "STU, whole state", "linear", "persistence"
DISTILLED = {"STU": "distilled STU", WHOLE: "distilled STU, whole state"}
PUBLISHED = {  # slides to the paper; other trajectories: they cannot be compared with ours
    "ant": {"STU": 0.0092, "Transformer": 0.0237, "Mamba-2": 0.0139},
    "walker2d": {"STU": 0.0062, "Transformer": 0.0134, "Mamba-2": 0.0066},
}
SIZES = {
    "quick": {"seeds": 1, "trajectories": 2, "tests": 1, "steps": 12, "long": 120, "loop": 300},
    "default": {"seeds": 1, "trajectories": 200, "tests": 16, "steps": 100, "long": 1000, "loop": 10_000},
    "full": {"seeds": 3, "trajectories": 600, "tests": 16, "steps": 100, "long": 1000, "loop": 10_000},
}


class Features:
    """What models read and predict of a body: fitted on training trajectories.

    Attributes:
        outputs: entries of a state.
        groups: their names with the numbers of entries.
    """

    def __init__(self, body: Body, data: Trajectories) -> None:
        self.body, self.groups, self.outputs = body, body.groups, data.states.shape[2]
        raw = self._raw(data).reshape(-1, self.outputs + data.torques.shape[2])
        self.mean = raw.mean(0)
        sizes = [size for _, size in body.groups] + [data.torques.shape[2]]
        variance = np.split(raw.var(0), np.cumsum(sizes)[:-1])
        self.scale = np.repeat([np.sqrt(group.mean()) for group in variance], sizes)

    def _raw(self, data: Trajectories) -> np.ndarray:
        """States from the second on with the torques that follow, (trajectories, steps - 1, inputs)."""
        states, roaming = data.states[:, 1:].astype(np.float64), list(self.body.roaming)
        states[:, :, roaming] = np.diff(data.states[:, :, roaming].astype(np.float64), axis=1)
        torques = np.concatenate([data.torques[:, 1:], np.zeros_like(data.torques[:, :1])], axis=1)
        return np.concatenate([states, torques], axis=2)

    def __call__(self, data: Trajectories) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs (trajectories, steps - 1, entries and torques) and targets, the next states; float32."""
        scaled = torch.from_numpy((self._raw(data) - self.mean) / self.scale).float()
        return scaled[:, :-1], scaled[:, 1:, : self.outputs]


def networks(env: str, inputs: int, outputs: int) -> dict:
    """Returns the networks by name, as functions that build them; the Transformer has the parameters of the STU."""
    shape = {
        "num_input_channels": inputs,
        "num_output_channels": outputs,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 1 if env == "ant" else 8,
        "num_filters": 16,
        "stu_branches": "separate",
        "max_position_embeddings": LENGTH,
        "sliding_window": LENGTH,
    }
    stu = {**shape, "layer_types": ["linear_attention"] * 4}
    ar = {**stu, "stu_input_taps": 3, "stu_output_taps": 2}
    attention = {**shape, "layer_types": ["sliding_attention"] * 4}

    def build(settings: dict) -> FlashSTUForTimeSeriesPrediction:
        return FlashSTUForTimeSeriesPrediction(FlashSTUConfig(**settings))

    return {
        "STU": lambda: build(stu),
        WHOLE: lambda: build(stu),
        "AR-STU": lambda: build(ar),
        "hybrid": lambda: build({**shape, "num_hidden_layers": 2}),
        "Transformer": lambda: matched(FlashSTUConfig(**attention), parameters(build(stu))),
        "Mamba-2": lambda: peers.mamba2(FlashSTUConfig(**{**shape, "num_hidden_layers": 2}), state_size=128),
    }


def trajectories(env: str, size: dict, folder: Path, anew: bool, searched: bool) -> tuple[Trajectories, Trajectories]:
    """Returns the training and the test trajectories of one gait, from the folder, or collected into it."""
    body, counts = BODIES[env], (size["trajectories"], size["tests"])
    paths = [folder / f"{env}-{part}-{count}.parquet" for part, count in zip(("train", "test"), counts, strict=True)]
    if anew or searched or not all(path.exists() for path in paths):
        gait = search(body, body.generations, seed=0) if searched else np.array(GAITS[env])
        for seed, (path, count, steps) in enumerate(zip(paths, counts, (LENGTH, CONTEXT + size["long"]), strict=True)):
            print(f"collecting {count} trajectories of {steps} steps into {path}", flush=True)
            write(collect(body, gait, count, steps + 1, seed), path)
    train_path, test_path = paths
    return read(train_path), read(test_path)


def measure(predictor: Predictor, inputs: torch.Tensor, targets: torch.Tensor, groups: tuple, steps: int) -> dict:
    """Returns a predictor's errors: one step ahead, also by group of entries, and over a closed loop."""
    errors = (predictor.one_step(inputs[:, :LENGTH]) - targets[:, :LENGTH]).double().square().mean((0, 1))
    parts = errors.split([size for _, size in groups])
    return {
        "error": float(errors.mean()),
        "by_group": {name: float(part.mean()) for (name, _), part in zip(groups, parts, strict=True)},
        "closed": closed_loop(predictor, inputs, targets, steps),
    }


def closed_loop(predictor: Predictor, inputs: torch.Tensor, targets: torch.Tensor, steps: int) -> list[float]:
    """Returns the errors of the predictions for `steps` steps after CONTEXT true ones."""
    stop = CONTEXT + steps - 1
    found = predictor.closed_loop(inputs[:, :CONTEXT], inputs[:, CONTEXT:stop, targets.shape[2] :])
    errors = squared_errors(found, targets[:, CONTEXT - 1 : stop])
    return [float(f"{min(error, 1e30):.4g}") for error in np.nan_to_num(errors, nan=1e30)]


@torch.no_grad()
def speed(predictor: Predictor, inputs: torch.Tensor, outputs: int, steps: int) -> list[dict]:
    """Run one closed loop, the torques repeating; time it at about step 100 and at the end, 100 steps each.

    Returns:
        at both places the step, steps per second, and the bytes of what is carried from step to step.
    """
    out = predictor.network(input_values=inputs[:1, :1], use_cache=True)  # pyright: ignore[reportOptionalCall]
    state, found, start = predictor.base(inputs[:1, :1]) + out.predictions, [], 0.0
    for step in range(1, steps + 1):
        if step in (51, steps - 99):
            start = time.perf_counter()
        now = torch.cat([state, inputs[:1, step % inputs.shape[1], None, outputs:]], dim=-1)
        out = predictor.network(input_values=now, past_key_values=out.past_key_values, use_cache=True)  # pyright: ignore
        state = predictor.base(now) + out.predictions
        if step in (150, steps):
            carried = sum(x.numel() * x.element_size() for s in out.past_key_values.states for x in state_tensors(s))
            rate = 100 / (time.perf_counter() - start)
            found.append({"step": step, "steps_per_second": rate, "bytes": carried})
    return found


def main() -> None:
    args = arguments()
    chosen = {"seeds": args.seeds, "trajectories": args.trajectories}
    size = SIZES[args.size] | {name: value for name, value in chosen.items() if value}
    torch.set_num_threads(1)
    name, body = f"robotics-{args.env}", BODIES[args.env]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(args.data or (folder if args.size == "quick" else "runs/robotics"))
        data, tests = trajectories(args.env, size, place, args.collect, args.search)
    if args.collect:
        return
    features = Features(body, data)
    (inputs, targets), (test_inputs, test_targets) = features(data), features(tests)
    fitted, outputs = linear(inputs, targets), features.outputs
    results: dict[str, Any] = {"environment": environment(torch.device("cpu")), "size": args.size, "env": args.env}
    results |= {**size, "facts": data.facts, "inputs": inputs.shape[2], "outputs": outputs, "rows": []}

    def add(model: str, seed: int, predictor: Predictor, **more: Any) -> None:
        row = {"model": model, "seed": seed, **more}
        row |= measure(predictor, test_inputs, test_targets, body.groups, size["steps"])
        results["rows"].append(row)
        print(f"{model}, seed {seed}: {row['error']:.4f}, closed loop {row['closed'][-1]:.3g}", flush=True)
        save(name, results, args.output)

    add(PERSISTENCE, 0, Predictor(persistence(outputs)))
    add(LINEAR, 0, Predictor(fitted))
    for seed in range(size["seeds"]):
        for model, build in networks(args.env, inputs.shape[2], outputs).items():
            torch.manual_seed(seed)
            base = nothing(outputs) if model == WHOLE else fitted
            predictor, facts = train(build(), base, inputs, targets, Settings(), seed)
            add(model, seed, predictor, **facts)
            if model in DISTILLED:
                fast = Predictor(base, distill(predictor.network).eval())  # pyright: ignore[reportArgumentType]
                long = closed_loop(fast, test_inputs, test_targets, size["long"])
                rates = speed(fast, test_inputs, outputs, size["loop"]) if model == "STU" else []
                add(DISTILLED[model], seed, fast, long=long, parameters=facts["parameters"], speed=rates)
    finish(name, results, render, plot, args.output)


def arguments() -> Any:
    parser = experiment_parser(__doc__, "robotics-ENV")
    add = parser.add_argument
    add("--env", choices=tuple(BODIES), default="halfcheetah", help="the body (halfcheetah)")
    add("--data", type=output_directory, metavar="DIR", help="trajectories (runs/robotics)")
    add("--collect", action="store_true", help="collect the trajectories, also if they are there, and stop")
    add("--search", action="store_true", help="search a gait and collect its trajectories, in place of the kept gait's")
    add("--trajectories", type=integer(1, 10**6), metavar="N", help="to learn from")
    add("--seeds", type=integer(1, 100), metavar="N", help="of every network")
    return parser.parse_args()


def render(results: dict) -> str:
    """Two tables: errors of all models, and the distilled model's speed."""
    env, facts, published = results["env"], results["facts"], PUBLISHED.get(results["env"], {})
    groups, steps = list(results["rows"][0]["by_group"]), len(results["rows"][0]["closed"])
    rows = []
    for model, runs in by_model(results).items():
        shown = f"{published[model]:g}" if model in published else ""
        cells = [[run["error"] for run in runs], *([run["closed"][i] for run in runs] for i in (9, -1))]
        cells = [figures(values) for values in cells]
        parts = [figures([run["by_group"][group] for run in runs]) for group in groups]
        count = f"{runs[0]['parameters']:,}" if "parameters" in runs[0] else ""
        seconds = spread([run["seconds"] for run in runs], 1) if "seconds" in runs[0] else ""
        rows.append([model, *cells, *parts, count, seconds, shown])
    gait = (
        f"{BODIES[env].name}: {results['trajectories']:,} trajectories of {LENGTH} steps of "
        f"{facts['step_seconds']:g} s; on average {facts['metres_per_second']:.2f} m/s; kept were the runs without a "
        f"fall, {100 * facts['without_a_fall']:.0f} % of them. {results['inputs']} inputs, {results['outputs']} "
        f"outputs; {results['tests']} test trajectories; seeds: {results['seeds']}. Mean squared errors in units of "
        "the groups' variance:"
    )
    header = ["model", "next state", "closed loop, 10 steps", f"{steps} steps", *(f"next {group}" for group in groups)]
    header += ["parameters", "training, s", "published, elsewhere"]
    return page(results, gait, table(header, rows), *distilled_parts(results))


def figures(values: list) -> str:
    """Median (least-greatest) with three significant digits."""
    low, middle, high = (f"{value:.3g}" for value in (min(values), float(np.median(values)), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"


def distilled_parts(results: dict) -> list[str]:
    """Returns what distilled models do in long closed loops, and how fast."""
    runs = {model: runs for model, runs in by_model(results).items() if "long" in runs[0]}
    if not runs:
        return []
    starts = range(0, len(next(iter(runs.values()))[0]["long"]) - 99, 300)
    errors = [
        [
            model,
            *(figures([np.mean(run["long"][start : start + 100]) for run in same]) for start in starts),
            figures([max(run["long"]) for run in same]),
        ]
        for model, same in runs.items()
    ]
    text = (
        "Distilled models in a long closed loop: mean errors over some steps, and the greatest of all. 1 is the error "
        "of the mean state, 2 that of a state of another time."
    )
    header = ["model", *(f"steps {start + 1:,}-{start + 100:,}" for start in starts), "greatest"]
    speed = next(same[0]["speed"] for same in runs.values() if same[0]["speed"])
    rates = [[f"{at['step']:,}", f"{at['steps_per_second']:,.0f}", f"{at['bytes']:,}"] for at in speed]
    what = f"Steps of one closed loop of the {DISTILLED['STU']}, and the bytes carried from step to step:"
    return [text, table(header, errors), what, table(["step", "steps/s", "bytes"], rates)]


def by_model(results: dict) -> dict[str, list[dict]]:
    """Returns the rows of each model, one per seed."""
    found: dict[str, list[dict]] = {}
    for row in results["rows"]:
        found.setdefault(row["model"], []).append(row)
    return found


def plot(results: dict, path: Path) -> None:
    figure, (curves, loops, long) = panels(3, 5)
    for place, (model, runs) in enumerate(by_model(results).items()):
        style = {"color": "0.4", "linestyle": ":" if model == PERSISTENCE else "--"} if place < 2 else {}
        style = style or {"color": f"C{place - 2}"}
        if "curve" in runs[0]:
            curves.plot(*zip(*runs[0]["curve"], strict=True), label=model, linewidth=1.4, **style)
        closed = np.median([run["closed"] for run in runs], axis=0)
        loops.plot(range(1, len(closed) + 1), closed, label=model, **style)
        for run in runs if "long" in runs[0] else []:
            long.plot(range(1, len(run["long"]) + 1), run["long"], linewidth=1, **style)
    curves.set(xlabel="step", ylabel="training loss, inputs with noise", yscale="log")
    curves.set_title(f"{BODIES[results['env']].name}: training, first seed", loc="left", fontsize=10)
    loops.set(xlabel="steps ahead", ylabel="mean squared error", yscale="log")
    lowest = min(min(run["closed"]) for run in results["rows"])
    loops.set_ylim(lowest / 2, 30)
    loops.set_title("closed loop: own predictions fed back", loc="left", fontsize=10)
    curves.legend(*loops.get_legend_handles_labels(), frameon=False, fontsize=8)  # where there is room
    long.axhline(2, color="0.6", linewidth=0.8, linestyle="--")
    long.set(xlabel="steps ahead", ylabel="mean squared error", yscale="log")
    long.set_title("distilled; dashed: a state of another time", loc="left", fontsize=10)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
