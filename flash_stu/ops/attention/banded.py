"""Causal sliding-window attention in plain PyTorch: tile by tile, in memory linear in the length.

A tile is a run of queries of some heads against the band of keys that they see. Its scores stay in the caches of a CPU
(a GPU gets large tiles, so that few kernels are launched) and are forgotten: the output and one number per query, the
log-sum-exp of its scores, are kept, from which the backward pass computes the weights again:

    p = exp(s - lse),   ds = p (dy v^T - sum(dy y)),   dq = ds k,   dk = ds^T q,   dv = p^T dy

Source: Dao et al. 2022, FlashAttention (arXiv 2205.14135), algorithm 4, for the backward pass.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from flash_stu.ops.kept import kept_op

_BITS = math.log2(math.e)  # in a unit of the exponential; where they underflow, exp is 100 times slower, exp2 is not
_ELEMENTS = {False: 2**18, True: 2**26}  # scores in a tile, on a CPU and on a GPU
_ROWS = {False: (16, 64), True: (64, 512)}  # least and most queries of a head in a tile
_ALIGNMENT = 16  # keys; rows of scores in multiples of it are reduced fastest
_FINITE = 1e30  # instead of minus the largest score where a query sees no key: its weights are 0, not NaN


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """As `sliding_window_attention`, with its arguments: the reference for the other back ends.

    The result is in the query's dtype, whatever autocast says; the softmax is in float32, in float64 for float64
    queries. Slopes get no gradient, and a query without keys gets zeros. In memory the heads of a token are side by
    side.
    """
    if query.numel() == 0:
        return query.clone()
    # drawn out here, so that recomputing a checkpointed layer draws the same
    seed = torch.randint(2**62, ()) if dropout else None
    return torch.ops.flash_stu.banded_attention(query, key, value, window, softcap, slopes, key_mask, dropout, seed)[0]


class _Tile(NamedTuple):
    """Which scores are computed together.

    Attributes:
        heads: of all the key heads in the batch.
        rows: queries.
        band: keys that at least one of the queries sees.
        clipped: how many more keys the first query would see if the sequence had begun earlier.
    """

    heads: slice
    rows: slice
    band: slice
    clipped: int


class _Band:
    """The operands of a call, cut into tiles. Query heads that share keys are further rows of a tile.

    Scores are in bits, that is, log2(e) times what they are elsewhere.

    Attributes:
        query: scaled, so that its products with keys are scores / unit, (batch * kv_heads, group, queries, head_dim).
        key, value: (batch * kv_heads, keys, head_dim).
        unit: the softcap in bits; 1 without one.
        wide: the dtype of everything but the factors of products.
        tiles: all _Tiles, in the order in which forward and backward pass go through them.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int,
        softcap: float | None,
        slopes: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        dropout: float,
        seed: torch.Tensor | None,
    ) -> None:
        batch, heads, queries, head_dim = query.shape
        kv_heads, keys = key.shape[1], key.shape[2]
        device, on_gpu = query.device, query.is_cuda
        window = min(window, keys)
        self.group = heads // kv_heads
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.factor = query.dtype if on_gpu else self.wide  # half precision is fast on tensor cores only
        self.softcap = softcap
        self.unit = _BITS * softcap if softcap else 1.0
        self.scale = head_dim**-0.5
        self.query_scale = self.scale * _BITS / self.unit
        scaled = query.new_empty(query.shape, dtype=self.factor)  # scaled and made contiguous at once
        torch.mul(query.to(self.factor), self.query_scale, out=scaled)
        self.query = self.by_key_head(scaled)
        self.key, self.value = (t.flatten(0, 1).to(self.factor) for t in (key, value))

        least, most = _ROWS[on_gpu]
        block = _ELEMENTS[on_gpu] // (self.group * (most + window))
        block = min(queries, max(least, min(block // _ALIGNMENT * _ALIGNMENT, most)))
        self.slack = -(block + window - 1) % _ALIGNMENT  # keys in a band before those of its first query
        reach = window + self.slack
        height = self.group * block
        self.tiles = list(_tiles(batch * kv_heads, height, block, queries, keys, reach, _ELEMENTS[on_gpu]))
        hidden = torch.full((block, block + self.slack), -torch.inf, dtype=self.wide, device=device)
        self.later = hidden[:, :block].triu(1)
        self.too_far = hidden.tril_(self.slack - 1)
        self.slopes = self.padding = None
        if slopes is not None:
            self.slopes = (-_BITS * slopes.to(self.wide)).view(kv_heads, self.group, 1, 1).repeat(batch, 1, 1, 1)
            rows = torch.arange(block, device=device)[:, None] + reach - 1
            self.distance = (rows - torch.arange(block + reach - 1, device=device)).to(self.wide)
        if key_mask is not None:
            padding = torch.where(key_mask.bool(), 0.0, -torch.inf).to(self.wide)
            self.padding = padding.repeat_interleave(kv_heads, dim=0)[:, None]
        self.kept = 1 - dropout
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(int(seed))

    def by_key_head(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, queries, head_dim) to (batch * kv_heads, group, queries, head_dim), ready for products."""
        return x.reshape(-1, self.group, *x.shape[2:]).to(self.factor)

    def scratch(self, number: int) -> list[torch.Tensor]:
        """Flat memory for the largest tile, `number` times: used again and again, it stays in the cache."""
        size = max(_length(t.heads) * _length(t.rows) * _length(t.band) for t in self.tiles) * self.group
        return [self.key.new_empty(size, dtype=self.wide) for _ in range(number)]

    def scores(self, tile: _Tile, memory: torch.Tensor) -> torch.Tensor:
        """Capped scores / unit, of invisible keys too: (heads, group * rows, band)."""
        rows = self.query[tile.heads, :, tile.rows].flatten(1, 2)
        scores = _product(rows, self.key[tile.heads, tile.band].mT, memory)
        return scores if self.softcap is None else scores.tanh_()

    def hide(self, scores: torch.Tensor, tile: _Tile, unit: float) -> torch.Tensor:
        """Add to scores / unit, in place, what depends on positions only: -inf at invisible keys, and the slopes."""
        rows, columns = _length(tile.rows), _length(tile.band)
        by_head = scores.view(len(scores), self.group, rows, columns)
        if self.slopes is not None:
            distance = self.distance[:rows, tile.clipped : tile.clipped + columns]
            by_head.addcmul_(distance, self.slopes[tile.heads] / unit)
        if self.padding is not None:
            scores.add_(self.padding[tile.heads, :, tile.band])
        by_head[..., -rows:].add_(self.later[:rows, :rows])
        if far := max(0, rows - 1 + self.slack - tile.clipped):
            by_head[..., :far].add_(self.too_far[:rows, tile.clipped : tile.clipped + far])
        return scores

    def raise_two_to(self, scores: torch.Tensor) -> torch.Tensor:
        """exp2 in place."""
        if self.slopes is not None:  # they make the weights of far keys denormal, and products with those are slow
            torch.threshold_(scores, math.log2(torch.finfo(self.wide).tiny), -torch.inf)
        return scores.exp2_()

    def drop(self, weights: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """0 where a weight is dropped, else 1; of the tiles in order."""
        return _shaped(memory, *weights.shape).bernoulli_(self.kept, generator=self.generator)


def _tiles(heads: int, height: int, block: int, queries: int, keys: int, reach: int, elements: int) -> Iterator[_Tile]:
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        past = keys - queries
        first = past + start + 1 - reach
        band = slice(max(0, first), past + stop)
        parts = -(-heads // max(1, elements // (height * _length(band))))
        size = -(-heads // parts)
        for head in range(0, heads, size):
            yield _Tile(slice(head, min(head + size, heads)), slice(start, stop), band, band.start - first)


def _length(part: slice) -> int:
    return part.stop - part.start


def _shaped(memory: torch.Tensor, *shape: int) -> torch.Tensor:
    """The beginning of flat memory as a tensor."""
    return memory[: math.prod(shape)].view(shape)


def _product(a: torch.Tensor, b: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """a @ b in the dtype of `memory`, which holds it; like a and b three-dimensional."""
    out = _shaped(memory, len(a), a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=out) if out.dtype == a.dtype else out.copy_(torch.bmm(a, b))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


@kept_op("flash_stu::banded_attention")
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    softcap: float | None,
    slopes: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and the log-sum-exp of every query's scores, (batch, heads, queries)."""
    with torch.autocast(query.device.type, enabled=False):
        band = _Band(query, key, value, window, softcap, slopes, key_mask, dropout, seed)
        y = torch.empty_like(band.query)
        lse = y.new_empty((*y.shape[:3], 1), dtype=band.wide)
        memory = band.scratch(2 if dropout else 1)
        for tile in band.tiles:
            scores = band.hide(band.scores(tile, memory[0]), tile, band.unit)
            shift = (scores.amax(-1, keepdim=True) * -band.unit).clamp_(max=_FINITE)
            weights = band.raise_two_to(torch.add(shift, scores, alpha=band.unit, out=scores))
            total = weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(band.wide).tiny)
            if dropout:
                weights *= band.drop(weights, memory[1])
            rows = (len(weights), band.group, -1)
            lse[tile.heads, :, tile.rows] = (total.log2() - shift).view(*rows, 1)
            total *= band.kept
            if band.factor == band.wide:
                outputs = torch.bmm(weights, band.value[tile.heads, tile.band]).div_(total)
            else:  # sums of weights that are not normalised may be beyond fp16
                weights = weights.div_(total).to(band.factor)
                outputs = torch.bmm(weights, band.value[tile.heads, tile.band])
            y[tile.heads, :, tile.rows] = outputs.unflatten(1, rows[1:])
        result = _empty_output(query)
        return result.copy_(y.view(query.shape)), lse.view(query.shape[:3])


def _empty_output(query: torch.Tensor) -> torch.Tensor:
    """Returns (batch, heads, queries, head_dim), a token's heads side by side, as the output projection reads them."""
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_output(query), query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("flash_stu::banded_attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    softcap: float | None,
    slopes: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    with torch.autocast(query.device.type, enabled=False):
        band = _Band(query, key, value, window, softcap, slopes, key_mask, dropout, seed)
        wide = band.wide
        mean = (grad.to(wide) * y).sum(-1).view(*band.query.shape[:3], 1)
        lse = lse.view(mean.shape)
        grad = band.by_key_head(grad) / band.kept
        to_query = torch.empty_like(band.query)
        to_key, to_value = (torch.zeros_like(t, dtype=wide) for t in (band.key, band.value))
        memory = band.scratch(4 if dropout else 3)
        for tile in band.tiles:
            heads, rows, columns = tile.heads, tile.rows, tile.band
            cotangent, near = grad[heads, :, rows].flatten(1, 2), band.key[heads, columns]

            scores = band.scores(tile, memory[0])
            weights = _shaped(memory[1], *scores.shape)
            torch.add(-lse[heads, :, rows].flatten(1, 2), scores, alpha=band.unit, out=weights)
            band.raise_two_to(band.hide(weights, tile, 1.0))
            to_scores = _product(cotangent, band.value[heads, columns].mT, memory[2])
            used = weights
            if dropout:
                keep = band.drop(weights, memory[3])
                to_scores *= keep
                used = keep.mul_(weights)
            _add_product(to_value[heads, columns], used.to(band.factor).mT, cotangent)

            to_scores.sub_(mean[heads, :, rows].flatten(1, 2)).mul_(weights)
            if softcap is not None:
                torch.ops.aten.tanh_backward.grad_input(to_scores, scores, grad_input=to_scores)
            to_scores = to_scores.to(band.factor)
            _add_product(to_key[heads, columns], to_scores.mT, band.query[heads, :, rows].flatten(1, 2))
            to_query[heads, :, rows] = torch.bmm(to_scores, near).unflatten(1, (band.group, -1))
        to_query.mul_(band.scale)
        to_key.mul_(band.scale / band.query_scale)
        return _as(to_query, query), _as(to_key, key), _as(to_value, value)


def _as(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return grad.view(like.shape).to(like.dtype)


@_attention_backward.register_fake
def _(*operands: Any) -> tuple[torch.Tensor, ...]:
    query_key_value = operands[3:6]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in query_key_value)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, ctx.window, ctx.softcap, slopes, key_mask, ctx.dropout, seed = inputs
    ctx.save_for_backward(*output, query, key, value, slopes, key_mask, seed)


def _differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, slopes, key_mask, seed = ctx.saved_tensors
    grads = torch.ops.flash_stu.banded_attention_backward(
        grad, *tensors, ctx.window, ctx.softcap, slopes, key_mask, ctx.dropout, seed
    )
    return *grads, *[None] * 6


_attention.register_autograd(_differentiate, setup_context=_save_inputs)
