"""The trainer: data, model and optimizers of one run, and the loop over its steps.

A step does not depend on what happened in this process before: the batch, the dropout seed and the learning rate are
functions of the step, and weights and moments come from the checkpoint. So a run that was stopped and resumed is the
same run, and without dropout the same config gives the same losses for every number of processes, up to rounding.
"""

import hashlib
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from flash_stu.data import BatchLoader, TokenDataset, load_tokenizer, prepare
from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.training.checkpoint import Checkpointer
from flash_stu.training.checkpoint_folder import RunState
from flash_stu.training.evaluation_hook import TaskEvaluation, ValidationWindows
from flash_stu.training.flops import peak_flops, train_flops
from flash_stu.training.initialization import build_model, check_initial_weights
from flash_stu.training.metrics import Metrics, StepRecord, check_wandb, peak_memory
from flash_stu.training.model_source import find_checkpoint
from flash_stu.training.optimizer import build_optimizers, learning_rate, set_learning_rate
from flash_stu.training.parallel import parallelize
from flash_stu.training.run_config import RunConfig
from flash_stu.training.run_directory import RunDirectory
from flash_stu.training.run_size import check_size
from flash_stu.training.step import dropout_seed, train_step
from flash_stu.training.watchdog import Watchdog

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what cluster schedulers send before they take a machine away


class Trainer:
    """One process's part of a run. Configuration errors are raised on construction, before the first step."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """Prepare data, model and optimizers; nothing is written but prepared data.

        Args:
            config: the run's.
            world: the processes, from join_world.

        Raises:
            UserError: for settings that do not fit each other, the data, the tokenizer or the run directory.
        """
        self.config, self.world = config, world
        train = config.train
        self.directory = RunDirectory(config)
        self.directory.check()
        check_wandb(config.wandb.mode)
        check_size(config, world)
        if train.initial_weights is not None:
            check_initial_weights(train.initial_weights)
        sequences = config.sequences_per_step(world.size)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if self.tokenizer.vocab_size > config.model["vocab_size"]:
            raise UserError(
                f"model.vocab_size is {config.model['vocab_size']}; "
                f"at least {self.tokenizer.vocab_size}, the vocabulary of tokenizer {self.tokenizer.spec}"
            )
        architecture = config.architecture()
        longest = architecture.max_position_embeddings if architecture.uses_stu else None
        self.evaluation = TaskEvaluation(config.evaluation, world, self.tokenizer, longest)
        data = prepare(config.data, progress=world.is_main)
        part = (world.data_rank, world.data_size)
        self.loader = BatchLoader(data.train, train.sequence_length, sequences, config.seed, *part)
        self.end_of_text = self.tokenizer.eos_token_id if config.data.separate_documents else None
        self.validation = ValidationWindows(data.validation, config, self.end_of_text)
        self.steps = config.count_steps(len(data.train))
        self.step = 0  # optimizer steps done, with the one in progress
        self.seconds = 0.0  # spent on them
        self.skipped = 0  # of them, because loss or gradient was not finite
        self.skipped_in_a_row = 0  # since the last step that was taken
        self.data_digest = _digest(data.train, data.validation)
        self.run_id = uuid.uuid4().hex[:8]
        self.terminated = False  # this process got a stop signal
        self.stopping = False  # some process did, and all know it

        self.model = parallelize(build_model(config.architecture()), config, world)
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self.mfu_per_rate = _mfu_per_rate(config, world)
        self.watchdog = Watchdog(world, 60 * config.parallel.timeout_minutes)
        self.metrics = Metrics(config, self.directory.path, self.steps, enabled=world.is_main)
        self.checkpoints = Checkpointer(
            self.directory.checkpoints,
            self.model,
            self.optimizers,
            world,
            keep=train.keep_checkpoints,
            keep_every=train.keep_every,
            report=self._say,
        )
        self.validation.try_forward(self.model, world)

    def fit(self) -> bool:
        """Train to the last step, resuming from the run directory, and export the model.

        Returns:
            True when the run is finished; False when a signal ended it early, with a checkpoint to resume from.
        """
        if self.world.on_main(lambda: self.directory.is_finished(self.steps)):
            self._say(f"{self.directory.path} is finished: {self.steps} steps, model in {self.directory.final}")
            return True
        with ExitStack() as holding:
            self.world.on_main(lambda: holding.enter_context(self.directory.holding()))
            self._announce()
            with self._stop_on_signal(), self.watchdog, self.checkpoints, self.metrics:
                self._resume()
                self.world.on_main(lambda: self.metrics.open(self.step, self.run_id))
                if self.step == 0:
                    self._validate()
                while self.step < self.steps and not self.stopping:
                    self.step += 1
                    self._train_step()
                    self._after_step()
                self.watchdog.mark("writing the last checkpoint")
                self.checkpoints.wait()
            if self.step < self.steps:
                self._say(f"stopped at step {self.step} of {self.steps}; the same command continues from there")
                return False
            self.world.on_main(self._export)
        return True

    def _train_step(self) -> None:
        """Take the optimizer step self.step on its global batch, and log it."""
        start = time.perf_counter()
        self._mark("reading its batch")
        batch = self.loader.batch(self.step - 1)
        waited = time.perf_counter() - start
        torch.manual_seed(dropout_seed(self.config.seed, self.step, self.world.rank))
        rate = learning_rate(self.step, self.config.optimizer, self.steps)
        set_learning_rate(self.optimizers, rate)
        flags = float(self.terminated), float(self.metrics.failure is not None)
        result = train_step(
            self.model, self.optimizers, batch, self.config, self.world, flags, self._mark, self.end_of_text
        )
        terminated, unwritten = result.sums
        if unwritten:
            self.world.on_main(self.metrics.sync)  # raises
        self.stopping = terminated > 0  # one process's signal stops all of them, after the same step
        self.skipped += not result.taken
        self.skipped_in_a_row = 0 if result.taken else self.skipped_in_a_row + 1
        seconds = time.perf_counter() - start
        self.seconds += seconds
        tokens_per_second = self.config.train.global_batch_size / seconds
        self.metrics.log_step(
            StepRecord(
                step=self.step,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                skipped=self.skipped,
                tokens_per_second=tokens_per_second,
                mfu=self.mfu_per_rate and self.mfu_per_rate * tokens_per_second,
                memory_gib=peak_memory(self.world.device),
                data_wait=waited,
                time=self.seconds,
            )
        )

    def _after_step(self) -> None:
        """Evaluate and save where it is time to.

        Raises:
            UserError: after too many skipped steps.
        """
        every, last = self.config.train, self.step == self.steps
        too_many = self.skipped_in_a_row > every.max_skipped_steps
        if last or self.step % every.validation_every == 0:
            self._validate()
        if self.evaluation.due(self.step):
            self.metrics.log_tasks(self.step, self.evaluation.scores(self.model, self.watchdog.mark))
        if last or self.stopping or too_many or self.step % every.checkpoint_every == 0:
            self._save(skipped_in_a_row=0 if too_many else self.skipped_in_a_row)
        if too_many:
            self.checkpoints.wait()
            raise UserError(
                f"loss or gradient not finite in {self.skipped_in_a_row} steps in a row, the last of them step "
                f"{self.step} (train.max_skipped_steps is {every.max_skipped_steps}); "
                f"{find_checkpoint(self.directory.path, self.step)} has the weights from before them. "
                "A lower learning rate or float32 helps; the same command tries the next batches"
            )

    def _validate(self) -> None:
        self.metrics.log_validation(self.step, *self.validation.losses(self.model, self.world, self._mark))

    def _resume(self) -> None:
        """Load the newest intact checkpoint, if there is one.

        Raises:
            UserError: if it was trained on other data.
        """
        state = self.checkpoints.resume()
        if state:
            if state.data != self.data_digest:
                raise UserError(
                    f"the text of data.dataset {self.config.data.dataset} is not what {self.directory.path} "
                    "was trained on so far; restore it, or choose another output_dir"
                )
            self.step, self.seconds, self.run_id = state.step, state.seconds, state.run_id
            self.skipped, self.skipped_in_a_row = state.skipped, state.skipped_in_a_row
            self._say(f"continuing {self.directory.path} after step {self.step} of {self.steps}")

    def _save(self, skipped_in_a_row: int) -> None:
        """Begin to write a checkpoint; training continues meanwhile."""
        self._mark("checkpoint")
        self.world.on_main(self.metrics.sync)
        state = RunState(
            step=self.step,
            seconds=self.seconds,
            run_id=self.run_id,
            data=self.data_digest,
            skipped=self.skipped,
            skipped_in_a_row=skipped_in_a_row,
        )
        self.checkpoints.save(state)

    def _export(self) -> None:
        self.directory.export(find_checkpoint(self.directory.path, self.steps))
        self._say(f"model written to {self.directory.final}")

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            self.terminated = True

        before = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        tokens = self.steps * self.config.train.global_batch_size
        self._say(f"training {parameters:,} parameters on {tokens:,} tokens in {self.steps:,} steps")
        self._say(f"processes: {self.world.size}, on {self.world.device.type}")
        self._say(f"run directory: {self.directory.path.resolve()}")

    def _mark(self, what: str) -> None:
        self.watchdog.mark(f"step {self.step}: {what}")

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def _mfu_per_rate(config: RunConfig, world: World) -> float | None:
    """Returns the MFU at one token per second over all processes; None where the device's peak is not known."""
    peak = peak_flops(world.device, torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32)
    flops = train_flops(config.architecture(), config.train.sequence_length)
    return None if peak is None else flops / (peak * world.size)


def _digest(*datasets: TokenDataset) -> str:
    """Returns a hash of all tokens, from the checksums of their shards."""
    checksums = [[shard.sha256 for shard in dataset.manifest.shards] for dataset in datasets]
    return hashlib.sha256(repr(checksums).encode()).hexdigest()
