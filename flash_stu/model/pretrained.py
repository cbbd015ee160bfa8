"""A block, and what all model classes share: initial weights, loading and saving, as transformers does them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Concatenate,
    PreTrainedModel,
    WeightConverter,
)
from transformers import initialization as hf_init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_layers import (
    GradientCheckpointingLayer,
)

from flash_stu.files import MANIFEST
from flash_stu.filters.spectral import spectral_filters
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers import LDS, STU, Bidirectional, GatedMLP, InputOutputTaps, SlidingWindowAttention
from flash_stu.model.layers.attention import AttentionWeights, check_implementation
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.layers.exact import SpectralFilters
from flash_stu.model.layers.linear import FUSED, DepthScaledLinear, FusedLinear, ValueEmbedding, join, join_tensors
from flash_stu.model.layers.mixer import Mixer
from flash_stu.model.layers.norm import RMSNorm
from flash_stu.model.saving import add_remote_code

# patterns; a distilled model that is loaded to be trained, or a model that gets taps, has none of them
OPTIONAL_TENSORS = [r"_change$", r"\.taps\.M_[uy]$"]


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        config: the model's configuration.
        kind: "linear_attention" or "sliding_attention".
    """

    def __init__(self, config: FlashSTUConfig, kind: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = build_mixer(config, kind)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: torch.Tensor,
        context: SequenceContext,
        past_key_values: FlashSTUCache | None = None,
        index: int = 0,
    ) -> torch.Tensor:
        """Run over x (batch, length, hidden_size); with a cache, after the tokens it has seen.

        Args:
            x: residual stream.
            context: what all layers share in this call.
            past_key_values: the cache, read and written at `index` if given; gradient checkpointing knows this name.
            index: this block's place in the model.
        """
        states = None if past_key_values is None else past_key_values.states
        x = x + self._drop(self.mixer(self.mixer_norm(x), context, states, index))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x


def build_mixer(config: FlashSTUConfig, kind: str) -> Mixer:
    """Returns the sequence mixer of a block; see there for the arguments."""
    if kind == "sliding_attention":
        return SlidingWindowAttention(config)
    layer = STU if config.lds_state_dim is None else LDS
    return Bidirectional(layer(config), layer(config)) if config.bidirectional else layer(config)


class FlashSTUPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving shared by all model classes."""

    config: FlashSTUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": Block, "attentions": AttentionWeights}
    # patterns, searched for in names; see flash_stu.model.layers.exact
    _keep_in_fp32_modules_strict = {
        r"mixer\.(\w+\.)?readout$",
        r"mixer\.(\w+\.)?readout_change$",
        r"mixer\.(\w+\.)?decay$",
        r"mixer\.(\w+\.)?log_rate_change$",
        r"filters\.phi$",
        r"taps\.M_y$",
    }
    _keys_to_ignore_on_load_missing = OPTIONAL_TENSORS

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called once for every module that holds tensors of its own, so no factor can accumulate.
        if isinstance(module, FusedLinear):
            for _, layer in module.separate():
                self._init_weights(layer)
        elif isinstance(module, DepthScaledLinear):
            _draw(module, (2 * self.config.num_hidden_layers * module.in_features) ** -0.5)
        elif isinstance(module, ValueEmbedding):
            std = self.config.initializer_range * module.in_features**-0.5
            hf_init.normal_(module.weight, std=std)
            hf_init.normal_(module.bias, std=std)
        elif isinstance(module, nn.Linear):
            _draw(module, module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            hf_init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            hf_init.ones_(module.weight)
        elif isinstance(module, STU | LDS | InputOutputTaps):
            module.reset_parameters(hf_init)
        elif isinstance(module, SpectralFilters):
            self._fill_filters(module)

    def _fill_filters(self, module: SpectralFilters) -> None:
        if module.phi.device.type == "meta" or getattr(module.phi, "_is_hf_initialized", False):
            return
        config = self.config
        _, phi = spectral_filters(config.max_position_embeddings, config.num_filters, config.filter_basis)
        hf_init.copy_(module.phi, phi.to(module.phi.dtype))

    def initialize_module(self, module: nn.Module) -> None:
        """Draw the initial weights of one of the model's modules, without those of the modules in it."""
        self._init_weights(module)

    def stays_float32(self, name: str) -> bool:
        """Returns whether a tensor of the model is float32 in a model of another dtype."""
        return any(re.search(pattern, name) for pattern in self._keep_in_fp32_modules_strict or ())

    def may_be_missing(self, name: str) -> bool:
        """Returns whether a stored model may lack a tensor, which is zero then."""
        return any(re.search(pattern, name) for pattern in self._keys_to_ignore_on_load_missing or ())

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *_: Any, **__: Any) -> Any:
        # None stays None: config.attention_backend decides
        check_implementation(attn_implementation, self.config)
        return attn_implementation

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch; the weights may be of layers that are not fused yet."""
        return super().load_state_dict(
            join_tensors(state_dict) if any(map(join, state_dict)) else state_dict, *args, **kwargs
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the directory also loads where nothing of ours is imported (trust_remote_code=True)."""
        Path(save_directory, MANIFEST).unlink(missing_ok=True)  # of what this program had written there before
        kwargs.setdefault("save_original_format", False)  # fused layers stay so
        super().save_pretrained(save_directory, *args, **kwargs)
        add_remote_code(save_directory)


def _draw(linear: nn.Linear, std: float) -> None:
    hf_init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        hf_init.zeros_(linear.bias)


# how from_pretrained reads a model whose layers were not fused yet
register_checkpoint_conversion_mapping(
    FlashSTUConfig.model_type,
    [
        WeightConverter([rf"\.{part}\." for part in parts], f".{fused}.", [Concatenate(dim=0)])
        for fused, parts in FUSED.items()
    ],
    overwrite=True,
)
