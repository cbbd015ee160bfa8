"""The run config: every setting of a training run, typed, and validated before any work starts.

A run is one YAML file plus `section.key=value` overrides. Unknown keys, wrong types and impossible combinations are
errors of one line that names the key. The resolved config, written into the run directory, is again such a file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from flash_stu.data import DataConfig
from flash_stu.errors import UserError
from flash_stu.filters.spectral import TENSOR
from flash_stu.model.config import LARGEST_LENGTH, FlashSTUConfig
from flash_stu.ops.conv import PARTIAL_BACKENDS
from flash_stu.settings import (
    LARGEST_SEED,
    Count,
    CountOrZero,
    ExpandedPath,
    Section,
    describe,
    flatten,
    override,
    read_yaml,
)

_LARGEST_BATCH = 2**40  # tokens
_Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """Length and shape of the training, validation and checkpoints."""

    sequence_length: int = Field(ge=2, le=LARGEST_LENGTH, description="tokens a sequence predicts")
    global_batch_size: int = Field(ge=1, le=_LARGEST_BATCH, description="tokens per optimizer step, over all processes")
    micro_batch_size: int = Field(default=1, ge=1, le=2**20, description="sequences per process and forward pass")
    sequence_chunks: int = Field(
        default=1,
        ge=1,
        le=2**20,
        description="pieces in which a sequence is run, one after the other, with exact gradients: activations are "
        "those of one piece, for one more forward pass",
    )
    steps: Count | None = Field(default=None, description="optimizer steps; or set epochs")
    epochs: float | None = Field(
        default=None, gt=0, le=1e6, description="passes over the training tokens; or set steps"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="dtype of the matrix products")
    compile: bool = Field(default=False, description="torch.compile every block")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="full: keep only the inputs of each block and recompute the rest in backward; "
        "selective: keep the results of products, attention and convolution too",
    )
    initial_weights: ExpandedPath | None = Field(
        default=None, description="a model directory to start from instead of random weights; its shape is model's"
    )
    max_grad_norm: float | None = Field(default=1.0, gt=0, le=1e9, description="clip the gradient's norm to this")
    max_skipped_steps: CountOrZero = Field(
        default=10, description="steps in a row with a loss or gradient that is not finite; one more ends the run"
    )
    validation_every: Count = Field(default=500, description="steps between two validations")
    validation_tokens: int | None = Field(
        default=1_048_576,
        ge=1,
        le=_LARGEST_BATCH,
        description="tokens of a validation, spread over the split; null: the whole split",
    )
    checkpoint_every: Count = Field(default=1000, description="steps between two checkpoints")
    keep_checkpoints: Count = Field(default=2, description="how many of the newest checkpoints to keep")
    keep_every: Count | None = Field(default=None, description="keep the checkpoints of multiples of this step too")
    log_every: Count = Field(default=10, description="steps between printed lines where there is no terminal")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs}; set exactly one, the other to null"
            )
        return self


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: Muon for the matrices in the blocks, AdamW for everything else"
    )
    learning_rate: float = Field(default=3e-3, gt=0, le=1e3, description="the peak, reached at the last warm-up step")
    min_learning_rate: float = Field(default=3e-5, ge=0, le=1e3, description="reached at the last step")
    warmup_steps: CountOrZero = Field(default=0, description="steps in which the rate rises from 0 to the peak")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="of the rate after the warm-up: to the minimum along a line or half a cosine, or constant",
    )
    betas: list[_Beta] = Field(
        default=[0.9, 0.95], min_length=2, max_length=2, description="AdamW's decay rates of the two moments"
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="AdamW's, added to the denominator")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's momentum")
    weight_decay: float = Field(default=0.1, ge=0, le=100, description="decay of matrices; vectors have none")
    amsgrad: bool = Field(default=False, description="AdamW divides by the largest second moment so far")
    fused: bool | Literal["auto"] = Field(default="auto", description="AdamW in one kernel per step; auto: on CUDA")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule != "constant" and self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"optimizer.min_learning_rate is {self.min_learning_rate}; "
                f"it must not exceed optimizer.learning_rate, {self.learning_rate}"
            )
        return self


class ParallelConfig(Section):
    """How several processes share the work."""

    strategy: Literal["auto", "none", "ddp", "fsdp"] = Field(
        default="auto",
        description="ddp: every process holds the model; fsdp: they share it; auto: none for one process, ddp up to a "
        "billion parameters, fsdp beyond and for replicas",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=2**20,
        description="fsdp: groups of processes that each hold one whole model (HSDP); usually the nodes",
    )
    context: int = Field(
        default=1,
        ge=1,
        le=2**20,
        description="neighbouring processes that share each sequence, an equal stretch of its tokens each",
    )
    reshard_after_forward: bool | Literal["auto"] = Field(
        default="auto",
        description="fsdp: free the gathered parameters between forward and backward, which saves memory and costs "
        "one more gathering; auto: if they take more than 8 GiB",
    )
    timeout_minutes: float = Field(
        default=10.0, gt=0, le=365 * 24 * 60, description="a process without progress for so long ends the run"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.replicas > 1 and self.strategy not in ("auto", "fsdp"):
            raise UserError(
                f"parallel.replicas is {self.replicas}, parallel.strategy {self.strategy!r}; needed: 'fsdp'"
            )
        return self


class EvaluationConfig(Section):
    """Tasks of lm-eval-harness during training, beside the validation loss."""

    tasks: str | None = Field(
        default=None, description="tasks or a suite as evaluate.py --tasks takes, such as embedded_cloze; null: none"
    )
    every: Count = Field(default=1000, description="steps between two evaluations")
    limit: Count | None = Field(default=None, description="score only this many items of each task, the first")
    data_dir: ExpandedPath | None = Field(
        default=None, description="local mirror of data sets; null: the hub, or its cache"
    )
    include_path: ExpandedPath | None = Field(default=None, description="folder with further task definitions")


class WandbConfig(Section):
    """Weights & Biases, beside metrics.jsonl, which is always written."""

    mode: Literal["auto", "disabled", "offline", "online"] = Field(
        default="auto", description="auto: offline where wandb is installed, else disabled"
    )
    project: str = Field(default="flash-stu", description="project of the run in wandb")
    name: str | None = Field(default=None, description="name of the run in wandb; null: the name of output_dir")


class RunConfig(Section):
    """All settings of a run."""

    output_dir: ExpandedPath = Field(description="the run directory")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="of initial weights, order of the data and dropout")
    model: dict[str, Any] = Field(description="entries of FlashSTUConfig")
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wandb: WandbConfig = WandbConfig()

    @field_validator("model")
    @classmethod
    def _resolve_model(cls, model: dict) -> dict:
        config = FlashSTUConfig.from_user(model)
        config.require_language_model()
        return config.to_user()

    def architecture(self) -> FlashSTUConfig:
        """Returns the model section as a new config of the model's own class."""
        return FlashSTUConfig.from_user(self.model)

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = self.model["max_position_embeddings"]
        if self.train.sequence_length > longest:
            raise UserError(
                f"train.sequence_length is {self.train.sequence_length}: sequence longer than the filters; "
                f"at most model.max_position_embeddings, {longest}"
            )
        every = self.train.keep_every
        if every is not None and every % self.train.checkpoint_every:
            raise UserError(
                f"train.keep_every is {every}; it must be a multiple of train.checkpoint_every, "
                f"{self.train.checkpoint_every}"
            )
        if self.train.steps is not None and self.optimizer.warmup_steps > self.train.steps:
            raise UserError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; at most train.steps, {self.train.steps}"
            )
        self._check_parts()
        self.sequences_per_step(self.parallel.context)
        return self

    def _check_parts(self) -> None:
        """Check what a sequence in parts does not go with."""
        numbers = {"parallel.context": self.parallel.context, "train.sequence_chunks": self.train.sequence_chunks}
        several = [f"{key} is {number}" for key, number in numbers.items() if number > 1]
        if not several:
            return
        if len(several) > 1:
            raise UserError(f"{several[0]} and {several[1]}; only one of them may be above 1")
        if self.data.separate_documents:
            raise UserError(
                f"{several[0]}, and data.separate_documents is true; documents are separated in whole sequences"
            )
        if not self.architecture().uses_stu:
            return
        if self.model["filter_basis"] == TENSOR:
            raise UserError(f"{several[0]}; model.filter_basis 'tensor' needs whole sequences")
        if self.model["conv_backend"] not in PARTIAL_BACKENDS:
            allowed = ", ".join(PARTIAL_BACKENDS)
            raise UserError(
                f"{several[0]}, and model.conv_backend is {self.model['conv_backend']!r}, which needs whole sequences; "
                f"allowed: {allowed}"
            )

    def sequences_per_step(self, processes: int) -> int:
        """Returns the number of sequences in a global batch.

        Raises:
            UserError: unless every process, or group of parallel.context processes, gets a whole number of micro
                batches; names the nearest sizes.
        """
        train, context = self.train, self.parallel.context
        groups = processes // context
        unit = train.sequence_length * train.micro_batch_size * groups
        if train.global_batch_size % unit:
            below = train.global_batch_size // unit * unit
            allowed = f"{below} or {below + unit}" if below else f"{unit}"
            among = f"{groups} processes" if context == 1 else f"{groups} groups of {context} processes"
            raise UserError(
                f"train.global_batch_size is {train.global_batch_size} tokens; "
                f"it must be a multiple of {unit} (sequence_length {train.sequence_length} x "
                f"micro_batch_size {train.micro_batch_size} x {among}), nearest: {allowed}"
            )
        return train.global_batch_size // train.sequence_length

    def count_steps(self, tokens: int) -> int:
        """Returns the number of optimizer steps: train.steps, or train.epochs of this many tokens.

        Raises:
            UserError: if these are not more than optimizer.warmup_steps.
        """
        if self.train.epochs is None:
            return self.train.steps or 0
        windows = (tokens - 1) // self.train.sequence_length
        steps = int(self.train.epochs * windows / self.sequences_per_step(self.parallel.context))
        if steps <= self.optimizer.warmup_steps:
            raise UserError(
                f"train.epochs is {self.train.epochs}, {steps} steps on {tokens} tokens; "
                f"more are needed than optimizer.warmup_steps, {self.optimizer.warmup_steps}"
            )
        return steps

    def to_yaml(self) -> str:
        """Returns the resolved config as a YAML document that load_config reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run config.

    Args:
        path: a YAML file.
        overrides: "section.key=value" strings, values in YAML, applied in order.

    Raises:
        UserError: for a file that is missing or not YAML, and for every setting that is unknown, of the wrong
            type, or impossible beside the others.
    """
    settings = read_yaml(path, "--config")
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: not a mapping of settings; see configs/quickstart.yaml")
    for text in overrides:
        override(settings, text)
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(describe(error, RunConfig)) from None


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Returns the dotted names of the settings in which two configs differ, sorted."""
    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    return [key for key in sorted(before | after) if before.get(key) != after.get(key)]
