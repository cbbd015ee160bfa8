"""The examples of docs/sequences.md, run as they are written, with less data."""

import re
from pathlib import Path

import torch

from flash_stu import FlashSTUForSequenceClassification

PAGE = (Path(__file__).parents[1] / "docs" / "sequences.md").read_text()


def run(containing: str, **changes: str) -> dict:
    """Run the block of the page that contains this, with parts of it changed; returns its variables."""
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if containing in b)
    for old, new in changes.items():
        assert old in block
        block = block.replace(old, new)
    variables: dict = {}
    exec(block, variables)
    return variables


def test_classify(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    trained = run("Trainer(", **{"num_train_epochs=4": "num_train_epochs=1, use_cpu=True", "400": "160", "256": "64"})
    assert 0 <= trained["trainer"].evaluate()["eval_accuracy"] <= 1
    assert type(FlashSTUForSequenceClassification.from_pretrained("runs/waves/final")) is type(trained["trainer"].model)


def test_predict():
    torch.manual_seed(0)
    variables = run("distill(", **{"range(100)": "range(20)", "1000": "500"})
    trajectory = torch.cat(variables["trajectory"], dim=1)
    assert trajectory.shape == (8, 501, 2) and trajectory.isfinite().all()
