"""The trainer: data, model and optimizer of one run, and the loop over its steps.

Nothing about a step depends on what happened in this process before: the batch, the dropout seed and the
learning rate are functions of the step, and weights and moments come from the checkpoint. So a run that was
stopped and started again is the same run, and without dropout the same config gives the same losses for
every number of processes, up to rounding.
"""

import hashlib
import math
import os
import shutil
import signal
import sys
import time
import uuid
from contextlib import contextmanager

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from flash_stu.data import BatchLoader, TokenDataset, load_tokenizer, prepare
from flash_stu.errors import UserError
from flash_stu.model import FlashSTUForCausalLM
from flash_stu.training import checkpoint
from flash_stu.training.config import RunConfig
from flash_stu.training.metrics import Metrics, check_wandb
from flash_stu.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from flash_stu.training.parallel import World, clip_gradients, parallelize, set_gradient_sync
from flash_stu.training.run_directory import RunDirectory


class Trainer:
    """One process's part of a run. Everything a user can have got wrong is found before the first step."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """Prepare data, model and optimizer.

        Args:
            config: the run's.
            world: the processes, from join_world.

        Raises:
            UserError: for settings that do not fit each other, the data, the tokenizer or the run directory.
        """
        self.config, self.world = config, world
        self.directory = RunDirectory(config)
        self.directory.check()
        check_wandb(config.wandb.mode)
        sequences = config.sequences_per_step(world.size)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if self.tokenizer.vocab_size > config.model["vocab_size"]:
            raise UserError(
                f"model.vocab_size is {config.model['vocab_size']}; "
                f"at least {self.tokenizer.vocab_size}, the vocabulary of tokenizer {self.tokenizer.spec}"
            )
        data = prepare(config.data, progress=world.is_main)
        self.loader = BatchLoader(
            data.train, config.train.sequence_length, sequences, config.seed, world.rank, world.size
        )
        self.validation = ValidationWindows(data.validation, config)
        self.steps = config.train.steps or self._steps_of_epochs(len(data.train), sequences)
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # spent on them
        self.data_digest = _digest(data.train, data.validation)
        self.run_id = uuid.uuid4().hex[:8]
        self.terminated = False  # this process got a SIGTERM
        self.stopping = False  # some process did, and all know it

        architecture = config.architecture()
        architecture.eos_token_id = self.tokenizer.eos_token_id
        torch.manual_seed(config.seed)
        self.model = parallelize(FlashSTUForCausalLM(architecture), config, world)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self._try_forward()

    def fit(self) -> bool:
        """Train to the last step, from where the run directory left off, and export the model.

        Returns:
            True when the run is finished; False when SIGTERM ended it early, with a checkpoint to go on from.
        """
        if self.world.from_main(self.directory.is_finished(self.steps)):
            self._say(f"{self.directory.path} is finished: {self.steps} steps, model in {self.directory.final}")
            return True
        self._announce()
        self._resume()
        every = self.config.train
        with self._open_metrics() as metrics, self._stop_on_sigterm():
            if self.step == 0:
                metrics.validation(0, **self.validate())
            while self.step < self.steps and not self.stopping:
                self.step += 1
                metrics.train(self.step, self._train_step())
                last = self.step == self.steps
                if last or self.step % every.validation_every == 0:
                    metrics.validation(self.step, **self.validate())
                if last or self.stopping or self.step % every.checkpoint_every == 0:
                    metrics.sync()
                    self._save()
        if self.step < self.steps:
            self._say(f"stopped at step {self.step} of {self.steps}; the same command continues from there")
            return False
        self._export()
        return True

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over the validation windows, {"loss" (nats per token), "bits_per_byte"}."""
        self.model.eval()
        nats = windows = 0
        for batch, counted in self.validation.batches(self.world):
            nats = nats + self._loss(batch, counted or None) * counted
            windows += counted
        nats, windows = self.world.sum(nats, windows)
        loss = nats / windows
        return {"loss": loss, "bits_per_byte": loss / math.log(2) * self.validation.tokens_per_byte}

    def _train_step(self) -> dict[str, float]:
        """One optimizer step on the global batch of self.step; what metrics.jsonl says of it."""
        start = time.perf_counter()
        torch.manual_seed(dropout_seed(self.config.seed, self.step, self.world.rank))
        rate = learning_rate(self.step, self.config.optimizer, self.steps)
        set_learning_rate(self.optimizer, rate)
        loss = self._accumulate_gradients()
        norm = clip_gradients(self.model, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, terminated = self.world.sum(loss / self.world.size, float(self.terminated))
        self.stopping = terminated > 0  # one process's SIGTERM stops all of them, after the same step
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step}; the checkpoints before it are intact")
        return {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": self.config.train.global_batch_size / seconds,
            "time": self.seconds,
        }

    def _accumulate_gradients(self) -> torch.Tensor:
        """Add up the gradients of this process's part of the global batch; returns its mean loss."""
        self.model.train()
        micro_batches = self.loader.batch(self.step - 1).split(self.config.train.micro_batch_size)
        total = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(micro_batches):
            set_gradient_sync(self.model, index == len(micro_batches) - 1)
            loss = self._loss(batch) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, windows: torch.Tensor, counted: int | None = None) -> torch.Tensor:
        """Mean nats per token of windows (sequences, sequence_length + 1), the first `counted` or all."""
        windows = windows.to(self.world.device, non_blocking=True)
        labels = windows[:, 1:].clone()
        if counted is not None:
            labels[counted:] = -100
        return self.model(input_ids=windows[:, :-1], shift_labels=labels, skip_logits=True).loss

    @torch.no_grad()
    def _try_forward(self) -> None:
        """Find out about a back end that cannot run here before anything is written."""
        self.model.eval()
        batch, _ = next(self.validation.batches(self.world))
        self._loss(batch)

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        tokens = self.steps * self.config.train.global_batch_size
        self._say(f"training {parameters:,} parameters on {tokens:,} tokens in {self.steps:,} steps")
        self._say(f"processes: {self.world.size}, on {self.world.device.type}")
        self._say(f"run directory: {self.directory.path.resolve()}")

    def _resume(self) -> None:
        if self.world.is_main:
            self.directory.create()
        progress = checkpoint.resume(self.directory.checkpoints, self.model, self.optimizer, self.world, self._say)
        if progress:
            if progress["data"] != self.data_digest:
                raise UserError(
                    f"the text of data.dataset {self.config.data.dataset} is not what {self.directory.path} "
                    "was trained on so far; restore it, or choose another output_dir"
                )
            self.step, self.seconds, self.run_id = progress["step"], progress["seconds"], progress["run_id"]
            self._say(f"continuing {self.directory.path} after step {self.step} of {self.steps}")

    def _save(self) -> None:
        progress = {"seconds": self.seconds, "run_id": self.run_id, "data": self.data_digest}
        keep = self.config.train.keep_checkpoints
        checkpoint.save(self.directory.checkpoints, self.step, self.model, self.optimizer, progress, keep, self.world)

    def _export(self) -> None:
        """Write final/: the model and its tokenizer as a transformers directory."""
        weights = checkpoint.gather_model(self.model)
        if self.world.is_main:
            architecture = self.config.architecture()
            architecture.eos_token_id = self.tokenizer.eos_token_id
            with torch.device("meta"):
                model = FlashSTUForCausalLM(architecture)
            model.load_state_dict(weights, assign=True, strict=False)
            model.tie_weights()
            temporary = self.directory.path / ".final.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            if not sys.stderr.isatty():
                disable_progress_bar()
            model.save_pretrained(temporary)
            self.tokenizer.to_transformers().save_pretrained(temporary)
            shutil.rmtree(self.directory.final, ignore_errors=True)
            os.rename(temporary, self.directory.final)
            self._say(f"model written to {self.directory.final}")
        self.world.barrier()

    def _steps_of_epochs(self, tokens: int, sequences: int) -> int:
        windows = (tokens - 1) // self.config.train.sequence_length
        steps = int(self.config.train.epochs * windows / sequences)
        if steps <= self.config.optimizer.warmup_steps:
            raise UserError(
                f"train.epochs is {self.config.train.epochs}, {steps} steps on {tokens} tokens; "
                f"more are needed than optimizer.warmup_steps, {self.config.optimizer.warmup_steps}"
            )
        return steps

    def _open_metrics(self) -> Metrics:
        return Metrics(self.config, self.directory.path, self.steps, self.step, self.run_id, enabled=self.world.is_main)

    @contextmanager
    def _stop_on_sigterm(self):
        def stop(*_):
            self.terminated = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


class ValidationWindows:
    """The same windows at every validation, evenly spread over the split."""

    def __init__(self, dataset: TokenDataset, config: RunConfig) -> None:
        self.dataset = dataset
        self.length = config.train.sequence_length
        self.batch_size = config.train.micro_batch_size
        available = (len(dataset) - 1) // self.length
        if available < 1:
            raise UserError(
                f"train.sequence_length is {self.length}; the validation split has only {len(dataset)} tokens"
            )
        wanted = config.train.validation_tokens
        count = available if wanted is None else min(available, max(1, wanted // self.length))
        self.starts = [i * available // count * self.length for i in range(count)]
        self.tokens_per_byte = len(dataset) / dataset.num_bytes

    def batches(self, world: World):
        """Yield (windows, how many of them count, from the front) for this process.

        Every process gets the same number of batches, since a forward pass may have to be made by all
        together, and all batches have one shape, since compiled blocks would be compiled again for another:
        the last ones are filled up with copies.
        """
        for first in range(0, len(self.starts), self.batch_size * world.size):
            begin = first + world.rank * self.batch_size
            starts = self.starts[begin : begin + self.batch_size]
            filled = starts + self.starts[:1] * (self.batch_size - len(starts))
            windows = [self.dataset.window(start, self.length + 1) for start in filled]
            yield torch.from_numpy(np.stack(windows).astype(np.int64)), len(starts)


def _digest(*datasets: TokenDataset) -> str:
    """A hash of all tokens, from the checksums of their shards."""
    checksums = [[shard.sha256 for shard in dataset.manifest.shards] for dataset in datasets]
    return hashlib.sha256(repr(checksums).encode()).hexdigest()


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step on one process: no state of theirs has to be saved."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
