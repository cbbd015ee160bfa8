"""The data of Long Range Arena: generated tasks, files of the published forms, batches, settings."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flash_stu import UserError

CONFIGS = Path(__file__).parents[1] / "configs" / "experiments" / "lra"
TASKS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture
def read(scripts):
    return lambda task, *changes, size="default": scripts["lra_settings"].read(CONFIGS / f"{task}.yaml", size, changes)


def test_listops(scripts):
    """Lengths as asked, every answer as often, the same for a seed; the answers are those of Python's evaluation."""
    listops = scripts["listops"]
    rows = listops.sequences(60, seed=3)
    assert all(500 <= len(row["input_ids"]) <= 2000 for row in rows)
    assert set(Counter(row["labels"] for row in rows).values()) == {6}
    again = listops.sequences(60, seed=3)
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))
    assert not np.array_equal(listops.sequences(60, seed=4)[0]["input_ids"], rows[0]["input_ids"])
    words = {"[MIN": "low(", "[MAX": "high(", "[MED": "middle(", "[SM": "total(", "]": "),"}
    functions = {
        "low": lambda *x: min(x),
        "high": lambda *x: max(x),
        "middle": lambda *x: int(np.median(x)),
        "total": lambda *x: sum(x) % 10,
    }
    for row in rows[:20]:
        tokens = [listops.TOKENS[i] for i in row["input_ids"]]
        code = "".join(words.get(token, f"{token},") for token in tokens)
        assert eval(code, functions)[0] == row["labels"] == listops.value(tokens)
        assert all(token in listops.TOKENS[1:] for token in tokens)


def test_listops_trees(scripts):
    """As published: three nodes in four are digits, operators have 2 to 10 arguments, depth is at most 10."""
    import random

    listops, draw = scripts["listops"], random.Random(0)
    depths, arguments = [], []
    for _ in range(3000):
        tokens, open_nodes, deepest = listops.tree(draw, 2000, 10, 10), [], 1
        if len(tokens) > 2000:
            continue
        for token in tokens:
            if token == "]":
                arguments.append(open_nodes.pop())
                continue
            if open_nodes:
                open_nodes[-1] += 1
            if token in listops.OPERATORS:
                open_nodes.append(0)
                deepest = max(deepest, len(open_nodes) + 1)
        assert open_nodes == []
        depths.append(deepest)
    assert max(depths) == 10
    assert set(arguments) == set(range(2, 11))
    roots = sum(depth == 1 for depth in depths) / len(depths)
    assert abs(roots - 0.75) < 4 * (0.75 * 0.25 / 3000) ** 0.5 + 0.03  # trees given up were none of a digit


def test_pathfinder(scripts):
    """Balanced, the same for a seed, dots and curves in every picture, and no telling by the distance of the dots."""
    pathfinder = scripts["pathfinder"]
    style = pathfinder.Style(16, 4, 2, dash=1.8, gap=1.0, apart=2.0, dot=1.2)
    images, labels = pathfinder.pictures(400, 1, style)
    assert images.shape == (400, 16, 16) and images.dtype == np.uint8 and labels.sum() == 200
    assert np.array_equal(pathfinder.pictures(9, 1, style)[0], pathfinder.pictures(9, 1, style)[0])
    bright = [np.argwhere(image > 200) for image in images]
    distance = np.array([np.linalg.norm(places - places[0], axis=1).max() for places in bright])
    assert (distance > 0).mean() > 0.99 and ((images > 40).sum((1, 2)) > 30).all()
    means = [distance[labels == label].mean() for label in (0, 1)]
    assert abs(means[0] - means[1]) < 4 * distance.std() * (2 / 200) ** 0.5
    assert pathfinder.pictures(4, 0, pathfinder.Style(32, 8, 6))[0].shape == (4, 32, 32)


def test_batches(scripts):
    collate = scripts["lra_data"].collate
    rows = [{"input_ids": np.array(ids, np.uint8), "labels": 1} for ids in ([3, 4], [5, 6, 7])]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    pairs = collate([{"input_ids": np.array([[1, 2, 0, 0], [3, 4, 5, 0]], np.uint16), "labels": 0}] * 2)
    assert pairs["input_ids"].tolist() == [[[1, 2, 0], [3, 4, 5]]] * 2
    assert pairs["attention_mask"].tolist() == [[[1, 1, 0], [1, 1, 1]]] * 2
    assert "attention_mask" not in collate(rows[1:])
    values = collate([{"input_values": np.ones((4, 1), np.float32), "labels": 2}])
    assert values["input_values"].shape == (1, 4, 1) and values["labels"].dtype == torch.int64


@pytest.mark.parametrize("task", ["listops", "pathfinder"])
def test_what_was_generated_is_kept(scripts, read, tmp_path, monkeypatch, task):
    lra_data = scripts["lra_data"]
    first = lra_data.load(read(task, size="quick"), folder=tmp_path)
    key = next(iter(first["train"][0]))
    monkeypatch.setattr(lra_data, "_generated", lambda *_: pytest.fail("generated again"))
    again = lra_data.load(read(task, size="quick"), folder=tmp_path)
    for split, rows in first.items():
        assert [row["labels"] for row in rows] == [row["labels"] for row in again[split]]
        assert all(np.array_equal(a[key], b[key]) for a, b in zip(rows, again[split], strict=True))
    with pytest.raises(pytest.fail.Exception):
        lra_data.load(read(task, "data.items=[8, 8, 8]", size="quick"), folder=tmp_path)


def test_text_and_images_from_files(scripts, read, tmp_path):
    load = scripts["lra_data"].load
    for split in ("train", "test"):
        table = pa.table({"text": [f"{split} {i} {40 * 'on'}" for i in range(20)], "label": [i % 2 for i in range(20)]})
        pq.write_table(table, tmp_path / f"{split}-00000.parquet")
    data = load(read("text", "data.items=[12, 4, 6]", "data.longest=30"), str(tmp_path))
    assert [len(data[split]) for split in ("train", "validation", "test")] == [12, 4, 6]
    assert (
        bytes((data["test"][0]["input_ids"] - 1).astype(np.uint8)).startswith(b"test ")
        and len(data["test"][0]["input_ids"]) == 30
    )
    everything = {bytes(row["input_ids"]) for split in ("train", "validation") for row in data[split]}
    assert len(everything) == 16

    folder = tmp_path / "cifar"
    folder.mkdir()
    colours = np.arange(10 * 3072, dtype=np.uint64).astype(np.uint8).reshape(10, 3072)
    labels = np.arange(10, dtype=np.uint8)[:, None]
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(np.hstack([labels, colours]).tobytes())
    data = load(read("image", "data.items=[5, 2, 3]"), str(folder))
    grey = np.array([0.299, 0.587, 0.114]) @ colours.reshape(10, 3, 1024)
    seen = grey[[row["labels"] for row in data["train"]]]
    image = data["test"][0]
    expected = (grey[image["labels"]] - seen.mean()) / seen.std()
    np.testing.assert_allclose(image["input_values"][:, 0], expected, atol=1e-5)


def test_retrieval_from_files(scripts, read, tmp_path):
    changes = ("data.items=[3, 3, 3]", "data.longest=6", "model.num_filters=4")
    load, settings = scripts["lra_data"].load, read("retrieval", *changes)
    for name in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text('1.0\ta\tb\tabc "d\tefghijk\n0\tc\td\tx\ty\n')
    rows = {row["labels"]: row["input_ids"] for row in load(settings, str(tmp_path))["test"]}
    assert bytes((rows[1] - 1).astype(np.uint8)) == b'abc "defghij'
    (tmp_path / "new_aan_pairs.eval.tsv").write_text("1.0\ta\tb\tabc\n")
    with pytest.raises(UserError, match=r"eval.tsv, line 1: needed: label 0 or 1, two ids and two texts"):
        load(settings, str(tmp_path))
    (tmp_path / "new_aan_pairs.eval.tsv").unlink()
    with pytest.raises(UserError, match="No such file or directory; --data-dir needs new_aan_pairs.train.tsv"):
        load(settings, str(tmp_path))
    with pytest.raises(UserError, match="retrieval is not on the hub: --data-dir needs the folder with"):
        load(settings)


def test_files_of_other_kinds(scripts, read, tmp_path):
    load = scripts["lra_data"].load
    with pytest.raises(
        UserError, match=r"needed: files \*train\* and \*test\*, parquet or jsonl or csv; found nothing"
    ):
        load(read("text"), str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("words,label\nx,1\n")
    with pytest.raises(UserError, match="train: no column text; needed: text, label"):
        load(read("text"), str(tmp_path))
    (tmp_path / "data_batch_1.bin").write_bytes(3073 * b"x")
    with pytest.raises(UserError, match="data_batch_1.bin: not a file of CIFAR-10's binary version"):
        load(read("image"), str(tmp_path))


@pytest.mark.parametrize("size", ["full", "default", "quick"])
@pytest.mark.parametrize("task", TASKS)
def test_the_settings_of_every_task_build_every_model(scripts, read, task, size):
    settings, training = read(task, size=size), scripts["lra_training"]
    assert settings.task == task
    if size == "quick":
        return
    with torch.device("meta"):
        sizes = {name: training.parameters(training.build(settings, name)) for name in ("stu", "ar_stu", "attention")}
    assert max(sizes.values()) < 1.02 * min(sizes.values())


def test_first_taps(scripts, read):
    """M^u is drawn where the settings say so, whatever the model; M^y begins at zero."""
    for name, std in {"stu": 0.2, "ar_stu": 0.2}.items():
        model = scripts["lra_training"].build(read("pathfinder"), name)
        taps = {key.rpartition(".")[2]: weight for key, weight in model.named_parameters() if ".taps." in key}
        assert taps["M_u"].shape == (18, 48)
        assert float(taps["M_u"].detach().std()) == pytest.approx(std, rel=0.15)  # 864 numbers: 6 standard errors
        assert name == "stu" or not taps["M_y"].any()


def test_pixels_have_variance_one(scripts, read):
    data = scripts["lra_data"].load(read("pathfinder", size="quick"))
    pixels = np.stack([row["input_values"] for row in data["train"]])
    assert pixels.dtype == np.float32 and pixels.shape[1:] == (256, 1)
    assert abs(pixels.mean()) < 1e-4 and abs(pixels.std() - 1) < 1e-4
    assert min(len(np.unique(row["input_values"])) for row in data["test"]) > 2


def test_bad_settings_are_one_line(read, tmp_path):
    for change, message in {
        "model.hidden=3": "model.hidden is not a configuration key; did you mean hidden_size",
        "data.size=3": "data: unknown setting size; allowed: items, shortest, longest, depth, arguments",
        "train.epochs=0": "train.epochs is 0; input should be greater than 0",
        "models.stu.train={rate: 1}": "models.stu.train: unknown setting rate",
        "models.gru={}": "models",
        "speed=1": "unknown setting speed",
    }.items():
        with pytest.raises(UserError) as error:
            read("listops", change)
        assert message in str(error.value) and "\n" not in str(error.value)
