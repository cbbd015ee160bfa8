"""The harness's own tasks on local data, scored by language models whose results are known beforehand."""

import json
import shutil
from pathlib import Path
from types import FunctionType

import pytest
import yaml
from lm_eval.api.model import LM

from flash_stu.errors import UserError
from flash_stu.evaluation.definitions import Definitions, TaskSpec, resolve_tasks
from flash_stu.evaluation.harness import load_tasks, run_task


class Chooser(LM):
    """Prefers the option whose index `choose` gives for a request."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose
        self.contexts = []

    def loglikelihood(self, requests):
        self.contexts += [request.args[0] for request in requests]
        return [(0.0 if request.idx == self.choose(request) else -1.0, False) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [-len(request.args[0].encode()) for request in requests]  # a nat per byte

    def generate_until(self, requests):
        raise NotImplementedError


def first_option():
    return Chooser(lambda request: 0)


def oracle(task):
    """Knows the right option. Where the options are contexts (winogrande), the task's text is its index."""

    def choose(request):
        member = task.harness["tasks"][request.task_name]
        gold = member.doc_to_text(request.doc) if member.multiple_input else member.doc_to_target(request.doc)
        return gold if isinstance(gold, int) else member.doc_to_choice(request.doc).index(gold)

    return Chooser(choose)


ITEMS_AND_FIRST_OPTION_SCORES = {
    "hellaswag": (10042, 0.2504),
    "piqa": (1838, 0.4951),
    "boolq": (3270, 0.3783),
    "winogrande": (1267, 0.4957),
    "commonsense_qa": (1221, 0.1957),
    "openbookqa": (500, 0.2760),
    "arc_easy": (2376, 0.2508),
    "arc_challenge": (1172, 0.2270),
}


def test_official_tasks_on_the_full_local_data(extra_data):
    """All of the paper's tasks but mmlu, which takes longest to load; one of its subjects is tested below."""
    specs = [spec for spec in resolve_tasks("paper")[0] if spec.name != "mmlu"]
    tasks = load_tasks(specs, extra_data / "eval_data")
    assert [task.spec.name for task in tasks] == list(ITEMS_AND_FIRST_OPTION_SCORES)
    for task in tasks:
        items, score = ITEMS_AND_FIRST_OPTION_SCORES[task.spec.name]
        result = run_task(first_option(), task)
        assert (result["items"], result["items_available"]) == (items, items)
        assert result["metric"] == "acc"
        assert result["value"] == pytest.approx(score, abs=5e-5)
        # standard error of a mean of zeros and ones
        assert result["stderr"] == pytest.approx((score * (1 - score) / (items - 1)) ** 0.5, rel=1e-3)
        assert run_task(oracle(task), task)["value"] == 1.0


def test_shots_come_from_the_split_the_task_names(mirror):
    for shots in (0, 5):
        (task,) = load_tasks([TaskSpec(name="mmlu_anatomy", shots=shots)], mirror)
        lm = first_option()
        result = run_task(lm, task)
        assert result["shots"] == shots
        assert result["value"] == pytest.approx(1 / 3)
        assert lm.contexts[0].count("dev ") == shots
        assert lm.contexts[0].endswith("test 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:")


def test_a_tag_is_the_plain_mean_of_its_members(tmp_path):
    for config, answers in (("ARC-Easy", "AAA"), ("ARC-Challenge", "BA")):
        folder = tmp_path / "allenai/ai2_arc" / config
        folder.mkdir(parents=True)
        choices = {"text": ["right", "wrong"], "label": ["A", "B"]}
        rows = [{"id": "", "question": "?", "choices": choices, "answerKey": answer} for answer in answers]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_tasks([TaskSpec(name="ai2_arc")], tmp_path)
    result = run_task(first_option(), task)
    assert (result["metric"], result["value"], result["stderr"]) == ("acc", 0.75, None)
    assert result["members"]["arc_challenge"]["acc"]["value"] == 0.5
    assert result["items"] == 5


def test_config_hash_follows_prompts_and_data_but_not_the_place(mirror, tmp_path):
    def config_hash(folder, shots=0):
        return load_tasks([TaskSpec(name="mmlu_anatomy", shots=shots)], folder)[0].config_hash

    before = config_hash(mirror)
    assert config_hash(mirror, shots=1) != before
    moved = mirror.rename(tmp_path / "elsewhere")
    assert config_hash(moved) == before
    test = moved / "cais/mmlu/anatomy/test.jsonl"
    test.write_text(test.read_text().replace("test 1?", "test one?"))
    assert config_hash(moved) != before


def test_config_hash_does_not_depend_on_where_functions_are_in_memory(tmp_path):
    folder = tmp_path / "allenai/winogrande/winogrande_xl"
    folder.mkdir(parents=True)
    row = {"sentence": "The cat saw the dog and _ ran.", "option1": "cat", "option2": "dog", "answer": "1"}
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    one, other = (load_tasks([TaskSpec(name="winogrande")], tmp_path)[0] for _ in range(2))
    config = other.harness["tasks"]["winogrande"].config
    before = config.doc_to_text
    config.doc_to_text = FunctionType(before.__code__, before.__globals__, before.__name__)  # elsewhere in memory
    assert str(config.doc_to_text) != str(before)
    assert one.config_hash == other.config_hash


def test_a_missing_file_of_the_mirror_is_named(mirror):
    (mirror / "cais/mmlu/anatomy/dev.jsonl").unlink()
    load_tasks([TaskSpec(name="mmlu_anatomy", shots=0)], mirror)  # examples are not needed
    with pytest.raises(UserError, match=r"mmlu_anatomy.*cais/mmlu/anatomy/dev\.jsonl, which does not exist"):
        load_tasks([TaskSpec(name="mmlu_anatomy", shots=5)], mirror)
    with pytest.raises(UserError, match=r"mmlu_abstract_algebra.*test\.jsonl, which does not exist"):
        load_tasks([TaskSpec(name="mmlu", shots=0)], mirror)
    with pytest.raises(UserError, match=r"super_glue/boolq/validation\.jsonl, which does not exist"):
        load_tasks([TaskSpec(name="boolq")], mirror)


def test_a_damaged_file_of_the_mirror_is_one_line(mirror):
    (mirror / "cais/mmlu/anatomy/test.jsonl").write_text('{"question": "cut o')
    with pytest.raises(UserError, match="'mmlu_anatomy' cannot be loaded") as caught:
        load_tasks([TaskSpec(name="mmlu_anatomy", shots=0)], mirror)
    assert "\n" not in str(caught.value)


def test_definitions_in_a_relative_folder_read_the_mirror(own_tasks, tmp_path, monkeypatch):
    definition = yaml.safe_load((own_tasks / "colours.yaml").read_text())
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks/colours.yaml"
    path.write_text(yaml.safe_dump(definition | {"dataset_path": "someone/colours", "dataset_kwargs": None}))
    data = tmp_path / "mirror/someone/colours/default/validation.jsonl"
    data.parent.mkdir(parents=True)
    shutil.copy(own_tasks / "colours.jsonl", data)
    monkeypatch.chdir(tmp_path)
    (task,) = load_tasks([TaskSpec(name="colours")], Path("mirror"), Path("tasks"))
    assert run_task(oracle(task), task)["items"] == 9


@pytest.mark.parametrize("content", ["", "\n", "x\n", "7\n", "[]\n", '{"text": "cut o'])
def test_damaged_data_of_a_mirror_are_one_line(content, mirror, capfd):
    (mirror / "cais/mmlu/anatomy/test.jsonl").write_text(content)
    with pytest.raises(UserError, match="mmlu_anatomy") as caught:
        load_tasks([TaskSpec(name="mmlu_anatomy", shots=0)], mirror)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_definition_whose_name_is_a_number(tmp_path):
    (tmp_path / "x.yaml").write_text("task: 7\ndataset_path: 7\n")
    with pytest.raises(UserError, match="unknown task 'mine'"):
        load_tasks([TaskSpec(name="mine")], include_path=tmp_path)


def test_mmlu_is_57_subjects():
    assert len(Definitions().leaves("mmlu")) == 57


def test_items_come_with_what_was_answered(mirror):
    (task,) = load_tasks([TaskSpec(name="mmlu_anatomy", shots=0)], mirror)
    samples = run_task(first_option(), task)["samples"]
    assert [(sample["task"], sample["doc"], sample["acc"]) for sample in samples] == [
        ("mmlu_anatomy", 0, 1.0),
        ("mmlu_anatomy", 1, 0.0),
        ("mmlu_anatomy", 2, 0.0),
    ]
    assert len({sample["hash"] for sample in samples}) == 3
    assert [answer[0] for answer in samples[1]["answers"]] == [0.0, -1.0, -1.0, -1.0]


def test_definitions_of_the_users_own_go_before_the_harness_own(own_tasks):
    (task,) = load_tasks([TaskSpec(name="colours")], include_path=own_tasks)
    result = run_task(oracle(task), task)
    assert (result["items"], result["value"]) == (9, 1.0)
    (group,) = load_tasks([TaskSpec(name="paints")], include_path=own_tasks)
    assert run_task(first_option(), group)["items"] == 9
    with pytest.raises(UserError, match="unknown task 'colour'; close matches: colours"):
        load_tasks([TaskSpec(name="colour")], include_path=own_tasks)


@pytest.mark.parametrize(("name", "match"), [("arc_eazy", "arc_easy"), ("embeded_bpb", "embedded_bpb")])
def test_unknown_tasks_are_answered_with_close_matches(name, match):
    with pytest.raises(UserError, match=f"unknown task '{name}'; close matches: .*{match}"):
        load_tasks([TaskSpec(name=name)])


def test_unknown_metric_names_the_allowed_ones(embedded_data):
    with pytest.raises(UserError, match="no metric 'f1'; allowed: acc"):
        load_tasks([TaskSpec(name="embedded_cloze", metric="f1")])


def test_embedded_tasks_score_what_they_must(embedded_data):
    bits, cloze = load_tasks([TaskSpec(name="embedded_bpb"), TaskSpec(name="embedded_cloze")])
    result = run_task(first_option(), bits)
    assert (result["metric"], result["higher_is_better"]) == ("bits_per_byte", False)
    assert result["value"] == pytest.approx(1.4426950408889634)  # a nat per byte
    assert result["items"] == 12
    assert run_task(oracle(cloze), cloze)["value"] == 1.0
    assert run_task(oracle(cloze), cloze, limit=5)["items"] == 5
