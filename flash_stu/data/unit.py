"""Units: the pieces of a dataset that can be read one without the others."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, islice


@dataclass(frozen=True)
class Unit:
    """Consecutive documents of a dataset: a file, or a row group of one.

    Attributes:
        name: what a message calls it.
        split: "train" or "validation"; None if each document's hash decides.
        read: starts reading; gives the documents as they are stored, the same every time.
        num_bytes: estimated bytes of text, None if unknown.
    """

    name: str
    split: str | None
    read: Callable[[], Iterable[str]]
    num_bytes: int | None


def first_documents(units: Iterable[Unit], number: int) -> list[Unit]:
    """Cut each split off after a number of documents; only reading it tells where, so it becomes one unit."""

    def joined(split: str | None, group: list[Unit]) -> Unit:
        def read() -> Iterator[str]:
            return islice(chain.from_iterable(unit.read() for unit in group), number)

        name = group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"
        return Unit(name, split, read, None)

    return [joined(split, list(group)) for split, group in groupby(units, lambda unit: unit.split)]


def divide(units: list[Unit], parts: int) -> list[tuple[int, int]]:
    """Divide units into consecutive parts of about equal size, none of them empty.

    Args:
        units: in order; counted as equally large unless the size of each is known.
        parts: at most as many as there are units.

    Returns:
        (first unit, unit after the last) of each part.
    """
    sizes = [unit.num_bytes for unit in units]
    if None in sizes or not sum(sizes):
        sizes = [1] * len(units)
    before = list(accumulate(sizes, initial=0))  # bytes before each unit, and in all
    borders = [0]
    for part in range(1, parts):
        fair = bisect_left(before, before[-1] * part // parts)
        borders.append(min(max(fair, borders[-1] + 1), len(units) - (parts - part)))
    borders.append(len(units))
    return list(zip(borders, borders[1:], strict=False))
