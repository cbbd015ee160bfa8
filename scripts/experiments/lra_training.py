"""One model of Long Range Arena: built with as many parameters as the others, trained by transformers.Trainer, tested.

A run directory holds Trainer's checkpoints, from which a run that was stopped goes on, then `final`, the model, and
result.json. A run that is finished is not trained again.
"""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lra_data import collate, load
from lra_settings import Model, Settings
from peers import mamba2, s5
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from flash_stu import FlashSTUForSequenceClassification
from flash_stu.errors import UserError
from flash_stu.files import write_text
from spectralds import distill

_PEERS = {"mamba2": (mamba2, "expand", 1), "s5": (s5, "ff_mult", 1 / 8)}  # inner width, in hidden sizes, and its steps


def train(settings: Settings, name: Model, seed: int, run: Path, data_dir: str | None) -> dict:
    """Train one model, or take what its run directory holds, and test it.

    Args:
        settings: of the task.
        name: one of lra_settings.MODELS but "lds".
        seed: of weights and order.
        run: the run directory.
        data_dir: see lra_data.load; what is generated is kept beside the run directory.

    Returns:
        parameters; accuracy on the test split, percent, and validation, that of each epoch; epochs; seconds of the
        training steps (CPU seconds without a GPU); tokens_per_second; memory, the most that the process held, bytes.
    """
    told = {"settings": settings.model_dump(mode="json"), "seed": seed}
    if (run / "result.json").is_file():
        stored = json.loads((run / "result.json").read_text())
        if stored.pop("told") != told:
            raise UserError(f"{run} holds a run of other settings: remove it, or name another folder by --runs")
        return stored
    torch.manual_seed(seed)
    model, training = build(settings, name), settings.training(name)
    data: dict[str, Any] = load(settings, data_dir, run.parent)  # lists are all that Trainer needs of a dataset
    steps = math.ceil(training.epochs * math.ceil(len(data["train"]) / training.batch_size))
    arguments = TrainingArguments(
        str(run),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=2 * training.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=round(training.warmup * steps),
        train_sampling_strategy="group_by_length" if "input_ids" in data["train"][0] else "random",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=_accuracy,
        optimizers=(optimizer(model, training.learning_rate, training.weight_decay, training.taps_rate), None),
        callbacks=[Watch(f"{settings.task}, {name}, seed {seed}")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    history = trainer.state.log_history
    seconds = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch)).seconds
    tokens = np.mean([np.size(next(iter(row.values()))) for row in data["train"]]) * steps * training.batch_size
    result = {
        "parameters": parameters(model),
        "accuracy": 100 * (trainer.predict(data["test"]).metrics or {})["test_accuracy"],
        "validation": [[entry["epoch"], 100 * entry["eval_accuracy"]] for entry in history if "eval_accuracy" in entry],
        "epochs": training.epochs,
        "seconds": seconds,
        "tokens_per_second": float(tokens / seconds),
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    trainer.save_model(str(run / "final"))
    write_text(run / "result.json", json.dumps(result | {"told": told}, indent=1))
    return result


def test_distilled(settings: Settings, run: Path, data_dir: str | None) -> dict:
    """Distill the STU of a finished run and test both.

    Returns:
        accuracy, percent, of the distilled model; differ: rows of the test split that it answers otherwise; logits: the
        largest difference of a class score over the largest score; states of a layer.
    """
    model = FlashSTUForSequenceClassification.from_pretrained(run / "final", trust_remote_code=False).eval()
    began = time.perf_counter()
    distilled = distill(model)
    seconds, rows = time.perf_counter() - began, load(settings, data_dir, run.parent)["test"]
    before, after = (_logits(one, rows, settings.train.batch_size) for one in (model, distilled))
    labels = np.array([row["labels"] for row in rows])
    return {
        "parameters": parameters(distilled),
        "accuracy": 100 * float((after.argmax(1) == labels).mean()),
        "differ": int((before.argmax(1) != after.argmax(1)).sum()),
        "logits": float(np.abs(before - after).max() / np.abs(before).max()),
        "states": distilled.config.lds_state_dim,
        "seconds": seconds,
    }


def build(settings: Settings, name: Model) -> nn.Module:
    """Returns a model with about as many parameters as the STU: what differs is the width of the MLPs."""
    config = settings.architecture(name)
    with torch.device("meta"):
        wanted = parameters(FlashSTUForSequenceClassification(settings.architecture("stu")))
    if name in _PEERS:
        make, inner, least = _PEERS[name]
        one, two = (parameters(make(config, **{inner: width})) for width in (1, 2))
        width = 1 + (wanted - one) / (two - one)  # the number of parameters is linear in it
        return make(config, **{inner: max(least, round(width / least) * least)})
    if name != "stu":
        with torch.device("meta"):
            own = parameters(FlashSTUForSequenceClassification(config))
        unit = 3 * config.hidden_size * config.num_hidden_layers  # parameters per unit of the MLPs' inner width
        config.intermediate_size = max(1, config.intermediate_size + round((wanted - own) / unit))
    model = FlashSTUForSequenceClassification(config)
    for key, weight in model.named_parameters():
        if key.endswith("taps.M_u") and settings.train.taps_std:
            nn.init.normal_(weight, std=settings.train.taps_std)
    return model


def parameters(model: nn.Module) -> int:
    """Returns the number of trained weights."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def optimizer(model: nn.Module, rate: float, decay: float, taps_rate: float) -> torch.optim.Optimizer:
    """Returns AdamW, slower and without decay for M^y, as Spectral SSM trains it; vectors do not decay either."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "taps": []}
    for name, weight in model.named_parameters():
        groups["taps" if name.endswith("taps.M_y") else "matrices" if weight.ndim > 1 else "vectors"].append(weight)
    chosen = [
        {"params": groups["matrices"], "weight_decay": decay},
        {"params": groups["vectors"], "weight_decay": 0.0},
        {"params": groups["taps"], "weight_decay": 0.0, "lr": rate * taps_rate},
    ]
    return torch.optim.AdamW([group for group in chosen if group["params"]], lr=rate)


class Watch(TrainerCallback, ExportableState):
    """Adds up the seconds of training steps, which a checkpoint keeps, and tells how far it is.

    On a CPU they are those that the process was given, whatever else runs there.

    Args:
        name: of the run.

    Attributes:
        seconds: so far.
    """

    def __init__(self, name: str) -> None:
        self.name, self.seconds, self._began = name, 0.0, 0.0

    @staticmethod
    def _now() -> float:
        return time.perf_counter() if torch.cuda.is_available() else time.process_time()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += self._now() - self._began

    def state(self) -> dict:
        return {"args": {"name": self.name}, "attributes": {"seconds": self.seconds}}

    def on_evaluate(self, _: Any, state: TrainerState, *__: Any, metrics: dict[str, float], **___: Any) -> None:
        percent = 100 * next(value for key, value in metrics.items() if key.endswith("accuracy"))
        print(f"{self.name}: epoch {state.epoch or 0:.0f}, {percent:.1f} % after {self.seconds:.0f} s", flush=True)


def _accuracy(result: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.asarray(result.predictions).argmax(-1) == result.label_ids).mean())}


@torch.no_grad()
def _logits(model: nn.Module, rows: list[dict], batch: int) -> np.ndarray:
    """Returns the class scores of all rows, (rows, classes), float64."""
    parts = []
    for first in range(0, len(rows), batch):
        inputs = collate(rows[first : first + batch])
        inputs.pop("labels")
        parts.append(model(**inputs).logits.double().numpy())
    return np.concatenate(parts)
