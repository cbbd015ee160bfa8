"""Checkpoints in the layout of the published code, and what that code really computes.

Two generations of it exist. In both the window is flash-attn's (W, 0), which is W + 1 keys, and RMSNorm's eps is that
of float32. The older (flash-stu; config names n_embd, n_heads, n_layers) always adds ALiBi with slopes scaled by 1/4
and applies the softcap. The newer (SpectraLDS; dim, num_heads, num_layers) ignores the softcap, and its RoPE is indexed
by the head axis, so that it cancels between query and key: its attention has no positions unless use_alibi is set. A
converted model gives the published logits only with all of this reproduced; none of it is a default of our own models.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flash_stu.config import FlashSTUConfig
from flash_stu.errors import UserError
from flash_stu.model import FlashSTUForCausalLM

POSITIONS = ("published", "rope")
_ALIBI_SCALE = 0.25
_FLOAT32_EPS = float(torch.finfo(torch.float32).eps)
_FILTER_KEYS = ("phi", "filters", "stu_filters")
_NOT_WEIGHTS = ("freqs_cis", "phi_fft", "sgn", *_FILTER_KEYS)  # buffers that some versions save as well


def read_config(path: str | Path, positions: str = "published") -> FlashSTUConfig:
    """Translate a published config.json.

    Args:
        path: the file.
        positions: "published" for the positions the published code really uses (see above), "rope" for standard RoPE.

    Raises:
        UserError: for a missing or malformed file, or a missing key.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file: {error}") from None
    older = "n_embd" in raw
    names = ("n_embd", "n_heads", "n_layers") if older else ("dim", "num_heads", "num_layers")
    needed = (*names, "seq_len", "window_size", "vocab_size", "mlp_scale", "num_eigh")
    for key in needed:
        if not isinstance(raw.get(key), int) and not (key == "window_size" and isinstance(raw.get(key), list)):
            raise UserError(f"{path}: {key} is {raw.get(key)!r}; an integer is needed (keys: {', '.join(needed)})")
    size, heads, layers = (raw[name] for name in names)
    window = raw["window_size"][0] if isinstance(raw["window_size"], list) else raw["window_size"]
    alibi = older or raw.get("use_alibi", False)
    full_branches = "positive" if raw.get("use_hankel_L", False) else "separate"
    tensordot = raw.get("use_approx", True)
    return FlashSTUConfig.from_user(
        {
            "vocab_size": raw["vocab_size"],
            "hidden_size": size,
            "intermediate_size": size * raw["mlp_scale"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "sliding_window": window + 1,
            "max_position_embeddings": raw["seq_len"],
            "layer_types": _layer_types(layers, raw.get("use_attn", True), raw.get("all_attn", False)),
            "conv_backend": "fft",  # its filters are rounded, and so no longer exactly sums of exponentials
            "position_embedding": "rope" if positions == "rope" else ("alibi" if alibi else "none"),
            "rope_theta": raw.get("theta", 10000.0),
            "alibi_scale": _ALIBI_SCALE,
            "attn_logit_softcapping": (raw.get("softcap") or None) if older else None,
            "rms_norm_eps": _FLOAT32_EPS,
            "dropout": raw.get("dropout", 0.0),
            "bias": raw.get("bias", False),
            "tie_word_embeddings": raw.get("weight_tying", True),
            "num_filters": raw["num_eigh"],
            "filter_basis": "hankel_l" if raw.get("use_hankel_L", False) else "hankel",
            "stu_type": "tensordot" if tensordot else "full",
            "stu_branches": "shared" if tensordot and full_branches == "separate" else full_branches,
        }
    )


def _layer_types(layers: int, use_attention: bool, all_attention: bool) -> list[str]:
    even = "sliding_attention" if all_attention else "linear_attention"
    odd = "sliding_attention" if use_attention else "linear_attention"
    return [(even, odd)[i % 2] for i in range(layers)]


def published_filters(seq_len: int, num_filters: int, basis: str) -> torch.Tensor:
    """Filters as the published code makes them: numpy's eigh of the full matrix, smallest of the top K first.

    O(seq_len^3): about a minute at 8192. Signs, and digits of the small filters, are those of this machine's LAPACK:
    weights trained elsewhere need the filters they were trained with.

    Returns:
        (seq_len, num_filters), columns scaled by the fourth root of their eigenvalue, float64.
    """
    index = np.arange(1, seq_len + 1, dtype=np.float64)
    n = index[:, None] + index[None, :]
    hankel, hankel_l = 2 / (n**3 - n), (1 + (-1.0) ** n) * 8 / ((n + 3) * (n - 1) * (n + 1))
    matrix = hankel if basis == "hankel" else hankel_l
    sigma, phi = np.linalg.eigh(matrix)
    sigma, phi = sigma[-num_filters:], phi[:, -num_filters:]
    return torch.from_numpy(phi * np.maximum(sigma, 0) ** 0.25)


def convert(
    checkpoint: str | Path,
    config: FlashSTUConfig,
    filters: torch.Tensor | None = None,
) -> FlashSTUForCausalLM:
    """Load a published checkpoint into our model.

    Args:
        checkpoint: .safetensors file.
        config: from read_config.
        filters: (seq_len, num_filters), those the checkpoint was trained with; by default the file's own if it has
            them, else published_filters().

    Returns:
        the model in the checkpoint's dtype, filters in float32.

    Raises:
        UserError: for an unreadable file, or a tensor that is missing, left over or of the wrong shape.
    """
    weights = _read_safetensors(checkpoint)
    stored = next((weights[key] for key in _FILTER_KEYS if key in weights), None)
    weights = {k: v for k, v in weights.items() if k.rsplit(".", 1)[-1] not in _NOT_WEIGHTS}
    if config.uses_stu:
        shape = (config.max_position_embeddings, config.num_filters)
        filters = stored if filters is None else filters
        filters = published_filters(*shape, config.filter_basis) if filters is None else filters
        if tuple(filters.shape) != shape:
            raise UserError(f"the filters have shape {tuple(filters.shape)}; seq_len and num_eigh ask for {shape}")

    state = _translate(weights, config, Path(checkpoint))
    if config.uses_stu:
        state["model.filters.phi"] = filters.float()
    with torch.device("meta"):
        model = FlashSTUForCausalLM(config)
    expected = {k: v for k, v in model.state_dict().items() if k in state or not _is_tied(k, config)}
    for key, tensor in expected.items():
        if key not in state:
            raise UserError(f"{checkpoint}: nothing in it becomes {key}; is config.json the right one?")
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{checkpoint}: {key} would have shape {tuple(state[key].shape)}; "
                f"the configuration needs {tuple(tensor.shape)}"
            )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _is_tied(key: str, config: FlashSTUConfig) -> bool:
    return config.tie_word_embeddings and key == "lm_head.weight"


def _read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable .safetensors file: {error}") from None


def _translate(weights: dict[str, torch.Tensor], config: FlashSTUConfig, path: Path) -> dict[str, torch.Tensor]:
    """Published names and layouts to ours, each tensor used exactly once."""
    left = dict(weights)
    state: dict[str, torch.Tensor] = {}

    def take(source: str) -> torch.Tensor:
        if source not in left:
            raise UserError(f"{path}: {source} is missing")
        return left.pop(source)

    def linear(source: str, target: str) -> None:
        state[f"{target}.weight"] = take(f"{source}.weight")
        if f"{source}.bias" in left:
            state[f"{target}.bias"] = take(f"{source}.bias")

    head, embedding = "lm_head.weight", "tok_emb.weight"
    if config.tie_word_embeddings:
        both = [left.pop(name) for name in (head, embedding) if name in left]
        if not both:
            raise UserError(f"{path}: {embedding} is missing")
        state["model.embed_tokens.weight"] = both[0]
        if "lm_head.bias" in left:
            state["lm_head.bias"] = take("lm_head.bias")
    else:
        state["model.embed_tokens.weight"] = take(embedding)
        linear("lm_head", "lm_head")
    state["model.norm.weight"] = take("norm.weight")

    for i, kind in enumerate(config.layer_types):
        old, new = f"layers.{i}", f"model.layers.{i}"
        short = "attn" if kind == "sliding_attention" else "stu"
        state[f"{new}.mixer_norm.weight"] = take(f"{old}.{short}_norm.weight")
        state[f"{new}.mlp_norm.weight"] = take(f"{old}.mlp_norm.weight")
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear(f"{old}.mlp.{name}", f"{new}.mlp.{name}")
        if kind == "sliding_attention":
            linear(f"{old}.attn.c_attn", f"{new}.mixer.c_attn")
            for suffix in ("weight", "bias"):
                fused = state.pop(f"{new}.mixer.c_attn.{suffix}", None)
                if fused is not None:
                    for name, part in zip(("q_proj", "k_proj", "v_proj"), fused.chunk(3), strict=True):
                        state[f"{new}.mixer.{name}.{suffix}"] = part.contiguous()
            linear(f"{old}.attn.c_proj", f"{new}.mixer.o_proj")
        elif config.stu_type == "tensordot":
            state[f"{new}.mixer.in_proj.weight"] = take(f"{old}.stu.M_inputs").t().contiguous()
            state[f"{new}.mixer.M_filters"] = take(f"{old}.stu.M_filters")[None]
        else:
            signs = ("plus", "minus") if config.stu_branches == "separate" else ("plus",)
            state[f"{new}.mixer.M_phi"] = torch.stack([take(f"{old}.stu.M_phi_{sign}") for sign in signs])
    if left:
        raise UserError(f"{path}: {sorted(left)[0]} has no place in this model ({len(left)} such tensors)")
    return state
