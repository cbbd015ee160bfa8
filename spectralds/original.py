"""The model that is distilled, with the tokenizer and the training run that belong to it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from flash_stu.data import Tokenizer, load_tokenizer
from flash_stu.model.loading import load_model, load_model_tokenizer
from flash_stu.training.model_source import is_checkpoint, load_checkpoint

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


@dataclass(frozen=True)
class Original:
    """A model to distill.

    Attributes:
        directory: of its weights.
        model: on the CPU in eval mode, in the dtype of its file.
        run: the training run that it is from, if that is known.
        run_tokenizer: the tokenizer of the run, for a checkpoint; None for a directory with its own tokenizer files.
    """

    directory: Path
    model: PreTrainedModel
    run: Path | None
    run_tokenizer: Tokenizer | None

    @classmethod
    def load(cls, directory: Path) -> "Original":
        """Load from a directory that `flash_stu.training.model_source.find_source` returned.

        Raises:
            UserError: for weights or a tokenizer that cannot be loaded.
        """
        place = directory.resolve()
        if is_checkpoint(directory):
            model, tokenizer = load_checkpoint(directory)
            return cls(directory, model, place.parent.parent, tokenizer)
        run = place.parent if place.name == "final" and (place.parent / "config.yaml").is_file() else None
        original = cls(directory, load_model(directory, dtype="auto", any_class=True), run, None)
        if original.has_tokenizer:
            load_model_tokenizer(directory)  # a damaged one is not passed on
        return original

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model comes with a tokenizer."""
        return self.run_tokenizer is not None or any(self.directory.glob("tokenizer*"))

    def load_tokenizer(self) -> Tokenizer:
        """Returns the model's tokenizer; raises a UserError if it is damaged."""
        return self.run_tokenizer or load_tokenizer(str(self.directory))

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's files, as transformers reads them, into a directory."""
        if self.run_tokenizer is not None:
            self.run_tokenizer.to_transformers().save_pretrained(directory)
            return
        for path in {path for pattern in _TOKENIZER_FILES for path in self.directory.glob(pattern)}:
            if path.is_file():
                shutil.copy2(path, directory)
