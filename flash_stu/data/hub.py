"""Datasets on the Hugging Face hub, streamed file by file."""

from collections.abc import Iterator

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from flash_stu.data.config import DataConfig
from flash_stu.data.formats import text_column
from flash_stu.data.unit import Unit
from flash_stu.errors import UserError
from flash_stu.network import spare_the_hub

_TIMEOUT = 10  # seconds to wait for the hub before saying that it cannot be reached
_ROWS = 256  # rows in memory at a time


def hub_commit(config: DataConfig) -> str | None:
    """Ask the hub for the commit that the dataset's revision is at now.

    Raises:
        UserError: if there is no such dataset or the hub cannot be asked.
    """
    name = config.dataset
    spare_the_hub()
    try:
        return HfApi().dataset_info(name, revision=config.revision, timeout=_TIMEOUT).sha
    except RepositoryNotFoundError as error:
        raise UserError(
            f"data.dataset {name!r}: no such file or directory, nor dataset on the Hugging Face hub"
        ) from error
    except Exception as error:  # the HTTP library's own errors differ between versions
        raise UserError(
            f"data.dataset {name!r}: no such file or directory, and the Hugging Face hub cannot be asked "
            f"({type(error).__name__})"
        ) from error


def hub_units(config: DataConfig, commit: str | None) -> list[Unit]:
    """Open a dataset as it was at a commit; its files are the units, and nothing is downloaded before it is read.

    Raises:
        UserError: if the dataset cannot be opened or has no train split.
    """
    import datasets  # slow to import, and only needed here

    name = config.dataset
    try:
        splits = datasets.load_dataset(name, config.subset, revision=commit, streaming=True, trust_remote_code=False)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.dataset {name!r}, subset {config.subset!r}, cannot be opened: {reason}") from error
    if "train" not in splits:
        raise UserError(f"data.dataset {name!r} has no train split; there are: {', '.join(splits)}")
    held_out = "validation" in splits
    units = _files(config, splits["train"], "train" if held_out else None)
    return units + (_files(config, splits["validation"], "validation") if held_out else [])


def _files(config: DataConfig, rows: "datasets.IterableDataset", split: str | None) -> list[Unit]:  # noqa: F821
    def unit(index: int) -> Unit:
        name = f"data.dataset {config.dataset!r}, file {index + 1} of {rows.num_shards}"
        return Unit(name, split, lambda: _texts(config, rows.shard(rows.num_shards, index)), None)

    return [unit(index) for index in range(rows.num_shards)]


def _texts(config: DataConfig, rows: "datasets.IterableDataset") -> Iterator[str]:  # noqa: F821
    """Read a text column as whole tables: row by row the library is several times slower."""
    try:
        for table in rows.with_format("arrow").iter(_ROWS):
            column = text_column(table.schema, config.text_column, f"data.dataset {config.dataset!r}")
            yield from (text for text in table.column(column).to_pylist() if text is not None)
    except UserError:
        raise
    except Exception as error:  # of the network, after the library's own attempts
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"data.dataset {config.dataset!r} cannot be read on: {reason}") from error
