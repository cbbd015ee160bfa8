"""The decoding loop against transformers' generate, batches against single prompts, text, and the command line."""

import io
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from flash_stu import FlashSTUForCausalLM, UserError
from flash_stu.data import load_tokenizer
from flash_stu.errors import run_cli
from flash_stu.generation import loop
from flash_stu.generation.loop import generate_text, generate_tokens, pad_left
from flash_stu.generation.sampling import Sampling
from flash_stu.model.layers import LDS

GREEDY = Sampling(temperature=0)
VARIANTS = {
    "futurefill": {},
    "futurefill_epoched": {"decode_backend": "futurefill_epoched", "stu_branches": "separate"},
    "naive": {"decode_backend": "naive", "stu_type": "full"},
    "lds": {"lds_state_dim": 12, "position_embedding": "alibi"},
    "lds only": {"lds_state_dim": 12, "layer_types": ["linear_attention"] * 4, "stu_branches": "separate"},
    "attention only": {"layer_types": ["sliding_attention"] * 4},
}
PROMPTS = ["def f(x):", "é", "once upon a time there", "12"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes").to_transformers()


@pytest.fixture
def make(tiny_model):
    """A model for bytes whose layers all do something."""

    def build(**changes) -> FlashSTUForCausalLM:
        # with an untied head the newest token does not simply repeat itself
        sizes = {"vocab_size": 257, "max_position_embeddings": 90, "tie_word_embeddings": False}
        model = tiny_model(**(sizes | changes))
        for layer in model.modules():
            if isinstance(layer, LDS):
                torch.nn.init.normal_(layer.readout, std=1.0)
                layer.decay.data.copy_(torch.linspace(-0.9, 0.9, len(layer.decay)))
        return model

    return build


def run(model, ids, count, sampling=GREEDY, **settings):
    return torch.stack(list(generate_tokens(model, ids, count, sampling, **settings)), dim=1)


def texts(*args, **settings):
    return ["".join(row) for row in zip(*generate_text(*args, **settings), strict=True)]


def encoded(tokenizer, prompts=PROMPTS):
    return pad_left(tokenizer(prompts).input_ids)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_padded_batch_equals_generate_and_each_prompt_alone(make, tokenizer, changes):
    model = make(**changes)
    ids, mask = encoded(tokenizer)
    tokens = run(model, ids, 40, attention_mask=mask)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=256)
    assert torch.equal(tokens, expected[:, ids.shape[1] :])
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(tokens[row], run(model, encoded(tokenizer, [prompt])[0], 40)[0])
        assert len(tokens[row].unique()) > 5


@pytest.mark.parametrize("changes", [VARIANTS["futurefill"], VARIANTS["lds"]], ids=["futurefill", "lds"])
def test_beam_search_with_padding(make, tokenizer, changes):
    model = make(**changes)
    ids, mask = encoded(tokenizer)
    settings = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, "pad_token_id": 256, "num_beams": 3}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_repetition_penalty_equals_generate(make):
    model, ids = make(), torch.arange(1, 19).view(2, 9)
    sampling = Sampling(temperature=0, repetition_penalty=1.3)
    settings = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.3, "pad_token_id": 256}
    assert torch.equal(run(model, ids, 40, sampling), model.generate(ids, **settings)[:, 9:])
    assert not torch.equal(run(model, ids, 40, sampling), run(model, ids, 40))


def test_repetition_penalty_ignores_padding(make, tokenizer):
    model, sampling = make(), Sampling(temperature=0, repetition_penalty=1.3)
    ids, mask = encoded(tokenizer)
    tokens = run(model, ids, 40, sampling, attention_mask=mask)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(tokens[row], run(model, encoded(tokenizer, [prompt])[0], 40, sampling)[0])


def test_generate_samples_with_every_setting(make, tokenizer):
    model = make()
    ids, mask = encoded(tokenizer)
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": True, "pad_token_id": 256}
    settings |= {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    first, again = (torch.manual_seed(0) and model.generate(ids, **settings) for _ in range(2))
    assert torch.equal(first, again)
    narrow = model.generate(ids, **settings | {"top_k": 1, "repetition_penalty": 1.0})
    assert torch.equal(narrow[:, ids.shape[1] :], run(model, ids, 20, attention_mask=mask))


def test_seed_decides_the_sample_of_a_batch(make, tokenizer):
    model, settings = make(), {"temperature": 0.9, "top_p": 0.95}
    first, again, other = (texts(model, tokenizer, PROMPTS, 20, Sampling(seed=seed, **settings)) for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_stops_when_every_row_has_ended(make):
    model, prompt = make(), torch.arange(1, 19).view(2, 9)
    greedy = run(model, prompt, 20)
    end = greedy[0, 3].item()
    stopped = run(model, prompt, 20, eos_token_id=end)
    row = stopped[0].tolist()
    first = row.index(end)
    assert row[: first + 1] == greedy[0, : first + 1].tolist()
    assert set(row[first:]) == {end}


def test_a_gpu_is_asked_at_every_16th_token_only_whether_all_have_ended(make, tokenizer, monkeypatch):
    model, prompt = make(), torch.arange(1, 19).view(2, 9)
    greedy = run(model, prompt, 40)
    ends = [greedy[0, place].item() for place in (0, 15, 16, 30)] + [256, None]
    settings = [{"eos_token_id": end} for end in ends]
    expected = [run(model, prompt, 40, **each) for each in settings]
    alone = [run(model, prompt[:1], 40, **each) for each in settings]
    assert min(len(tokens[0]) for tokens in alone) == 1
    pieces = list(generate_text(model, tokenizer, PROMPTS, 40, GREEDY, ["e"]))
    monkeypatch.setattr(loop, "_tokens_between_looks", lambda _: 16)
    for each, both, first in zip(settings, expected, alone, strict=True):
        assert torch.equal(run(model, prompt, 40, **each), both)
        assert torch.equal(run(model, prompt[:1], 40, **each), first)
    assert list(generate_text(model, tokenizer, PROMPTS, 40, GREEDY, ["e"])) == pieces


def test_text_is_the_decoded_tokens(make, tokenizer):
    model = make()
    together = texts(model, tokenizer, PROMPTS, 30, GREEDY)
    for prompt, text in zip(PROMPTS, together, strict=True):
        tokens = run(model, encoded(tokenizer, [prompt])[0], 30, eos_token_id=256)[0]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert texts(model, tokenizer, [prompt], 30, GREEDY) == [text]


def spelling(model, tokenizer, text):
    """Make the model say a text byte by byte after any prompt, again and again."""
    ids = tokenizer(text).input_ids
    following = dict(zip(ids, ids[1:] + ids[:1], strict=True))  # the characters must differ

    def rule(module, args, kwargs, output):
        newest = args[0] if args else kwargs["input_ids"]
        output.logits.fill_(-5.0)
        output.logits[:, -1].scatter_(
            1, torch.tensor([[following.get(i, ids[0])] for i in newest[:, -1].tolist()]), 5.0
        )

    return model.register_forward_hook(rule, with_kwargs=True)


def test_stop_strings_across_tokens_equal_generate(make, tokenizer):
    model = make(lds_state_dim=12)
    spelling(model, tokenizer, "one TWU3,é")
    prompts = ["x", "e", "W"]  # the rows reach the stop string at different times
    together = texts(model, tokenizer, prompts, 60, GREEDY, ["TWU"])
    assert together == ["one ", " ", "U3,éone "]
    ids, mask = encoded(tokenizer, prompts)
    settings = {
        "max_new_tokens": 60,
        "eos_token_id": 256,
        "do_sample": False,
        "stop_strings": ["TWU"],
        "tokenizer": tokenizer,
    }
    theirs = model.generate(ids, attention_mask=mask, pad_token_id=256, **settings)
    for text, row in zip(together, theirs, strict=True):  # generate() keeps the stop string
        assert tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) == text + "TWU"
    assert texts(model, tokenizer, ["x"], 6, GREEDY, ["U3,Z"]) == ["one TW"]
    assert texts(model, tokenizer, ["x"], 7, GREEDY, ["U3,Z"]) == ["one TWU"]  # held back, then shown at the end


def test_streams_as_soon_as_it_can(make, tokenizer):
    model = make(lds_state_dim=12)
    spelling(model, tokenizer, "aé€bSTo")
    pieces = [piece for [piece] in generate_text(model, tokenizer, ["x"], 9, GREEDY, ["STX"])]
    assert pieces == ["a", "", "é", "", "", "€", "b", "", "ST"]
    pieces = [piece for [piece] in generate_text(model, tokenizer, ["x"], 50, GREEDY, ["STo"])]
    assert pieces == ["a", "", "é", "", "", "€", "b", "", "", ""]  # ten tokens, not fifty


def test_end_of_text_ends_the_text(make, tokenizer):
    model = make(lds_state_dim=12)
    spelling(model, tokenizer, "ab<|endoftext|>cd")
    assert texts(model, tokenizer, ["x", "c"], 50, GREEDY) == ["ab", "dab"]


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (torch.arange(9)[None], {"count": 82}, "91 together; this model's spectral filters end at 90"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "the prompt is empty"),
        (torch.ones(2, 3).long(), {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "every token of row 1"),
    ],
)
def test_bad_prompts(make, ids, settings, message):
    with pytest.raises(UserError, match=message):
        run(make(), ids, settings.pop("count", 1), **settings)


def test_empty_prompt_text(make, tokenizer):
    with pytest.raises(UserError, match="prompt '' is empty"):
        texts(make(), tokenizer, ["a", ""], 3)


def test_script(make, tokenizer, tmp_path, monkeypatch, capsys):
    model, directory = make(lds_state_dim=12), tmp_path / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (tmp_path / "prompts").write_text("first line\n\nsecond ü\n")
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "generate.py"))["main"]

    def script(*words):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(directory), *map(str, words)])
        status = run_cli(main)
        return status, *capsys.readouterr()

    settings = ["--max-new-tokens", 9, "--temperature", 0, "--device", "cpu"]
    _, shown, _ = script("--prompt", "abc", "--prompt-file", tmp_path / "prompts", *settings)
    expected = texts(model, tokenizer, ["abc", "first line", "second ü"], 9, GREEDY)
    assert shown == f"[1] abc{expected[0]}\n\n[2] first line{expected[1]}\n\n[3] second ü{expected[2]}\n"
    _, shown, _ = script("--prompt", "abc", "--stop", expected[0][3], *settings)
    assert shown == f"abc{expected[0].split(expected[0][3])[0]}\n"
    assert script("--prompt", "a", "--top-k", 0)[2].startswith("error: argument --top-k: 0 is out of range")
    assert script() == (2, "", "error: there is no prompt; give --prompt TEXT or --prompt-file FILE\n")
    status, _, error = script("--prompt-file", tmp_path / "absent")
    assert status == 2 and error.endswith("absent: no such file\n")


def test_prompts_end_at_newlines_only(make, tokenizer, tmp_path, monkeypatch, capsys):
    model, directory = make(lds_state_dim=12), tmp_path / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "generate.py"))["main"]
    content = b"\xef\xbb\xbfa\xe2\x80\xa8b\x0b\x0c\xc2\x85c\x1c\rd\r\n\r\nsecond\n"
    (tmp_path / "prompts").write_bytes(content)

    def script(*words):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(directory), *words, "--max-new-tokens", "1"])
        return run_cli(main), *capsys.readouterr()

    expected = "[1] a\u2028b\x0b\x0c\x85c\x1c\rd"
    status, shown, _ = script("--prompt-file", str(tmp_path / "prompts"))
    assert status == 0 and shown.startswith(expected) and "[2] second" in shown and "[3]" not in shown
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert script("--prompt-file", "-")[:2] == (0, shown)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script("--prompt-file", "~/prompts")[:2] == (0, shown)
    (tmp_path / "prompts").write_text("a", encoding="utf-16")
    status, shown, error = script("--prompt-file", str(tmp_path / "prompts"))
    assert (status, shown, error.count("\n")) == (2, "", 1) and "the text is UTF-16" in error


def test_a_reader_that_has_gone(make, tokenizer, tmp_path, monkeypatch, capfd):
    model, directory = make(lds_state_dim=12), tmp_path / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "generate.py"))["main"]
    capfd.readouterr()
    for prompts in (["--prompt", "a"], ["--prompt", "a", "--prompt", "b"]):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(directory), *prompts])
            assert run_cli(main) == 141
    assert capfd.readouterr().err == ""
