"""Byte-level BPE vocabularies as transformers tokenizers with the very same token ids."""

from collections.abc import Mapping

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


def byte_level_tokenizer(
    ranks: Mapping[bytes, int],
    special_tokens: Mapping[str, int],
    end_of_text: str,
    pattern: str | None = None,
) -> PreTrainedTokenizerFast:
    """Build a transformers tokenizer that gives every token the id it has in a byte-level BPE vocabulary.

    Ids without a token are given a placeholder, so that the tokenizer's length is its largest id plus one and
    the library has no reason to number anything anew (converters that skip the gaps shift special tokens).
    Special tokens and placeholders are entries of the BPE vocabulary that no merge can produce.

    Args:
        ranks: id of every token, which is also the rank at which its parts merge; all 256 single bytes
            included.
        special_tokens: id of every special token.
        end_of_text: the special token that ends a document; it also pads, because padding is always masked.
        pattern: regular expression of the pieces that BPE runs on, in tiktoken's dialect; one piece if None.
    """
    alphabet = dict(enumerate(byte_alphabet()))
    tokens = {token.decode("latin-1").translate(alphabet): rank for token, rank in ranks.items()}
    vocabulary = tokens | special_tokens
    used = set(vocabulary.values())
    for gap in set(range(max(used) + 1)) - used:
        vocabulary[f"<|unused_{gap}|>"] = gap

    backend = Backend(BPE(vocabulary, merge_list(tokens), ignore_merges=True))
    bytes_to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        backend.pre_tokenizer = bytes_to_characters
    else:
        split = pre_tokenizers.Split(Regex(oniguruma(pattern)), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_to_characters])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end_of_text,
        pad_token=end_of_text,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def merge_list(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """List every pair of tokens that joins into a token, in the order in which tiktoken would join them.

    All ways to cut a token count, because tiktoken joins any two neighbours whose bytes are a token.
    """
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                merges.append((rank, left, right, token, cut))
    merges.sort()
    return [(token[:cut], token[cut:]) for _, _, _, token, cut in merges]


def byte_alphabet() -> list[str]:
    """Give the printable character that stands for each byte inside the tokenizers library (as in GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def oniguruma(pattern: str) -> str:
    """Translate a tiktoken pattern for the tokenizers library.

    In Oniguruma's dialect `{1,3}+` is a repeated group instead of a possessive quantifier, and `$` also
    matches before a newline. Giving back never helps these patterns, so a greedy quantifier finds the same
    pieces.
    """
    return pattern.replace("}+", "}").replace("$", r"\z")
