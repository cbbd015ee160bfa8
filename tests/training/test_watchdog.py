"""A stalled process is named: by its silence, by its place in the program, or by where all are."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from flash_stu.distributed import World
from flash_stu.training import watchdog
from flash_stu.training.watchdog import Post, Watchdog, describe_stall


def test_a_process_whose_heart_stopped_is_named():
    posts = {r: Post(10, 40, "step 7: micro batch 1 of 2", f"node{r}", "run (autograd.py)") for r in range(3)}
    text = describe_stall(posts, [1], 4)
    assert "process 1 of 4 (host node1, step 7: micro batch 1 of 2) does not respond" in text
    assert "process 0" not in text


def test_a_process_that_never_posted_is_named():
    assert "process 1 of 2 does not respond" in describe_stall({0: Post(1, 1, "a", "h", "f")}, [1], 2)


def test_the_processes_behind_the_others_are_named():
    posts = {r: Post(10, 40 - (r == 2), f"step {r}", "node", f"frame{r}") for r in range(4)}
    text = describe_stall(posts, [], 4)
    assert "process 2 of 4 (host node, step 2) is in frame2" in text and "frame1" not in text


def test_without_a_culprit_everyones_place_is_told():
    posts = {r: Post(10, 40, "step 7", "node", "wait" if r else "read") for r in range(3)}
    assert describe_stall(posts, [], 3).endswith("All processes got to step 7; they are: 0 in read; 1, 2 in wait")


def test_two_processes_of_which_one_stands_still(monkeypatch, capsys):
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "launcher_store", lambda prefix: store)
    stalled, ends = threading.Event(), []
    monkeypatch.setattr(os, "_exit", ends.append)  # of threads that play processes

    def process(rank: int) -> None:
        world = World(rank, 2, torch.device("cpu"))
        with Watchdog(world, timeout=3.0) as dog:
            for step in range(6):
                dog.mark(f"step {step}: reading")
                if rank == 1 and step == 3:
                    stalled.wait()  # the other goes on to wait for this one
                time.sleep(0.1)
                dog.mark(f"step {step}: computing")
                if rank == 0 and step == 3:
                    stalled.wait()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while len(ends) < 2 and time.monotonic() - start < 120:
        time.sleep(0.05)
    stalled.set()
    for thread in threads:
        thread.join()
    assert ends == [watchdog.EXIT_STATUS] * 2
    told = capsys.readouterr().err
    assert told.startswith("error: training has stood still for 3 s; this ends it. process 1 of 2")
    assert told.count("\n") == 1 and "step 3: reading" in told and "wait" in told


def test_a_process_that_gets_on_is_left_alone(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "launcher_store", lambda prefix: store)
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with Watchdog(World(0, 2, torch.device("cpu")), timeout=3.0) as dog:
        for step in range(45):
            dog.mark(f"step {step}")
            time.sleep(0.1)
    assert ends == []


def test_a_lost_store_is_said(monkeypatch, capsys):
    """It is process 0's where no launcher has one."""
    store, ends = dist.HashStore(), []
    monkeypatch.setattr(watchdog, "launcher_store", lambda prefix: store)
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    with pytest.raises(RuntimeError), Watchdog(World(1, 2, torch.device("cpu")), timeout=3.0) as dog:
        monkeypatch.setattr(dog, "_read", lost)
        raise RuntimeError("gloo/transport/tcp/pair.cc: connection closed by peer")
    told = "error: a connection to a process broke; this ends it. The store at node7, of torchrun or process 0, "
    assert ends == [watchdog.EXIT_STATUS] and capsys.readouterr().err == told + "does not respond\n"


def lost():
    raise dist.DistNetworkError


def test_other_errors_pass(monkeypatch, capsys):
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "launcher_store", lambda prefix: store)
    with pytest.raises(RuntimeError, match="shapes"), Watchdog(World(1, 2, torch.device("cpu")), timeout=3.0):
        raise RuntimeError("shapes do not fit")
    assert not capsys.readouterr().err
