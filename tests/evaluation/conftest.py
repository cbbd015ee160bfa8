"""Model directories and a small corpus for the evaluation tests."""

import json
import random

import datasets
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from flash_stu.data import load_tokenizer

MAX_LENGTH = 65


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep the converted copies that the datasets library makes out of the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def _save(model, directory):
    """Save a model, with logits far from uniform so that mistakes show, and the byte tokenizer."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(directory)
    load_tokenizer("bytes").to_transformers().save_pretrained(directory)
    return directory


@pytest.fixture
def stu_dir(tiny_model, tmp_path):
    """A tiny hybrid STU model on bytes with a context of 65 tokens."""
    return _save(tiny_model(vocab_size=257, num_hidden_layers=2), tmp_path / "stu")


@pytest.fixture
def long_dir(tiny_model, tmp_path):
    """A tiny hybrid STU model on bytes with a context of 901 tokens."""
    return _save(tiny_model(vocab_size=257, num_hidden_layers=2, max_position_embeddings=901), tmp_path / "long")


@pytest.fixture
def lds_dir(tiny_model, tmp_path):
    """A tiny hybrid of LDS layers and attention on bytes, trained length 65 tokens by its config."""
    return _save(tiny_model(vocab_size=257, num_hidden_layers=2, lds_state_dim=10), tmp_path / "lds")


@pytest.fixture
def llama_dir(tmp_path):
    """A tiny model of another architecture on bytes with a context of 65 tokens."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
    )
    return _save(LlamaForCausalLM(config), tmp_path / "llama")


@pytest.fixture(scope="session")
def documents():
    """Twelve made-up documents, the first ones longer than the models' context, one of them not ASCII."""
    rng = random.Random(3)
    words = [f"{stem}{end}" for stem in ("lam", "ber", "quo", "tin", "sor") for end in ("a", "est", "ing", "o")]
    texts = [" ".join(rng.choices(words, k=rng.randrange(150, 200))) for _ in range(12)]
    return [f"{texts[0][:200]} été 東京 {texts[0][200:]}", *texts[1:]]


@pytest.fixture
def mirror(tmp_path):
    """A mirror of one mmlu subject with 3 questions and 5 worked examples, made up."""
    folder = tmp_path / "mirror/cais/mmlu/anatomy"
    folder.mkdir(parents=True)
    for split, count in (("test", 3), ("dev", 5)):
        rows = [
            {"question": f"{split} {i}?", "subject": "anatomy", "choices": list("wxyz"), "answer": i % 4}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mirror"


@pytest.fixture(scope="session")
def own_tasks(tmp_path_factory):
    """A folder with a task of the user's own, nine questions with three choices each, and a group of it."""
    folder = tmp_path_factory.mktemp("own_tasks")
    colours = ["red", "green", "dark blue"]
    rows = [
        {"text": f"The paint in pot {number} is, as anyone can see,", "choices": colours, "label": number % 3}
        for number in range(9)
    ]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "colours.jsonl")}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "text",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "colours.yaml").write_text(yaml.safe_dump(task))
    (folder / "paints.yaml").write_text(yaml.safe_dump({"group": "paints", "task": ["colours"]}))
    return folder


@pytest.fixture
def embedded_data(documents, tmp_path, monkeypatch):
    """The embedded tasks' data made from the small documents, put where the harness looks for them."""
    from flash_stu.evaluation import definitions

    folder = definitions.write_embedded_data(documents, tmp_path / "embedded")
    monkeypatch.setattr(definitions, "_embedded_data", lambda: folder)
    return folder
