"""Scoring against log-softmax of the full logits, and windows against the harness's."""

import json
import random

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.evaluation import scoring
from flash_stu.evaluation.resume import Journal
from flash_stu.evaluation.scoring import Budget, Counters, Window, score_windows, split_windows
from flash_stu.model.loading import load_model
from flash_stu.progress import Progress


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


def random_windows(longest: int, count: int = 13) -> list[Window]:
    """Windows of random tokens, some of which begin alike, at depths that nest."""
    rng = random.Random(0)
    beginnings = [()]
    for _ in range(3):
        beginnings.append((*rng.choice(beginnings), *rng.choices(range(257), k=rng.randrange(17, 22))))
    windows = []
    for _ in range(count):
        beginning = rng.choice(beginnings)
        rest = rng.choices(range(257), k=rng.randrange(1, longest - len(beginning) + 1))
        inputs = (*beginning, *rest)
        windows.append(Window(inputs, tuple(rng.choices(range(257), k=rng.randrange(1, len(rest) + 1)))))
    return windows


def expected(model, window):
    """From the full logits, alone."""
    with torch.no_grad():
        logits = model(torch.tensor([window.inputs])).logits[0, -len(window.targets) :].double()
    targets = torch.tensor(window.targets)
    log_probs = logits.log_softmax(-1)[range(len(targets)), targets]
    return log_probs.sum().item(), torch.equal(logits.argmax(-1), targets)


@pytest.mark.parametrize("name", ["stu_dir", "lds_dir", "llama_dir"])
@pytest.mark.parametrize(("tokens", "rows"), [(1, None), (300, 5), (4096, None)])
def test_scores_are_those_of_the_full_logits(name, tokens, rows, request, monkeypatch):
    model = load_model(request.getfixturevalue(name), dtype=torch.float64)
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 3 * 257)  # three positions at a time
    windows = random_windows(65, 20)
    first = windows[0].inputs
    with torch.no_grad():
        likeliest = model(torch.tensor([first])).logits[0].argmax(-1).tolist()
    # same inputs, other targets: one of them what greedy decoding gives
    windows += [Window(first, (5,)), Window(first, tuple(likeliest[-1:]))]

    counters = Counters()
    scores = score_windows(model, windows, Budget(tokens, rows), counters)

    assert counters.forward_tokens_unshared == sum(len(window.inputs) for window in windows)
    alone = sum(len(inputs) for inputs in {w.inputs for w in windows})
    assert counters.forward_tokens == alone if name == "llama_dir" else counters.forward_tokens < 0.9 * alone
    for window, score in zip(windows, scores, strict=True):
        log_likelihood, greedy = expected(model, window)
        # logits are compared in float32, whatever the model computes in
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=2e-4)
        assert len(score.log_probs) == len(window.targets)
        assert score.greedy == greedy
    assert scores[-1].greedy


@pytest.mark.parametrize("name", ["stu_dir", "lds_dir"])
def test_scores_in_float32_do_not_depend_on_the_batches(name, request):
    model = load_model(request.getfixturevalue(name))
    windows = random_windows(65, 20)
    before = model.config.decode_backend
    runs = [score_windows(model, windows, Budget(tokens), Counters()) for tokens in (1, 100, 4096)]
    for one, *others in zip(*runs, strict=True):
        for other in others:
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
    assert model.config.decode_backend == before


def test_memory_that_runs_out_makes_batches_smaller(stu_dir, monkeypatch):
    model = load_model(stu_dir)
    windows = random_windows(65, 20)
    wanted = score_windows(model, windows, Budget(4096), Counters())
    forward, largest = model.model.forward, 0

    def scarce(input_ids, **kwargs):
        nonlocal largest
        if input_ids.numel() > 130:
            raise torch.OutOfMemoryError("too much")
        largest = max(largest, input_ids.numel())
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", scarce)
    budget, counters = Budget(4096), Counters()
    found = score_windows(model, windows, budget, counters)
    assert budget.tokens < 4096 and 65 < largest <= 130
    for one, other in zip(wanted, found, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)

    def hopeless(**kwargs):
        raise torch.OutOfMemoryError("none")

    monkeypatch.setattr(model.model, "forward", hopeless)
    with pytest.raises(UserError, match="does not hold one sequence of"):
        score_windows(model, windows, Budget(4096), Counters())


def test_inputs_beyond_the_trained_length_go_through_the_state_in_pieces(lds_dir):
    model = load_model(lds_dir, dtype=torch.float64)
    ids = random.Random(1).choices(range(257), k=301)
    window = Window(tuple(ids[:-1]), tuple(ids[1:]))
    (score,) = score_windows(model, [window], Budget(64), Counters())
    assert score.log_likelihood == pytest.approx(expected(model, window)[0], rel=1e-6)


def test_scores_that_a_journal_knows_are_not_run_again(stu_dir, tmp_path, monkeypatch):
    model, windows = load_model(stu_dir), random_windows(65, 20)
    wanted = score_windows(model, windows, Budget(100), Counters())
    run, batches = model.model.forward, 0

    def stop(**kwargs):
        nonlocal batches
        batches += 1
        if batches > 7:
            raise KeyboardInterrupt
        return run(**kwargs)

    monkeypatch.setattr(model.model, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        score_windows(model, windows, Budget(100), Counters(), journal=Journal(tmp_path / "part", {"a": 1}, World()))
    (path,) = tmp_path.glob("part*")
    path.write_text(path.read_text()[:-9])  # died while it wrote its last line
    noted = {int(row) for line in path.read_text().splitlines()[1:-1] for row in json.loads(line)["rows"]}
    assert len(noted) > 2

    tokens = 0

    def count(input_ids, **kwargs):
        nonlocal tokens
        tokens += input_ids.numel()
        return run(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", count)
    journal, counters = Journal(tmp_path / "part", {"a": 1}, World()), Counters()
    found = score_windows(model, windows, Budget(1), counters, journal=journal)
    assert tokens < counters.forward_tokens - 20
    for one, other in zip(wanted, found, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
        assert one.greedy == other.greedy
    again = Journal(tmp_path / "part", {"a": 1}, World())
    assert len(again.known()) == len({window.inputs for window in windows})
    assert again.known() == {}  # the second list of requests of the same task
    assert Journal(tmp_path / "part", {"a": 2}, World()).known() == {}
    journal.close()
    assert list(tmp_path.glob("part*")) == []


def test_progress_counts_every_token_once(stu_dir):
    progress, counters = Progress(enabled=False), Counters()
    score_windows(load_model(stu_dir), random_windows(65), Budget(100), counters, progress)
    assert progress.done == progress.total == counters.forward_tokens
