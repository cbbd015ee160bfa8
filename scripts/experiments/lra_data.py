"""The data of Long Range Arena: generated here, or from the hub or a folder, as rows of arrays; and batches of them.

    listops               generated, see listops.py
    pathfinder, pathx     generated, see pathfinder.py; PathX is pathfinder at 128 x 128
    text                  IMDB reviews as bytes
    retrieval             pairs of papers of the ACL Anthology Network as bytes; does one cite the other?
    image                 CIFAR-10 in grey, a pixel a step

A row has "input_ids", (length,) uint8, of a pair (2, length), or "input_values", (length, 1) float32; and "labels".

Source: Tay et al. 2021, Long Range Arena (arXiv 2011.04006), section 2.
"""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import listops
import numpy as np
import torch
from lra_settings import BytesData, ImageData, ListOpsData, PathfinderData, Settings
from pathfinder import Style, pictures

from flash_stu.errors import UserError
from flash_stu.files import replacing_file

Rows = list[dict[str, Any]]
SPLITS = ("train", "validation", "test")
_PARTS = ("key", "flat", "shapes", "labels")  # of a split, as it is kept
_PAIRS = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue, ITU-R BT.601


def load(settings: Settings, data_dir: str | None = None, folder: Path | None = None) -> dict[str, Rows]:
    """Returns the rows of each split.

    Args:
        settings: of the experiment.
        data_dir: a folder with the files of text, retrieval or image; None for the hub.
        folder: where what is generated is kept for the next call with the same settings; None to generate it anew.

    Raises:
        UserError: for files that are not there or not of the form that is known, and without the hub.
    """
    data = settings.data
    if isinstance(data, ImageData):
        return _standardised(_cut(_images(data_dir), data.items))
    if settings.task == "retrieval" and isinstance(data, BytesData):
        return _cut(_pairs(data_dir, data.longest), data.items)
    if isinstance(data, BytesData):
        return _cut(_texts(data_dir, data.longest), data.items)
    if folder is None:
        return _generated(data)
    path, told = folder / "data.npz", data.model_dump_json()
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["settings"]) == told:
                return {split: _unpack(*(stored[f"{split}_{part}"] for part in _PARTS)) for split in SPLITS}
    rows = _generated(data)
    packed: dict[str, Any] = {f"{s}_{part}": array for s in SPLITS for part, array in _pack(rows[s]).items()}
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **packed, settings=told)
    return rows


def _generated(data: ListOpsData | PathfinderData) -> dict[str, Rows]:
    """Returns generated rows; every split has a seed of its own, whatever the sizes of the others."""
    shape, found = data.model_dump(exclude={"items"}), {}
    for seed, (split, count) in enumerate(zip(SPLITS, data.items, strict=True)):
        if isinstance(data, ListOpsData):
            found[split] = listops.sequences(count, seed, **shape)
        else:
            found[split] = _as_values(*pictures(count, seed, Style(**shape)))
    return found if isinstance(data, ListOpsData) else _standardised(found)


def _pack(rows: Rows) -> dict[str, np.ndarray]:
    key = next(iter(rows[0]))
    arrays = [row[key] for row in rows]
    shapes, labels = np.array([array.shape for array in arrays]), np.array([row["labels"] for row in rows])
    values = (np.array(key), np.concatenate([array.ravel() for array in arrays]), shapes, labels)
    return dict(zip(_PARTS, values, strict=True))


def _unpack(key: np.ndarray, flat: np.ndarray, shapes: np.ndarray, labels: np.ndarray) -> Rows:
    parts = np.split(flat, shapes.prod(axis=1).cumsum()[:-1])
    rows = zip(parts, shapes, labels.tolist(), strict=True)
    return [{str(key): part.reshape(shape), "labels": label} for part, shape, label in rows]


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    """Returns rows as a batch: ids padded at the end with 0, and a mask if any of them is."""
    batch = {"labels": torch.tensor([int(row["labels"]) for row in rows])}
    if "input_values" in rows[0]:
        return batch | {"input_values": torch.from_numpy(np.stack([row["input_values"] for row in rows]))}
    sequences = [part for row in rows for part in np.atleast_2d(row["input_ids"])]
    lengths = [int(np.count_nonzero(part)) or 1 for part in sequences]
    ids = np.zeros((len(sequences), max(lengths)), np.int64)
    for place, (part, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids[place, :length] = part[:length]
    mask = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
    shape = (len(rows), *rows[0]["input_ids"].shape[:-1], -1)
    batch["input_ids"] = torch.from_numpy(ids).view(shape)
    if not mask.all():
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).view(shape)
    return batch


def _cut(rows: dict[str, Rows], items: list[int]) -> dict[str, Rows]:
    """Returns at most so many rows of each split, in an order drawn once; "train" gives a fifth to validate with."""
    order = np.random.default_rng(0)
    shuffled = {name: [part[i] for i in order.permutation(len(part))] for name, part in rows.items()}
    if "validation" not in shuffled:
        held = min(items[1], len(shuffled["train"]) // 5)
        shuffled["validation"], shuffled["train"] = shuffled["train"][:held], shuffled["train"][held:]
    return {name: shuffled[name][:count] for name, count in zip(SPLITS, items, strict=True)}


def _as_values(images: np.ndarray, labels: np.ndarray) -> Rows:
    """Returns grey pictures (count, height, width) as sequences of pixels."""
    values = images.reshape(len(images), -1, 1).astype(np.float32)
    return [{"input_values": value, "labels": int(label)} for value, label in zip(values, labels, strict=True)]


def _standardised(rows: dict[str, Rows]) -> dict[str, Rows]:
    """Scales the pixels of all splits to mean 0 and variance 1 on the training split, in place."""
    known = np.concatenate([row["input_values"] for row in rows["train"]])
    mean, deviation = known.mean(dtype=np.float64), known.std(dtype=np.float64)
    for row in (row for split in SPLITS for row in rows[split]):
        row["input_values"] = ((row["input_values"] - mean) / deviation).astype(np.float32)
    return rows


def _as_bytes(text: str, longest: int) -> np.ndarray:
    """Returns the first bytes of a text plus one, (longest or less,), uint16: 0 is left for padding."""
    return np.frombuffer(text.encode()[:longest], np.uint8).astype(np.uint16) + 1


def _texts(data_dir: str | None, longest: int) -> dict[str, Rows]:
    found = _table("stanfordnlp/imdb", data_dir, ("text", "label"))
    return {
        split: [{"input_ids": _as_bytes(row["text"], longest), "labels": row["label"]} for row in rows]
        for split, rows in found.items()
    }


def _images(data_dir: str | None) -> dict[str, Rows]:
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and list(folder.glob("data_batch_*.bin")):
        names = {"train": sorted(folder.glob("data_batch_*.bin")), "test": [folder / "test_batch.bin"]}
        return {split: [row for path in paths for row in _batch(path)] for split, paths in names.items()}
    found = _table("uoft-cs/cifar10", data_dir, ("img", "label"))
    return {
        split: _as_values(np.stack([_grey(_pixels(row["img"])) for row in rows]), np.array([r["label"] for r in rows]))
        for split, rows in found.items()
    }


def _batch(path: Path) -> Rows:
    """Returns the rows of a file of CIFAR-10's binary version, each a label and 32 x 32 bytes of each colour."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not len(content) or len(content) % 3073 or content[::3073].max() > 9:
        raise UserError(f"{path}: not a file of CIFAR-10's binary version (cifar-10-binary.tar.gz)")
    labels, colours = content.reshape(-1, 3073)[:, 0], content.reshape(-1, 3073)[:, 1:]
    return _as_values(_grey(colours.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels)


def _grey(colours: np.ndarray) -> np.ndarray:
    """Returns (..., height, width) of (..., height, width, 3), or what is grey already."""
    return colours if colours.shape[-1] != 3 else colours.astype(np.float32) @ _GREY


def _pixels(image: Any) -> np.ndarray:
    """Returns an image of the datasets library, or of a file with its bytes, as an array."""
    if isinstance(image, dict):
        from PIL import Image

        image = Image.open(io.BytesIO(image["bytes"]))
    return np.asarray(image)


def _pairs(data_dir: str | None, longest: int) -> dict[str, Rows]:
    if data_dir is None:
        raise UserError("retrieval is not on the hub: --data-dir needs the folder with " + ", ".join(_PAIRS.values()))
    csv.field_size_limit(sys.maxsize)
    return {split: list(_pair_rows(Path(data_dir) / name, longest)) for split, name in _PAIRS.items()}


def _pair_rows(path: Path, longest: int) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for number, fields in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
                if len(fields) != 5 or fields[0] not in ("0", "1", "0.0", "1.0"):
                    raise UserError(f"{path}, line {number}: needed: label 0 or 1, two ids and two texts, by tabs")
                pair = np.zeros((2, longest), np.uint16)
                for place, text in enumerate(fields[3:]):
                    ids = _as_bytes(text, longest)
                    pair[place, : len(ids)] = ids
                yield {"input_ids": pair, "labels": int(float(fields[0]))}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --data-dir needs {', '.join(_PAIRS.values())}") from None


def _table(hub: str, data_dir: str | None, columns: tuple[str, str]) -> dict[str, Any]:
    """Returns the splits "train" and "test" of a dataset of the hub, or of parquet, JSON lines or CSV in a folder."""
    from datasets import load_dataset

    try:
        if data_dir is None:
            found = load_dataset(hub, columns=list(columns), trust_remote_code=False)
        else:
            kinds = {"parquet": "parquet", "jsonl": "json", "csv": "csv"}
            files = {s: sorted(map(str, Path(data_dir).rglob(f"*{s}*.*"))) for s in ("train", "test")}
            suffix = Path(files["train"][0]).suffix[1:] if files["train"] else "nothing"
            if suffix not in kinds or not files["test"]:
                raise UserError(f"{data_dir}: needed: files *train* and *test*, {' or '.join(kinds)}; found {suffix}")
            found = load_dataset(kinds[suffix], data_files=files, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # of the hub, the network and the files, in as many ways as there are libraries
        reason = " ".join(str(error).split())[:200]
        where = f"the hub has no {hub} now; give its files by --data-dir" if data_dir is None else data_dir
        raise UserError(f"{where}: {reason}") from None
    for split in ("train", "test"):
        if missing := [column for column in columns if column not in found[split].column_names]:
            raise UserError(f"{data_dir or hub}, {split}: no column {missing[0]}; needed: {', '.join(columns)}")
    return {split: found[split] for split in ("train", "test")}
