"""Pathfinder: pictures of two dashed curves among shorter ones, with two dots: does one curve join them?

Every curve is a walk of dashes with gaps whose direction turns a little from dash to dash; no two come near each other.
The dots are at the ends of one long curve (label 1), or at an end of each (label 0). A network reads the picture as a
sequence of pixels, row by row.

These pictures are our own: the task is the published one, the drawing is not. At 32 x 32 long curves have `dashes`
dashes of 2.2 pixels; larger pictures have more and longer ones.

Source: Linsley et al. 2018 (arXiv 1805.08315); Tay et al. 2021, Long Range Arena (arXiv 2011.04006), section 2.5.
"""

import math
from typing import NamedTuple

import numpy as np

_TRIES = 20  # of a curve in a picture, before the picture is begun anew
_SAME_DISTANCE = 0.4  # dashes; scenes where dots of either label would not be as far apart are drawn anew
_TURNS = 8  # directions from which a dash takes the first that leads nowhere forbidden


class Style(NamedTuple):
    """How pictures are drawn; lengths in pixels.

    Attributes:
        size: pixels of a side.
        dashes: of a long curve.
        distractors: how many shorter curves, of a third of the dashes.
        dash, gap: their lengths.
        turn: standard deviation of the change of direction from dash to dash, radians.
        apart: least distance of points of different curves.
        width: of a line.
        dot: radius.
        equal_distance: the dots of either label are as far apart; otherwise those of one curve are closer, which tells
            a part of the answers.
    """

    size: int
    dashes: int
    distractors: int
    dash: float = 2.2
    gap: float = 1.6
    turn: float = 0.35
    apart: float = 2.6
    width: float = 1.0
    dot: float = 1.6
    equal_distance: bool = True


def pictures(count: int, seed: int, style: Style) -> tuple[np.ndarray, np.ndarray]:
    """Draw pictures, half of them of each label.

    Args:
        count: how many.
        seed: of the draw.
        style: how.

    Returns:
        (count, size, size), uint8; the labels, (count,), int64.
    """
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % 2)
    return np.stack([picture(draw, bool(label), style) for label in labels]), labels


def picture(draw: np.random.Generator, joined: bool, style: Style) -> np.ndarray:
    """Returns one picture, (size, size), uint8."""
    lengths = [style.dashes, style.dashes] + [max(1, style.dashes // 3)] * style.distractors
    while True:
        curves = _curves(draw, lengths, style)
        if curves is None:
            continue
        ends = np.stack([curve[[0, -1], [0, 1]] for curve in curves[:2]])  # (2 curves, 2 ends, 2)
        pairs = np.array([[a, b] for a in ends[0] for b in ends[1]])
        wanted, found = (np.linalg.norm(dots[..., 0, :] - dots[..., 1, :], axis=-1) for dots in (ends[0], pairs))
        nearest = np.abs(found - wanted).argmin()
        if not style.equal_distance:
            nearest = draw.integers(len(pairs))
        if not style.equal_distance or abs(found[nearest] - wanted) <= _SAME_DISTANCE * style.dash:
            dots = ends[0] if joined else pairs[nearest]
            return _drawn(np.concatenate(curves), dots, style)


def _curves(draw: np.random.Generator, lengths: list[int], style: Style) -> list[np.ndarray] | None:
    """Returns curves apart from each other, each (dashes, 2 ends, 2); None if there is no room for one."""
    taken = np.empty((0, 2))
    curves = []
    for dashes in lengths:
        walks = (_walk(draw, dashes, taken, style) for _ in range(_TRIES))
        curve = next((walk for walk in walks if walk is not None), None)
        if curve is None:
            return None
        curves.append(curve)
        taken = np.concatenate([taken, _points(curve)])
    return curves


def _walk(draw: np.random.Generator, dashes: int, taken: np.ndarray, style: Style) -> np.ndarray | None:
    """Returns one curve apart from the points taken; None if it ran into them, itself or the edge."""
    place, direction = draw.uniform(1, style.size - 2, 2), draw.uniform(0, 2 * math.pi)
    curve = np.empty((dashes, 2, 2))
    for number in range(dashes):
        directions = direction + draw.normal(0, style.turn, _TURNS)
        steps = np.stack([np.sin(directions), np.cos(directions)], axis=1)
        ends = place + style.dash * steps
        inside = ((ends >= 1) & (ends <= style.size - 2)).all(axis=1)
        avoided = np.concatenate([taken, _points(curve[: max(0, number - 1)])])  # a curve is near its own last dash
        if len(avoided):
            middles = place + style.dash / 2 * steps
            nearest = np.minimum(_squared(ends, avoided).min(axis=1), _squared(middles, avoided).min(axis=1))
            inside &= nearest >= style.apart**2
        if not inside.any():
            return None
        chosen = inside.argmax()
        curve[number] = place, ends[chosen]
        direction, place = directions[chosen], ends[chosen] + style.gap * steps[chosen]
    return curve


def _points(curve: np.ndarray) -> np.ndarray:
    """Returns points along the dashes, (points, 2)."""
    return np.concatenate([curve[:, 0], curve.mean(axis=1), curve[:, 1]])


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.square(a[:, None] - b).sum(axis=-1)


def _drawn(dashes: np.ndarray, dots: np.ndarray, style: Style) -> np.ndarray:
    """Returns the picture of dashes (dashes, 2 ends, 2) and dots (dots, 2), with soft edges."""
    axis = np.arange(style.size, dtype=np.float32)
    pixels = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    start, along = dashes[:, 0].astype(np.float32), (dashes[:, 1] - dashes[:, 0]).astype(np.float32)
    from_start = pixels - start
    share = np.clip((from_start * along).sum(-1) / np.square(along).sum(-1), 0, 1)
    distance = np.sqrt(np.square(from_start - share[..., None] * along).sum(-1)).min(axis=1)
    lines = np.clip(style.width / 2 + 0.5 - distance, 0, 1)
    discs = np.clip(style.dot + 0.5 - np.sqrt(np.square(pixels - dots).sum(-1)).min(axis=1), 0, 1)
    return (255 * np.maximum(0.6 * lines, discs)).astype(np.uint8).reshape(style.size, style.size)
