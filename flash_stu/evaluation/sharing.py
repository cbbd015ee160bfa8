"""Inputs that begin alike: which beginnings are worth running once, for all that follow.

The endings offered for one context begin with that context, and the questions of one subject with the same worked
examples. `plan_families` finds the beginnings by which most tokens are saved, each input belonging to one family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

_SHORTEST_PREFIX = 16  # tokens; below, carrying on from a state costs more than it saves
_SMALL_FAMILY = 16  # inputs; up to here prefixes are rounded down, so that many families have equally long ones
_LARGEST_FAMILY = 256  # inputs; larger ones are divided, so that several processes can share their work


@dataclass(frozen=True)
class Family:
    """Inputs with a common beginning."""

    prefix: int  # how many tokens at the beginning of every member are run once; 0 for a single input
    members: tuple[int, ...]  # indices of the inputs

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that must be run for inputs of these lengths, by index."""
        return self.prefix + sum(lengths[index] - self.prefix for index in self.members)


def plan_families(inputs: Sequence[Sequence[int]], shareable: Sequence[int]) -> list[Family]:
    """Divide inputs into families such that few tokens must be run.

    Common beginnings form a tree. From its leaves up, every node may make a family of the inputs below it that have
    none, and of families whose beginning is not worth having been run apart.

    Args:
        inputs: distinct token sequences.
        shareable: per input, how many of its first tokens may be run with others; fewer than its length.

    Returns:
        families that hold every input once, in an order that follows from the inputs alone.
    """
    # big-endian bytes sort and compare like the token ids, only faster
    keys = [np.array(ids[:count], dtype=">u4") for ids, count in zip(inputs, shareable, strict=True)]
    texts = [key.tobytes() for key in keys]
    order = sorted(range(len(inputs)), key=texts.__getitem__)
    families, stack = [], []
    for place, index in enumerate(order):
        last = place + 1 == len(order)
        depth = 0 if last else _common(keys[index], keys[order[place + 1]])
        node = _Node(depth=len(keys[index]), loose=[index], families=[])
        while stack and stack[-1].depth > depth:
            node = stack.pop().take(node).close()
        if stack and stack[-1].depth == depth:
            stack[-1].take(node)
        else:
            stack.append(_Node(depth, [], []).take(node))
    for node in stack:  # only the root, of depth 0, is left
        families += [Family(0, (index,)) for index in node.loose]
        for prefix, members in node.families:
            for start in range(0, len(members), _LARGEST_FAMILY):
                families.append(Family(prefix, tuple(members[start : start + _LARGEST_FAMILY])))
    return families


def deal(families: Sequence[Family], lengths: Sequence[int], hands: int) -> list[list[Family]]:
    """Give families to processes so that each has about as many tokens to run: the largest first, to who has least."""
    piles: list[list[Family]] = [[] for _ in range(hands)]
    loads = [0] * hands
    costs = sorted(((family.tokens(lengths), family) for family in families), key=itemgetter(0), reverse=True)
    for cost, family in costs:
        hand = loads.index(min(loads))
        piles[hand].append(family)
        loads[hand] += cost
    return piles


@dataclass
class _Node:
    """Inputs that share their first `depth` tokens."""

    depth: int
    loose: list[int]  # inputs in no family yet
    families: list[tuple[int, list[int]]]  # (prefix, inputs) of the others

    def take(self, child: "_Node") -> "_Node":
        self.loose += child.loose
        self.families += child.families
        return self

    def close(self) -> "_Node":
        """Make a family if that saves tokens."""
        joining = [f for f in self.families if len(f[1]) * self.depth > (len(f[1]) - 1) * f[0]]
        members = [*self.loose, *(index for _, some in joining for index in some)]
        prefix = _rounded(self.depth) if len(members) <= _SMALL_FAMILY else self.depth
        saved = (len(members) - 1) * prefix - sum((len(some) - 1) * own for own, some in joining)
        if prefix >= _SHORTEST_PREFIX and saved > 0:
            self.families = [f for f in self.families if f not in joining] + [(prefix, members)]
            self.loose = []
        return self


def _rounded(length: int) -> int:
    """The length with its five leading binary digits only: at most 1/16 less."""
    unit = 1 << max(0, length.bit_length() - 5)
    return length - length % unit


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
