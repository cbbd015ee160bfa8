"""Items of the two small tasks that are made from the embedded corpus: bits per byte, and a cloze test."""

import random
from collections.abc import Sequence

_BPB_DOCUMENT_BYTES = 4096  # a document's beginning: long pages must not crowd out the rest
_BPB_TOTAL_BYTES = 65536
_CLOZE_ITEMS = 200
_CLOZE_CONTEXT = 96  # bytes
_CLOZE_CHOICE = 48  # bytes
_CLOZE_CHOICES = 4


def bpb_documents(documents: Sequence[str], seed: int = 0) -> list[dict]:
    """Choose texts to measure bits per byte on: the first 4 KiB of documents in random order, 64 KiB in all.

    Returns:
        rows {"text": str}.
    """
    rows, total = [], 0
    for index in random.Random(seed).sample(range(len(documents)), len(documents)):
        text = documents[index].encode()[:_BPB_DOCUMENT_BYTES].decode(errors="ignore")
        size = len(text.encode())
        if not text.strip() or total + size > _BPB_TOTAL_BYTES:
            continue
        rows.append({"text": text})
        total += size
    return rows


def cloze_items(documents: Sequence[str], seed: int = 0) -> list[dict]:
    """Cut passages in two and offer the true second half among three from other documents.

    Every choice has 48 bytes, starts with the space before a word and stops at the end of one, so length and
    word boundaries give nothing away. Documents take turns, so that long ones do not dominate.

    Returns:
        at most 200 rows {"context": 96 bytes, "choices": four texts, "label": index of the true one}.
    """
    rng = random.Random(seed)
    cuts = {index: found for index, text in enumerate(documents) if (found := _cuts(text))}
    if len(cuts) < _CLOZE_CHOICES:
        return []
    items, used, sources = [], set(), sorted(cuts)
    while len(items) < _CLOZE_ITEMS:
        before = len(items)
        for index in rng.sample(sources, len(sources)):
            fresh = [cut for cut in cuts[index] if (index, cut) not in used and cut >= _CLOZE_CONTEXT]
            if not fresh or len(items) == _CLOZE_ITEMS:
                continue
            cut = rng.choice(fresh)
            # Passages of one document must not overlap, or one item would give away another.
            used |= {(index, other) for other in fresh if abs(other - cut) < _CLOZE_CONTEXT + _CLOZE_CHOICE}
            others = rng.sample([other for other in sources if other != index], _CLOZE_CHOICES - 1)
            choices = [_choice(documents[index], cut)]
            choices += [_choice(documents[other], rng.choice(cuts[other])) for other in others]
            if len(set(choices)) < _CLOZE_CHOICES:
                continue
            true, label = choices[0], rng.randrange(_CLOZE_CHOICES)
            choices[0], choices[label] = choices[label], true
            context = documents[index][cut - _CLOZE_CONTEXT : cut]
            items.append({"context": context, "choices": choices, "label": label})
        if len(items) == before:
            break
    return items


def _choice(text: str, cut: int) -> str:
    return text[cut : cut + _CLOZE_CHOICE]


def _cuts(text: str) -> list[int]:
    """Positions of the spaces where a choice can start: in plain ASCII, so that characters are bytes."""
    cuts = []
    for cut in range(1, len(text) - _CLOZE_CHOICE):
        if text[cut] != " " or text[cut - 1].isspace() or text[cut + 1].isspace():
            continue
        stop = cut + _CLOZE_CHOICE
        whole_words = text[stop].isspace() and not text[stop - 1].isspace()
        if whole_words and text[max(0, cut - _CLOZE_CONTEXT) : stop].isascii():
            cuts.append(cut)
    return cuts
