"""Model directories with one thing wrong: every entry point that loads one names it in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flash_stu import UserError
from flash_stu.evaluation.runner import check_model_dir
from flash_stu.files import MANIFEST, seal
from flash_stu.model.loading import load_model

JSON = {"list": b"[]", "number": b"7", "null": b"null", "text": b'"x"', "empty": b"", "cut": b'{"a": '}
JSON |= {"deep": b"[" * 20_000, "not UTF-8": b"\xff\xfe{", "digits": b'{"a": ' + b"9" * 5000 + b"}"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_filters")


def contents(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def setting(key: str, value):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def weights(change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def index(content):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return write


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")


def token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzz"] = 5000
    path.write_text(json.dumps(content))


NORM = "model.norm.weight"
CASES = {
    f"{name} {kind}": (contents(name, data), name)
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    )
    for kind, data in JSON.items()
}
CASES |= {
    f"{key} {value!r}": (setting(key, value), key)
    for key in SIZES
    for value in ("64", -5, 0, 10**12, 2.5, None if key != "num_filters" else [], True, float("nan"))
}
CASES |= {
    f"{key} {value!r}": (setting(key, value), key)
    for key, value in [
        *[("model_type", value) for value in ("foreign", None, 5, [], "", "t5x")],
        *[("rope_theta", value) for value in ("x", float("inf"), -1.0)],
        *[("rms_norm_eps", value) for value in ("1e-5", float("nan"), -1.0)],
        *[("eos_token_id", value) for value in (-1, 10**6, "x", 2.5)],
        *[("layer_types", value) for value in ("x", [], ["foreign"] * 2, [1, 2])],
        *[("conv_backend", value) for value in ("nonsense", 5)],
        *[("tie_word_embeddings", value) for value in ("yes", 1)],
        ("dropout", 1.5),
        ("initializer_range", -1.0),
        ("lds_state_dim", -2),
        ("transformers_weights", "adapter_model.bin"),
    ]
}
CASES |= {
    "a tensor is missing": (weights(lambda t: t.pop(NORM)), NORM),
    "a tensor is misshapen": (weights(lambda t: t.update({NORM: torch.ones(3)})), NORM),
    "a tensor is a number": (weights(lambda t: t.update({NORM: torch.ones(())})), NORM),
    "a tensor is unknown": (weights(lambda t: t.update(foo=torch.ones(3))), "foo"),
    "many tensors are unknown": (weights(lambda t: t.update({f"foo{i}": torch.ones(1) for i in range(50)})), "foo"),
    "integers": (weights(lambda t: t.update({NORM: t[NORM].long()})), f"{NORM} has dtype I64"),
    "complex numbers": (weights(lambda t: t.update({NORM: t[NORM].to(torch.complex64)})), NORM),
    "booleans": (weights(lambda t: t.update({NORM: t[NORM].bool()})), f"{NORM} has dtype BOOL"),
    "no tensors": (weights(lambda t: t.clear()), "model.embed_tokens.weight"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "an index without weight_map": (index({}), "index.json"),
    "an index of a list": (index({"metadata": {}, "weight_map": []}), "index.json"),
    "an index of numbers": (index({"metadata": {}, "weight_map": {"a": 5}}), "index.json"),
    "an index of lists": (index({"metadata": {}, "weight_map": {"a": []}}), "index.json"),
    "an index without metadata": (index({"weight_map": {"a": "part.safetensors"}}), "index.json"),
    "an index to elsewhere": (index({"metadata": {}, "weight_map": {"a": "../x.safetensors"}}), "'../x.safetensors'"),
    "an index to a pickle": (index({"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}), "'pytorch_model.bin'"),
    "an index to a missing part": (index({"metadata": {}, "weight_map": {"a": "b.safetensors"}}), "b.safetensors"),
    "only a pickle": (only_pickle, "model.safetensors"),
    "an adapter": (contents("adapter_config.json", b"{}"), "adapter_config.json"),
    "a token beyond the vocabulary": (token, "ids go up to 5000"),
}
LATER = {  # what loading the weights shows
    "NaN": weights(lambda t: t[NORM].fill_(float("nan"))),
    "infinity": weights(lambda t: t["model.embed_tokens.weight"].fill_(float("inf"))),
}


@pytest.mark.parametrize("name", CASES)
def test_one_thing_is_wrong(refuses, model_dir, name):
    damage, words = CASES[name]
    damage(model_dir)
    refuses("scripts/generate.py", ["--model", "model", "--prompt", "a", "--device", "cpu"], words)
    if not name.startswith("generation_config"):
        refuses("evaluate.py", ["--model", "model", "--output", "out", "--device", "cpu"], words)
    refuses("distill.py", ["--checkpoint", "model", "--output", "out", "--state-dim", 8], words)


def flip(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[content.find(b"endoftext") if name == "tokenizer.json" else -9] ^= 4  # the JSON stays valid
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", MANIFEST])
def test_one_bit_of_a_directory_that_this_program_wrote(refuses, config_file, model_dir, name):
    seal(model_dir, "model")
    flip(model_dir, name)
    words = (name, "delete .flash_stu.json")
    refuses("scripts/generate.py", ["--model", "model", "--prompt", "a", "--device", "cpu"], *words)
    refuses("evaluate.py", ["--model", "model", "--output", "out", "--device", "cpu"], *words)
    refuses("distill.py", ["--checkpoint", "model", "--output", "out", "--state-dim", 8], *words)
    if name != "tokenizer.json":
        refuses("train.py", ["--config", config_file, "train.initial_weights=model"], *words)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_what_could_be_read_without_end(refuses, model_dir, name):
    (model_dir / name).unlink()
    (model_dir / name).symlink_to("/dev/zero")
    refuses("scripts/generate.py", ["--model", "model", "--prompt", "a", "--device", "cpu"], name)
    refuses("distill.py", ["--checkpoint", "model", "--output", "out", "--state-dim", 8], name)
    (model_dir / name).unlink()
    os.mkfifo(model_dir / name)
    refuses("scripts/generate.py", ["--model", "model", "--prompt", "a", "--device", "cpu"], name)
    refuses("distill.py", ["--checkpoint", "model", "--output", "out", "--state-dim", 8], name)


@pytest.mark.parametrize("name", LATER)
def test_values_that_are_not_finite(refuses, model_dir, name):
    LATER[name](model_dir)
    refuses("scripts/generate.py", ["--model", "model", "--prompt", "a", "--device", "cpu"], "not finite")
    refuses("distill.py", ["--checkpoint", "model", "--output", "out", "--state-dim", 8], "not finite")


def test_logits_that_are_not_finite(refuses, model_dir):
    weights(lambda t: t["model.layers.0.mlp.gate_up_proj.weight"].fill_(3e38))(model_dir)
    refuses(
        "scripts/generate.py", ["--model", "model", "--prompt", "a", "--max-new-tokens", 2], "logits are not finite"
    )


@pytest.fixture
def llama_dir(model_dir):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **shape)).save_pretrained(model_dir)
    return model_dir


@pytest.mark.parametrize(
    "change",
    [
        *(weights(lambda t: t.pop(NORM)), weights(lambda t: t.update({NORM: torch.ones(3)}))),
        *(
            weights(lambda t: t.update(foo=torch.ones(3))),
            setting("hidden_size", "16"),
            setting("num_hidden_layers", -1),
        ),
        *(setting("rope_parameters", 5), setting("dtype", "nonsense"), setting("tie_word_embeddings", "yes")),
    ],
)
def test_other_architectures_are_checked_too(llama_dir, capfd, change):
    change(llama_dir)
    capfd.readouterr()
    with pytest.raises(UserError) as error:
        check_model_dir(llama_dir)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_other_architectures_are_not_generated_from(refuses, llama_dir):
    assert check_model_dir(llama_dir) == llama_dir
    words = "a LlamaForCausalLM cannot be run here"
    refuses("scripts/generate.py", ["--model", "model", "--prompt", "a", "--device", "cpu"], words)


def test_code_beside_a_model_is_not_run(refuses, model_dir, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    setting("model_type", "foreign")(model_dir)
    setting("auto_map", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(model_dir)
    (model_dir / "evil.py").write_text("raise SystemExit('run')\n")
    refuses("scripts/generate.py", ["--model", "model", "--prompt", "a"], "model_type is 'foreign'")
    setting("model_type", "flash_stu")(model_dir)
    (model_dir / "modeling_flash_stu.py").write_text("raise SystemExit('run')\n")
    tokenizer = json.loads((model_dir / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert check_model_dir(model_dir) == model_dir


def test_a_pickle_beside_a_model_is_not_read(model_dir):
    expected = load_model(model_dir).state_dict()
    (model_dir / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(model_dir).state_dict().items())


def test_initial_weights(refuses, config_file, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"{}")
    refuses("train.py", ["--config", config_file, "train.initial_weights=damaged"], "train.initial_weights", "damaged")


def test_a_model_saved_over_an_export_is_a_users_and_loads(tmp_path, tiny_model):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    seal(tmp_path, "model")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / MANIFEST).exists()
    assert torch.equal(load_model(tmp_path).lm_head.weight, model.lm_head.weight)
