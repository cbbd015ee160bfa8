"""The model: blocks of a sequence mixer and an MLP, as transformers classes.

`config.layer_types` decides each block's mixer, so the Transformer baseline is a configuration, and
`config.lds_state_dim` whether its "linear_attention" blocks are STU or distilled LDS layers. The model knows nothing of
parallelism, training or distillation; those act on it from outside.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from flash_stu.errors import UserError
from flash_stu.files import MANIFEST
from flash_stu.filters.spectral import spectral_filters
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers import LDS, STU, GatedMLP, InputOutputTaps, SlidingWindowAttention
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.layers.exact import SpectralFilters
from flash_stu.model.layers.linear import DepthScaledLinear
from flash_stu.model.padding import read_mask
from flash_stu.model.saving import add_remote_code
from flash_stu.ops.cross_entropy import linear_cross_entropy
from flash_stu.ops.positions import rotary_angles

# patterns; a distilled model that is loaded to be trained, or a model that gets taps, has none of them
OPTIONAL_TENSORS = [r"_change$", r"\.taps\.M_[uy]$"]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        config: the model's configuration.
        kind: "linear_attention" or "sliding_attention".
    """

    def __init__(self, config: FlashSTUConfig, kind: str) -> None:
        super().__init__()
        linear = STU if config.lds_state_dim is None else LDS
        mixer = linear if kind == "linear_attention" else SlidingWindowAttention
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = mixer(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, context: SequenceContext, cache: FlashSTUCache | None = None, index: int = 0
    ) -> torch.Tensor:
        """Run over x (batch, length, hidden_size); with a cache, after the tokens it has seen.

        Args:
            x: residual stream.
            context: what all layers share in this call.
            cache: read and written at `index` if given.
            index: this block's place in the model.
        """
        mixed = self.mixer_norm(x)
        if cache is None:
            mixed = self.mixer(mixed, context)
        elif cache.states[index] is not None and x.shape[1] == 1:
            mixed, cache.states[index] = self.mixer.step(mixed, context, cache.states[index])
        else:
            mixed, cache.states[index] = self.mixer.prefill(mixed, context, cache.states[index])
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class FlashSTUPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving shared by the two model classes."""

    config: FlashSTUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _is_stateful = True
    # see flash_stu.model.layers.exact
    _keep_in_fp32_modules_strict = {"readout", "readout_change", "decay", "log_rate_change", "phi", "M_y"}
    _keys_to_ignore_on_load_missing = OPTIONAL_TENSORS

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called once for every module that holds tensors of its own, so no factor can accumulate.
        if isinstance(module, DepthScaledLinear):
            _draw(module, (2 * self.config.num_hidden_layers * module.in_features) ** -0.5)
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
        return name.rpartition(".")[2] in (self._keep_in_fp32_modules_strict or ())

    def may_be_missing(self, name: str) -> bool:
        """Returns whether a stored model may lack a tensor, which is zero then."""
        return any(re.search(pattern, name) for pattern in self._keys_to_ignore_on_load_missing or ())

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the directory also loads where nothing of ours is imported (trust_remote_code=True)."""
        Path(save_directory, MANIFEST).unlink(missing_ok=True)  # of what this program had written there before
        super().save_pretrained(save_directory, *args, **kwargs)
        add_remote_code(save_directory)


def _draw(linear: nn.Linear, std: float) -> None:
    hf_init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        hf_init.zeros_(linear.bias)


class FlashSTUModel(FlashSTUPreTrainedModel):
    """Token ids to hidden states (batch, length, hidden_size), after the final norm."""

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.filters = SpectralFilters(config.max_position_embeddings, config.num_filters) if config.uses_stu else None
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.block_types)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: FlashSTUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: (batch, length); or inputs_embeds instead.
            attention_mask: (batch, tokens in the cache + length), 0 at padding, which may be anywhere in the first call
                of a cache and nowhere after it; see flash_stu.model.padding.
            position_ids: (batch, length); by default counted from the cache.
            past_key_values: cache to continue from.
            inputs_embeds: (batch, length, hidden_size).
            use_cache: return a cache; by default only if one was given.

        Raises:
            UserError: for a sequence longer than the spectral filters of a model with STU layers, or an invalid mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("the model takes exactly one of input_ids and inputs_embeds")
        cache = past_key_values
        if cache is None and use_cache:
            cache = FlashSTUCache(len(self.layers))
        if cache is not None and not isinstance(cache, FlashSTUCache):
            raise UserError(f"past_key_values is a {type(cache).__name__}; a Flash STU model takes a FlashSTUCache")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if cache is None else cache.seq_length
        self._check_length(past + x.shape[1])
        alignment = read_mask(attention_mask, x.shape[0], x.shape[1], cache)
        if alignment is not None:
            x = alignment.align(x)
            position_ids = None if position_ids is None else alignment.align(position_ids)
        context = self.context(x, past, None if alignment is None else alignment.mask, position_ids)

        x = self.dropout(x)
        for index, block in enumerate(self.layers):
            x = block(x, context, cache, index)
        if cache is not None:
            cache.seq_length = past + x.shape[1]
        x = self.norm(x) if alignment is None else alignment.restore(self.norm(x))
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)

    def _check_length(self, length: int) -> None:
        if self.filters is not None and length > self.config.max_position_embeddings:
            raise UserError(
                f"the sequence has {length} tokens; the spectral filters end at {self.config.max_position_embeddings} "
                f"(max_position_embeddings); distill the model to go further"
            )

    def context(
        self, x: torch.Tensor, past: int, mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> SequenceContext:
        """Returns what all layers share in one call: filters, rotary angles and mask.

        Args:
            x: embeddings, (batch, length, hidden_size).
            past: tokens before them.
            mask: (batch, length), False at padding; None if there is none.
            position_ids: (batch or 1, length); None for the tokens after `past`.
        """
        config, rotary = self.config, None
        if config.position_embedding == "rope" and "sliding_attention" in config.block_types:
            if position_ids is None:
                position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
            head_dim = config.hidden_size // config.num_attention_heads
            rotary = rotary_angles(position_ids, head_dim, config.rope_theta)
        return SequenceContext(None if self.filters is None else self.filters.phi, rotary, mask)


class FlashSTUForCausalLM(FlashSTUPreTrainedModel, GenerationMixin):
    """The language model: hidden states to next-token logits, loss and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__(config)
        self.model = FlashSTUModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: FlashSTUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss if labels are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: see FlashSTUModel.
            labels: (batch, length), aligned with input_ids and shifted here; -100 does not count.
            shift_labels: (batch, length), the next token of every position, already shifted.
            logits_to_keep: project only the last so many positions (0: all), or the positions in a 1-D tensor.
            skip_logits: return no logits, only the loss: what training wants with a large vocabulary.

        Returns:
            loss: mean cross entropy in nats, float32; logits (batch, kept positions, vocab_size); the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        hidden = outputs.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        loss = logits = None
        if shift_labels is not None:
            loss = linear_cross_entropy(
                hidden, self.lm_head.weight, shift_labels, self.lm_head.bias, self.config.loss_backend
            )
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> bool:
        # generate() would build transformers' own cache, whose layers cannot hold our states
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = FlashSTUCache(self.config.num_hidden_layers)
            return True
        return False

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # transformers counts on from the last column, where it gives padding the position 0
        mask = model_kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


AutoModel.register(FlashSTUConfig, FlashSTUModel, exist_ok=True)
AutoModelForCausalLM.register(FlashSTUConfig, FlashSTUForCausalLM, exist_ok=True)
