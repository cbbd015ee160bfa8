"""Which beginnings are run once: against the best choice, found by trying them all."""

import random
from functools import cache

import pytest

from flash_stu.evaluation import sharing
from flash_stu.evaluation.sharing import Family, deal, plan_families


def tree(seed: int, count: int) -> list[tuple[int, ...]]:
    """Distinct sequences of which many begin like others."""
    rng = random.Random(seed)
    found = {(rng.randrange(3),)}
    while len(found) < count:
        old = rng.choice(sorted(found))
        found.add((*old[: rng.randrange(len(old) + 1)], *rng.choices(range(300), k=rng.randrange(1, 30))))
    return rng.sample(sorted(found), count)


def fewest_tokens(inputs, shareable, shortest):
    """The fewest tokens over all choices of beginnings to run, each input continuing the longest one chosen of its own.

    A beginning worth choosing is where two inputs part.
    """
    keys = [ids[:count] for ids, count in zip(inputs, shareable, strict=True)]

    @cache
    def best(beginning, rows, chosen):
        """For rows that begin so, after the choice of the first `chosen` tokens or 0."""
        if len(rows) == 1:
            return len(inputs[rows[0]]) - chosen
        deeper = {}
        for row in rows:
            deeper.setdefault(keys[row][: len(beginning) + 1], []).append(row)
        if len(deeper) == 1 and beginning not in deeper:
            ((longer, same),) = deeper.items()
            return best(longer, tuple(same), chosen)

        def below(chosen):
            ended = [len(inputs[row]) - chosen for row in deeper.get(beginning, [])]
            return sum(ended) + sum(best(k, tuple(v), chosen) for k, v in deeper.items() if k != beginning)

        run = len(beginning) + below(len(beginning)) if len(beginning) >= shortest else float("inf")
        return min(below(chosen), run)

    return best((), tuple(range(len(inputs))), 0)


@pytest.mark.parametrize("seed", range(8))
def test_the_division_is_near_the_best_there_is(seed, monkeypatch):
    monkeypatch.setattr(sharing, "_SMALL_FAMILY", 0)  # no rounding
    inputs = tree(seed, 40)
    shareable = [max(0, len(ids) - 1 - seed % 3) for ids in inputs]
    families = plan_families(inputs, shareable)
    assert sorted(row for family in families for row in family.members) == list(range(40))
    for family in families:
        beginnings = {inputs[row][: family.prefix] for row in family.members}
        assert len(beginnings) == 1
        assert all(family.prefix <= shareable[row] for row in family.members)
    lengths = [len(ids) for ids in inputs]
    tokens = sum(family.tokens(lengths) for family in families)
    assert 1 <= tokens / fewest_tokens(inputs, shareable, 16) <= 1.02


def test_small_families_have_few_different_prefixes():
    inputs = [(*range(length), 1000 + end, 5) for length in range(100, 132) for end in range(3)]
    inputs = [(length, *ids) for length, ids in enumerate(inputs)]
    assert all(family.prefix == 0 for family in plan_families(inputs, [len(ids) - 1 for ids in inputs]))
    inputs = [(7000 + i, *range(100 + i), 1000 + end, 5) for i in range(32) for end in range(3)]
    families = plan_families(inputs, [len(ids) - 1 for ids in inputs])
    assert len(families) == 32
    assert {family.prefix for family in families} == {100, 104, 108, 112, 116, 120, 124, 128}


def test_large_families_are_divided(monkeypatch):
    monkeypatch.setattr(sharing, "_LARGEST_FAMILY", 10)
    inputs = [(*range(50), end) for end in range(25)]
    families = plan_families(inputs, [50] * 25)
    assert [(family.prefix, len(family.members)) for family in families] == [(50, 10), (50, 10), (50, 5)]


@pytest.mark.parametrize("hands", [1, 2, 5])
def test_every_process_gets_about_as_much(hands):
    lengths = random.Random(0).choices(range(20, 90), k=200)
    families = [Family(0, (row,)) for row in range(150)] + [Family(10, tuple(range(150, 200)))]
    piles = deal(families, lengths, hands)
    assert sorted((f for pile in piles for f in pile), key=lambda f: f.members) == families
    loads = [sum(family.tokens(lengths) for family in pile) for pile in piles]
    assert max(loads) - min(loads) <= 90 or hands == 5
    assert piles == deal(families, lengths, hands)
