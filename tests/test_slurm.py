"""The Slurm scripts, with a scheduler played by two shell scripts: srun starts the tasks, scontrol takes notes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & echo $! >> "$SLURM_SUBMIT_DIR/tasks"
done
status=0; for job in $(jobs -p); do wait "$job" || status=$?; done; exit $status
"""
SCONTROL = """#!/bin/bash
case $1 in show) printf 'localhost\\nother\\n' ;; requeue) echo "$2" >> "$SLURM_SUBMIT_DIR/requeued" ;; esac
"""


@pytest.fixture
def cluster(tmp_path):
    """A checkout on a cluster of one node, where `submit(script, *arguments)` starts a job's script."""
    for name in ("flash_stu", "spectralds", "scripts", "train.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text("")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    variables = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{Path(yaml.__file__).parents[1]}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_TASK_COUNT": "1",
    }

    def submit(script: str, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "slurm" / script), *map(str, arguments)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    submit.folder = tmp_path
    return submit


@pytest.fixture
def config(cluster) -> Path:
    """A run that does not end by itself."""
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    settings["output_dir"] = str(cluster.folder / "run")
    settings["model"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings["model"] |= {"max_position_embeddings": 32, "sliding_window": 8, "num_filters": 4}
    settings["data"] = {"dataset": str(cluster.folder / "text.txt"), "cache_dir": str(cluster.folder / "cache")}
    settings["data"]["validation_fraction"] = 0.3
    (cluster.folder / "text.txt").write_text("<|endoftext|>\n".join(f"a document, number {i}\n" * 9 for i in range(40)))
    settings["train"] |= {"sequence_length": 32, "global_batch_size": 64, "micro_batch_size": 1, "steps": 10**6}
    settings["train"] |= {"validation_tokens": 64, "checkpoint_every": 100}
    settings["optimizer"] |= {"warmup_steps": 1, "schedule": "constant"}  # whose length may change
    settings["wandb"] = {"mode": "disabled"}
    path = cluster.folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_job_that_is_cut_short_goes_back_into_the_queue_and_finishes(cluster, config):
    folder = cluster.folder
    job = cluster("one_node.sbatch", config)
    wait_for(lambda: (folder / "run" / "metrics.jsonl").is_file() and len(lines(folder / "run" / "metrics.jsonl")) > 3)
    os.kill(int(lines(folder / "tasks")[0]), signal.SIGUSR1)  # as --signal asks, a while before the time is up
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "the same command continues" in output
    assert lines(folder / "requeued") == ["4711"]

    done = json.loads(lines(folder / "run" / "metrics.jsonl")[-1])["step"]
    job = cluster("several_nodes.sbatch", config, f"train.steps={done + 5}")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "continuing" in output and (folder / "run" / "final" / "config.json").is_file()
    assert lines(folder / "requeued") == ["4711"]


def test_data_is_prepared_in_an_array_job(cluster, config):
    job = cluster("prepare_data.sbatch", config)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert list((cluster.folder / "cache").glob("*/train/manifest.json"))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
