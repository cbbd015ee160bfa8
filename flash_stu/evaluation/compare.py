"""Two models on the same items: the difference, and whether it can be chance.

Scores on the same items go up and down together, so their standard errors say little about the difference. McNemar's
test looks only at the items that one model gets right and the other does not: if the models are equally good, each is
as likely to be the one that is right.

Source: McNemar 1947, Psychometrika 12, 153; the exact binomial form.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

CLOSE = 1e-3  # nats, a log-likelihood


def compare_all(models: Mapping[str, dict], items: Mapping[str, dict[str, list]]) -> list[dict[str, Any]]:
    """Compare the first model with every other on the tasks that both have.

    Args:
        models: by label, as results.json has them; what was asked differently of the two is left out.
        items: by label and task, what was answered.

    Returns:
        per pair {"first", "second", "tasks"}: the labels, and what `compare` returns by task; with several tasks of
        accuracies also for "all items" of them.
    """
    first, *others = items
    pairs = []
    for second in others:
        tasks, pooled = {}, ([], [])
        for name, own in items[second].items():
            task, other = (models[label]["tasks"].get(name) for label in (second, first))
            if task is None or other is None or task["config_hash"] != other["config_hash"]:
                continue
            if not own or not isinstance(own[0].get(task["metric"]), int | float):
                continue
            tasks[name] = compare(items[first][name], own, task["metric"])
            if task["metric"] == "acc":
                for pool, some in zip(pooled, (items[first][name], own), strict=True):
                    pool += some
        if sum("p_value" in task for task in tasks.values()) > 1:
            tasks["all items"] = compare(*pooled, "acc")
        if tasks:
            pairs.append({"first": first, "second": second, "tasks": tasks})
    return pairs


def compare(first: Sequence[dict], second: Sequence[dict], metric: str) -> dict[str, Any]:
    """Compare a metric of two models on the same items of a task, as flash_stu.evaluation.harness.run_task gives them.

    Returns:
        how many items; "difference": mean of second minus first, with its standard error over pairs; how many items
        both answer alike (the same choice, else the same value); for how many all log-likelihoods are within CLOSE, and
        their largest difference; and where values are right or wrong, the four counts and McNemar's p-value.

    Raises:
        ValueError: if the items are not the same.
    """
    pairs = _pairs(first, second)
    values = [(float(a[metric]), float(b[metric])) for a, b in pairs]
    differences = [b - a for a, b in values]
    count = len(pairs)
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / max(1, count - 1)
    gaps = [gap for gap in map(_largest_gap, pairs) if gap is not None]
    found = {
        "items": count,
        "difference": mean,
        "stderr": math.sqrt(variance / count),
        "alike": sum(_choice(a, metric) == _choice(b, metric) for a, b in pairs),
        "close": sum(gap <= CLOSE for gap in gaps) if gaps else None,
        "largest_log_likelihood_difference": max(gaps, default=None),
    }
    if all(value in (0.0, 1.0) for pair in values for value in pair):
        counts = {
            "both_right": values.count((1.0, 1.0)),
            "only_first": values.count((1.0, 0.0)),
            "only_second": values.count((0.0, 1.0)),
            "both_wrong": values.count((0.0, 0.0)),
        }
        found |= counts | {"p_value": mcnemar(counts["only_first"], counts["only_second"])}
    return found


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the two-sided probability of so uneven a split of what only one of two equal models gets right."""
    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def _pairs(first: Sequence[dict], second: Sequence[dict]) -> list[tuple[dict, dict]]:
    named = {(item["task"], item["doc"]): item for item in second}
    pairs = [(item, named.get((item["task"], item["doc"]))) for item in first]
    same = [(a, b) for a, b in pairs if b is not None and a["hash"] == b["hash"]]
    if not len(named) == len(first) == len(same):
        raise ValueError("the two models were asked different items")
    return same


def _largest_gap(pair: tuple[dict, dict]) -> float | None:
    gaps = (abs(x - y) for x, y in zip(*map(_numbers, pair), strict=True))
    return max(gaps, default=None)


def _numbers(item: dict) -> list[float]:
    """Returns the log-likelihoods among the answers: of choices with whether they are greedy, or of whole texts."""
    firsts = [answer[0] if isinstance(answer, list | tuple) else answer for answer in item["answers"]]
    return [value for value in firsts if isinstance(value, float)]


def _choice(item: dict, metric: str) -> object:
    """Returns the choice a model prefers, if it was offered several; else the item's value."""
    numbers = _numbers(item)
    return max(range(len(numbers)), key=numbers.__getitem__) if len(numbers) > 1 else item[metric]
