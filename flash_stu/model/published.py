"""Checkpoints in the layout of the published code, and the model that reproduces what that code computes.

Two generations of it exist. In both the window is flash-attn's (W, 0), which is W + 1 keys, and RMSNorm's eps is that
of float32. The older (flash-stu; config names n_embd, n_heads, n_layers) always adds ALiBi with slopes scaled by 1/4
and applies the softcap. The newer (SpectraLDS; dim, num_heads, num_layers) ignores the softcap, and its RoPE is indexed
by the head axis, so that it cancels between query and key: its attention has no positions unless use_alibi is set. A
converted model gives the published logits only with all of this reproduced; none of it is a default of our own models.
"""

from pathlib import Path
from types import NoneType

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flash_stu.errors import UserError, reason
from flash_stu.model.config import BOUNDS, FlashSTUConfig
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.model.weights import check_finite
from flash_stu.reading import read_json
from flash_stu.settings import LARGEST_COUNT, shown

POSITIONS = ("published", "rope")
_SWITCHES = ("use_alibi", "use_hankel_L", "use_approx", "use_attn", "all_attn", "bias", "weight_tying")
_WRAPPERS = ("_orig_mod", "module")  # of torch.compile and DistributedDataParallel
_LARGEST_EIGENPROBLEM = 2**15  # rows; a matrix of this size takes 8 GB, and its eigenvectors an hour
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
    raw = read_json(path)
    older = "n_embd" in raw
    names = ("n_embd", "n_heads", "n_layers") if older else ("dim", "num_heads", "num_layers")
    window = raw.get("window_size")
    if isinstance(window, list) and window:
        raw["window_size"] = window[0]
    for key in (*names, "seq_len", "window_size", "vocab_size", "mlp_scale", "num_eigh"):
        high = BOUNDS["num_hidden_layers"][1] if key == names[2] else LARGEST_COUNT
        if type(raw.get(key)) is not int or not 1 <= raw[key] <= high:
            raise UserError(f"{path}: {key} is {shown(raw.get(key))}; needed: an integer from 1 to {high}")
    for key in _SWITCHES:
        if type(raw.get(key, False)) is not bool:
            raise UserError(f"{path}: {key} is {shown(raw[key])}; allowed: true, false")
    for key in ("theta", "softcap", "dropout"):
        if type(raw.get(key, 0)) not in (int, float, NoneType):
            raise UserError(f"{path}: {key} is {shown(raw[key])}; a number is needed")
    try:
        return FlashSTUConfig.from_user(_entries(raw, names, positions, older))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _entries(raw: dict, names: tuple[str, str, str], positions: str, older: bool) -> dict:
    """Returns the entries of FlashSTUConfig for a published config.json."""
    size, heads, layers = (raw[name] for name in names)
    alibi = older or raw.get("use_alibi", False)
    full_branches = "positive" if raw.get("use_hankel_L", False) else "separate"
    tensordot = raw.get("use_approx", True)
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": size,
        "intermediate_size": size * raw["mlp_scale"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "sliding_window": raw["window_size"] + 1,
        "max_position_embeddings": raw["seq_len"],
        "layer_types": _layer_types(layers, raw.get("use_attn", True), raw.get("all_attn", False)),
        "conv_backend": "fft",  # its filters are rounded, and so no longer exactly sums of exponentials
        "position_embedding": "rope" if positions == "rope" else ("alibi" if alibi else "none"),
        "rope_theta": raw.get("theta") or 10000.0,
        "alibi_scale": _ALIBI_SCALE,
        "attn_logit_softcapping": (raw.get("softcap") or None) if older else None,
        "rms_norm_eps": _FLOAT32_EPS,
        "dropout": raw.get("dropout") or 0.0,
        "bias": raw.get("bias", False),
        "tie_word_embeddings": raw.get("weight_tying", True),
        "num_filters": raw["num_eigh"],
        "filter_basis": "hankel_l" if raw.get("use_hankel_L", False) else "hankel",
        "stu_type": "tensordot" if tensordot else "full",
        "stu_branches": "shared" if tensordot and full_branches == "separate" else full_branches,
    }


def _layer_types(layers: int, use_attention: bool, all_attention: bool) -> list[str]:
    even = "sliding_attention" if all_attention else "linear_attention"
    odd = "sliding_attention" if use_attention else "linear_attention"
    return [(even, odd)[i % 2] for i in range(layers)]


def published_filters(seq_len: int, num_filters: int, basis: str) -> torch.Tensor:
    """Compute filters as the published code makes them: numpy's eigh of the full matrix, smallest of the top K first.

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


def convert(checkpoint: str | Path, config: FlashSTUConfig, filters: torch.Tensor | None = None) -> FlashSTUForCausalLM:
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
    check_finite(weights | ({} if stored is None else {"the stored filters": stored}), checkpoint)
    state = _translate(weights, config, Path(checkpoint))
    if config.uses_stu:
        shape = (config.max_position_embeddings, config.num_filters)
        filters = stored if filters is None else filters
        if filters is None and shape[0] > _LARGEST_EIGENPROBLEM:
            raise UserError(f"seq_len is {shape[0]}; the filters are computed up to {_LARGEST_EIGENPROBLEM}: give them")
        filters = published_filters(*shape, config.filter_basis) if filters is None else filters
        if tuple(filters.shape) != shape:
            raise UserError(f"the filters have shape {tuple(filters.shape)}; seq_len and num_eigh ask for {shape}")
        state["model.filters.phi"] = filters.float()
    with torch.device("meta"):
        model = FlashSTUForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        missing.remove("lm_head.weight")
    if missing or unexpected:
        problem = f"nothing in it becomes {missing[0]}" if missing else f"{unexpected[0]} has no place in this model"
        raise UserError(f"{checkpoint}: {problem}; is config.json the right one?")
    model.tie_weights()
    return model.eval()


def _read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file by name, without the prefixes that wrappers of a model leave."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable .safetensors file: {reason(error)}") from None
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        plain = _without_prefixes(name)
        if plain in weights:
            raise UserError(f"{path}: {plain} is there twice, once as {name}")
        if not tensor.is_floating_point() and plain.rsplit(".", 1)[-1] not in _NOT_WEIGHTS:
            raise UserError(f"{path}: {name} has dtype {tensor.dtype}; a floating point dtype is needed")
        weights[plain] = tensor
    return weights


def _without_prefixes(name: str) -> str:
    """`module._orig_mod.layers.0._orig_mod.mlp.up_proj.weight` is `layers.0.mlp.up_proj.weight`."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _translate(weights: dict[str, torch.Tensor], config: FlashSTUConfig, path: Path) -> dict[str, torch.Tensor]:
    """Translate published names and layouts to ours, each tensor used exactly once."""
    left = dict(weights)
    state: dict[str, torch.Tensor] = {}

    def take(source: str, *shape: int) -> torch.Tensor:
        if source not in left:
            raise UserError(f"{path}: {source} is missing")
        tensor = left.pop(source)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {source} has shape {tuple(tensor.shape)}; config.json asks for {shape}")
        return tensor

    def linear(source: str, target: str, outputs: int, inputs: int) -> None:
        """Take a linear layer; its outputs come after those that the target has already."""
        for key, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            if key == "weight" or f"{source}.{key}" in left:
                tensor, there = take(f"{source}.{key}", *shape), state.get(f"{target}.{key}")
                state[f"{target}.{key}"] = tensor if there is None else torch.cat([there, tensor])

    size, inner, filters = config.hidden_size, config.intermediate_size, config.num_filters
    head, embedding, vocabulary = "lm_head.weight", "tok_emb.weight", (config.vocab_size, size)
    if config.tie_word_embeddings:
        state["model.embed_tokens.weight"] = take(head if head in left else embedding, *vocabulary)
        left.pop(embedding, None)
        if "lm_head.bias" in left:
            state["lm_head.bias"] = take("lm_head.bias", config.vocab_size)
    else:
        state["model.embed_tokens.weight"] = take(embedding, *vocabulary)
        linear("lm_head", "lm_head", *vocabulary)
    state["model.norm.weight"] = take("norm.weight", size)

    for i, kind in enumerate(config.block_types):
        old, new = f"layers.{i}", f"model.layers.{i}"
        short = "attn" if kind == "sliding_attention" else "stu"
        state[f"{new}.mixer_norm.weight"] = take(f"{old}.{short}_norm.weight", size)
        state[f"{new}.mlp_norm.weight"] = take(f"{old}.mlp_norm.weight", size)
        linear(f"{old}.mlp.gate_proj", f"{new}.mlp.gate_up_proj", inner, size)
        linear(f"{old}.mlp.up_proj", f"{new}.mlp.gate_up_proj", inner, size)
        linear(f"{old}.mlp.down_proj", f"{new}.mlp.down_proj", size, inner)
        if kind == "sliding_attention":
            linear(f"{old}.attn.c_attn", f"{new}.mixer.qkv_proj", 3 * size, size)
            linear(f"{old}.attn.c_proj", f"{new}.mixer.o_proj", size, size)
        elif config.stu_type == "tensordot":
            state[f"{new}.mixer.in_proj.weight"] = take(f"{old}.stu.M_inputs", size, size).t().contiguous()
            state[f"{new}.mixer.M_filters"] = take(f"{old}.stu.M_filters", filters, size)[None]
        else:
            signs = ("plus", "minus") if config.stu_branches == "separate" else ("plus",)
            matrices = [take(f"{old}.stu.M_phi_{sign}", filters, size, size) for sign in signs]
            state[f"{new}.mixer.M_phi"] = torch.stack(matrices)
    if left:
        raise UserError(f"{path}: {sorted(left)[0]} has no place in this model ({len(left)} such tensors)")
    return state
