"""Training of models that predict the next step of a series, and their errors one step ahead and in closed loop.

A network may have a base, a fixed prediction that it corrects: the last value (persistence), or a linear map of the
last inputs. Inputs are (batch, length, channels): what is predicted first, then what is only given (torques).
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from peers import Peer
from torch import nn
from transformers import Trainer, TrainingArguments

from flash_stu import FlashSTUConfig
from flash_stu.model.prediction import FlashSTUForTimeSeriesPrediction

Base = Callable[
    [torch.Tensor], torch.Tensor
]  # inputs (batch, length, channels) to predictions (batch, length, outputs)


def persistence(outputs: int) -> Base:
    """Returns the prediction that nothing changes."""
    return lambda inputs: inputs[..., :outputs]


def nothing(outputs: int) -> Base:
    """Returns the prediction of zeros, for a network that predicts the whole."""
    return lambda inputs: torch.zeros_like(inputs[..., :outputs])


def linear(inputs: torch.Tensor, targets: torch.Tensor) -> Base:
    """Returns the least-squares prediction from the last inputs and a constant, fitted in float64."""
    rows = _with_one(inputs).flatten(0, 1).double()
    weights = torch.linalg.lstsq(rows.T @ rows, rows.T @ targets.flatten(0, 1).double(), driver="gelsd").solution
    return lambda inputs: (_with_one(inputs).double() @ weights).to(inputs.dtype)


def _with_one(inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)


@dataclass
class Predictor:
    """A network, or none, that corrects a base.

    Attributes:
        base: what it corrects.
        network: FlashSTUForTimeSeriesPrediction, a Peer, or None for the base alone.
    """

    base: Base
    network: nn.Module | None = None

    @torch.no_grad()
    def one_step(self, inputs: torch.Tensor, batch: int = 32) -> torch.Tensor:
        """Returns the predictions (batch, length, outputs) at every step, from true inputs."""
        return torch.cat([self._whole(rows) for rows in inputs.split(batch)])

    def _whole(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) + (0 if self.network is None else self.network(input_values=inputs).predictions)

    @torch.no_grad()
    def closed_loop(self, context: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Feed its own predictions back.

        Args:
            context: true inputs, (batch, length, channels).
            given: the channels that are not predicted, at the steps after them, (batch, steps, channels).

        Returns:
            predictions (batch, steps + 1, outputs), of the step after the context and of the `steps` that follow.
        """
        step = self.stepper()
        predictions = [step(context)]
        for now in given.split(1, dim=1):
            predictions.append(step(torch.cat([predictions[-1], now], dim=-1)))
        return torch.cat(predictions, dim=1)

    def stepper(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns a function that takes the next inputs, at first a whole past, and predicts (batch, 1, outputs).

        A network of ours carries its past in its cache; another library's reads it anew at every step.
        """
        past: list = []

        def step(inputs: torch.Tensor) -> torch.Tensor:
            base = self.base(inputs[:, -1:])
            if self.network is None:
                return base
            if isinstance(self.network, Peer):
                past.append(inputs)
                return base + self.network(input_values=torch.cat(past, dim=1)).predictions[:, -1:]
            cache = past[0] if past else None
            out = self.network(input_values=inputs, past_key_values=cache, use_cache=True)
            past[:] = [out.past_key_values]
            return base + out.predictions[:, -1:]

        return step


@dataclass(frozen=True)
class Settings:
    """Of a training: AdamW from `rate` by a cosine to a tenth of it, after a warm-up of an eighth of the steps.

    Attributes:
        epochs, batch, rate, weight_decay: as their names say.
        noise: standard deviation of what is added to all inputs of some steps.
        noisy: the share of those steps.
    """

    epochs: int = 1
    batch: int = 2
    rate: float = 1.8e-3
    weight_decay: float = 0.1
    noise: float = 0.5
    noisy: float = 0.1


def train(
    network: nn.Module, base: Base, inputs: torch.Tensor, targets: torch.Tensor, settings: Settings, seed: int
) -> tuple[Predictor, dict]:
    """Train a network to correct a base.

    Returns:
        the predictor, and the training's parameters, seconds, updates and curve of [step, loss].
    """
    generator = torch.Generator().manual_seed(seed)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        noisy, clean = (torch.stack([row[key] for row in rows]) for key in ("inputs", "targets"))
        chosen = torch.rand(noisy.shape[:2], generator=generator) < settings.noisy
        noisy = noisy + settings.noise * chosen[..., None] * torch.randn(noisy.shape, generator=generator)
        return {"input_values": noisy, "labels": clean - base(noisy)}

    data = [{"inputs": x, "targets": y} for x, y in zip(inputs, targets, strict=True)]
    steps = settings.epochs * -(-len(data) // settings.batch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=steps // 8,
            weight_decay=settings.weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.95,
            logging_steps=max(1, steps // 40),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=True,
            seed=seed,
        )
        trainer = QuietTrainer(network, arguments, train_dataset=data, data_collator=collate)  # pyright: ignore[reportArgumentType]
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    curve = [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]
    facts = {"parameters": parameters(network), "seconds": seconds, "updates": steps, "curve": curve}
    return Predictor(base, network.eval()), facts


class QuietTrainer(Trainer):
    """transformers' Trainer without a line per log: the curve is in its state."""

    def __init__(self, *arguments, **settings) -> None:  # noqa: ANN002, ANN003 - the base class's
        super().__init__(*arguments, **settings)
        from transformers import PrinterCallback

        self.remove_callback(PrinterCallback)


def parameters(network: nn.Module) -> int:
    """Returns how many numbers are trained."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def matched(config: FlashSTUConfig, wanted: int) -> FlashSTUForTimeSeriesPrediction:
    """Returns a model of the configuration with the intermediate size that brings it closest to so many parameters."""

    def build(size: int) -> FlashSTUForTimeSeriesPrediction:
        changed = copy.deepcopy(config)
        changed.intermediate_size = size
        return FlashSTUForTimeSeriesPrediction(changed)

    small, large = parameters(build(8)), parameters(build(16))
    per_size = (large - small) / 8
    return build(max(1, round(8 + (wanted - small) / per_size)))


def squared_errors(predictions: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Returns the mean squared error at each step, over batch and channels, (length,) float64."""
    return (predictions.double() - targets.double()).square().mean((0, 2)).numpy()
