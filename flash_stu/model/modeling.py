"""The model: blocks of a sequence mixer and an MLP, as transformers classes.

`config.layer_types` decides each block's mixer, so the Transformer baseline is a configuration, and
`config.lds_state_dim` whether its "linear_attention" blocks are STU or distilled LDS layers. The model knows nothing of
parallelism, training or distillation; those act on it from outside.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from flash_stu.errors import UserError
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.keywords import RECORDED, document_numbers, refuse_unknown
from flash_stu.model.layers import SlidingWindowAttention
from flash_stu.model.layers.context import Ring, SequenceContext
from flash_stu.model.layers.documents import Documents
from flash_stu.model.layers.exact import SpectralFilters
from flash_stu.model.layers.linear import ValueEmbedding
from flash_stu.model.layers.norm import RMSNorm
from flash_stu.model.padding import read_mask, restored
from flash_stu.model.pretrained import Block, FlashSTUPreTrainedModel
from flash_stu.ops.cross_entropy.choice import linear_cross_entropy
from flash_stu.ops.parts import Part
from flash_stu.ops.positions import rotary_angles


class FlashSTUModel(FlashSTUPreTrainedModel):
    """Token ids, or numbers, to hidden states (batch, length, hidden_size), after the final norm."""

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__(config)
        if config.num_input_channels is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        else:
            self._input_embed_layer = "embed_values"  # where transformers looks for it
            self.embed_values = ValueEmbedding(config.num_input_channels, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.filters = SpectralFilters(config.max_position_embeddings, config.num_filters) if config.uses_stu else None
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.block_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attends = "sliding_attention" in config.block_types
        # read once: every attribute of transformers' configurations takes a while
        self.window = config.sliding_window if attends else None
        self.rotary_head_dim = None
        if attends and config.position_embedding == "rope":
            self.rotary_head_dim = config.hidden_size // config.num_attention_heads
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: FlashSTUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        input_values: torch.Tensor | None = None,
        **keywords: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: (batch, length); or inputs_embeds instead.
            input_values: (batch, length, num_input_channels), where the configuration has that, instead of input_ids.
            attention_mask: (batch, tokens in the cache + length), 0 at padding, which may be anywhere in the first call
                of a cache and nowhere after it; see flash_stu.model.padding.
            position_ids: (batch, length); by default counted from the cache. Where they do not count on, another
                document begins: see flash_stu.model.keywords.
            past_key_values: cache to continue from.
            inputs_embeds: (batch, length, hidden_size).
            use_cache: return a cache; by default what config.use_cache says where a model in eval mode reads rows that
                are one document each.
            keywords: cu_seq_lens_q, cu_seq_lens_k, seq_idx: documents in packed rows; output_hidden_states and
                output_attentions: see transformers. Weights of attention layers are (batch, heads, length, keys), of
                the keys in the window where there is a cache. part: a flash_stu.ops.parts.Part, where this call is
                about a part of longer sequences.

        Raises:
            UserError: for a sequence longer than the spectral filters of a model with STU layers, an invalid mask, or
                an argument that the model does not have.
        """
        part: Part | None = keywords.pop("part", None)
        refuse_unknown(keywords)
        x = self._embed(input_ids, input_values, inputs_embeds)
        cache = past_key_values
        if cache is not None and not isinstance(cache, FlashSTUCache):
            raise UserError(f"past_key_values is a {type(cache).__name__}; a Flash STU model takes a FlashSTUCache")
        past = cache.seq_length if cache is not None else part.start if part is not None else 0
        alignment = read_mask(attention_mask, x.shape[0], x.shape[1], cache)
        documents = None
        first_positions = None if position_ids is None or past else position_ids
        if (numbers := document_numbers(keywords, first_positions, x.shape[:2], alignment)) is not None:
            documents = Documents.of(numbers)
        whole = past + x.shape[1] if part is None else part.length
        if self.filters is not None:
            self._check_length(whole if documents is None else documents.longest)
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
            raise UserError("a cache cannot be used in training with gradient checkpointing: set use_cache to False")
        if self.config.bidirectional:
            _refuse_causal(bool(use_cache) or cache is not None, documents, part)
            use_cache = False
        if use_cache is None and cache is None:
            use_cache = self.config.use_cache and not self.training and documents is None and part is None
        if documents is not None and (use_cache or cache is not None):
            raise UserError("a cache holds one document a row, and this batch has more: set use_cache to False")
        if cache is None and use_cache:
            cache = FlashSTUCache(len(self.layers))
        if alignment is not None:
            if cache is not None:
                alignment.remember(cache)
            x = alignment.align(x)
            position_ids = None if position_ids is None else alignment.align(position_ids)
        context = self.context(x, past, None if alignment is None else alignment.mask, position_ids, cache)
        wanted = {name: keywords[name] for name in RECORDED if keywords.get(name) is not None}
        weights = bool(wanted.get("output_attentions", self.config.output_attentions))
        if weights and documents is not None:
            raise UserError("output_attentions is True; that is not done for several documents in a row")
        if documents is not None or weights:
            context = context._replace(documents=documents, weights=past + x.shape[1] if weights else None)
        context = context.in_part(part, cached=bool(use_cache) or cache is not None)
        if cache is None and documents is None and part is None:
            mixers = (block.mixer for block in self.layers)
            attention = next((mixer for mixer in mixers if isinstance(mixer, SlidingWindowAttention)), None)
            context = context._replace(band=None if attention is None else attention.band(x))
        outputs = self._run(self.dropout(x) if self.training else x, context, cache, return_dict=True, **wanted)
        return outputs if alignment is None else restored(outputs, alignment)

    def _embed(
        self, ids: torch.Tensor | None, values: torch.Tensor | None, embeds: torch.Tensor | None
    ) -> torch.Tensor:
        channels = self.config.num_input_channels
        kind, given, other = ("input_ids", ids, values) if channels is None else ("input_values", values, ids)
        if other is not None or (given is None) == (embeds is None):
            raise UserError(f"the model takes exactly one of {kind} and inputs_embeds")
        if embeds is not None:
            return embeds
        if ids is not None:
            return self.embed_tokens(ids)
        assert values is not None
        if values.ndim != 3 or values.shape[-1] != channels:
            raise UserError(f"input_values has shape {tuple(values.shape)}; needed: (batch, length, {channels})")
        return self.embed_values(values.to(self.embed_values.weight.dtype))

    @capture_outputs
    def _run(
        self, x: torch.Tensor, context: SequenceContext, cache: FlashSTUCache | None, **_: Any
    ) -> BaseModelOutputWithPast:
        """Run the blocks and the norm over embeddings whose padding comes first in every row."""
        for index, block in enumerate(self.layers):
            x = block(x, context, past_key_values=cache, index=index)
        if cache is not None:
            cache.seq_length += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"the sequence has {length} tokens; the spectral filters end at {self.config.max_position_embeddings} "
                f"(max_position_embeddings); distill the model to go further"
            )

    def context(
        self,
        x: torch.Tensor,
        past: int | torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: FlashSTUCache | None = None,
    ) -> SequenceContext:
        """Returns what all layers share in one call: filters, rotary angles, mask and place.

        Args:
            x: embeddings, (batch, length, hidden_size).
            past: tokens before them; in a captured step a tensor, (1,).
            mask: (batch, length), False at padding; None if there is none.
            position_ids: (batch or 1, length); None for the tokens after `past`.
            cache: what the call continues or begins; None if nothing is kept.
        """
        rotary = ring = None
        padding = None if cache is None else cache.padding
        if self.rotary_head_dim is not None:
            if position_ids is None:
                position_ids = (past + torch.arange(x.shape[1], device=x.device))[None]
            rotary = rotary_angles(position_ids, self.rotary_head_dim, self.config.rope_theta)
        if self.window is not None and cache is not None and x.shape[1] == 1:
            ring = Ring.at(past, padding, self.window, x.device)
        filters = None if self.filters is None else self.filters.phi
        return SequenceContext(filters, rotary, mask, seen=past, padding=padding, ring=ring)


def _refuse_causal(cached: bool, documents: Documents | None, part: Part | None) -> None:
    """Refuse what only a model that looks back can do."""
    wanted = {"a cache": cached, "several documents in a row": documents is not None, "parts": part is not None}
    for what, asked in wanted.items():
        if asked:
            raise UserError(f"a bidirectional model reads whole sequences, one a row: it does not go with {what}")


class FlashSTUForCausalLM(FlashSTUPreTrainedModel, GenerationMixin):
    """The language model: hidden states to next-token logits, loss and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlashSTUConfig) -> None:
        config.require_language_model()
        super().__init__(config)
        self.model = FlashSTUModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: FlashSTUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **keywords: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss if labels are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: see FlashSTUModel.
            labels: (batch, length), aligned with input_ids and shifted here; -100 does not count.
            use_cache: see FlashSTUModel; by default there is no cache where there is a loss.
            logits_to_keep: project only the last so many positions (0: all), or the positions in a 1-D tensor.
            skip_logits: return no logits, only the loss: what training wants with a large vocabulary.
            keywords: shift_labels: (batch, length), the next token of every position, instead of labels;
                num_items_in_batch: labels that count in all micro batches of a step, of which this may be one. The
                rest as in FlashSTUModel.

        Returns:
            loss: cross entropy in nats, float32, the sum over the labels that count divided by num_items_in_batch, by
                default by their number; logits (batch, kept positions, vocab_size); the cache; and what else was asked.
        """
        shift_labels = keywords.pop("shift_labels", None)
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if use_cache is None and shift_labels is not None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **keywords,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if shift_labels is not None:
            loss = linear_cross_entropy(
                hidden,
                self.lm_head.weight,
                shift_labels.to(hidden.device),
                self.lm_head.bias,
                self.config.loss_backend,
                keywords.get("num_items_in_batch"),
            )
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> bool:
        # generate() would build transformers' own cache, whose layers cannot hold our states
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UserError(f"cache_implementation is {kind!r}; a Flash STU model has one kind of cache: leave it out")
        past = model_kwargs.get("past_key_values")
        if past is not None and not isinstance(past, FlashSTUCache):
            raise UserError(f"past_key_values is a {type(past).__name__}; a Flash STU model takes a FlashSTUCache")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = FlashSTUCache(self.config.num_hidden_layers)
            return True
        return False

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise UserError("continuous batching pages keys and values; the states of a Flash STU model have no pages")

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        # transformers counts on from the last column, where it gives padding the position 0
        mask = model_kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
