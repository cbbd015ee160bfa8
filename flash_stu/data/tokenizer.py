"""Tokenizers: bytes, tiktoken and Hugging Face behind one interface, exported to transformers with the same ids."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
from huggingface_hub import HfApi
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flash_stu.errors import UserError
from flash_stu.network import HUB_TIMEOUT, ask_hub

END_OF_TEXT = "<|endoftext|>"
# tiktoken's \s, Unicode's White_Space; Python's has four separators more
_BLANK = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LONG_RUN = 2**17  # blanks; the regular expressions of tiktoken fail at about a million
# A chat as plain text, which a model without tokens for turns can read too; an answer ends the text.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {% if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message['content'] }}{{ '\n\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{{ ' ' }}{% endif -%}
"""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        spec: the name that `load_tokenizer` loads this tokenizer by.
        vocab_size: every id is smaller than this.
        eos_token_id: the id that ends a document.
    """

    spec: str
    vocab_size: int
    eos_token_id: int

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that determines the ids, equal for two tokenizers that encode alike."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts as ordinary text: names of special tokens inside them have no special meaning.

        Releases the interpreter lock, so calls from several threads run in parallel.

        Returns:
            one array of uint32 ids per text.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; invalid UTF-8 becomes U+FFFD, ids without a token are skipped."""

    @abstractmethod
    def to_transformers(self) -> PreTrainedTokenizerFast:
        """Build a transformers tokenizer that gives the same ids and adds no tokens of its own.

        One difference remains: like every transformers tokenizer it parses the names of special tokens in a
        text.
        """

    def encode(self, text: str) -> np.ndarray:
        """Encode one text; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Encode documents into one array of uint32 ids, each document followed by the end-of-text token."""
        documents = self.encode_batch(texts)
        ids = np.full(sum(map(len, documents)) + len(documents), self.eos_token_id, dtype=np.uint32)
        start = 0
        for document in documents:
            ids[start : start + len(document)] = document
            start += len(document) + 1
        return ids


class BytesTokenizer(Tokenizer):
    """Every UTF-8 byte is a token, 256 ends a document."""

    spec = "bytes"
    vocab_size = 257
    eos_token_id = 256
    _tokens = (*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode())

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"utf-8 bytes, 256 ends a document").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(errors="replace"), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        tokens = self._tokens
        return b"".join(tokens[i] for i in map(int, ids) if i < len(tokens)).decode(errors="replace")

    def to_transformers(self) -> PreTrainedTokenizerFast:
        ranks = {bytes([byte]): byte for byte in range(256)}
        return byte_level_tokenizer(ranks, {END_OF_TEXT: self.eos_token_id}, END_OF_TEXT)


class TiktokenTokenizer(Tokenizer):
    """An encoding of the tiktoken library."""

    def __init__(self, name: str) -> None:
        self.spec = f"tiktoken:{name}"
        if name not in tiktoken.list_encoding_names():
            allowed = ", ".join(tiktoken.list_encoding_names())
            raise UserError(f"tokenizer {self.spec!r}: tiktoken has no encoding {name!r}; allowed: {allowed}")
        try:
            self._encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer {self.spec!r} could not be loaded ({type(error).__name__}); without internet "
                "access set TIKTOKEN_CACHE_DIR to a copy of the cache of a machine that has loaded it"
            ) from error
        if END_OF_TEXT not in self._encoding.special_tokens_set:
            raise UserError(f"tokenizer {self.spec!r} has no {END_OF_TEXT} token to end documents with")
        self.vocab_size = self._encoding.n_vocab
        self.eos_token_id = self._encoding.eot_token

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(_pattern(self._encoding).encode())
        for token, rank in sorted(_ranks(self._encoding).items()):
            digest.update(b"%d %d " % (rank, len(token)) + token)
        digest.update(b"end of text %d" % self.eos_token_id)
        return digest.hexdigest()

    @cached_property
    def _gaps(self) -> frozenset[int]:
        used = {*_ranks(self._encoding).values(), *self._special_tokens().values()}
        return frozenset(range(self.vocab_size)) - used

    @cached_property
    def _merges(self) -> tiktoken.Encoding:
        return whole_text_encoding(self._encoding)

    def _special_tokens(self) -> dict[str, int]:
        return {token: self._encoding.encode_single_token(token) for token in self._encoding.special_tokens_set}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        try:
            # the numpy route is encode_ordinary without the Python list of integers, about a third faster
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # of the regular expression's stack
            if re.search(f"{_BLANK}{{{_LONG_RUN}}}", text) is None:
                raise
        return encode_long_runs(self._encoding, self._merges, text)

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if i < self.vocab_size and i not in self._gaps]
        return self._encoding.decode(known)

    def to_transformers(self) -> PreTrainedTokenizerFast:
        ranks, special_tokens = _ranks(self._encoding), self._special_tokens()
        return byte_level_tokenizer(ranks, special_tokens, END_OF_TEXT, _pattern(self._encoding))


def _pattern(encoding: tiktoken.Encoding) -> str:
    """Returns the regular expression whose matches an encoding merges bytes in; tiktoken has no public way to it."""
    return encoding._pat_str  # noqa: SLF001 (a test says if it goes)


def _ranks(encoding: tiktoken.Encoding) -> dict[bytes, int]:
    """Returns the id of every token that is not special."""
    return {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}


def whole_text_encoding(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """Returns an encoding with the same tokens that merges the bytes of a text across the borders of the pattern."""
    return tiktoken.Encoding("whole text", pat_str=r"(?s:.+)", mergeable_ranks=_ranks(encoding), special_tokens={})


def encode_long_runs(
    encoding: tiktoken.Encoding, merges: tiktoken.Encoding, text: str, longest: int = _LONG_RUN
) -> np.ndarray:
    """Encode a text with long runs of blanks, which tiktoken's regular expressions are too recursive for.

    Every pattern of tiktoken cuts a run of blanks in the same way. No match goes from a character that is not blank
    into a run, except for newlines after punctuation; where the pattern knows newlines, one match ends with the last of
    the run. The rest of the run is one match, without its last blank if something follows, which begins the next
    match. So the byte-pair merges are applied to that match as it is, and the pattern to the text on either side of it:
    the tokens are those of the whole text. A pattern with `\\s++$` matches a run that ends the text whole, and without
    recursion.

    Args:
        encoding: one of tiktoken's, or one with the same pattern.
        merges: its `whole_text_encoding`.
        text: without lone surrogates.
        longest: shorter runs are left to the pattern.

    Returns:
        uint32 ids.
    """
    pattern = _pattern(encoding)
    newlines, whole_end = (part in pattern for part in (r"\s*[\r\n]", r"\s++$"))
    parts, start = [], 0
    for run in re.finditer(f"{_BLANK}{{{longest},}}", text):
        if whole_end and run.end() == len(text):
            break
        first = run.start()
        if newlines:
            first = max(first, text.rfind("\n", first, run.end()) + 1, text.rfind("\r", first, run.end()) + 1)
        last = run.end() if run.end() == len(text) else run.end() - 1
        if last - first < longest:
            continue
        parts.append(encoding.encode_to_numpy(text[start:first], disallowed_special=()))
        parts.append(merges.encode_to_numpy(text[first:last], disallowed_special=()))
        start = last
    parts.append(encoding.encode_to_numpy(text[start:], disallowed_special=()))
    return np.concatenate(parts)


class HuggingFaceTokenizer(Tokenizer):
    """A fast Hugging Face tokenizer without the tokens it would put around a text."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._original = _load_hugging_face(spec)
        if not self._original.is_fast:
            raise UserError(f"tokenizer {spec!r} is not available in the tokenizers library (no tokenizer.json)")
        eos_token_id = self._original.eos_token_id
        if not isinstance(eos_token_id, int):
            raise UserError(f"tokenizer {spec!r} names no eos_token to end documents with")
        self.eos_token_id = eos_token_id
        self.vocab_size = max(self._original.get_vocab().values()) + 1

        definition = json.loads(self._original.backend_tokenizer.to_str())
        definition.update(post_processor=None, truncation=None, padding=None)
        self._definition = json.dumps(definition)
        self._backend = Backend.from_str(self._definition)
        self._backend.encode_special_tokens = True  # names of special tokens in a text are ordinary text

    @cached_property
    def fingerprint(self) -> str:
        definition = json.loads(self._definition)
        parts = {key: definition[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        parts["eos_token_id"] = self.eos_token_id
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=False)

    def to_transformers(self) -> PreTrainedTokenizerFast:
        original = self._original
        special_tokens = {"pad_token": original.eos_token, **original.special_tokens_map}
        return PreTrainedTokenizerFast(
            tokenizer_object=Backend.from_str(self._definition),
            chat_template=original.chat_template,
            padding_side="left",
            clean_up_tokenization_spaces=original.clean_up_tokenization_spaces,
            model_input_names=["input_ids", "attention_mask"],
            **special_tokens,
        )


@contextmanager
def naming_documents(tokenizer: Tokenizer, texts: Sequence[str], source: str, first: int = 1) -> Iterator[None]:
    """Turn any failure of a tokenizer in the block into one line that names the document.

    Args:
        tokenizer: what fails.
        texts: the documents that it encodes.
        source: where they are from.
        first: number of the first one.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        number, cause = f"{first} to {first + len(texts) - 1}", error
        for index, text in enumerate(texts, start=first):
            try:
                tokenizer.encode(text)
            except BaseException as found:
                number, cause = index, found
                break
        reason = " ".join(str(cause).split()) or type(cause).__name__
        message = f"{source}, document {number}: tokenizer {tokenizer.spec!r} cannot encode it: {reason}"
        raise UserError(message) from error


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer by name.

    Args:
        spec: "bytes", "tiktoken:<name>" (such as tiktoken:o200k_base), the name of a Hugging Face tokenizer,
            or a local directory with one.

    Raises:
        UserError: if there is no such tokenizer, or it cannot be had without internet access.
    """
    if spec == "bytes":
        return BytesTokenizer()
    if spec.startswith("tiktoken:"):
        return TiktokenTokenizer(spec.removeprefix("tiktoken:"))
    return HuggingFaceTokenizer(spec)


def _load_hugging_face(spec: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a directory, the local hub cache or the hub, in this order."""
    try:
        return AutoTokenizer.from_pretrained(spec, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        if Path(spec).is_dir():
            raise UserError(f"tokenizer {spec!r}: no readable tokenizer.json in that directory") from error
    ask_hub(  # once, before transformers asks it for a minute
        lambda: HfApi().model_info(spec, timeout=HUB_TIMEOUT),
        f"tokenizer {spec!r} not found on the Hugging Face hub",
        f"tokenizer {spec!r} is neither a local directory nor in the Hugging Face cache, and the hub cannot be asked",
        "; allowed: bytes, tiktoken:<name>, a Hugging Face tokenizer or a local directory",
    )
    try:
        return AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:  # see above
        raise UserError(f"tokenizer {spec!r}: that Hugging Face repository holds no tokenizer") from error


def byte_level_tokenizer(
    ranks: Mapping[bytes, int],
    special_tokens: Mapping[str, int],
    end_of_text: str,
    pattern: str | None = None,
) -> PreTrainedTokenizerFast:
    """Returns a transformers tokenizer in which every token has the id of a byte-level BPE vocabulary.

    Ids without a token get a placeholder, so that the tokenizer's length is its largest id plus one and
    the library does not renumber anything (converters that skip the gaps shift special tokens).
    Special tokens and placeholders are entries of the BPE vocabulary that no merge produces. The end-of-text token also
    pads, because padding is always masked.

    Args:
        ranks: id of every token, which is also the rank at which its parts merge; all 256 single bytes included.
        special_tokens: id of every special token.
        end_of_text: the special token that ends a document.
        pattern: regular expression whose matches BPE runs on, in tiktoken's dialect; the whole text if None.
    """
    characters = bytes_to_unicode()  # that stand for bytes inside the tokenizers library
    tokens = {token.decode("latin-1").translate(characters): rank for token, rank in ranks.items()}
    vocabulary = {**tokens, **special_tokens}
    used = set(vocabulary.values())
    for gap in set(range(max(used) + 1)) - used:
        vocabulary[f"<|unused_{gap}|>"] = gap

    backend = Backend(BPE(vocabulary, _merge_list(tokens), ignore_merges=True))
    bytes_to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        backend.pre_tokenizer = bytes_to_characters
    else:
        split = pre_tokenizers.Split(Regex(_oniguruma(pattern)), behavior="isolated")
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
        chat_template=_CHAT_TEMPLATE,
    )


def _merge_list(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Returns every pair of tokens that merges into a token, in the order in which tiktoken merges them.

    A token has several such pairs, because tiktoken merges any two neighbours whose bytes are a token.
    """
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                merges.append((rank, left, right, token, cut))
    merges.sort()
    return [(token[:cut], token[cut:]) for _, _, _, token, cut in merges]


def _oniguruma(pattern: str) -> str:
    """Translate a tiktoken pattern for the tokenizers library.

    In Oniguruma's dialect `{1,3}+` is a repeated group instead of a possessive quantifier, and `$` also
    matches before a newline. Backtracking never helps these patterns, so a greedy quantifier finds the same
    matches.
    """
    return pattern.replace("}+", "}").replace("$", r"\z")
