"""Streaming text: nothing shown too early, nothing lost, stop strings found wherever tokens end."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flash_stu import UserError
from flash_stu.data import load_tokenizer
from flash_stu.generation.streaming import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes").to_transformers()


def pieces(tokenizer, text, stop=()):
    data = text if isinstance(text, bytes) else text.encode()
    stream = TextStream(tokenizer, [], stop)
    return [stream.push(byte) for byte in data] + [stream.finish()]


def test_characters_wait_for_their_last_byte(tokenizer):
    text = "aé€😀\ufffdz"
    out = pieces(tokenizer, text)
    assert "".join(out) == text
    assert out[:10] == ["a", "", "é", "", "", "€", "", "", "", "😀"]


def test_broken_bytes_are_shown_as_decoding_shows_them(tokenizer):
    random.seed(0)
    data = bytes(random.randrange(256) for _ in range(2000))
    assert "".join(pieces(tokenizer, data)) == data.decode(errors="replace")
    assert "".join(pieces(tokenizer, b"ab\xf0\x9f")) == "ab\ufffd"  # cut off in the middle of a character


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two EN", ["END"], "one EN two EN"),  # the beginning of a stop string is text in the end
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("x é€ y", ["€"], "x é"),
        ("first\n\nsecond", ["\n\n", "second"], "first"),
        ("abcd", ["bcd", "c"], "ab"),  # as soon as any stop string is complete
        ("END", ["END"], ""),
    ],
)
def test_stop_strings(tokenizer, text, stop, expected):
    out = pieces(tokenizer, text, stop)
    assert "".join(out) == expected
    stream, whole = TextStream(tokenizer, [], stop), ""
    for byte in text.encode():
        whole += stream.push(byte)
        assert expected.startswith(whole)  # never more than remains in the end
    assert stream.finished == (expected != text)


def test_random_texts_against_find(tokenizer):
    random.seed(1)
    for _ in range(300):
        text = "".join(random.choices("abé", k=12))
        stop = ["".join(random.choices("abé", k=random.randint(1, 4))) for _ in range(random.randint(1, 2))]
        ends = [len(text[: text.find(s) + len(s)].encode()) for s in stop if s in text]
        complete = text.encode()[: min(ends)].decode() if ends else text  # what is there when the first one is complete
        cut = min((complete.find(s) for s in stop if s in complete), default=len(complete))
        assert "".join(pieces(tokenizer, text, stop)) == complete[:cut], (text, stop)


def test_end_of_text_ends_the_row(tokenizer):
    stream = TextStream(tokenizer, [], ["xyz"])
    assert [stream.push(byte) for byte in b"abx"] == ["a", "b", ""]
    assert stream.push(256) == "x"
    assert stream.finished and stream.push(97) == "" and stream.finish() == ""


def test_words_after_a_prompt_keep_their_space():
    words = Tokenizer(models.WordLevel({"<end>": 0, "▁the": 1, "▁heart": 2, "s": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    assert wrapped.decode([2]) == "heart"  # such a tokenizer drops the space where a text begins
    stream = TextStream(wrapped, [1])
    assert [stream.push(2), stream.push(3), stream.push(0)] == [" heart", "s", ""]


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(tokenizer, [], ["a", ""])
