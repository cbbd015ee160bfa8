"""Documents that share a row get what each gets alone: in every kind of layer, whoever tells where they begin."""

import pytest
import torch
from torch.nn.functional import pad

from flash_stu import UserError
from flash_stu.distributed import World
from flash_stu.model.layers.documents import Documents
from flash_stu.training.step import token_loss

KINDS = [
    {},
    {"stu_type": "full", "stu_branches": "positive", "position_embedding": "alibi", "num_filters": 3},
    {"lds_state_dim": 8},
    {"lds_state_dim": 8, "stu_type": "full", "num_filters": 3},
    {"layer_types": ["sliding_attention"] * 4, "num_key_value_heads": 2},
]
LENGTHS = ([1, 9, 2, 17], [29], [13, 1, 1, 14])  # of the documents in each of three rows


def packed():
    torch.manual_seed(5)
    ids = torch.randint(0, 61, (3, 29))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    numbers = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in LENGTHS])
    ends = pad(torch.tensor([n for row in LENGTHS for n in row]).cumsum(0), (1, 0)).int()
    ways = [
        {"position_ids": positions},
        {"seq_idx": numbers},
        {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 29, "max_length_k": 29},
    ]
    return ids, ways


def alone(model, ids):
    """Hidden states of every document by itself, put together again."""
    rows = [
        torch.cat([model(part[None]).logits[0] for part in row.split(lengths)])
        for row, lengths in zip(ids, LENGTHS, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("changes", KINDS)
@torch.no_grad()
def test_documents_in_a_row_are_apart(tiny_model, changes):
    model, (ids, ways) = tiny_model(**changes), packed()
    expected = alone(model, ids)
    assert (model(ids).logits - expected).abs().max() > 0.05  # together they are not
    for way in ways:
        out = model(ids, **way)
        torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
        assert out.past_key_values is None
    whole = ways[0] | {"attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(model(ids, **whole).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", KINDS)
@torch.no_grad()
def test_padding_beside_documents(tiny_model, changes):
    model, (ids, ways) = tiny_model(**changes), packed()
    expected = alone(model, ids)
    for front, behind in ((4, 0), (0, 5)):
        mask = pad(torch.ones_like(ids), (front, behind))
        for way in ways[:2]:
            padded = {name: pad(value, (front, behind), value=3) for name, value in way.items()}
            logits = model(pad(ids, (front, behind)), attention_mask=mask, **padded).logits
            torch.testing.assert_close(logits[:, front : front + 29], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_documents_alone(tiny_model, changes, checkpointed):
    model, (ids, ways) = tiny_model(**changes), packed()
    labels = torch.randint(0, 61, ids.shape)
    loss = torch.nn.functional.cross_entropy(alone(model, ids).flatten(0, 1), labels.flatten())
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if checkpointed:
        model.train().gradient_checkpointing_enable()
    model(ids, shift_labels=labels, **ways[0]).loss.backward()
    for mine, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, mine, atol=2e-6, rtol=1e-3)


@torch.no_grad()
def test_a_row_may_be_longer_than_the_filters_if_no_document_is(tiny_model):
    model = tiny_model()
    ids = torch.arange(130)[None] % 61
    ends = torch.tensor([0, 65, 130], dtype=torch.int32)
    both = model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits
    torch.testing.assert_close(both[:, 65:], model(ids[:, 65:]).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="max_position_embeddings"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 64, 130]))


def test_what_cannot_be_done_is_refused(tiny_model):
    model, (ids, ways) = tiny_model(), packed()
    for way, name in (
        (ways[0] | {"use_cache": True}, "use_cache"),
        (ways[1] | {"output_attentions": True}, "output_attentions"),
        ({"cu_seq_lens_q": torch.tensor([0, 30])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 50, 40, 87])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 87]), "cu_seq_lens_k": torch.tensor([0, 7, 87])}, "cu_seq_lens_k"),
        ({"seq_idx": torch.zeros(3, 28)}, "seq_idx"),
    ):
        with pytest.raises(UserError, match=name):
            model(ids, **way)


def test_at_most_two_places_for_every_token():
    torch.manual_seed(0)
    lengths = torch.randint(1, 400, (64,))
    numbers = torch.arange(64).repeat_interleave(lengths)[None]
    documents = Documents.of(numbers)
    assert sum(places.numel() for places in documents.groups) < 2 * numbers.numel()
    assert len(documents.groups) <= 10 and documents.longest == lengths.max()
    assert Documents.of(torch.zeros(3, 5)) is None


@pytest.mark.parametrize("changes", KINDS)
@torch.no_grad()
def test_training_can_keep_documents_apart(tiny_model, changes):
    model = tiny_model(**changes)
    windows = torch.randint(0, 60, (2, 30))
    windows[0, [4, 21]] = windows[1, [0, 13, 14]] = 60  # end of text: it ends a document and begins the next
    begins = ([0, 4, 21], [0, 13, 14])
    losses = []
    for row, first in zip(windows, begins, strict=True):
        for start, end in zip(first, [*first[1:], 29], strict=True):
            part = row[start : end + 1]
            losses += [model(part[None, :-1], shift_labels=part[None, 1:]).loss * (end - start)]
    apart = token_loss(model, windows, World(), end_of_text=60)
    torch.testing.assert_close(apart, sum(losses) / 58)
    assert abs(apart - token_loss(model, windows, World())) > 1e-4
