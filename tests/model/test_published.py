"""Converted checkpoints against an independent, naive rendering of what the published code computes."""

import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from published_weights import published_weights
from safetensors.torch import save_file
from torch.nn import functional as F

from flash_stu import UserError
from flash_stu.errors import run_cli
from flash_stu.model.loading import load_model
from flash_stu.model.published import convert, published_filters, read_config
from scripts.convert_checkpoint import main

NEWER = {
    "dim": 32,
    "num_heads": 4,
    "num_layers": 4,
    "seq_len": 40,
    "window_size": 6,
    "vocab_size": 53,
    "mlp_scale": 2,
    "num_eigh": 8,
    "use_hankel_L": False,
    "theta": 10000.0,
    "use_alibi": False,
    "softcap": 50.0,
    "weight_tying": True,
}
OLDER = {k: v for k, v in NEWER.items() if k not in ("dim", "num_heads", "num_layers", "use_alibi", "weight_tying")} | {
    "n_embd": 32,
    "n_heads": 4,
    "n_layers": 4,
    "softcap": 2.0,
}


def reference_logits(weights, ids, phi, window, softcap=None, alibi=False, heads=4, layers=4, both=True):
    """Token by token sums, straight from the formulas; float64."""
    w = {k: v.double() for k, v in weights.items()}
    phi = phi.double()

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 2.0**-23).sqrt() * weight

    def stu(x, prefix):
        signs = [1] if not both else [1, -1]
        y = torch.zeros_like(x)
        for t in range(x.shape[1]):
            for lag in range(t + 1):
                for sign, name in zip(signs, ("plus", "minus"), strict=False):
                    factor = sign**lag
                    if f"{prefix}.M_inputs" in w:
                        taps = phi[lag] @ w[f"{prefix}.M_filters"]
                        y[:, t] += factor * taps * (x[:, t - lag] @ w[f"{prefix}.M_inputs"])
                    else:
                        matrix = torch.einsum("k,kde->de", phi[lag], w[f"{prefix}.M_phi_{name}"])
                        y[:, t] += factor * x[:, t - lag] @ matrix
        return y

    def attention(x, prefix):
        q, k, v = (x @ w[f"{prefix}.c_attn.weight"].t()).chunk(3, dim=-1)
        size = x.shape[-1] // heads
        y = torch.zeros_like(x)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for t in range(x.shape[1]):
                seen = torch.arange(max(0, t - window), t + 1)  # window keys before the query, and its own
                scores = (k[:, seen, part] * q[:, t : t + 1, part]).sum(-1) / math.sqrt(size)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi:
                    scores = scores - 0.25 * 2.0 ** (-8 * (h + 1) / heads) * (t - seen)
                y[:, t, part] = (scores.softmax(-1)[..., None] * v[:, seen, part]).sum(1)
        return y @ w[f"{prefix}.c_proj.weight"].t()

    x = w["tok_emb.weight"][ids]
    for i in range(layers):
        kind, mixer = ("stu", stu) if i % 2 == 0 else ("attn", attention)
        x = x + mixer(norm(x, w[f"layers.{i}.{kind}_norm.weight"]), f"layers.{i}.{kind}")
        h = norm(x, w[f"layers.{i}.mlp_norm.weight"])
        gate = F.gelu(h @ w[f"layers.{i}.mlp.gate_proj.weight"].t(), approximate="tanh")
        x = x + (gate * (h @ w[f"layers.{i}.mlp.up_proj.weight"].t())) @ w[f"layers.{i}.mlp.down_proj.weight"].t()
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].t()


def write(folder: Path, weights, config):
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors", folder / "config.json"


CASES = {
    "newer": (NEWER, {}),
    "newer with alibi": (NEWER | {"use_alibi": True}, {"alibi": True}),
    "older": (OLDER, {"alibi": True, "softcap": 2.0}),
    "hankel_l": (NEWER | {"use_hankel_L": True}, {"both": False}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_the_published_ones(tmp_path, case):
    raw, reference = CASES[case]
    weights, ids = published_weights(), torch.randint(0, 53, (2, 33))
    checkpoint, config_path = write(tmp_path, weights, raw)
    config = read_config(config_path)
    phi = published_filters(40, 8, config.filter_basis)
    expected = reference_logits(weights, ids, phi, raw["window_size"], **reference)
    logits = convert(checkpoint, config)(ids).logits
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_full_stu(tmp_path):
    weights, ids = published_weights(full=True), torch.randint(0, 53, (2, 21))
    checkpoint, config_path = write(tmp_path, weights, NEWER | {"use_approx": False})
    config = read_config(config_path)
    assert (config.stu_type, config.stu_branches) == ("full", "separate")
    expected = reference_logits(weights, ids, published_filters(40, 8, "hankel"), 6)
    torch.testing.assert_close(convert(checkpoint, config)(ids).logits.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@torch.no_grad()
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
    weights, ids = published_weights(), torch.randint(0, 53, (2, 21))
    checkpoint, config_path = write(tmp_path, weights, NEWER)
    config = read_config(config_path)
    expected = convert(checkpoint, config)(ids).logits
    prefixed = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    prefixed[f"{prefix}layers.1._orig_mod.mlp_norm.weight"] = prefixed.pop(f"{prefix}layers.1.mlp_norm.weight")
    save_file(prefixed, checkpoint)
    assert torch.equal(convert(checkpoint, config)(ids).logits, expected)


def run(*arguments):
    """Run the script's command line in this process; returns exit status, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    command = mock.patch.object(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    with command, redirect_stdout(stdout), redirect_stderr(stderr):
        status = run_cli(main)
    return SimpleNamespace(returncode=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@torch.no_grad()
def test_command_line_with_the_filters_it_was_trained_with(tmp_path):
    weights, ids = published_weights(), torch.randint(0, 53, (2, 21))
    checkpoint, config_path = write(tmp_path, weights, NEWER)
    phi = published_filters(40, 8, "hankel") * torch.tensor([1, -1, 1, 1, -1, -1, 1, -1])
    np.save(tmp_path / "filters.npy", phi.float().numpy())
    out = tmp_path / "converted"
    done = run(
        "--checkpoint", checkpoint, "--config", config_path, "--output", out, "--filters", tmp_path / "filters.npy"
    )
    assert done.returncode == 0, done.stderr
    logits = load_model(out)(ids).logits
    torch.testing.assert_close(logits.double(), reference_logits(weights, ids, phi, 6), atol=1e-4, rtol=0)

    again = run("--checkpoint", checkpoint, "--config", config_path, "--output", out)
    assert (again.returncode, again.stderr) == (0, "")  # an earlier conversion is replaced, and nothing else
    (out / "notes.txt").touch()
    refused = run("--checkpoint", checkpoint, "--config", config_path, "--output", out)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --output {out} holds notes.txt, which this program did not write")


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    weights = published_weights()
    _, config_path = write(tmp_path, weights, NEWER)
    config = read_config(config_path)

    def message(changed):
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(UserError) as error:
            convert(tmp_path / "changed.safetensors", config)
        return str(error.value)

    without = {k: v for k, v in weights.items() if k != "layers.2.stu.M_inputs"}
    assert "layers.2.stu.M_inputs is missing" in message(without)
    assert "layers.9.stu.bias has no place" in message(weights | {"layers.9.stu.bias": torch.zeros(1)})
    wrong = weights | {"layers.0.stu.M_filters": torch.zeros(9, 32)}
    assert "layers.0.stu.M_filters has shape (9, 32); config.json asks for (8, 32)" in message(wrong)
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "absent.safetensors", config)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="not a readable .safetensors file"):
        convert(tmp_path / "cut.safetensors", config)
    (tmp_path / "short.json").write_text(json.dumps({k: v for k, v in NEWER.items() if k != "num_eigh"}))
    with pytest.raises(UserError, match="num_eigh is None; needed: an integer from 1"):
        read_config(tmp_path / "short.json")
    with pytest.raises(UserError, match=r"the filters have shape \(40, 7\)"):
        convert(tmp_path / "model.safetensors", config, torch.zeros(40, 7))
