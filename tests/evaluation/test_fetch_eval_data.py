"""The mirror that scripts/fetch_eval_data.py makes, the hub replaced by a stand-in."""

import datasets
import pytest

from flash_stu.errors import UserError
from flash_stu.evaluation.definitions import TaskSpec
from flash_stu.evaluation.harness import load_tasks
from scripts.fetch_eval_data import fetch


@pytest.fixture
def hub(monkeypatch):
    """Data sets by (id, configuration, split); what was asked for is in `calls`."""
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=list("ABCD")),
        }
    )

    class Hub:
        calls = []

        def load_dataset(self, name, configuration=None, split=None, **options):
            self.calls.append((name, configuration, split))
            if split == "dev" and len(self.calls) == 2:
                raise ConnectionError("no route\nto the hub")
            rows = [{"question": f"été {split} {i}?", "choices": list("wxyz"), "answer": i} for i in range(4)]
            return datasets.Dataset.from_list(rows, features=features)

    stand_in = Hub()
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    yield stand_in
    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_download_goes_on_and_is_what_tasks_read(hub, tmp_path, monkeypatch, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: [{name: mmlu_anatomy, shots: 2}]")
    mirror = tmp_path / "mirror"
    with pytest.raises(UserError, match=r"split dev of cais/mmlu \(anatomy\) cannot be had: ConnectionError: no route"):
        fetch(str(suite), mirror)
    folder = mirror / "cais/mmlu/anatomy"
    assert [path.name for path in folder.iterdir()] == ["test.jsonl"]
    files = fetch(str(suite), mirror)
    assert files == [folder / "test.jsonl", folder / "dev.jsonl"]
    assert hub.calls == [("cais/mmlu", "anatomy", split) for split in ("test", "dev", "dev")]
    assert "4 rows" in capsys.readouterr().out
    assert '"question":"été test 0?"' in (folder / "test.jsonl").read_text().replace('": "', '":"')

    monkeypatch.undo()
    (task,) = load_tasks([TaskSpec(name="mmlu_anatomy", shots=2)], mirror)
    member = task.harness["tasks"]["mmlu_anatomy"]
    assert [doc["answer"] for doc in member.eval_docs] == [0, 1, 2, 3]
    assert member.eval_docs[0]["question"] == "été test 0?"


def test_tasks_without_a_hub_data_set_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown task 'nothing'"):
        fetch("nothing", tmp_path)
