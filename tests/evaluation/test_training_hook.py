"""Tasks during training: what is logged is what an evaluation of the exported model gives."""

import json

import datasets
import pytest
import torch
from processes import run_processes
from tiny_run import run_settings

from flash_stu.data import load_tokenizer
from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.evaluation import evaluate
from flash_stu.evaluation.definitions import TaskSpec
from flash_stu.evaluation.harness import load_tasks, run_task
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.training import Trainer, join_world
from flash_stu.training.evaluation_hook import TaskEvaluation, whole_copy
from flash_stu.training.run_config import EvaluationConfig, RunConfig


@pytest.fixture
def settings(own_tasks, documents, tmp_path):
    """A tiny run of 4 steps that runs a task after every second."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    settings = run_settings(tmp_path / "run", tmp_path / "text.jsonl", tmp_path / "cache")
    settings["data"]["validation_fraction"] = 0.3
    settings["train"] |= {"steps": 4, "validation_tokens": 96}
    settings["evaluation"] = {"tasks": "colours", "every": 2, "include_path": str(own_tasks)}
    return settings


def test_scores_are_logged_and_those_of_the_export(settings, own_tasks, tmp_path):
    config = RunConfig.model_validate(settings)
    with join_world(config) as world:
        assert Trainer(config, world).fit()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r["evaluation/colours/acc"] for r in records if "evaluation/colours/acc" in r}
    assert list(found) == [2, 4]
    results = evaluate([tmp_path / "run"], "colours", include_path=own_tasks, device="cpu", progress=False)
    assert results["models"]["run"]["tasks"]["colours"]["value"] == found[4]


def test_the_training_run_is_the_same_without(settings, tmp_path):
    losses = []
    for name, tasks in (("with", "colours"), ("without", None)):
        settings["output_dir"] = str(tmp_path / name)
        settings["evaluation"]["tasks"] = tasks
        config = RunConfig.model_validate(settings)
        with join_world(config) as world:
            Trainer(config, world).fit()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "loss" in record])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def answers(settings, strategy, own_tasks, cache):
    """The scores, and the copy's answers, in one of the processes of an untrained run."""
    datasets.config.HF_DATASETS_CACHE = cache
    settings["parallel"] = {"strategy": strategy}
    config = RunConfig.model_validate(settings)
    with join_world(config) as world:
        return scores_and_answers(Trainer(config, world), own_tasks)


def scores_and_answers(trainer, own_tasks):
    scores = trainer.evaluation.scores(trainer.model)
    (task,) = load_tasks([TaskSpec(name="colours")], include_path=own_tasks)
    copy = whole_copy(trainer.model, trainer.world.device, torch.float32)
    lm = EvaluatedLM(copy, load_tokenizer("bytes").to_transformers(), world=trainer.world)
    samples = run_task(lm, task)["samples"]
    return scores, [answer[0] for sample in samples for answer in sample["answers"]]


def test_every_strategy_gives_the_same_answers(settings, own_tasks):
    cache = datasets.config.HF_DATASETS_CACHE
    wanted = answers(settings, "none", own_tasks, cache)
    sharded = run_processes(2, answers, settings, "fsdp", own_tasks, cache)
    for scores, found in [answers(settings, "ddp", own_tasks, cache), *sharded]:
        assert scores == wanted[0]
        assert found == pytest.approx(wanted[1], abs=1e-4)


def test_a_copy_in_bfloat16_keeps_what_must_be_exact(tiny_model):
    model = tiny_model()
    copy = whole_copy(model, torch.device("cpu"), torch.bfloat16)
    for (name, value), (other, original) in zip(copy.state_dict().items(), model.state_dict().items(), strict=True):
        exact = name.endswith("phi")
        assert name == other and value.dtype == (torch.float32 if exact else torch.bfloat16)
        assert torch.equal(value, original if exact else original.bfloat16())
        assert value.data_ptr() != original.data_ptr()
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "colour"}, "evaluation.tasks: unknown task 'colour'; close matches: colours"),
        ({"include_path": "nowhere"}, "evaluation.include_path is 'nowhere', which is not a directory"),
        ({"tasks": "passkey_300"}, "evaluation.tasks: passkey_300 is longer than model.max_position_embeddings, 65"),
    ],
)
def test_bad_settings_are_found_before_training(changes, message, own_tasks):
    config = EvaluationConfig(**({"tasks": "colours", "include_path": str(own_tasks)} | changes))
    with pytest.raises(UserError, match=message):
        TaskEvaluation(config, World(0, 1, torch.device("cpu")), load_tokenizer("bytes"), longest=65)
