"""Fragments of a dataset: dividing them among processes, and keeping the first documents."""

from itertools import pairwise

import pytest

from flash_stu.data.preparation import divide
from flash_stu.data.sources import Fragment, first_documents


def fragments(sizes, split=None):
    return [Fragment("a file", split, lambda size=size: [f"{size}"] * 3, size) for size in sizes]


def test_parts_are_consecutive_and_not_empty():
    for sizes in ([1], [5, 1, 1], [1, 1, 9], [100, 0, 0, 0], [0, 0, 0], [3, 1, 4, 1, 5, 9, 2, 6], [None, 4, 1]):
        for parts in range(1, len(sizes) + 1):
            ranges = divide(fragments(sizes), parts)
            assert len(ranges) == parts and ranges[0][0] == 0 and ranges[-1][1] == len(sizes)
            assert all(first < last for first, last in ranges)
            assert all(before[1] == after[0] for before, after in pairwise(ranges))


def test_parts_are_balanced():
    sizes = [7, 3] * 50
    for first, last in divide(fragments(sizes), 8):
        assert abs(sum(sizes[first:last]) - 500 / 8) <= 7
    assert divide(fragments([90, 1, 1, 1, 1]), 2) == [(0, 1), (1, 5)]
    assert divide(fragments([None] * 10), 3) == [(0, 3), (3, 6), (6, 10)]


@pytest.mark.parametrize("number", [1, 3, 4, 100])
def test_first_documents_of_each_split(number):
    cut = first_documents([*fragments([1, 2], "train"), *fragments([8], "validation")], number)
    assert [fragment.split for fragment in cut] == ["train", "validation"]
    assert list(cut[0].read()) == list(cut[0].read()) == (["1"] * 3 + ["2"] * 3)[:number]
    assert list(cut[1].read()) == (["8"] * 3)[:number]
