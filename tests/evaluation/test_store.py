"""Results that are kept between two starts of an evaluation."""

import pytest

from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.evaluation.resume import Journal, Store

KEY = {"model": "a1", "task": {"name": "piqa", "shots": 0}, "limit": None}


def test_what_was_written_is_read_for_the_same_key_only(tmp_path):
    store = Store(tmp_path / "out")
    with store.holding():
        assert store.read("my model", "piqa", KEY) is None
        found = {"key": KEY, "result": {"value": 0.5}, "items": []}
        store.write("runs/my model", "piqa", found)
        assert store.read("runs/my model", "piqa", KEY) == found
        assert store.read("runs/my model", "boolq", KEY) is None
        with pytest.raises(UserError, match=r"holds runs/my model on piqa with other settings \(model, limit\)"):
            store.read("runs/my model", "piqa", KEY | {"limit": 5, "model": "a2"})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".flash_stu.json", "items"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"result": 1}', b"\xff", None])
def test_a_changed_item_file_is_refused_by_name_and_stays(content, tmp_path):
    store = Store(tmp_path)
    with store.holding():
        store.write("m", "piqa", {"key": KEY, "result": {"value": 0.5}})
    path = tmp_path / "items/m/piqa.json"
    content = path.read_bytes().replace(b"0.5", b"0.6") if content is None else content  # an edited score
    path.write_bytes(content)
    words = r"output .* holds items/m/piqa.json, which this program did not write or somebody changed"
    for refused in (lambda: store.read("m", "piqa", KEY), store.check, store.holding().__enter__):
        with pytest.raises(UserError, match=words):
            refused()
    assert path.read_bytes() == content
    path.unlink()
    with store.holding():
        assert store.read("m", "piqa", KEY) is None


def test_a_foreign_directory_or_file_is_refused(tmp_path):
    Store(None).check()
    with Store(None).holding():
        pass
    Store(tmp_path / "new").check()
    Store(tmp_path).check()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and was not written by this program"):
        Store(tmp_path).check()
    with pytest.raises(UserError, match="is not a directory"):
        Store(tmp_path / "thesis.tex").check()
    store = Store(tmp_path / "new")
    with store.holding():
        store.write("m", "piqa", {"key": KEY})
    (tmp_path / "new/table.md").write_text("mine")
    store.check(["results.json"])
    with pytest.raises(UserError, match="new holds table.md, which this program did not write"):
        store.check(["results.json", "table.md"])


def test_a_directory_held_for_nothing_is_gone(tmp_path):
    with pytest.raises(KeyError), Store(tmp_path / "a/b").holding():
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def noted(path, key=KEY):
    return Journal(path, key, World()).known()


def test_altered_lines_of_a_journal_count_for_nothing(tmp_path):
    path = tmp_path / "piqa.json.part"
    journal = Journal(path, KEY, World())
    journal.known()
    for row in range(4):
        journal.add({row: [(-1.5, True)]})
    assert set(noted(path)) == {0, 1, 2, 3}
    (file,) = tmp_path.iterdir()
    header, *lines = file.read_bytes().splitlines()
    lines[1] = lines[1].replace(b"-1.5", b"-0.5")
    lines[2] = b"\xff" + lines[2]
    file.write_bytes(b"\n".join([header, *lines, b"7", b"[]", b"{}"]))
    assert noted(path) == {0: [[-1.5, True]], 3: [[-1.5, True]]}
    assert noted(path, KEY | {"limit": 1}) == {}
    mine = tmp_path / "piqa.json.part.notes"
    mine.write_text("mine")
    journal.close()
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize("content", [b"my notes", b"7\n", b'{"key": 1}\n', b"\xff\n[]\n"])
def test_what_is_no_journal_is_refused_by_name_and_stays(content, tmp_path):
    file = tmp_path / "piqa.json.part.0"
    file.write_bytes(content)
    journal = Journal(tmp_path / "piqa.json.part", KEY, World())
    for refused in (journal.known, lambda: journal.add({0: []}), journal.close):
        with pytest.raises(UserError, match=r"piqa.json.part.0 is not a journal of this program"):
            refused()
    assert file.read_bytes() == content
