"""Tokenizers against plain bytes, tiktoken itself and transformers' own reload."""

import random

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flash_stu.data import load_tokenizer
from flash_stu.data import tokenizer as tokenizer_module
from flash_stu.data.tokenizer import byte_level_tokenizer
from flash_stu.errors import UserError

TEXTS = [
    "plain words",
    " leading and trailing space ",
    "naïve café, Ωμέγα, 日本語テキスト, 한국어, عربى, 🙂👩‍👩‍👧‍👧",
    "def f(x):\n\treturn {'a': x ** 2}  # it's 12345.678e-9\r\n\r\n    pass\n",
    "I'LL we've you'd THEY'RE x'ſ \u00a0\u2003\u3000 e\u0301",
    "\n\n  \t \n",
    "tail spaces   \n  ",
    "aaaaaaaaaaaaa" * 9 + "=" * 77,
    "\x00\x01\x7f\x85\x1c",
]
# as in cl100k_base: possessive quantifiers and "$", which the tokenizers library reads differently
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    alphabet = "abcAB 12'\n\r\t  sSdDlLvVeErR./=-_é中🙂\u200d\u0301ſ"
    return ["".join(generator.choices(alphabet, k=generator.randrange(50))) for _ in range(count)]


def train_bpe(special_tokens: list[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS + [tokenizer_module.__doc__, byte_level_tokenizer.__doc__], trainer)
    return backend


def reload(tokenizer: PreTrainedTokenizerFast, directory) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def assert_agree(ours, exported, texts):
    for text, ids in zip(texts, exported(texts)["input_ids"], strict=True):
        assert ids == ours.encode(text).tolist(), repr(text)
        assert exported.decode(ids) == text
        assert ours.decode(ids) == text


def test_bytes_are_the_utf8_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (257, 256)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0xFF, 104, 105, 256, 300]) == "\ufffdhi<|endoftext|>"


def test_documents_end_with_end_of_text():
    ids = load_tokenizer("bytes").encode_documents(["ab", "", "é"])
    assert ids.tolist() == [97, 98, 256, 256, 0xC3, 0xA9, 256]
    assert ids.dtype == np.uint32


def test_bytes_in_transformers(tmp_path):
    tokenizer = load_tokenizer("bytes")
    exported = reload(tokenizer.to_transformers(), tmp_path)
    assert_agree(tokenizer, exported, TEXTS + random_texts(100))
    assert len(exported) == 257
    assert exported.eos_token_id == exported.pad_token_id == 256
    assert exported("a<|endoftext|>b")["input_ids"] == [97, 256, 98]
    assert exported.decode([97, 256, 98], skip_special_tokens=True) == "ab"
    assert set(exported("x")) == {"input_ids", "attention_mask"}
    assert exported(["abc", "a"], padding=True)["input_ids"][1] == [256, 256, 97]


def test_exported_ids_equal_tiktoken_with_gaps(tmp_path):
    """A small encoding of our own, so that no download is needed; special tokens lie beyond gaps."""
    vocabulary = sorted(train_bpe([]).get_vocab().items(), key=lambda item: item[1])
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    merged = [bytes(to_byte[character] for character in token) for token, _ in vocabulary if len(token) > 1]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + index for index, token in enumerate(merged)}
    specials = {"<|endoftext|>": len(ranks) + 3, "<|endofprompt|>": len(ranks) + 11}
    encoding = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)

    exported = reload(byte_level_tokenizer(ranks, specials, "<|endoftext|>", PATTERN), tmp_path)
    texts = TEXTS + random_texts(2000)
    assert exported(texts)["input_ids"] == encoding.encode_ordinary_batch(texts)
    assert exported.eos_token_id == specials["<|endoftext|>"]
    assert len(exported) == encoding.n_vocab
    assert len({exported.convert_ids_to_tokens(i) for i in range(encoding.n_vocab)}) == encoding.n_vocab


def test_private_attributes_of_tiktoken(monkeypatch):
    """tiktoken has no public way to an encoding's pattern: if this fails, `_pattern` in the tokenizer needs another."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    specials = {"<|endoftext|>": 300}
    encoding = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)
    first = load_tokenizer("tiktoken:o200k_base")
    assert tokenizer_module._pattern(encoding) == PATTERN
    assert tokenizer_module._ranks(encoding) == ranks
    assert first.decode([256, 299, 300]) == "ab<|endoftext|>"
    encoding = tiktoken.Encoding("small", pat_str="a|b", mergeable_ranks=ranks, special_tokens=specials)
    assert load_tokenizer("tiktoken:o200k_base").fingerprint != first.fingerprint


def test_o200k(extra_data, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(extra_data / "tiktoken"))
    tokenizer = load_tokenizer("tiktoken:o200k_base")
    assert tokenizer.vocab_size == 200019
    assert tokenizer.eos_token_id == 199999
    reference = tiktoken.get_encoding("o200k_base")
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == reference.encode_ordinary_batch(TEXTS)
    assert tokenizer.encode("<|endoftext|>").tolist() == reference.encode_ordinary("<|endoftext|>")
    assert tokenizer.decode([24912, 199998, 250000, 199999]) == "hello<|endoftext|>"

    exported = reload(tokenizer.to_transformers(), tmp_path)
    assert_agree(tokenizer, exported, TEXTS + random_texts(500))
    assert len(exported) == 200019
    assert exported.eos_token_id == 199999
    assert exported("a<|endoftext|>")["input_ids"][-1] == 199999


@pytest.fixture
def hugging_face_directory(tmp_path):
    """A tokenizer that wraps texts in <s> ... </s> and has a special token beyond its vocabulary."""
    backend = train_bpe(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<extra>"],
        chat_template="{{ messages }}",
    )
    tokenizer.save_pretrained(tmp_path / "original")
    return str(tmp_path / "original")


def test_hugging_face(hugging_face_directory, tmp_path):
    tokenizer = load_tokenizer(hugging_face_directory)
    original = AutoTokenizer.from_pretrained(hugging_face_directory)
    for text in TEXTS:
        assert original(text)["input_ids"] == [0, *tokenizer.encode(text), 1]
    assert tokenizer.eos_token_id == 1
    assert tokenizer.vocab_size == len(original)
    assert tokenizer.decode(tokenizer.encode("no </s> <extra> here")) == "no </s> <extra> here"
    assert not {0, 1, len(original) - 1} & set(tokenizer.encode("no <s></s> <extra> here").tolist())

    exported = reload(tokenizer.to_transformers(), tmp_path / "exported")
    assert_agree(tokenizer, exported, TEXTS)
    assert exported.chat_template == original.chat_template
    assert exported("x</s>")["input_ids"][-1] == exported.eos_token_id == exported.pad_token_id == 1
    assert load_tokenizer(str(tmp_path / "exported")).fingerprint == tokenizer.fingerprint


def test_fingerprints_differ(hugging_face_directory, tmp_path):
    tokenizer = load_tokenizer(hugging_face_directory)
    original = AutoTokenizer.from_pretrained(hugging_face_directory)
    original.eos_token = "<extra>"
    original.save_pretrained(tmp_path / "other")
    other = load_tokenizer(str(tmp_path / "other"))
    assert len({tokenizer.fingerprint, other.fingerprint, load_tokenizer("bytes").fingerprint}) == 3


def refuse(*args, **kwargs):
    raise ConnectionError("no network here")


def test_unknown_tokenizers(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no encoding 'nope'; allowed: .*o200k_base"):
        load_tokenizer("tiktoken:nope")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no readable tokenizer.json"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="'tiktoken:cl100k_base' could not be loaded .*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("tiktoken:cl100k_base")
    monkeypatch.setattr(tokenizer_module.HfApi, "model_info", refuse)
    with pytest.raises(UserError, match="'bites' is neither .*allowed: bytes, tiktoken:<name>") as error:
        load_tokenizer("bites")
    assert "\n" not in str(error.value)


def test_hugging_face_tokenizer_without_end_of_text(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=train_bpe([])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="names no eos_token"):
        load_tokenizer(str(tmp_path))
