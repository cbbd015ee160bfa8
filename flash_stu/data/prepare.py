"""From a data config to memory-mapped tokens, tokenised once."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from flash_stu.data.config import DataConfig
from flash_stu.data.corpus import Source, open_source
from flash_stu.data.shards import FORMAT, TokenDataset
from flash_stu.data.staging import Staging, is_complete
from flash_stu.data.tokenizer import Tokenizer, load_tokenizer

_REVISION = 1  # part of the cache key: raise it when the same config and text give other tokens


@dataclass(frozen=True)
class PreparedData:
    """A tokenised corpus: its two splits, the tokenizer, and the directory that holds the shards."""

    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer
    directory: Path


def prepare(config: DataConfig, progress: bool = True) -> PreparedData:
    """Tokenise a corpus, or open the tokens of an earlier time.

    Tokens are kept in cache_dir under a key of everything that determines them: the tokenizer, the files'
    names, sizes and times (for a hub dataset its name and revision), and how documents are chosen and split.
    What a stopped process has done is not done again. Any number of processes may call this at once: one
    works, the others wait and open its result. Where locks do not reach (nodes on some network file systems)
    several may work, on the same bytes of the same files, and the first to finish wins.

    Args:
        config: what to tokenise. A dataset directory that already holds shards (train/ and validation/, each
            with its manifest.json) is opened as it is.
        progress: report on stderr: which files are read and which are not, and a bar on a terminal or a line now and
            then elsewhere.

    Raises:
        UserError: see `load_tokenizer`, `iter_documents` and `TokenDataset`; also if a split comes out empty,
            the cache directory cannot be written, or the corpus is being tokenised in several parts.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    directory, _ = _tokenise(config, tokenizer, 0, 1, progress)
    return PreparedData(
        TokenDataset(directory / "train", tokenizer),
        TokenDataset(directory / "validation", tokenizer),
        tokenizer,
        directory,
    )


def prepare_part(config: DataConfig, index: int, parts: int, progress: bool = True) -> list[int]:
    """Tokenise one part of a corpus; the last part to be finished completes what `prepare` opens.

    The parts may be worked on at any time, in any order, by processes on any machines that share cache_dir.
    Joined in order they are the tokens that one process would write.

    Args:
        config: see `prepare`.
        index: which part, from 0.
        parts: how many parts there are; the same for all of them.
        progress: see `prepare`.

    Returns:
        the parts that are still to be finished; none if the corpus is complete.

    Raises:
        UserError: see `prepare`; also for more parts than the corpus can be divided into.
    """
    return _tokenise(config, load_tokenizer(config.tokenizer), index, parts, progress)[1]


def _tokenise(
    config: DataConfig, tokenizer: Tokenizer, index: int, parts: int, progress: bool
) -> tuple[Path, list[int]]:
    """Do a part unless that is done; the directory of the tokens and the parts that remain."""
    given = Path(config.dataset)
    if is_complete(given):
        return given, []
    source = open_source(config)
    directory = _cache_directory(config) / _entry_name(config, tokenizer, source)
    if is_complete(directory):
        return directory, []
    return directory, Staging(directory, config, source, tokenizer, progress).tokenise(index, parts)


def _entry_name(config: DataConfig, tokenizer: Tokenizer, source: Source) -> str:
    """Name the cache entry: something to recognise it by, and a hash of all that determines its tokens."""
    key = json.dumps([FORMAT, _REVISION, tokenizer.fingerprint, source.identity], sort_keys=True)
    words = f"{Path(config.dataset).name}-{tokenizer.spec.split(':')[-1].split('/')[-1]}"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", words).strip("._")[:60]
    return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _cache_directory(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).absolute()
    return Path(platformdirs.user_cache_dir("flash_stu")) / "tokens"
