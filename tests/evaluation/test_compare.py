"""Paired comparison of two models."""

import math

import pytest

from flash_stu.evaluation.compare import compare, mcnemar


@pytest.mark.parametrize("first", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("second", [0, 2, 3, 11])
def test_p_values_are_the_tails_of_a_fair_coin(first, second):
    total, few = first + second, min(first, second)
    tail = sum(math.comb(total, k) for k in range(few + 1)) / 2**total
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(min(1.0, 2 * tail))


def test_p_values_of_large_counts():
    assert mcnemar(0, 0) == mcnemar(5000, 5000) == 1.0
    # the normal approximation with continuity correction is good here
    z = (4900 - 5100 + 1) / math.sqrt(10000)
    assert mcnemar(4900, 5100) == pytest.approx(math.erfc(-z / math.sqrt(2)), rel=1e-3)


def item(doc, acc, *log_likelihoods, digest="h"):
    answers = [[value, False] for value in log_likelihoods]
    return {"task": "t", "doc": doc, "hash": f"{digest}{doc}", "acc": acc, "answers": answers}


def test_items_are_paired_by_number_not_by_place():
    first = [item(0, 1.0, -1.0, -2.0), item(1, 0.0, -1.0, -3.0), item(2, 1.0, -1.0, -3.0), item(3, 0.0, -1.0, -3.0)]
    second = [item(2, 1.0, -1.5, -3.0), item(0, 0.0, -2.5, -2.0), item(1, 0.0, -1.0, -3.0), item(3, 0.0, -4.0, -3.0)]
    found = compare(first, second, "acc")
    assert (found["items"], found["difference"]) == (4, -0.25)
    assert [found[k] for k in ("both_right", "only_first", "only_second", "both_wrong")] == [1, 1, 0, 2]
    assert found["p_value"] == 1.0
    assert found["alike"] == 2  # items 0 and 3 are answered differently, 3 wrongly by both
    assert (found["close"], found["largest_log_likelihood_difference"]) == (1, 3.0)
    # differences -1, 0, 0, 0
    assert found["stderr"] == pytest.approx(math.sqrt(0.25 / 4))


def test_other_values_have_no_p_value():
    first, second = ([item(0, 0.5, -1.0), item(1, 0.25, -2.0)], [item(0, 0.75, -1.0), item(1, 0.25, -2.5)])
    found = compare(first, second, "acc")
    assert found["difference"] == 0.125 and "p_value" not in found
    assert found["alike"] == 1


def test_different_items_are_refused():
    with pytest.raises(ValueError, match="different items"):
        compare([item(0, 1.0)], [item(1, 1.0)], "acc")
    with pytest.raises(ValueError, match="different items"):
        compare([item(0, 1.0)], [item(0, 1.0, digest="other")], "acc")
