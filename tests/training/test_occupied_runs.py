"""Two starts on one run, and what processes leave that die."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_runs import assert_same, content, one_error, results
from processes import run_processes

from flash_stu import distributed
from flash_stu.errors import UserError
from flash_stu.locks import holding
from flash_stu.training import Trainer, join_world, load_config, metrics

REPOSITORY = Path(__file__).parents[2]


def test_a_second_start_names_who_has_the_run_and_destroys_nothing(start, run, whole):
    before = content(run)
    with holding(run, "output_dir"):
        one_error(start(), str(run), "in use", f"process {os.getpid()}", f"host {socket.gethostname()}")
    assert content(run) == before
    assert start()[0] == 0
    assert_same(run, whole)


def test_a_second_start_while_the_first_makes_its_directory(start, tmp_path):
    with holding(tmp_path / "run", "output_dir"):
        one_error(start(), "in use")
    assert sorted(os.listdir(tmp_path / "run")) == []
    assert start()[0] == 0  # the lock is free, and no reason to refuse the directory


def test_what_a_start_that_was_killed_at_once_leaves_is_a_run_directory(start, tmp_path, whole):
    run = tmp_path / "run"
    (run / ".config.yaml.flash_stu-0123abcd.tmp").mkdir(parents=True)
    (run / ".lock").touch()
    assert start()[0] == 0
    assert_same(run, whole)


def start_one_of_several(config_file: Path) -> str:
    config = load_config(config_file)
    try:
        with join_world(config) as world:
            Trainer(config, world).fit()
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}({error})"
    return "trained"


def test_a_second_start_with_several_processes_ends_on_all_of_them(config_file, run):
    before = content(run)
    with holding(run, "output_dir"):
        main, other = run_processes(2, start_one_of_several, config_file)
    assert "in use by process" in main and other == "SystemExit(2)"
    assert content(run) == before


def full_on_main(config_file: Path) -> str:
    """Train with a disk that takes no third line of metrics."""
    opened = metrics.Metrics.open

    def open_full(self, *arguments):
        opened(self, *arguments)
        write, lines = self._write, []

        def limited(step, **values):
            lines.append(step)
            if len(lines) == 3:
                os.dup2(os.open("/dev/full", os.O_WRONLY), self.file.fileno())
            write(step, **values)

        self._write = limited

    metrics.Metrics.open = open_full
    return start_one_of_several(config_file)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_full_for_one_of_several_processes_ends_all(config_file, tmp_path):
    main, other = run_processes(2, full_on_main, config_file)
    assert "metrics.jsonl cannot be written: No space left on device" in main and other == "SystemExit(2)"
    assert len(results(tmp_path / "run")) == 2


def test_workers_end_when_torchrun_is_killed(config_file, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["--config", config_file, "train.steps=1000000", "train.checkpoint_every=1000000"]
    with (tmp_path / "stderr").open("w") as stderr:
        torchrun = subprocess.Popen(
            [*launcher, REPOSITORY / "train.py", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    workers = []
    try:
        wait_until(lambda: len(results(tmp_path / "run")) > 3)
        workers = [int(word) for word in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]
        assert len(workers) == 2
        torchrun.kill()
        torchrun.wait()
        wait_until(lambda: not any(is_running(worker) for worker in workers))
    finally:
        torchrun.kill()
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert [line for line in lines if line.lower().startswith("error") or "Traceback" in line] == [
        f"error: torchrun (process {torchrun.pid}) has died; the processes that it started end too"
    ]
    wait_until(lambda: is_free(tmp_path / "run"))


def is_free(directory: Path) -> bool:
    try:
        with holding(directory, "output_dir"):
            return True
    except UserError:
        return False


def wait_until(happened: Callable[[], bool], timeout: float = 300.0) -> None:
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_torchrun_did_not_start_is_not_watched(monkeypatch):
    started = []
    monkeypatch.setattr(distributed.threading.Thread, "start", lambda thread: started.append(thread))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    distributed.end_with_launcher()
    assert started == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    distributed.end_with_launcher()
    assert len(started) == 1 and started[0].daemon
