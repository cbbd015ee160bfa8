"""Selective activation checkpointing computes products, attention and convolutions once."""

from collections import Counter

import pytest
import torch
from call_counter import CallCounter

from flash_stu.ops.kept import KEPT
from flash_stu.training.initialization import build_model
from flash_stu.training.parallel import World, parallelize


def count(config) -> Counter:
    model = parallelize(build_model(config.architecture()), config, World(0, 1, torch.device("cpu"))).train()
    ids = torch.arange(2 * 25).view(2, 25) % 256
    with CallCounter() as counter:
        model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], skip_logits=True).loss.backward()
    return counter.calls


@pytest.mark.parametrize("attention", ["banded", "sdpa"])
@pytest.mark.parametrize("convolution", ["fft", "chunked"])
def test_what_is_kept_is_not_computed_again(load, convolution, attention):
    changes = [f"model.conv_backend={convolution}", f"model.attention_backend={attention}"]
    changes += ["model.attn_logit_softcapping=null"] * (attention == "sdpa")
    plain, selective, full = (
        count(load(*changes, f"train.activation_checkpointing={mode}")) for mode in ("none", "selective", "full")
    )
    kept = {name for name in plain if name in KEPT}
    expected = {"aten::mm", f"flash_stu::{convolution}_conv"}
    expected.add(
        "flash_stu::banded_attention" if attention == "banded" else "aten::_scaled_dot_product_flash_attention_for_cpu"
    )
    assert kept >= expected
    for name in kept:
        assert selective[name] == plain[name] < full[name]


def test_every_operator_of_a_layer_with_a_backward_pass_is_kept():
    pytest.importorskip("triton")
    from flash_stu.ops.conv import chunked, fft, tail, triton  # noqa: F401 (they register)

    ours = {name for name in dir(torch.ops.flash_stu) if f"{name}_backward" in dir(torch.ops.flash_stu)}
    kept = {f"flash_stu::{name}" for name in ours - {"add_taps"}}  # a few products a number: sooner computed than kept
    assert kept <= KEPT and len(kept) == 4
