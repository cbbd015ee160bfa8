"""The tests' own launcher of processes."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import Child, ProcessError, run_processes


def add_ranks(offset: int) -> tuple[int, torch.Tensor]:
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(os.environ["LOCAL_RANK"]), total


def test_results_come_back_by_rank():
    assert [(rank, total.item()) for rank, total in run_processes(3, add_ranks, 10)] == [(0, 33), (1, 33), (2, 33)]


def fail_or_hang() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("one of us is wrong")
    time.sleep(600)


def test_a_failure_ends_the_others_and_shows_its_traceback():
    start = time.monotonic()
    with pytest.raises(ProcessError, match=r"process 1: Traceback[^$]*in fail_or_hang[^$]*one of us is wrong"):
        run_processes(2, fail_or_hang)
    assert time.monotonic() - start < 300


def test_time_out():
    with pytest.raises(TimeoutError, match=r"processes \[0, 1\] are not finished after 0.5 seconds"):
        run_processes(2, time.sleep, 100, timeout=0.5)


def test_a_killed_process_has_no_result():
    child = Child(time.sleep, 100)
    child.kill()
    with pytest.raises(ProcessError, match="exit code -9"):
        child.result()
    assert Child(os.getenv, "NAME", environment={"NAME": "value"}).result() == "value"
    assert Child(os.getenv, "CUDA_VISIBLE_DEVICES").result() == ""
