"""Task lists and suites."""

import pytest

from flash_stu.errors import UserError
from flash_stu.evaluation.definitions import TaskSpec, resolve_tasks

PAPER = [
    *("mmlu", "hellaswag", "piqa", "boolq", "winogrande"),
    *("commonsense_qa", "openbookqa", "arc_easy", "arc_challenge"),
]


def test_the_paper_suite_is_its_table_in_order():
    specs, published = resolve_tasks("paper")
    assert [spec.name for spec in specs] == PAPER
    assert list(published) == ["Flash STU 340M", "SpectraLDS 340M", "Transformer 340M"]
    averages = [sum(row[name] for name in PAPER) / len(PAPER) for row in published.values()]
    assert [round(average, 2) for average in averages] == [39.20, 39.03, 38.96]  # as the paper prints them
    assert [spec.shots for spec in specs] == [5] + [0] * 8
    assert {spec.metric for spec in specs} == {"acc"}


def test_names_suites_and_files_mix(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tasks:\n  - {name: lambada_openai, shots: 2}\n")
    specs, published = resolve_tasks(f"wikitext, {path},")
    assert specs == [TaskSpec(name="wikitext"), TaskSpec(name="lambada_openai", shots=2)]
    assert published == {}
    assert [spec.name for spec in resolve_tasks(None)[0]] == ["embedded_bpb", "embedded_cloze"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [{name: a, shot: 1}]", "tasks.0.shot: Extra inputs"),
        ("tasks: [{name: a, shots: -1}]", "tasks.0.shots: .*greater than or equal to 0"),
        ("tasks: [{name: a, shots: five}]", "tasks.0.shots: .*integer"),
        ("tasks: []", "tasks: List should have at least 1"),
        ("{tasks: [{name: a}], published: {theirs: [1.0, 2.0]}}", "'theirs' has 2 values for 1 tasks"),
        ("- a", "the file: "),
        ("tasks: [", "not a YAML file"),
    ],
)
def test_a_bad_suite_file_is_refused_by_key(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        resolve_tasks([str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("", "names no task"),
        (" , ", "names no task"),
        ("paper,piqa", "'piqa' is asked for twice"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_bad_task_lists_are_refused(tasks, message):
    with pytest.raises(UserError, match=message):
        resolve_tasks(tasks)
