"""The ring of the window: any split of a sequence into prefills and steps gives what one forward pass gives."""

import math

import pytest
import torch

from flash_stu.model.layers import SlidingWindowAttention
from flash_stu.model.layers.context import Ring, SequenceContext
from flash_stu.model.layers.state import WindowState
from flash_stu.ops.positions import rotary_angles

VARIANTS = [
    {"position_embedding": "rope"},
    {"position_embedding": "alibi", "num_key_value_heads": 2},
    {"position_embedding": "none", "attn_logit_softcapping": None, "num_key_value_heads": 1},
]


def make(tiny_config, **changes):
    config = tiny_config(**changes)
    torch.manual_seed(1)
    layer = SlidingWindowAttention(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return config, layer


def context(config, start, end, mask=None):
    angles = rotary_angles(torch.arange(start, end)[None], 8, config.rope_theta)
    rotary = angles if config.position_embedding == "rope" else None
    padding = None if mask is None else (~mask).sum(dim=1, keepdim=True)
    ring = Ring.at(start, padding, config.sliding_window, "cpu")
    mask = None if mask is None else mask[:, start:end]
    return SequenceContext(rotary=rotary, mask=mask, seen=start, padding=padding, ring=ring)


def in_pieces(config, layer, x, ends, mask=None):
    """Run over x in pieces that end at `ends`; pieces of one token after the first are steps."""
    state, parts, start = None, [], 0
    for end in ends:
        run = layer.step if state is not None and end == start + 1 else layer.prefill
        y, state = run(x[:, start:end], context(config, start, end, mask), state)
        parts.append(y)
        start = end
    return torch.cat(parts, dim=1), state


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("window", [1, 2, 7, 50])  # 50: longer than the sequence
@pytest.mark.parametrize(
    "ends", [range(1, 32), [3, *range(4, 32)], [20, *range(21, 32)], [2, 3, 9, 10, 11, 29, 30, 31], [7, 14, 15, 31]]
)
@torch.no_grad()
def test_pieces_give_the_whole(tiny_config, changes, window, ends):
    config, layer = make(tiny_config, sliding_window=window, **changes)
    x = torch.randn(2, 31, 32)
    y, state = in_pieces(config, layer, x, ends)
    torch.testing.assert_close(y, layer(x, context(config, 0, 31)), atol=2e-5, rtol=1e-5)
    assert state.keys.shape == (2, config.num_key_value_heads, window, 8)


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_left_padding(tiny_config, changes):
    config, layer = make(tiny_config, **changes)
    x = torch.randn(3, 31, 32)
    mask = torch.ones(3, 31, dtype=torch.bool)
    mask[1, :3], mask[2, :13] = False, False  # one row's padding ends inside the first piece, one's in a later one
    for ends in ([5, *range(6, 32)], [16, 17, 18, 25, *range(26, 32)]):
        y, _ = in_pieces(config, layer, x, ends, mask)
        for row, first in ((0, 0), (1, 3), (2, 13)):
            alone = layer(x[row : row + 1, first:], context(config, first, 31))
            torch.testing.assert_close(y[row : row + 1, first:], alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_memory_is_the_window(tiny_config):
    config, layer = make(tiny_config)
    _, state = layer.prefill(torch.randn(2, 3, 32), context(config, 0, 3))
    place = state.pairs.data_ptr()
    for t in range(3, 40):
        _, state = layer.step(torch.randn(2, 1, 32), context(config, t, t + 1), state)
    assert state.pairs.data_ptr() == place


@torch.no_grad()
def test_select_copies_rows(tiny_config):
    config, layer = make(tiny_config)
    x = torch.randn(2, 12, 32)
    _, state = in_pieces(config, layer, x, [5, *range(6, 13)])
    chosen = state.select(torch.tensor([1, 1, 0]))
    new = torch.randn(3, 1, 32)
    y, _ = layer.step(new, context(config, 12, 13), chosen)
    whole = layer(torch.cat([x[[1, 1, 0]], new], dim=1), context(config, 0, 13))[:, -1:]
    torch.testing.assert_close(y, whole, atol=2e-5, rtol=1e-5)
    again, _ = layer.step(new[1:], context(config, 12, 13), state.select(torch.tensor([1, 0])))
    torch.testing.assert_close(again, whole[1:], atol=2e-5, rtol=1e-5)  # the first step left `state` alone


def test_ring_order():
    kept = torch.arange(10.0).view(1, 1, 10, 1)
    state = WindowState.of(kept, -kept, 10, window=4)
    assert state.keys.flatten().tolist() == [8, 9, 6, 7]
    state.put(torch.full((1, 1, 1, 1), 10.0), torch.full((1, 1, 1, 1), -10.0), torch.tensor([10 % 4]))
    keys, values = state.in_order(11)
    assert keys.flatten().tolist() == [7, 8, 9, 10]
    assert torch.equal(values, -keys)
    short = WindowState.of(kept[:, :, :3], kept[:, :, :3], 3, window=6)
    assert short.in_order(3)[0].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("past", [0, 1, 3, 4, 5, 11])
def test_what_a_step_sees(past):
    """A tensor of the place gives what a number does, whose slots are only those that hold something."""
    padding = torch.tensor([[0], [3]])
    for rows in (None, padding):
        numbers, moved = (Ring.at(place, rows, 4, "cpu") for place in (past, torch.tensor([past])))
        places = [max(p for p in range(-4, past + 1) if p % 4 == slot) for slot in range(4)]
        assert numbers.slot.item() == moved.slot.item() == past % 4 == places.index(past)
        assert moved.distance().tolist() == [past - place for place in places]
        assert numbers.distance().tolist() == moved.distance()[: numbers.filled].tolist()
        expected = [[place >= first for place in places] for first in ((0,) if rows is None else (0, 3))]
        assert moved.visible.tolist() == expected
        assert not any(any(row[numbers.filled :]) for row in expected)
        if rows is None:
            assert numbers.visible is None and all(expected[0][: numbers.filled])
        else:
            assert numbers.visible.tolist() == [row[: numbers.filled] for row in expected]


def test_rotary_angles_are_exact_far_out():
    positions = torch.tensor([[0, 999_999, 1_000_000, 123_456_789]])
    cos, sin = rotary_angles(positions, 64, 10_000.0)
    for place, position in enumerate(positions[0].tolist()):
        for i in range(32):
            angle = position * 10_000.0 ** (-i / 32)
            assert cos[0, 0, place, i].item() == pytest.approx(math.cos(angle), abs=2e-7 + 1e-15 * position)
            assert sin[0, 0, place, 32 + i].item() == pytest.approx(math.sin(angle), abs=2e-7 + 1e-15 * position)


@torch.no_grad()
def test_attention_depends_on_distances_only_even_after_a_million_tokens(tiny_config):
    config, layer = make(tiny_config)
    x = torch.randn(1, 20, 32)
    far = context(config, 1_000_000, 1_000_020)
    torch.testing.assert_close(layer(x, far), layer(x, context(config, 0, 20)), atol=1e-5, rtol=1e-5)
