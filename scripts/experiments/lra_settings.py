"""Settings of a Long Range Arena experiment: a YAML file for each task, configs/experiments/lra.

At the top are the papers' sizes; `reduced` replaces what two CPU cores want smaller. `models` replaces, for one of
them, what is the same for all others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from listops import CLASSES, TOKENS
from pydantic import Field, ValidationError, model_validator

from flash_stu import FlashSTUConfig
from flash_stu.errors import UserError
from flash_stu.settings import Count, Section, describe, override, read_yaml

Model = Literal["stu", "ar_stu", "lds", "attention", "mamba2", "s5"]
MODELS: tuple[Model, ...] = get_args(Model)
_Items = Annotated[list[Annotated[int, Field(ge=1, le=10**7)]], Field(min_length=3, max_length=3)]


class Task(NamedTuple):
    """Shape of a task: ids of the vocabulary (None: inputs are numbers), classes, sequences a row."""

    vocabulary: int | None
    classes: int
    towers: int = 1


TASKS = {
    "listops": Task(len(TOKENS), CLASSES),
    "text": Task(257, 2),  # bytes plus one; 0 is padding
    "retrieval": Task(257, 2, towers=2),
    "image": Task(None, 10),
    "pathfinder": Task(None, 2),
    "pathx": Task(None, 2),
}


class ListOpsData(Section):
    """See listops.sequences."""

    items: _Items
    shortest: int = Field(default=500, ge=1, le=10**5)
    longest: int = Field(default=2000, ge=1, le=10**5)
    depth: int = Field(default=10, ge=2, le=50)
    arguments: int = Field(default=10, ge=2, le=100)


class PathfinderData(Section):
    """See pathfinder.Style."""

    items: _Items

    @property
    def longest(self) -> int:
        return self.size**2

    size: int = Field(ge=8, le=256)
    dashes: int = Field(ge=2, le=200)
    distractors: int = Field(ge=0, le=200)
    dash: float = Field(default=2.2, gt=0, le=20)
    gap: float = Field(default=1.6, ge=0, le=20)
    turn: float = Field(default=0.35, ge=0, le=3)
    apart: float = Field(default=2.6, gt=0, le=20)
    dot: float = Field(default=1.6, gt=0, le=20)
    equal_distance: bool = True


class BytesData(Section):
    """Texts, or pairs of them, of at most `longest` bytes."""

    items: _Items
    longest: int = Field(ge=1, le=10**6)


class ImageData(Section):
    """CIFAR-10."""

    items: _Items

    @property
    def longest(self) -> int:
        return 32 * 32


TOY = {
    "data": {"items": [24, 8, 8]},
    "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_filters": 4},
    "train": {"epochs": 1, "batch_size": 8},
}
DATA: dict[str, type[Section]] = {
    "listops": ListOpsData,
    "text": BytesData,
    "retrieval": BytesData,
    "image": ImageData,
    "pathfinder": PathfinderData,
    "pathx": PathfinderData,
}


class TrainSettings(Section):
    """One training: Adam with decoupled weight decay, linear warm-up, then a cosine to 0."""

    epochs: float = Field(gt=0, le=10**6)
    batch_size: Count
    learning_rate: float = Field(gt=0, le=10)
    weight_decay: float = Field(ge=0, le=10)
    warmup: float = Field(default=0.1, ge=0, le=1)  # share of the steps
    taps_std: float = Field(default=0.0, ge=0, le=10)  # of the first M^u; the layers' own begins at 0
    taps_rate: float = Field(default=0.1, ge=0, le=1)  # of M^y, times the learning rate; without decay


class Changes(Section):
    """Settings of one model that are not those of all."""

    model: dict[str, Any] = {}
    train: dict[str, Any] = {}


class Settings(Section):
    """Of one task."""

    task: Literal["listops", "text", "retrieval", "image", "pathfinder", "pathx"]
    data: ListOpsData | PathfinderData | BytesData | ImageData
    model: dict[str, Any]
    train: TrainSettings
    models: dict[Model, Changes] = {}

    @model_validator(mode="before")
    @classmethod
    def _data_of_task(cls, values: Any) -> Any:
        kind = DATA.get(str(values.get("task"))) if isinstance(values, dict) else None
        if kind is None or not isinstance(values.get("data"), dict):
            return values
        try:
            return values | {"data": kind.model_validate(values["data"])}
        except ValidationError as error:
            raise UserError(f"data: {describe(error, kind)}") from None

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        for name in MODELS:
            self.architecture(name)
            self.training(name)
        return self

    def architecture(self, name: Model) -> FlashSTUConfig:
        """Returns the configuration of one of `MODELS`; of mamba2 and s5 it says task, width and depth."""
        task, values = TASKS[self.task], self.model | self._changes(name).model
        values |= {"max_position_embeddings": self.data.longest, "sliding_window": self.data.longest}
        values |= {"classifier_pooling": "mean", "classifier_towers": task.towers}
        values |= {"num_input_channels": 1} if task.vocabulary is None else {"vocab_size": task.vocabulary}
        kind = "sliding_attention" if name == "attention" else "linear_attention"
        layers = values.get("num_hidden_layers", FlashSTUConfig.num_hidden_layers)
        config = FlashSTUConfig.from_user(values | {"layer_types": [kind] * layers})
        config.num_labels = task.classes
        return config

    def training(self, name: Model) -> TrainSettings:
        """Returns how one of `MODELS` is trained."""
        try:
            return TrainSettings.model_validate(self.train.model_dump() | self._changes(name).train)
        except ValidationError as error:
            raise UserError(f"models.{name}.train: {describe(error, TrainSettings)}") from None

    def _changes(self, name: Model) -> Changes:
        return self.models.get(name, Changes())


def read(path: str | Path, size: str, overrides: Sequence[str] = ()) -> Settings:
    """Read the settings of a task.

    Args:
        path: a YAML file.
        size: "full", "default" for what `reduced` makes of it, or "quick" for a toy of that.
        overrides: "section.key=value", applied last.

    Raises:
        UserError: naming the first setting that is unknown, of the wrong type, or impossible.
    """
    values = read_yaml(path, "--config")
    if not isinstance(values, dict) or not isinstance(values.get("reduced", {}), dict):
        raise UserError(f"--config {path}: not a mapping of settings; see configs/experiments/lra")
    reduced = values.pop("reduced", {})
    if size != "full":
        _merge(values, reduced)
    if size == "quick":
        _merge(values, TOY)
        values["models"] = {name: {"model": own.get("model", {})} for name, own in values.get("models", {}).items()}
    for text in overrides:
        override(values, text)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"--config {path}: {describe(error, Settings)}") from None


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(key), dict):
            _merge(values[key], change)
        else:
            values[key] = change
