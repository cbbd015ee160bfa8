"""Model directories and a small corpus for the evaluation tests."""

import random

import datasets
import pytest
import torch
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
def embedded_data(documents, tmp_path, monkeypatch):
    """The embedded tasks' data made from the small documents, put where the harness looks for them."""
    from flash_stu.evaluation import harness
    from flash_stu.evaluation.embedded import write_embedded_data

    folder = write_embedded_data(documents, tmp_path / "embedded")
    monkeypatch.setattr(harness, "_embedded_data", lambda: folder)
    return folder
