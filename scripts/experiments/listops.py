"""ListOps: nested lists of digits under MIN, MAX, MED (median) and SM (sum modulo 10); the answer is a digit.

    [SM 4 [MAX 1 7 2 ] 9 ]   is   0

A node is a digit with probability 3/4, at the largest depth always, and else an operator over 2 to `arguments` nodes.
Long Range Arena takes trees of 500 to 2,000 tokens, of depth 10 and up to 10 arguments. Here every answer is as
frequent as every other, where nature prefers 0 and 9: a constant answer is right one time in ten.

Source: Nangia and Bowman 2018 (arXiv 1804.06028); Tay et al. 2021, Long Range Arena (arXiv 2011.04006), section 2.1.
"""

import random
from collections.abc import Iterator
from statistics import median

import numpy as np

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
DIGITS = tuple("0123456789")
TOKENS = ("<pad>", *DIGITS, *OPERATORS, END)  # a token's id is its place
IDS = {token: number for number, token in enumerate(TOKENS)}
VALUE = 0.75  # the probability of a digit
CLASSES = 10


def sequences(
    count: int, seed: int, shortest: int = 500, longest: int = 2000, depth: int = 10, arguments: int = 10
) -> list[dict]:
    """Draw different sequences, every answer as often as every other (to one).

    Args:
        count: how many.
        seed: of the draw.
        shortest, longest: tokens of a sequence.
        depth: largest depth of a tree; the root's is 1.
        arguments: the most of an operator.

    Returns:
        "input_ids", (length,) uint8, and "labels", the answer, of each.
    """
    draw = random.Random(seed)
    room = [count // CLASSES + (digit < count % CLASSES) for digit in range(CLASSES)]
    found: list[dict] = []
    seen: set[bytes] = set()
    while len(found) < count:
        tokens = tree(draw, longest, depth, arguments)
        if not shortest <= len(tokens) <= longest:
            continue
        answer = value(tokens)
        ids = bytes(IDS[token] for token in tokens)
        if room[answer] and ids not in seen:
            room[answer] -= 1
            seen.add(ids)
            found.append({"input_ids": np.frombuffer(ids, np.uint8), "labels": answer})
    draw.shuffle(found)
    return found


def tree(draw: random.Random, longest: int, depth: int, arguments: int) -> list[str]:
    """Returns the tokens of one tree; it is given up, longer than `longest`, as soon as it is too long."""
    tokens: list[str] = []
    open_nodes = [1]  # of every operator that is open, the nodes still to come; the outermost is the root's place
    while open_nodes and len(tokens) <= longest:
        if open_nodes[-1] == 0:
            open_nodes.pop()
            if open_nodes:
                tokens.append(END)
            continue
        open_nodes[-1] -= 1
        if len(open_nodes) >= depth or draw.random() < VALUE:
            tokens.append(draw.choice(DIGITS))
        else:
            tokens.append(draw.choice(OPERATORS))
            open_nodes.append(draw.randint(2, arguments))
    return tokens


def value(tokens: list[str]) -> int:
    """Returns the answer of a sequence; the median of an even number of digits is rounded down."""
    return next(_values(iter(tokens)))


def _values(tokens: Iterator[str]) -> Iterator[int]:
    """Yields the values of the nodes up to the end of the list that they are in."""
    for token in tokens:
        if token == END:
            return
        if token in OPERATORS:
            inside = list(_values(tokens))
            results = {"[MIN": min, "[MAX": max, "[MED": median, "[SM": sum}
            yield int(results[token](inside)) % 10
        else:
            yield int(token)
