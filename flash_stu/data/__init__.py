"""Text to batches of tokens: sources, tokenizers, token shards and the loader."""

from flash_stu.data.loader import BatchLoader
from flash_stu.data.preparation import PreparedData, prepare, prepare_part
from flash_stu.data.shards import ShardWriter, TokenDataset, write_manifest
from flash_stu.data.sources import DataConfig, embedded_corpus, iter_documents
from flash_stu.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BatchLoader",
    "DataConfig",
    "PreparedData",
    "ShardWriter",
    "TokenDataset",
    "Tokenizer",
    "embedded_corpus",
    "iter_documents",
    "load_tokenizer",
    "prepare",
    "prepare_part",
    "write_manifest",
]
