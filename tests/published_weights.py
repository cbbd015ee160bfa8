"""Weights in the layout of the published code, for the tests of its conversion."""

import torch


def published_weights(layers=4, size=32, vocab=53, filters=8, full=False):
    """Returns random tensors of a small model by their published names; `full`: M_phi instead of tensordot."""
    torch.manual_seed(0)

    def draw(*shape, scale=0.3):
        return torch.randn(*shape) * scale

    weights = {"tok_emb.weight": draw(vocab, size, scale=1.0), "norm.weight": 1 + draw(size)}
    weights["lm_head.weight"] = weights["tok_emb.weight"].clone()
    for i in range(layers):
        kind = "stu" if i % 2 == 0 else "attn"
        weights |= {f"layers.{i}.{kind}_norm.weight": 1 + draw(size), f"layers.{i}.mlp_norm.weight": 1 + draw(size)}
        for name, shape in (("gate", (2 * size, size)), ("up", (2 * size, size)), ("down", (size, 2 * size))):
            weights[f"layers.{i}.mlp.{name}_proj.weight"] = draw(*shape)
        if kind == "attn":
            weights[f"layers.{i}.attn.c_attn.weight"] = draw(3 * size, size)
            weights[f"layers.{i}.attn.c_proj.weight"] = draw(size, size)
        elif full:
            weights[f"layers.{i}.stu.M_phi_plus"] = draw(filters, size, size)
            weights[f"layers.{i}.stu.M_phi_minus"] = draw(filters, size, size)
        else:
            weights[f"layers.{i}.stu.M_inputs"] = draw(size, size)
            weights[f"layers.{i}.stu.M_filters"] = draw(filters, size)
    return weights
