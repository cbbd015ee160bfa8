"""A byte-level BPE tokenizer of few tokens: a large vocabulary would make most of a small model its head."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flash_stu.data.sources import DataConfig, iter_documents
from flash_stu.data.tokenizer import END_OF_TEXT
from flash_stu.files import replacing_directory

_CHARACTERS = 8_000_000  # of training text that merges are counted on


def bpe_tokenizer(folder: Path, data: DataConfig, tokens: int) -> str:
    """Train a tokenizer on the first training documents of a dataset, unless the folder is there.

    Args:
        folder: to write, one that `load_tokenizer` loads.
        data: the dataset.
        tokens: size of the vocabulary, end-of-text included.

    Returns:
        the folder's path.
    """
    if folder.exists():
        return str(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, show_progress=False, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet
    )
    backend.train_from_iterator(_training_text(data), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    with replacing_directory(folder, "tokenizer") as temporary:
        tokenizer.save_pretrained(temporary)
    return str(folder)


def _training_text(data: DataConfig) -> Iterator[str]:
    left = _CHARACTERS
    for split, document in iter_documents(data):
        if left <= 0:
            return
        if split == "train":
            yield document
            left -= len(document)
