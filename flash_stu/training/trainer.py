"""The trainer: data, model and optimizer of one run, and the loop over its steps.

Nothing about a step depends on what happened in this process before: the batch, the dropout seed and the
learning rate are functions of the step, and weights and moments come from the checkpoint. So a run that was
stopped and started again is the same run, and without dropout the same config gives the same losses for
every number of processes, up to rounding.
"""

import hashlib
import math
import signal
import time
import uuid
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from flash_stu.data import BatchLoader, TokenDataset, load_tokenizer, prepare
from flash_stu.errors import UserError
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.training.checkpoint import Checkpointer, RunState
from flash_stu.training.config import RunConfig
from flash_stu.training.evaluation_hook import TaskEvaluation
from flash_stu.training.export import find_checkpoint
from flash_stu.training.flops import peak_flops, train_flops
from flash_stu.training.health import SkippedSteps, SpikeDetector
from flash_stu.training.initialization import check_initial_weights
from flash_stu.training.metrics import Metrics, peak_memory, read_metrics
from flash_stu.training.optimizer import build_optimizers, learning_rate, set_learning_rate
from flash_stu.training.parallel import (
    World,
    check_size,
    clip_gradients,
    free_gathered,
    parallelize,
    set_gradient_sync,
)
from flash_stu.training.run_directory import RunDirectory
from flash_stu.training.tracking import check_wandb
from flash_stu.training.validation import ValidationWindows
from flash_stu.training.watchdog import Watchdog

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what cluster schedulers send before they take a machine away


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
        check_size(config, world)
        if config.train.initial_weights is not None:
            check_initial_weights(config.train.initial_weights)
        sequences = config.sequences_per_step(world.size)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if self.tokenizer.vocab_size > config.model["vocab_size"]:
            raise UserError(
                f"model.vocab_size is {config.model['vocab_size']}; "
                f"at least {self.tokenizer.vocab_size}, the vocabulary of tokenizer {self.tokenizer.spec}"
            )
        self.evaluation = TaskEvaluation(config.evaluation, world, self.tokenizer)
        data = prepare(config.data, progress=world.is_main)
        self.loader = BatchLoader(
            data.train, config.train.sequence_length, sequences, config.seed, world.rank, world.size
        )
        self.validation = ValidationWindows(data.validation, config)
        self.steps = config.train.steps or self._steps_of_epochs(len(data.train), sequences)
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # spent on them
        self.skipped = SkippedSteps(config.train.max_skipped_steps)
        self.data_digest = _digest(data.train, data.validation)
        self.run_id = uuid.uuid4().hex[:8]
        self.terminated = False  # this process got a stop signal
        self.stopping = False  # some process did, and all know it

        self.model = parallelize(build_model(config), config, world)
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self.mfu_per_rate = _mfu_per_rate(config.architecture(), config, world)
        self._try_forward()

    def fit(self) -> bool:
        """Train to the last step, from where the run directory left off, and export the model.

        Returns:
            True when the run is finished; False when a signal ended it early, with a checkpoint to go on from.
        """
        if self.world.on_main(lambda: self.directory.is_finished(self.steps)):
            self._say(f"{self.directory.path} is finished: {self.steps} steps, model in {self.directory.final}")
            return True
        with ExitStack() as stack:
            self.world.on_main(lambda: stack.enter_context(self.directory.holding()))
            self._announce()
            self._train()
            if self.step < self.steps:
                self._say(f"stopped at step {self.step} of {self.steps}; the same command continues from there")
                return False
            self.world.on_main(self._export)
        return True

    def _train(self) -> None:
        """Train to the last step or a signal."""
        with ExitStack() as stack:
            stack.enter_context(self._stop_on_signal())
            self.watchdog = stack.enter_context(Watchdog(self.world, 60 * self.config.parallel.timeout_minutes))
            self.checkpoints = stack.enter_context(self._open_checkpoints())
            self._resume()
            self.metrics = stack.enter_context(self._metrics())
            self.world.on_main(self.metrics.open)
            self.spikes = SpikeDetector(r["loss"] for r in read_metrics(self.directory.metrics_file) if "loss" in r)
            self._loop()

    def _loop(self) -> None:
        """The steps, with what happens between them."""
        every = self.config.train
        if self.step == 0:
            self.metrics.validation(0, **self.validate())
        while self.step < self.steps and not self.stopping:
            self.step += 1
            record = self._train_step()
            self.metrics.train(self.step, record)
            if usual := self.spikes.check(record["loss"]):
                self.metrics.loss_spike(self.step, record["loss"], usual)
            last = self.step == self.steps
            if last or self.step % every.validation_every == 0:
                self.metrics.validation(self.step, **self.validate())
            if self.evaluation.due(self.step):
                self.metrics.tasks(self.step, self.evaluation.scores(self.model, self.watchdog.mark))
            if last or self.stopping or self.skipped.too_many or self.step % every.checkpoint_every == 0:
                self._save()
            if self.skipped.too_many:
                self.checkpoints.wait()
                self.skipped.end_run(self.step, find_checkpoint(self.directory.path, self.step))
        self.watchdog.mark("writing the last checkpoint")
        self.checkpoints.wait()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over the validation windows, {"loss" (nats per token), "bits_per_byte"}."""
        self.model.eval()
        nats = windows = 0
        for batch, counted in self.validation.batches(self.world):
            self.watchdog.mark(f"step {self.step}: validation")
            nats = nats + self._loss(batch, counted or None) * counted
            windows += counted
        free_gathered(self.model)
        nats, windows = self.world.sum(nats, windows)
        loss = nats / windows
        return {"loss": loss, "bits_per_byte": loss / math.log(2) * self.validation.tokens_per_byte}

    def _train_step(self) -> dict[str, float | None]:
        """One optimizer step on the global batch of self.step; what metrics.jsonl says of it."""
        start = time.perf_counter()
        self.watchdog.mark(f"step {self.step}: reading its batch")
        batch = self.loader.batch(self.step - 1)
        waited = time.perf_counter() - start
        torch.manual_seed(dropout_seed(self.config.seed, self.step, self.world.rank))
        rate = learning_rate(self.step, self.config.optimizer, self.steps)
        set_learning_rate(self.optimizers, rate)
        loss = self._accumulate_gradients(batch)
        norm = clip_gradients(self.model, self.config.train.max_grad_norm)
        loss, terminated, unwritten = self.world.sum(
            loss / self.world.size, float(self.terminated), float(self.metrics.failure is not None)
        )
        if unwritten:
            self.world.on_main(self.metrics.sync)  # raises
        self.stopping = terminated > 0  # one process's signal stops all of them, after the same step
        if not self.skipped.count(loss, norm):
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        tokens_per_second = self.config.train.global_batch_size / seconds
        return {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "skipped": self.skipped.total,
            "tokens_per_second": tokens_per_second,
            "mfu": self.mfu_per_rate and self.mfu_per_rate * tokens_per_second,
            "memory_gib": peak_memory(self.world.device),
            "data_wait": waited,
            "time": self.seconds,
        }

    def _accumulate_gradients(self, batch: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of this process's part of the global batch; returns its mean loss."""
        self.model.train()
        micro_batches = batch.split(self.config.train.micro_batch_size)
        total = torch.zeros((), device=self.world.device)
        for index, windows in enumerate(micro_batches):
            self.watchdog.mark(f"step {self.step}: micro batch {index + 1} of {len(micro_batches)}")
            set_gradient_sync(self.model, index == len(micro_batches) - 1, self.config)
            loss = self._loss(windows) / len(micro_batches)
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
        free_gathered(self.model)

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        tokens = self.steps * self.config.train.global_batch_size
        self._say(f"training {parameters:,} parameters on {tokens:,} tokens in {self.steps:,} steps")
        self._say(f"processes: {self.world.size}, on {self.world.device.type}")
        self._say(f"run directory: {self.directory.path.resolve()}")

    def _resume(self) -> None:
        state = self.checkpoints.resume()
        if state:
            if state.data != self.data_digest:
                raise UserError(
                    f"the text of data.dataset {self.config.data.dataset} is not what {self.directory.path} "
                    "was trained on so far; restore it, or choose another output_dir"
                )
            self.step, self.seconds, self.run_id = state.step, state.seconds, state.run_id
            self.skipped.total, self.skipped.in_a_row = state.skipped, state.skipped_in_a_row
            self._say(f"continuing {self.directory.path} after step {self.step} of {self.steps}")

    def _save(self) -> None:
        """Begin to write a checkpoint; the steps go on meanwhile."""
        self.watchdog.mark(f"step {self.step}: checkpoint")
        self.world.on_main(self.metrics.sync)
        state = RunState(
            step=self.step,
            seconds=self.seconds,
            run_id=self.run_id,
            data=self.data_digest,
            skipped=self.skipped.total,
            skipped_in_a_row=0 if self.skipped.too_many else self.skipped.in_a_row,
        )
        self.checkpoints.save(state)

    def _export(self) -> None:
        self.directory.export(find_checkpoint(self.directory.path, self.steps))
        self._say(f"model written to {self.directory.final}")

    def _steps_of_epochs(self, tokens: int, sequences: int) -> int:
        windows = (tokens - 1) // self.config.train.sequence_length
        steps = int(self.config.train.epochs * windows / sequences)
        if steps <= self.config.optimizer.warmup_steps:
            raise UserError(
                f"train.epochs is {self.config.train.epochs}, {steps} steps on {tokens} tokens; "
                f"more are needed than optimizer.warmup_steps, {self.config.optimizer.warmup_steps}"
            )
        return steps

    def _open_checkpoints(self) -> Checkpointer:
        train = self.config.train
        return Checkpointer(
            self.directory.checkpoints,
            self.model,
            self.optimizers,
            self.world,
            keep=train.keep_checkpoints,
            keep_every=train.keep_every,
            report=self._say,
        )

    def _metrics(self) -> Metrics:
        return Metrics(self.config, self.directory.path, self.steps, self.step, self.run_id, enabled=self.world.is_main)

    @contextmanager
    def _stop_on_signal(self):
        def stop(*_):
            self.terminated = True

        before = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def build_model(config: RunConfig) -> FlashSTUForCausalLM:
    """The run's model on the meta device, for parallelize."""
    with torch.device("meta"):
        return FlashSTUForCausalLM(config.architecture())


def _mfu_per_rate(architecture: FlashSTUConfig, config: RunConfig, world: World) -> float | None:
    """MFU at one token per second over all processes; None where the device's peak is not known."""
    peak = peak_flops(world.device, torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32)
    return None if peak is None else train_flops(architecture, config.train.sequence_length) / (peak * world.size)


def _digest(*datasets: TokenDataset) -> str:
    """A hash of all tokens, from the checksums of their shards."""
    checksums = [[shard.sha256 for shard in dataset.manifest.shards] for dataset in datasets]
    return hashlib.sha256(repr(checksums).encode()).hexdigest()


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step on one process: no state of theirs has to be saved."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
