"""What is kept between two starts of an evaluation."""

import pytest

from flash_stu.errors import UserError
from flash_stu.evaluation.store import Store

KEY = {"model": "a1", "task": {"name": "piqa", "shots": 0}, "limit": None}


def test_what_was_written_is_read_for_the_same_key_only(tmp_path):
    store = Store(tmp_path / "out")
    assert store.read("my model", "piqa", KEY) is None
    found = {"key": KEY, "result": {"value": 0.5}, "items": []}
    store.write("runs/my model", "piqa", found)
    assert store.read("runs/my model", "piqa", KEY) == found
    assert store.read("runs/my model", "boolq", KEY) is None
    with pytest.raises(UserError, match=r"holds runs/my model on piqa with other settings \(model, limit\)"):
        store.read("runs/my model", "piqa", KEY | {"limit": 5, "model": "a2"})
    assert not [path for path in tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("content", ["", "[]", '{"result": 1}'])
def test_a_foreign_file_is_one_line(content, tmp_path):
    store = Store(tmp_path)
    store.write("m", "piqa", {"key": KEY})
    (path,) = tmp_path.rglob("piqa.json")
    path.write_text(content)
    with pytest.raises(UserError, match=r"piqa.json is not a result of this program"):
        store.read("m", "piqa", KEY)


def test_a_foreign_directory_is_refused(tmp_path):
    Store(None).check()
    Store(tmp_path / "new").check()
    Store(tmp_path).check()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no evaluation"):
        Store(tmp_path).check()
    with pytest.raises(UserError, match="is not a directory"):
        Store(tmp_path / "thesis.tex").check()
    for folder in (tmp_path, tmp_path / "new"):
        Store(folder).begin()
        (folder / "something").write_text("")
        Store(folder).check()
