"""Pass keys and copies of any length: what their items are, who can solve them, and how they are reported."""

import json
import random
import re

import pytest
from lm_eval.api.model import LM

from flash_stu.errors import UserError
from flash_stu.evaluation import definitions, evaluate, language_model
from flash_stu.evaluation.compare import compare_all
from flash_stu.evaluation.definitions import Definitions, TaskSpec
from flash_stu.evaluation.harness import load_tasks, run_task
from flash_stu.evaluation.long_context import make_items, parse_name
from flash_stu.evaluation.report import format_report

DEPTHS = [0, 20, 40, 60, 80, 100]


def count_bytes(text):
    return len(text.encode())


def count_words(text):
    return len(text.split())


@pytest.fixture(scope="module")
def corpus():
    """Made-up documents of words of three to nine letters; the longest is shorter than the tasks."""
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnop", k=k)) for k in range(3, 10) for _ in range(30)]
    return [" ".join(rng.choices(words, k=60)) for _ in range(20)]


@pytest.fixture
def generated(corpus, tmp_path, monkeypatch):
    """The tasks are made from the small corpus, and kept in a folder of the test."""
    monkeypatch.setattr(definitions, "embedded_corpus", lambda: {"train": corpus[:15], "validation": corpus[15:]})
    monkeypatch.setattr(definitions.platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))


@pytest.mark.parametrize(("count", "length", "word"), [(count_bytes, 1500, 10), (count_words, 400, 1)])
def test_a_pass_key_is_at_its_depth_of_a_text_of_the_length(count, length, word, corpus):
    items = make_items(parse_name(f"passkey_{length}"), count, corpus)
    assert len(items) == 60 and {item["label"] for item in items} == {0, 1, 2, 3}
    for depth, item in zip(DEPTHS * 10, items, strict=True):
        context, key = item["context"], item["choices"][item["label"]]
        parts = re.fullmatch(r"(.*)(\nThe pass key[^\n]*\n)(.*)\nWhat is.*", context, re.DOTALL)
        before, needle, after = parts.groups()
        assert needle.count(key) == 1 and context.count(key[1:]) == 1
        assert [choice for choice in item["choices"] if choice[1:] in context] == [key]
        assert all(re.fullmatch(r" [1-9]\d{4}", choice) for choice in item["choices"])
        assert len(set(item["choices"])) == 4
        assert len(before) == pytest.approx(depth / 100 * len(before + after), abs=10)
        assert (before == "") == (depth == 0) and (after == "") == (depth == 100)
        assert not before or before[-1].isspace()  # no word is cut in two
        assert length - length // 256 - word <= count(context + key) <= length
        assert count(context) + count(key) == count(context + key)


@pytest.mark.parametrize(("count", "length"), [(count_bytes, 1500), (count_words, 400)])
def test_a_copy_goes_on_from_its_depth_of_the_list(count, length, corpus):
    items = make_items(parse_name(f"copy_{length}"), count, corpus)
    assert len(items) == 60 and {item["label"] for item in items} == {0, 1, 2, 3}
    for depth, item in zip(DEPTHS * 10, items, strict=True):
        words, again = re.fullmatch(r"Words:(.*)\nAgain:(.*)", item["context"]).groups()
        words, again, answer = (text.split() for text in (words, again, item["choices"][item["label"]]))
        start = len(again)
        assert words[: start + 4] == again + answer and len(answer) == 4
        assert start == int((len(words) - 4) * depth / 100)
        assert len(set(item["choices"])) == 4
        assert all(choice in f" {' '.join(words)}" for choice in item["choices"])
        assert count(item["context"] + item["choices"][item["label"]]) <= length
        if depth == 100:
            assert length - length // 256 - 12 <= count(item["context"] + item["choices"][item["label"]])


@pytest.mark.parametrize("kind", ["passkey", "copy"])
def test_items_follow_the_seed(kind, corpus):
    task = parse_name(f"{kind}_600")
    assert make_items(task, count_bytes, corpus) == make_items(task, count_bytes, list(corpus))
    assert make_items(task, count_bytes, corpus, seed=1) != make_items(task, count_bytes, corpus)


class Reader(LM):
    """Finds the answer in the last so many characters of a prompt; where it cannot, all answers are alike."""

    def __init__(self, sight=10**6):
        super().__init__()
        self.sight = sight

    def answer(self, prompt):
        seen = prompt[-self.sight :]
        if stated := re.search(r"The pass key is( \d+)\.", seen):
            return stated[1]
        if copied := re.search(r"Words:(.*)\nAgain:(.*)", seen):
            return "".join(f" {word}" for word in copied[1].split()[len(copied[2].split()) :][:4])
        return None

    def loglikelihood(self, requests):
        right = [self.answer(request.args[0]) == request.args[1] for request in requests]
        return [(0.0 if each else -1.0, each) for each in right]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def test_a_reader_scores_all_and_a_constant_chance(generated):
    for task in load_tasks([TaskSpec(name="passkey_500"), TaskSpec(name="copy_600")]):
        result = run_task(Reader(), task)
        assert (result["metric"], result["value"], result["items"]) == ("acc", 1.0, 60)
        assert result["metrics"]["exact_match"]["value"] == 1.0
        assert result["depths"] == [{"depth": d, "items": 10, "acc": 1.0, "exact_match": 1.0} for d in DEPTHS]
        constant = run_task(Reader(sight=5), task)
        assert constant["metrics"]["exact_match"]["value"] == 0.0
        assert constant["value"] == pytest.approx(1 / 4, abs=4 * (3 / 16 / 60) ** 0.5)  # four standard errors


def test_scores_by_depth_show_how_far_a_reader_sees(generated):
    (task,) = load_tasks([TaskSpec(name="passkey_1000")])
    depths = run_task(Reader(sight=450), task)["depths"]
    assert [entry["exact_match"] for entry in depths] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    few = run_task(Reader(), task, limit=8)["depths"]
    assert [(entry["depth"], entry["items"]) for entry in few] == list(zip(DEPTHS, [2, 2, 1, 1, 1, 1], strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("passkey", "task 'passkey' needs a length in tokens, as in passkey_4096"),
        ("passkey_0", "task 'passkey_0': the length is out of range; allowed: 1 to 16777216"),
        ("copy_" + "9" * 5000, "the length is out of range"),
        ("passkey_80", "task 'passkey_80' is too short; at least 81 tokens are needed"),
        ("copy_100", "task 'copy_100' is too short; at least 397 tokens are needed"),
    ],
)
def test_bad_lengths_are_one_line(name, message, generated):
    with pytest.raises(UserError) as caught:
        load_tasks([TaskSpec(name=name)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_shortest_lengths_hold_a_prompt(corpus):
    assert make_items(parse_name("passkey_81"), count_bytes, corpus)[0]["context"].startswith("\nThe pass key is")
    words = make_items(parse_name("copy_397"), count_bytes, corpus)[0]["context"].split()
    assert len(words) == 1 + 32 + 1


def test_names_of_others_are_left_alone():
    Definitions().require("passkey_4096")
    assert parse_name("mmlu") is None and parse_name("copy_cat") is None


def test_what_a_model_cannot_take_is_said_and_left_out(stu_dir, lds_dir, generated, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"

    def run():
        tasks = "copy_450,passkey_300"
        return evaluate([stu_dir, lds_dir], tasks, limit=6, output=output, device="cpu", batch_size=4)

    results = run()
    line = "stu: {} not measured, longer than the longest input of this model, 65 tokens."
    printed = capsys.readouterr().out
    assert all(line.format(name) in printed for name in ("copy_450", "passkey_300", "copy_450, passkey_300"))
    stu, lds = (results["models"][label] for label in ("stu", "lds"))
    assert stu["tasks"] == {} and stu["too_long"] == ["copy_450", "passkey_300"]
    assert list(lds["tasks"]) == ["copy_450", "passkey_300"] and lds["too_long"] == []
    assert results["comparisons"] == []
    assert lds["tasks"]["passkey_300"]["truncated"] == 0
    assert {"copy.by-depth.png", "passkey.by-depth.png"} <= {path.name for path in output.iterdir()}
    report = (output / "table.md").read_text()
    assert report == format_report(json.loads((output / "results.json").read_text())) + "\n"
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in report.splitlines() if row.startswith("| 300")]
    assert [row[:3] for row in rows] == [["300", f"{depth} %", ""] for depth in DEPTHS]
    assert all(re.fullmatch(r"\d+ / \d+", row[3]) for row in rows)

    monkeypatch.setattr(language_model, "load_source", lambda *_: pytest.fail("a model was loaded"))
    assert run()["models"] == results["models"]  # resumed, what was left out too


def test_models_of_different_tokenizers_are_not_compared():
    def model(config_hash):
        return {"tasks": {"passkey_300": {"metric": "acc", "config_hash": config_hash}}}

    def items(hashed):
        return {"passkey_300": [{"task": "passkey_300", "doc": 0, "hash": hashed, "acc": 1.0, "answers": [-1.0]}]}

    models = {"bytes": model("a"), "words": model("b"), "other bytes": model("a")}
    answered = {"bytes": items("1"), "words": items("2"), "other bytes": items("1")}
    assert [(pair["first"], pair["second"]) for pair in compare_all(models, answered)] == [("bytes", "other bytes")]
