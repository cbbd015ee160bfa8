"""Long-context tasks of any length, generated: a pass key in a long text, and a long copy.

`passkey_N` states a key of five digits at some depth of a text of N tokens, and asks for it at the end. The text is of
the embedded corpus. `copy_N` lists words in random order, then the same words again, up to some depth of the list: what
comes next? Only the list can tell, N/2 tokens before. Of both the answer is scored against three others, and whether
greedy decoding would write it. N counts the tokens of prompt and answer with the evaluated model's own tokenizer.

Source: pass keys after Mohtashami and Jaggi 2023 (arXiv 2305.16300), copies after Jelassi et al. 2024 (2402.01032).
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from flash_stu.errors import UserError

DEPTHS = (0, 20, 40, 60, 80, 100)  # percent of the text before the key, or of the list before the answer
CHOICES = 4
_LONGEST = 2**24  # tokens
_ROUNDS = 10  # items of each depth
NEEDLE = "\nThe pass key is{key}. Remember it.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
_ANSWER_WORDS = 4

CountTokens = Callable[[str], int]
Item = dict[str, Any]  # context, choices, label: index of the right one


class LongTask(NamedTuple):
    """A task's name, taken apart."""

    kind: str  # "passkey" or "copy"
    length: int  # tokens, of prompt and answer at most


def parse_name(name: str) -> LongTask | None:
    """Returns what a name such as passkey_4096 means; None if it is not one of these tasks.

    Raises:
        UserError: for a name without a length, or with one that is out of range.
    """
    match = re.fullmatch(rf"({'|'.join(_ITEMS)})(?:_(\d+))?", name)
    if match is None:
        return None
    kind, length = match.groups()
    if length is None:
        raise UserError(f"task {name!r} needs a length in tokens, as in {kind}_4096")
    if len(length) > len(str(_LONGEST)) or not 1 <= int(length) <= _LONGEST:
        raise UserError(f"task {name!r}: the length is out of range; allowed: 1 to {_LONGEST} tokens")
    return LongTask(kind, int(length))


def make_items(task: LongTask, count_tokens: CountTokens, documents: Sequence[str], seed: int = 0) -> list[Item]:
    """Generate the items of a task: ten rounds through `DEPTHS`, each round on one text.

    Args:
        task: which, and how long.
        count_tokens: number of tokens of a text.
        documents: what the text is made of, or the words of the list are.
        seed: of everything random.

    Returns:
        rows {"context", "choices", "label"}. Those of one round begin alike, which shares most of the work.

    Raises:
        UserError: if the length does not hold the shortest prompt and its answer.
    """
    return list(_ITEMS[task.kind](task, count_tokens, documents, random.Random(seed)))


def by_depth(items: Sequence[Item], metrics: Sequence[str]) -> list[dict[str, float]]:
    """Returns {"depth" in percent, "items", mean of each metric} for every depth, of items as `run_task` has them."""
    found = []
    for place, depth in enumerate(DEPTHS):
        own = [item for item in items if item["doc"] % len(DEPTHS) == place]
        means = {metric: sum(item[metric] for item in own) / len(own) for metric in metrics if own}
        found += [{"depth": depth, "items": len(own), **means}] * bool(own)
    return found


def _passkey_items(
    task: LongTask, count_tokens: CountTokens, documents: Sequence[str], rng: random.Random
) -> Iterator[Item]:
    """Yields in each round an item per depth, of one text but different keys."""
    for _ in range(_ROUNDS):
        pieces = _pieces(documents, task.length, rng)  # of a token at least: never too few
        whole, fitting = "".join(pieces), None
        for depth in DEPTHS:
            keys: list[str] = []
            while len(keys) < CHOICES:
                key = f" {rng.randrange(10_000, 100_000)}"
                keys += [key] * (key not in keys and key[1:] not in whole)
            label = rng.randrange(CHOICES)
            prompt = partial(_passkey_prompt, pieces, depth, keys[label])

            def tokens(count: int, prompt: Callable[[int], str] = prompt, answer: str = keys[label]) -> int:
                return count_tokens(prompt(count) + answer)

            count = fitting = _most(tokens, len(pieces), task) if fitting is None else fitting
            while tokens(count) > task.length:
                count -= 1  # where the key comes between other words there may be a token more
            yield {"context": prompt(count), "choices": keys, "label": label}


def _passkey_prompt(pieces: Sequence[str], depth: int, key: str, count: int) -> str:
    text = "".join(pieces[:count])
    cut = len(text) * depth // 100
    while 0 < cut < len(text) and not text[cut - 1].isspace():
        cut += 1  # to the beginning of a word
    return text[:cut] + NEEDLE.format(key=key) + text[cut:] + QUESTION


def _copy_items(
    task: LongTask, count_tokens: CountTokens, documents: Sequence[str], rng: random.Random
) -> Iterator[Item]:
    """Yields in each round an item per depth, of one list."""
    vocabulary = sorted({word for text in documents for word in re.findall(r"\b[a-z]{5}\b", text)})
    fewest = 2 * CHOICES * _ANSWER_WORDS  # words in a list
    for _ in range(_ROUNDS):
        words = [f" {word}" for word in rng.choices(vocabulary, k=max(fewest, task.length // 2))]
        answers = ["".join(words[start : start + _ANSWER_WORDS]) for start in range(len(words))]

        def context(count: int, start: int, words: list[str] = words) -> str:
            return f"Words:{''.join(words[:count])}\nAgain:{''.join(words[:start])}"

        def tokens(count: int, context: Callable[[int, int], str] = context, answers: list[str] = answers) -> int:
            return count_tokens(context(count, count - _ANSWER_WORDS) + answers[count - _ANSWER_WORDS])

        count = _most(tokens, len(words), task, fewest)
        for depth in DEPTHS:
            start = (count - _ANSWER_WORDS) * depth // 100
            choices = [answers[start]]
            while len(choices) < CHOICES:
                other = rng.randrange(count - _ANSWER_WORDS + 1)
                choices += [answers[other]] * (abs(other - start) >= _ANSWER_WORDS and answers[other] not in choices)
            label = rng.randrange(CHOICES)
            choices[0], choices[label] = choices[label], choices[0]
            yield {"context": context(count, start), "choices": choices, "label": label}


_ITEMS = {"passkey": _passkey_items, "copy": _copy_items}


def _pieces(documents: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Returns so many words, each with the blanks that follow it, of documents in random order; again if too few."""
    pieces: list[str] = []
    while len(pieces) < count:
        for text in rng.sample(documents, len(documents)):
            pieces += re.findall(r"\S+\s*", f"{text}\n\n")
            if len(pieces) >= count:
                break
    return pieces[:count]


def _most(tokens: Callable[[int], int], highest: int, task: LongTask, lowest: int = 0) -> int:
    """Returns about the largest n, from `lowest` to `highest`, whose tokens(n) fit; tokens is nearly linear."""
    low, fewest = lowest, tokens(lowest)
    if fewest > task.length:
        raise UserError(f"task '{task.kind}_{task.length}' is too short; at least {fewest} tokens are needed")
    high, step = highest, min(64, highest - lowest)
    slope = max(1.0, (tokens(lowest + step) - fewest) / max(1, step))  # tokens per word
    while high - low > 1 and task.length - fewest > task.length // 256:  # a few tokens less do not matter
        middle = min(max(low + int((task.length - fewest) / slope), low + 1), high - 1)
        if (found := tokens(middle)) <= task.length:
            slope = max(1.0, (found - fewest) / (middle - low))
            low, fewest = middle, found
        else:
            slope = max(1.0, (found - fewest) / (middle - low))
            high = middle
    return low
