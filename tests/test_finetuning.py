"""The examples of docs/finetuning.md, run as they are written on a toy model; and what PEFT and Trainer rely on."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from flash_stu import FlashSTUForSequenceClassification, FlashSTUForTokenClassification, UserError
from flash_stu.data.tokenizer import load_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text()
LDS = {"lds_state_dim": 8}


def example(language: str, containing: str, **changes: str) -> str:
    """A block of the page, with what makes it long or names a place changed."""
    block = next(b for b in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if containing in b)
    for old, new in changes.items():
        assert re.search(old, block)
        block = re.sub(old, new, block)
    return block


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """A folder with a toy model where the page has one, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(vocab_size=320, max_position_embeddings=512, eos_token_id=256, pad_token_id=256, **LDS)
    model.save_pretrained("runs/quickstart/distilled")
    load_tokenizer("bytes").to_transformers().save_pretrained("runs/quickstart/distilled")
    return tmp_path


def test_the_trainer_example(folder):
    Path("notes.txt").write_text("\n".join(f"The line number {i} is {'long ' * (i % 5)}." for i in range(40)))
    code = example("python", "Trainer(\n    model", max_steps=r"use_cpu=True, max_steps", **{"=200": "=4", "=50": "=2"})
    variables: dict = {}
    exec(code, variables)
    history = variables["trainer"].state.log_history
    assert sum("eval_loss" in entry for entry in history) == 2
    tuned = AutoModelForCausalLM.from_pretrained("runs/notes/final")
    before = AutoModelForCausalLM.from_pretrained("runs/quickstart/distilled")
    assert not torch.equal(tuned.lm_head.weight, before.lm_head.weight)


def test_the_lora_example(folder):
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!" * (1 + i % 9)}]}
        for i in range(40)
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    variables: dict = {}
    exec(example("python", "SFTTrainer(", max_steps="use_cpu=True, max_steps", **{"=200": "=2"}), variables)
    tuned = AutoModelForCausalLM.from_pretrained("runs/chat/final")
    assert tuned.config.lds_state_dim == 8


def test_the_evaluation_example(folder, monkeypatch):
    from lm_eval.__main__ import cli_evaluate

    Path("data.jsonl").write_text(
        "\n".join(json.dumps({"q": f"{i} is", "c": [" odd", " even"], "a": i % 2}) for i in range(6))
    )
    Path("toy.yaml").write_text(
        "task: hellaswag_toy\ndataset_path: json\ndataset_kwargs: {data_files: {validation: data.jsonl}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: q\ndoc_to_target: a\n"
        "doc_to_choice: c\nmetric_list: [{metric: acc}]\n"
    )
    Path("runs/notes").mkdir()
    Path("runs/quickstart/distilled").rename("runs/notes/final")
    command = shlex.split(example("sh", "lm_eval", hellaswag="hellaswag_toy --include_path . --device cpu"))
    monkeypatch.setattr(sys, "argv", command)
    cli_evaluate()
    results = json.loads(next(Path("runs/notes/eval").rglob("results*.json")).read_text())
    assert 0 <= results["results"]["hellaswag_toy"]["acc,none"] <= 1


@pytest.mark.parametrize("batch", [1, 4])
def test_accumulation_does_not_change_a_step(tiny_model, tmp_path, batch):
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(0, 61, (length,)).tolist()} for length in (5, 20, 9, 13)]
    tokenizer = load_tokenizer("bytes").to_transformers()
    tokenizer.padding_side = "right"  # else padding predicts the first token of a row
    model = tiny_model(vocab_size=320)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            max_grad_norm=1e9,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    fresh = tiny_model(vocab_size=320)
    losses = [fresh(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["input_ids"]])).loss for row in rows]
    weights = [len(row["input_ids"]) - 1 for row in rows]
    expected = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in fresh.parameters()])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert float(trainer.state.log_history[0]["grad_norm"]) == pytest.approx(norm.item(), rel=1e-3)
    assert trainer.label_names == ["labels"]


@pytest.mark.parametrize("changes", [{}, LDS])
@torch.no_grad()
def test_classifiers(tiny_model, tmp_path, changes):
    model = tiny_model(**changes, pad_token_id=60)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 60, (2, 12))
    padded = torch.nn.functional.pad(ids[:1, :7], (0, 5), value=60)
    both = torch.cat([padded, ids[1:]])
    texts = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert type(texts) is FlashSTUForSequenceClassification
    out = texts(both, attention_mask=(both != 60).long(), labels=torch.tensor([0, 2]), num_items_in_batch=None)
    assert out.logits.shape == (2, 3) and out.loss.ndim == 0
    torch.testing.assert_close(out.logits[:1], texts(ids[:1, :7]).logits, atol=1e-5, rtol=1e-5)
    hidden = model.model(ids[1:]).last_hidden_state[:, -1]
    torch.testing.assert_close(out.logits[1:], texts.score(hidden), atol=1e-5, rtol=1e-5)
    tokens = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert type(tokens) is FlashSTUForTokenClassification
    assert tokens(ids, labels=ids % 3).logits.shape == (2, 12, 3)


@pytest.mark.parametrize("changes", [{}, LDS, {"layer_types": ["sliding_attention"] * 4}])
def test_lora_adapts_the_mixers_if_it_is_not_told(tiny_model, changes):
    peft = pytest.importorskip("peft")
    ids = torch.randint(0, 61, (2, 9))
    model = peft.get_peft_model(tiny_model(**changes), peft.LoraConfig(init_lora_weights=False))
    adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    attention = {"qkv_proj", "o_proj"}
    assert adapted == (attention if "layer_types" in changes else attention | {"in_proj"})
    _agrees_with_itself_merged(model.eval(), ids)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], r".*\.1\.mixer\.(v_proj|o_proj)", ["layers.1.mlp.up_proj"]])
def test_lora_refuses_parts_of_fused_layers(tiny_model, targets):
    """PEFT would leave them out without a word, as it would what an older adapter has for them."""
    peft = pytest.importorskip("peft")
    with pytest.raises(UserError, match="_proj, which is a part of (qkv|gate_up)_proj"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=targets))


@pytest.mark.parametrize("name", ["M_filters", "M_phi"])
def test_lora_adapts_filters_in_generation_too(tiny_model, name):
    peft = pytest.importorskip("peft")
    changes = {"stu_type": "full", **LDS} if name == "M_phi" else {"stu_branches": "separate"}
    config = peft.LoraConfig(target_modules=[], target_parameters=[name], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(**changes), config)
    assert any(p.requires_grad for p in model.parameters())
    _agrees_with_itself_merged(model.eval(), torch.randint(0, 61, (2, 9)))


def _agrees_with_itself_merged(model, ids):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=ids, **settings)
    assert torch.equal(generated, model.generate(input_ids=ids, use_cache=False, **settings))
    merged = model.merge_and_unload()
    assert torch.equal(generated, merged.generate(ids, **settings))


def test_transformers_serve_finds_the_class(folder):
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    assert manager.transformers.FlashSTUForCausalLM.__module__ == "flash_stu.model.modeling"


def test_the_tokenizers_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained("runs/quickstart/distilled")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "User: Hi\n\nAssistant: Ho<|endoftext|>"
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "User: Hi\n\nAssistant: " and text.startswith(asked)
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    chosen = [i for i, mine in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(chosen) == "Ho<|endoftext|>"
