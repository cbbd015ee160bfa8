"""The data section of a run config."""

from pydantic import Field

from flash_stu.paths import ExpandedPath
from flash_stu.settings import Count, Section


class DataConfig(Section):
    """The text to train on, and how it becomes tokens."""

    dataset: ExpandedPath = Field(
        default="embedded",
        description="embedded (the corpus inside every Python installation), a local .parquet, .jsonl, .json or .txt "
        "file (the last three also compressed: .gz, .zst, .bz2), a directory or glob of such files, a directory of "
        "token shards made earlier, or the name of a dataset on the Hugging Face hub",
    )
    subset: str | None = Field(default=None, description="configuration of a hub dataset, such as sample-10BT")
    revision: str | None = Field(
        default=None, description="commit or tag of a hub dataset; null: what is current when it is tokenised"
    )
    text_column: str = Field(default="text", description="column (parquet, hub) or key (jsonl) that holds the text")
    tokenizer: ExpandedPath = Field(
        default="bytes",
        description="bytes, tiktoken:NAME such as tiktoken:o200k_base, or name or folder of a Hugging Face tokenizer",
    )
    separate_documents: bool = Field(
        default=False,
        description="keep the documents that share a sequence apart: no layer carries anything from one to the next; "
        "each begins at the end-of-text token before it. The published models are trained without",
    )
    cache_dir: ExpandedPath | None = Field(
        default=None, description="where token shards are kept; null: the user's cache directory"
    )
    validation_fraction: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="share of the documents held out where the dataset has no validation split; of a single document, "
        "the share of its text, at its end",
    )
    max_documents: Count | None = Field(
        default=None, description="read at most this many documents of the training and of the validation files"
    )
