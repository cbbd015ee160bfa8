"""Scoring against log-softmax of the full logits, and windows against the harness's."""

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flash_stu.evaluation import scoring
from flash_stu.evaluation.scoring import Counters, Window, score_windows, split_windows
from flash_stu.loading import load_model


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 13, 14, 15, 30])
def test_windows_of_a_text_are_the_harness_rolling_windows(length):
    tokens = list(range(1, length + 1))
    theirs = map(
        make_disjoint_window,
        get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=7, context_len=1),
    )
    ours = split_windows([0], tokens, max_length=7)
    # the harness keeps context and targets apart; the model reads both but for the last token
    assert ours == [Window((*context, *targets)[:-1], tuple(targets)) for context, targets in theirs]


@pytest.mark.parametrize(("context", "continuation"), [(3, 2), (5, 3), (6, 3), (9, 4), (20, 7), (20, 1)])
def test_a_continuation_that_fits_is_one_window_cut_from_the_left(context, continuation):
    stream = list(range(context + continuation))
    windows = split_windows(stream[:context], stream[context:], max_length=7)
    assert windows == [Window(tuple(stream[:-1][-7:]), tuple(stream[context:]))]


def test_a_long_continuation_is_scored_once_per_token_within_the_context():
    windows = split_windows([1, 2, 3], list(range(10, 30)), max_length=7)
    assert [token for window in windows for token in window.targets] == list(range(10, 30))
    assert all(len(window.targets) <= len(window.inputs) <= 7 for window in windows)
    assert windows[0].inputs == (3, 10, 11, 12, 13, 14, 15)


@pytest.mark.parametrize("name", ["stu_dir", "llama_dir"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_the_full_logits(name, batch_size, request, monkeypatch):
    model = load_model(request.getfixturevalue(name), dtype=torch.float64)
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 3 * 257)  # three positions at a time
    rng = torch.Generator().manual_seed(0)
    windows = []
    for _ in range(13):
        length = int(torch.randint(1, 66, (1,), generator=rng))
        scored = int(torch.randint(1, length + 1, (1,), generator=rng))
        inputs = tuple(torch.randint(0, 257, (length,), generator=rng).tolist())
        windows.append(Window(inputs, tuple(torch.randint(0, 257, (scored,), generator=rng).tolist())))
    first = windows[0].inputs
    with torch.no_grad():
        likeliest = model(torch.tensor([first])).logits[0].argmax(-1).tolist()
    # same inputs, other targets: one of them what greedy decoding gives
    windows += [Window(first, (5,)), Window(first, tuple(likeliest)), Window(first, tuple(likeliest[-1:]))]

    counters = Counters()
    progress = []
    scores = score_windows(model, windows, batch_size, counters, progress.append)

    assert sum(progress) == len(windows)
    assert counters.forward_tokens == sum(len(inputs) for inputs in {w.inputs for w in windows})
    for window, (log_likelihood, greedy) in zip(windows, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([window.inputs])).logits[0, -len(window.targets) :].double()
        targets = torch.tensor(window.targets)
        expected = logits.log_softmax(-1)[range(len(targets)), targets].sum().item()
        # logits are compared in float32, whatever the model computes in
        assert log_likelihood == pytest.approx(expected, abs=2e-4)
        assert greedy == torch.equal(logits.argmax(-1), targets)
    assert [greedy for _, greedy in scores][-2:] == [True, True]
