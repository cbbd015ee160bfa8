"""Sliding-window attention with RoPE, ALiBi or no positions, grouped heads and a softcap."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from flash_stu.errors import UserError
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.layers.linear import DepthScaledLinear, FusedLinear
from flash_stu.model.layers.mixer import Mixer
from flash_stu.model.layers.state import WindowState
from flash_stu.ops import backends
from flash_stu.ops.attention.choice import shared_band, sliding_window_attention
from flash_stu.ops.attention.dense import attend_to_window, attention_weights
from flash_stu.ops.positions import alibi_slopes, rotate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# what transformers calls our back ends
_IMPLEMENTATIONS = {
    "eager": "banded",
    "sdpa": "sdpa",
    "flex_attention": "flex_attention",
    "flash_attention_2": "flash_attn",
}


def check_implementation(name: str | None, config: FlashSTUConfig) -> None:
    """Check an attn_implementation of transformers; None leaves the choice to attention_backend.

    Raises:
        UserError: for one that there is none of here, or that this model cannot use.
    """
    if name is None:
        return
    if name not in _IMPLEMENTATIONS:
        allowed = ", ".join(_IMPLEMENTATIONS)
        raise UserError(f'Specified `attn_implementation="{name}"` is not supported; allowed: {allowed}, or None')
    if name == "sdpa" and config.attn_logit_softcapping is not None:
        raise UserError(
            f"attn_implementation is 'sdpa', which has no softcap; this model's attn_logit_softcapping is "
            f"{config.attn_logit_softcapping}: use another, or None"
        )
    if name in ("flex_attention", "flash_attention_2"):
        backends.require("attention", _IMPLEMENTATIONS[name])


class AttentionWeights(nn.Module):
    """The weights of an attention layer, where somebody wants to look at them.

    A module, so that transformers' hooks find its results.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        columns: int,
        key_mask: torch.Tensor | None,
        options: dict[str, Any],
        dropout: float,
    ) -> torch.Tensor:
        """Returns (batch, heads, queries, columns), the keys last; see flash_stu.ops.attention.dense."""
        weights = attention_weights(query, key, key_mask=key_mask, **options)
        weights = functional.dropout(weights, dropout) if dropout else weights
        return functional.pad(weights, (columns - key.shape[2], 0))


class SlidingWindowAttention(Mixer):
    """Self-attention over the last `sliding_window` tokens: (batch, length, hidden_size) to the same.

    In a bidirectional model a token also sees as many after it, in whole sequences only.

    Args:
        config: hidden_size, num_attention_heads, num_key_value_heads, sliding_window, position_embedding, alibi_scale,
            attn_logit_softcapping, dropout, bias, bidirectional and attention_backend are read.

    Source: as for flash_stu.ops.attention.choice.
    """

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or self.heads
        self.head_dim = config.hidden_size // self.heads
        self.window = config.sliding_window
        self.causal = not config.bidirectional
        self.softcap = config.attn_logit_softcapping
        self.alibi_scale = config.alibi_scale if config.position_embedding == "alibi" else None
        self.dropout = config.dropout
        inner = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        self.qkv_proj = FusedLinear("qkv_proj", config.hidden_size, (inner, keys, keys), config.bias)
        self.o_proj = DepthScaledLinear(inner, config.hidden_size, bias=config.bias)
        self.weights = AttentionWeights()

    @property
    def backend(self) -> str:
        """The attention back end in use: what attn_implementation asks for, else config.attention_backend."""
        name = self.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
        return self.config.attention_backend if name is None else _IMPLEMENTATIONS[name]

    def band(self, x: torch.Tensor) -> "BlockMask | None":
        """Returns what attention layers share of flex_attention over whole sequences x (batch, length, channels)."""
        return shared_band(self.backend, x.shape[1], self.window, x.device) if self.causal else None

    def whole(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Attend over a whole sequence, or a part of one after the keys and values of a window before it.

        In a part the queries whose windows lie in it come first: the keys and values before it arrive meanwhile, and in
        the backward pass their gradients leave first.
        """
        query, key, value = self._heads(x, context)
        if context.past is None:
            return self.o_proj(self._attend(query, key, value, context.mask, context))
        halo = context.past.begin_halo(torch.cat([key, value], dim=-1).transpose(1, 2), self.window - 1)
        first = min(self.window - 1, x.shape[1])
        inside = [self._attend(query[:, :, first:], key, value, None, context)] if first < x.shape[1] else []
        past_key, past_value = halo.wait().transpose(1, 2).chunk(2, dim=-1)
        key = torch.cat([past_key, key[:, :, :first]], dim=2)
        value = torch.cat([past_value, value[:, :, :first]], dim=2)
        across = self._attend(query[:, :, :first], key, value, None, context)
        return self.o_proj(torch.cat([across, *inside], dim=1))

    def prefill(
        self, x: torch.Tensor, context: SequenceContext, state: WindowState | None = None
    ) -> tuple[torch.Tensor, WindowState]:
        """Attend over a sequence after the keys and values in `state`; only a window of them is kept."""
        query, key, value = self._heads(x, context)
        seen = context.tokens_before()
        end = seen + x.shape[1]
        if state is not None:
            past_key, past_value = state.in_order(seen)
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        y = self._attend(query, key, value, context.real(end - key.shape[2], end), context)
        return self.o_proj(y), WindowState.of(key, value, end, self.window)

    def step(self, x: torch.Tensor, context: SequenceContext, state: WindowState) -> tuple[torch.Tensor, WindowState]:
        """One more token x (batch, 1, channels): the cost is the window's. The ring in `state` is changed in place."""
        query, key, value = self._heads(x, context)
        ring = context.step_ring()
        state.put(key, value, ring.slot)
        if context.weights is not None:
            end = context.tokens_before() + 1
            key, value = state.in_order(end)
            mask = context.real(end - key.shape[2], end)
            return self.o_proj(self._attend(query, key, value, mask, context)), state
        slopes = self._slopes(x.device)
        bias = None if slopes is None else -slopes[:, None] * ring.distance()
        key, value = state.keys[:, :, : ring.filled], state.values[:, :, : ring.filled]
        y = attend_to_window(query, key, value, ring.visible, self.softcap, bias)
        return self.o_proj(y.flatten(1)[:, None]), state

    def _heads(self, x: torch.Tensor, context: SequenceContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned, value = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if context.rotary is not None:
            turned = rotate(turned, *context.rotary)
        query, key = turned.split([self.heads, self.kv_heads], dim=1)
        return query, key, value

    def _slopes(self, device: torch.device) -> torch.Tensor | None:
        return None if self.alibi_scale is None else alibi_slopes(self.heads, self.alibi_scale, device)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        context: SequenceContext,
    ) -> torch.Tensor:
        """Returns (batch, queries, heads * head_dim)."""
        options = {
            "window": self.window,
            "softcap": self.softcap,
            "slopes": self._slopes(query.device),
            "causal": self.causal,
        }
        dropout = self.dropout if self.training else 0.0
        if context.weights is not None:
            length = query.shape[2]  # one step: its own place in the window is taken; else the window comes before
            past = min(context.weights - length, self.window if length > 1 else self.window - 1)
            weights = self.weights(query, key, past + length, mask, options, dropout)[..., -key.shape[2] :]
            y = weights @ value.repeat_interleave(self.heads // self.kv_heads, dim=1)
        else:
            y = sliding_window_attention(
                query, key, value, key_mask=mask, dropout=dropout, backend=self.backend, band=context.band, **options
            )
        return y.transpose(1, 2).flatten(2)
