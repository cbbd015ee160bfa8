"""Documents that tokenizer libraries fail at: the same tokens where they can be had, else the file and the document."""

import random
import string

import numpy as np
import pytest
import tiktoken

from flash_stu.data import DataConfig, prepare
from flash_stu.data import tokenizer as tokenizer_module
from flash_stu.data.tokenize import TextBatch, encode_batch
from flash_stu.data.tokenizer import TiktokenTokenizer, encode_long_runs, load_tokenizer, whole_text_encoding
from flash_stu.errors import UserError

# the patterns of tiktoken's encodings: gpt2 and p50k_base have r50k_base's
PATTERNS = {
    "r50k": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}
BLANKS = " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"


@pytest.fixture(scope="module")
def encodings() -> dict[str, tiktoken.Encoding]:
    """Small vocabularies in which runs of blanks, and blanks with what follows them, are tokens of many lengths."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    merged = [" " * n for n in (2, 4, 3, 8, 16, 5)] + ["\t\t", "\n\n", " \n", "\n\n\n\n", "\r\n", "!\n", "\u3000"]
    merged += ["\xa0\xa0", " a", "\ta", "aa", "aaaa", " !", "!!", "\u3000\u3000", "'s", "11", " 1", "\n "]
    for token in merged:
        ranks.setdefault(token.encode(), len(ranks))
    for character in ("\u3000", "\xa0"):  # halves, so that merges can reach the whole
        ranks.setdefault(character.encode()[:2], len(ranks))
    return {
        name: tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 999})
        for name, pattern in PATTERNS.items()
    }


@pytest.mark.parametrize("name", PATTERNS)
def test_tokens_do_not_depend_on_where_runs_are_cut(encodings, name):
    encoding, generator = encodings[name], random.Random(0)
    merges = whole_text_encoding(encoding)
    sides = ["", "a", "A", "aA's", "1", "!", "!/", "e\u0301", "中", "🙂", "\x1c", "\u200b", "a!", "'", "."]
    runs = ["", "\n", " ", "\r\n", "\t", "x"]
    runs += [blank * length for blank in " \n\t\xa0\u3000" for length in (4, 5, 6, 7, 11, 64)]
    runs += ["".join(generator.choices(BLANKS, k=generator.randrange(1, 30))) for _ in range(40)]
    for _ in range(3000):
        text = "".join(generator.choice(runs if place % 2 else sides) for place in range(generator.randrange(1, 8)))
        expected = encoding.encode_ordinary(text)
        for longest in (2, 5, 6):
            assert encode_long_runs(encoding, merges, text, longest).tolist() == expected, repr(text)


@pytest.fixture
def tokenizer(encodings, monkeypatch):
    """A tokenizer of the small o200k, as the library's own."""
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encodings["o200k"])
    return load_tokenizer("tiktoken:o200k_base")


@pytest.mark.parametrize("blank", [" ", "\t", "\xa0", "\u3000", "\n", " \t", "\u2028", "\n ", "a", "!", "中", "1"])
def test_a_million_of_one_character(tokenizer, encodings, blank):
    count = 1_100_000 // len(blank)
    for text in (f"before{blank * count}after", blank * count):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert tokenizer.decode(ids) == text
        # the ends are cut as with a run that the library can still do
        short = encodings["o200k"].encode_ordinary(text.replace(blank * count, blank * (count % 960 + 960)))
        assert ids[:8].tolist() == short[:8] and ids[-8:].tolist() == short[-8:]


def test_a_run_in_the_midst_of_a_corpus(tokenizer, tmp_path):
    text = "start " + " " * 1_000_000 + " end"
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(["first", text, *string.ascii_letters]))
    config = DataConfig(
        dataset=str(tmp_path / "a.txt"),
        cache_dir=str(tmp_path / "cache"),
        tokenizer="tiktoken:o200k_base",
        validation_fraction=0.3,
    )
    data = prepare(config, progress=False)
    assert data.train.num_documents + data.validation.num_documents == 54


class Panic(BaseException):
    """As the libraries written in Rust raise it."""


Panic.__name__ = "PanicException"


@pytest.mark.parametrize("failure", [ValueError("Max stack\nsize exceeded"), Panic("unwrap"), RuntimeError()])
def test_failures_name_file_and_document(tmp_path, monkeypatch, failure):
    tokenizer = load_tokenizer("bytes")
    encode = type(tokenizer).encode_batch

    def fail(self, texts):
        if any("bad" in text for text in texts):
            raise failure
        return encode(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode_batch", fail)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in ["x", "", "y", "bad", "z"]))
    config = DataConfig(dataset=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), validation_fraction=0.5)
    with pytest.raises(UserError, match="a.jsonl, document 4: tokenizer 'bytes' cannot encode it: ") as caught:
        prepare(config, progress=False)
    assert "\n" not in str(caught.value)
    batch = TextBatch("a file", 7, None, ["good", "bad"], 0, 9)
    with pytest.raises(UserError, match="a file, document 8"):
        encode_batch(batch, tokenizer, 0.1)


def test_only_runs_of_blanks_are_cut(encodings, monkeypatch, tokenizer):
    monkeypatch.setattr(tokenizer_module, "encode_long_runs", lambda *_: pytest.fail("a run was cut"))
    assert isinstance(tokenizer, TiktokenTokenizer)
    assert tokenizer.encode(" " * 1000 + "a").tolist() == encodings["o200k"].encode_ordinary(" " * 1000 + "a")


def test_o200k(extra_data, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(extra_data / "tiktoken"))
    encoding = tiktoken.get_encoding("o200k_base")
    merges = whole_text_encoding(encoding)
    for blank in " \t\n\xa0\u3000":
        for length in (1000, 4095, 4096, 4097, 20_000):
            for text in (f"a{blank * length}b", f"!{blank * length}!", blank * length, f"\n{blank * length}\nb"):
                assert encode_long_runs(encoding, merges, text, 4096).tolist() == encoding.encode_ordinary(text)
