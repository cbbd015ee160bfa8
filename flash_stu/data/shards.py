"""Token shards: a corpus as memory-mapped files of token ids.

A directory of shards holds, for one split of a corpus,

    *.bin            token ids and nothing else, little-endian uint16 or uint32; whole documents, each ended
                     by the end-of-text token
    manifest.json    the shards in order, their counts and checksums, and the tokenizer that made them
    verified.json    which shards passed which checksum and how they looked then; a cache, may be missing or damaged

Shards are written one at a time. The manifest is written last, atomically: a directory with a manifest is complete,
and one without is not read. Several writers may fill one directory under different
prefixes; whoever knows all their shards writes the manifest.
"""

import hashlib
import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedRandom
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flash_stu.data.tokenizer import Tokenizer
from flash_stu.errors import UserError, WriteError, reason
from flash_stu.files import write_text
from flash_stu.reading import DamagedError, read_regular
from flash_stu.settings import first_problem

MANIFEST = "manifest.json"
_VERIFIED = "verified.json"
FORMAT = 1
SHARD_TOKENS = 2**27  # 512 MiB of uint32
_BLOCK = 2**20  # bytes read at a time

Count = Annotated[int, Field(ge=0)]
TokenType = Literal["uint16", "uint32"]


class Shard(BaseModel):
    """One shard file as the manifest records it.

    num_bytes counts the UTF-8 text; sha256 covers the file and is empty as long as that is being written.
    """

    model_config = ConfigDict(strict=True)

    name: str = Field(pattern=r"^[\w-]+\.bin$")
    num_tokens: Count
    num_documents: Count
    num_bytes: Count
    sha256: str


class Manifest(BaseModel):
    """The content of a directory of shards; the counts are the sums over them."""

    model_config = ConfigDict(strict=True)

    format: int
    dtype: TokenType
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: Count
    eos_token_id: Count
    num_tokens: Count
    num_documents: Count
    num_bytes: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        for key in ("num_tokens", "num_documents", "num_bytes"):
            if getattr(self, key) != sum(getattr(shard, key) for shard in self.shards):
                raise ValueError(f"{key} is not the sum over the shards")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same name")
        return self


def token_type(vocab_size: int) -> TokenType:
    """Returns the smallest type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _stored(name: TokenType) -> np.dtype:
    return np.dtype(name).newbyteorder("<")


class ShardWriter:
    """Writes documents into shards PREFIX-00000.bin, PREFIX-00001.bin ... of a directory.

    Tokens are safe on disk after `commit`; a later writer can resume there, whatever happened in between, and writes
    the same files as one that was never interrupted.

    Args:
        directory: an existing directory.
        tokenizer: whose ids are written.
        prefix: start of the file names; one per writer where several share the directory.
        shard_tokens: a shard is closed once it holds this many tokens.
        committed: result of an earlier writer's last `commit`, to resume after it.

    Raises:
        UserError: if a file has lost what was committed.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        prefix: str = "shard",
        shard_tokens: int = SHARD_TOKENS,
        committed: Iterable[Shard] = (),
    ) -> None:
        self._shards = [shard.model_copy() for shard in committed]
        self._directory = directory
        self._prefix = prefix
        self._shard_tokens = shard_tokens
        self._vocab_size = tokenizer.vocab_size
        self._dtype = _stored(token_type(tokenizer.vocab_size))
        self._digest = hashlib.sha256()
        self._file: BufferedRandom | None = None
        if self._shards and not self._shards[-1].sha256:
            self._file = self._open_last()

    def add(self, ids: np.ndarray, num_documents: int, num_bytes: int) -> None:
        """Append whole documents.

        Args:
            ids: token ids of the documents, each with its end-of-text token (`Tokenizer.encode_documents`).
            num_documents: how many documents they are.
            num_bytes: bytes of their UTF-8 text.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        if not len(ids):
            return
        if ids.max() >= self._vocab_size:
            raise ValueError(f"token id {ids.max()} is outside the vocabulary of {self._vocab_size}")
        if self._file is None:
            name = f"{self._prefix}-{len(self._shards):05d}.bin"
            self._shards.append(Shard(name=name, num_tokens=0, num_documents=0, num_bytes=0, sha256=""))
            self._file = self._open_last()
        data = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._file.write(data)
        self._digest.update(data)
        shard = self._shards[-1]
        shard.num_tokens += len(ids)
        shard.num_documents += num_documents
        shard.num_bytes += num_bytes
        if shard.num_tokens >= self._shard_tokens:
            self.finish()

    def commit(self) -> list[Shard]:
        """Flush everything added to disk; returns all shards written, of which the last may be open."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return [shard.model_copy() for shard in self._shards]

    def finish(self) -> list[Shard]:
        """Close the last shard; returns all shards written."""
        if self._file is not None:
            self._file.truncate()
            self.commit()
            self._file.close()
            self._file = None
            self._shards[-1].sha256 = self._digest.hexdigest()
        return self.commit()

    def _open_last(self) -> BufferedRandom:
        """Open the last shard's file after the tokens it is known to hold, of which a new one has none.

        Tokens of an interrupted writer beyond them are overwritten, and not truncated before the shard is closed:
        if that writer is still alive, where locks do not reach, both write the same bytes to the same places.
        """
        shard = self._shards[-1]
        path = self._directory / shard.name
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 - open across calls
        self._digest = hashlib.sha256()
        missing = shard.num_tokens * self._dtype.itemsize
        while missing and (block := file.read(min(missing, _BLOCK))):
            self._digest.update(block)
            missing -= len(block)
        if missing:
            raise UserError(f"unfinished token shard {path} has lost its last {missing} bytes")
        file.seek(shard.num_tokens * self._dtype.itemsize)
        return file


def write_manifest(directory: Path, tokenizer: Tokenizer, shards: Iterable[Shard]) -> Manifest:
    """Write the manifest of a complete directory of shards, in this order."""
    shards = list(shards)
    manifest = Manifest(
        format=FORMAT,
        dtype=token_type(tokenizer.vocab_size),
        tokenizer=tokenizer.spec,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=sum(shard.num_documents for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=shards,
    )
    write_text(directory / MANIFEST, manifest.model_dump_json(indent=1))
    return manifest


class TokenDataset:
    """The tokens of a directory of shards, one long memory-mapped sequence.

    Opening checks that every shard is there with the size it should have. Its checksum is computed the first
    time a file is opened and again whenever its size, modification time or inode change time differ from what
    they were at its last check (verified.json; a directory that cannot be written to is checked at every
    opening).

    Args:
        directory: with manifest.json.
        tokenizer: the tokenizer the ids must be from; not compared if None.

    Raises:
        UserError: naming the file, if the directory is incomplete, a shard is missing, truncated or altered,
            or the shards were made by another tokenizer.
    """

    def __init__(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        self.directory = Path(directory)
        self._remedy = f"delete {self.directory} to tokenise again"
        self.manifest = _read_manifest(self.directory)
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)
        self._dtype = _stored(self.manifest.dtype)
        self._ends = list(accumulate((shard.num_tokens for shard in self.manifest.shards), initial=0))
        self._maps: dict[int, mmap.mmap] = {}
        for shard in self.manifest.shards:
            self._check_size(shard)
        self._verify_changed()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the UTF-8 text that the tokens were made of."""
        return self.manifest.num_bytes

    @property
    def num_documents(self) -> int:
        """Documents, each of which ends with an end-of-text token."""
        return self.manifest.num_documents

    def window(self, start: int, length: int) -> np.ndarray:
        """Copy `length` consecutive tokens as stored (uint16 or uint32); see `read`."""
        tokens = np.empty(max(length, 0), dtype=self._dtype)
        self.read(start, tokens)
        return tokens

    def read(self, start: int, tokens: np.ndarray) -> None:
        """Fill an array of any integer type with consecutive tokens, across shards where need be.

        Raises:
            IndexError: if they are not inside the dataset.
        """
        if start < 0 or start + len(tokens) > len(self):
            raise IndexError(f"tokens {start} to {start + len(tokens)} of a dataset of {len(self)}")
        filled = 0
        for shard, offset, count in self._ranges(start, len(tokens)):
            stored = np.frombuffer(self._map(shard), self._dtype, count, offset * self._dtype.itemsize)
            tokens[filled : filled + count] = stored
            filled += count

    def read_ahead(self, start: int, length: int) -> None:
        """Ask the operating system to load tokens from disk that will be read soon; does not wait for them."""
        for shard, offset, count in self._ranges(start, length):
            first = offset * self._dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            last = (offset + count) * self._dtype.itemsize
            self._map(shard).madvise(mmap.MADV_WILLNEED, first, last - first)

    def _ranges(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Returns the (shard, first token in it, number of tokens) of consecutive tokens."""
        index = bisect_right(self._ends, start) - 1
        while length > 0:
            count = min(length, self._ends[index + 1] - start)
            yield index, start - self._ends[index], count
            start, length, index = start + count, length - count, index + 1

    def _map(self, index: int) -> mmap.mmap:
        if index not in self._maps:
            with open(self.directory / self.manifest.shards[index].name, "rb") as file:
                self._maps[index] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[index]

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        made_by = self.manifest.tokenizer_fingerprint
        if tokenizer.fingerprint != made_by:
            raise UserError(
                f"token shards in {self.directory} were made by tokenizer {self.manifest.tokenizer!r} "
                f"(fingerprint {made_by[:12]}), not by {tokenizer.spec!r} ({tokenizer.fingerprint[:12]})"
            )
        if self.manifest.eos_token_id != tokenizer.eos_token_id:  # which the fingerprint covers
            raise UserError(
                f"token shard manifest {self.directory / MANIFEST} is damaged (eos_token_id is "
                f"{self.manifest.eos_token_id}, not {tokenizer.eos_token_id}); {self._remedy}"
            )

    def _check_size(self, shard: Shard) -> None:
        path = self.directory / shard.name
        expected = shard.num_tokens * self._dtype.itemsize
        if not path.is_file():
            raise UserError(f"token shard {path} is missing; {self._remedy}")
        if path.stat().st_size != expected:
            raise UserError(f"token shard {path} has {path.stat().st_size} bytes instead of {expected}; {self._remedy}")

    def _verify_changed(self) -> None:
        """Check the checksums of the shards that have changed since their last check."""
        verified = None
        with suppress(OSError, ValueError, RecursionError):
            verified = json.loads(read_regular(self.directory / _VERIFIED))
        paths = {self.directory / shard.name: shard.sha256 for shard in self.manifest.shards}
        stamps = {path.name: _stamp(path, expected) for path, expected in paths.items()}
        known = verified if isinstance(verified, dict) else {}
        changed = [path for path in paths if known.get(path.name) != stamps[path.name]]
        if changed:
            with ThreadPoolExecutor() as pool:
                for path, digest in zip(changed, pool.map(_sha256, changed), strict=True):
                    if digest != paths[path]:
                        raise UserError(f"token shard {path} is damaged (its checksum differs); {self._remedy}")
            with suppress(WriteError):  # a read-only directory: the next process checks again
                write_text(self.directory / _VERIFIED, json.dumps(stamps, indent=1))


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate_json(read_regular(path))
    except FileNotFoundError as error:
        raise UserError(f"no token shards in {directory}: it has no complete {MANIFEST}") from error
    except (OSError, DamagedError) as error:
        raise UserError(f"token shard manifest {path} cannot be read: {reason(error)}") from error
    except ValidationError as error:
        remedy = f"delete {directory} to tokenise again"
        raise UserError(f"token shard manifest {path} is damaged ({first_problem(error)}); {remedy}") from error
    if manifest.format != FORMAT:
        raise UserError(f"token shard manifest {path} has format {manifest.format}; this version reads {FORMAT}")
    return manifest


def _stamp(path: Path, sha256: str) -> list[str | int]:
    status = path.stat()
    return [sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
