"""The data section of a run's config."""

from pydantic import Field

from flash_stu.paths import ExpandedPath
from flash_stu.settings import Count, Section


class DataConfig(Section):
    """The text to train on and how it becomes tokens.

    Attributes:
        dataset: "embedded" (the corpus inside every Python installation), a local .parquet, .jsonl, .json or .txt
            file (the last three also compressed: .gz, .zst, .bz2), a directory or glob of such files, a directory of
            token shards made earlier, or the name of a dataset on the Hugging Face hub.
        subset: configuration of a hub dataset, such as "sample-10BT".
        revision: commit or tag of a hub dataset; without one, the one that was current when it was tokenized.
        text_column: column (parquet, hub) or key (jsonl) that holds the text.
        tokenizer: see `load_tokenizer`.
        cache_dir: where token shards are kept; the user's cache directory if None.
        validation_fraction: share of the documents held out where the dataset has no validation split; of a single
            document, the share of its text, at its end.
        max_documents: read at most this many documents of the training files and of the validation files.
    """

    dataset: ExpandedPath = "embedded"
    subset: str | None = None
    revision: str | None = None
    text_column: str = "text"
    tokenizer: ExpandedPath = "bytes"
    cache_dir: ExpandedPath | None = None
    validation_fraction: float = Field(default=0.01, gt=0, lt=1)
    max_documents: Count | None = None
