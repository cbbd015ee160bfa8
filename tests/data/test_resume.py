"""However a preparation is interrupted, going on gives the very files of one that was not."""

import os
import random
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from flash_stu.data import DataConfig, preparation, prepare, prepare_part, shards, tokenize
from flash_stu.errors import UserError


@pytest.fixture(params=["rows.parquet"])
def corpus(request, tmp_path, write_documents, monkeypatch):
    """Some 300 documents, cut into many chunks, several shards and frequent commits."""
    generator = random.Random(1)
    documents = [f"document {number} " * generator.randint(1, 9) for number in range(300)]
    if request.param == "lines":
        for number in range(5):
            write_documents(tmp_path / "lines" / f"{number}.jsonl", documents[number * 60 : number * 60 + 60])
    else:
        write_documents(tmp_path / request.param, documents)
    monkeypatch.setattr(tokenize, "SHARD_TOKENS", 4000)
    monkeypatch.setattr(tokenize, "_BATCH", 300)
    monkeypatch.setattr(tokenize, "_COMMIT_EVERY", 0.002)
    monkeypatch.setattr(tokenize, "_num_threads", lambda: 2)
    return str(tmp_path / request.param)


in_files_and_in_row_groups = pytest.mark.parametrize("corpus", ["lines", "rows.parquet"], indirect=True)


@pytest.fixture
def config(corpus, tmp_path):
    def make(cache: str) -> DataConfig:
        return DataConfig(dataset=corpus, validation_fraction=0.2, cache_dir=str(tmp_path / cache))

    return make


def files(directory: Path) -> dict[str, bytes]:
    """The shards and manifests of a cache entry."""
    paths = [*directory.glob("*/*.bin"), *directory.glob("*/manifest.json")]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def leftovers(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory.parent) if name != directory.name and not name.endswith(".lock")]


class Killer:
    """Kills this process before or after a number of the steps on which safety depends."""

    def __init__(self, after: float):
        self.steps = 0
        self._after = after
        for owner, name in [(os, "fsync"), (os, "replace"), (os, "rename"), (shards.ShardWriter, "add")]:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function):
        def step(*args):
            self._count()
            result = function(*args)
            self._count()
            return result

        return step

    def _count(self):
        self.steps += 1
        if self.steps > self._after:
            os.kill(os.getpid(), signal.SIGKILL)


def start(fork, target, *args):
    process = fork.Process(target=target, args=args)
    process.start()
    return process


def finish(process) -> int:
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def prepare_until_killed(config, after, sender=None):
    killer = Killer(after)
    prepare(config, progress=False)
    if sender is not None:
        sender.send(killer.steps)


@in_files_and_in_row_groups
def test_killed_at_random_moments(config, fork):
    receiver, sender = fork.Pipe(duplex=False)
    assert finish(start(fork, prepare_until_killed, config("whole"), float("inf"), sender)) == 0
    whole = prepare(config("whole"), progress=False)
    assert len(whole.train.manifest.shards) > 3

    steps = receiver.recv()
    generator = random.Random(0)
    kills = 0
    while finish(start(fork, prepare_until_killed, config("killed"), generator.randint(1, steps // 3))) != 0:
        kills += 1
        assert kills < 100
    assert kills >= 3
    resumed = prepare(config("killed"), progress=False)
    assert files(resumed.directory) == files(whole.directory)
    assert leftovers(resumed.directory) == []


def test_only_the_rest_is_done_again(config, fork, monkeypatch):
    """The second process writes the documents that the first one had not committed."""
    monkeypatch.setattr(tokenize, "_COMMIT_EVERY", 0)
    written = []
    original = shards.ShardWriter.add
    monkeypatch.setattr(shards.ShardWriter, "add", lambda *args: written.append(args[2]) or original(*args))
    prepare(config("whole"), progress=False)
    everything = sum(written)
    assert everything == 300
    assert finish(start(fork, prepare_until_killed, config("killed"), 200)) == -signal.SIGKILL
    written.clear()
    prepare(config("killed"), progress=False)
    assert 0 < sum(written) < 0.9 * everything


@pytest.fixture
def unfinished(config, fork) -> Path:
    """Files left by a killed preparation."""
    assert finish(start(fork, prepare_until_killed, config("killed"), 150)) == -signal.SIGKILL
    return next(Path(config("killed").cache_dir).glob(".*.unfinished"))


def test_what_was_committed_is_gone(config, unfinished):
    for path in unfinished.glob("*/*.bin"):
        os.truncate(path, 0)
    state = unfinished / "part-0000.json"
    with pytest.raises(UserError, match=rf"unfinished .*\.bin has lost its last \d+ bytes; delete {state} to do"):
        prepare(config("killed"), progress=False)
    state.unlink()
    assert files(prepare(config("killed"), False).directory) == files(prepare(config("whole"), False).directory)


def test_damaged_state(config, unfinished):
    (unfinished / "part-0000.json").write_text("{")
    with pytest.raises(UserError, match="part-0000.json is damaged; delete .*/part-0000.json to do this part again"):
        prepare(config("killed"), progress=False)
    (unfinished / "job.json").write_text("{")
    with pytest.raises(UserError, match=f"job.json is damaged; delete {unfinished} to start again"):
        prepare(config("killed"), progress=False)


def test_several_at_once_without_locks(config, fork, monkeypatch):
    """Processes whose locks do not reach each other write the same bytes, and the first to finish wins."""
    whole = prepare(config("whole"), progress=False)
    monkeypatch.setattr(preparation.Preparation, "_lock", lambda *args: nullcontext())
    original = shards.ShardWriter.add

    def slow_add(*args):
        time.sleep(random.random() / 200)
        original(*args)

    monkeypatch.setattr(shards.ShardWriter, "add", slow_add)
    Path(config("shared").cache_dir).mkdir()
    processes = [start(fork, prepare, config("shared"), False) for _ in range(3)]
    assert [finish(process) for process in processes] == [0, 0, 0]
    shared = prepare(config("shared"), progress=False)
    assert files(shared.directory) == files(whole.directory)


def prepare_part_until_killed(config, index, parts):
    Killer(random.Random(time.time_ns()).randint(20, 200))
    prepare_part(config, index, parts, progress=False)


@in_files_and_in_row_groups
def test_parts_in_any_order_and_killed(config, fork):
    whole = prepare(config("whole"), progress=False)
    order = [2, 0, 1]
    for done, index in enumerate(order, start=1):
        while finish(start(fork, prepare_part_until_killed, config("parts"), index, 3)) != 0:
            pass
        assert prepare_part(config("parts"), index, 3, progress=False) == sorted(order[done:])
    joined = prepare(config("parts"), progress=False)
    for split in ("train", "validation"):
        one, three = getattr(whole, split), getattr(joined, split)
        assert (one.num_documents, one.num_bytes) == (three.num_documents, three.num_bytes)
        assert one.window(0, len(one)).tolist() == three.window(0, len(three)).tolist()
    assert leftovers(joined.directory) == []


def test_all_parts_at_once(config, fork):
    whole = prepare(config("whole"), progress=False)
    processes = [start(fork, prepare_part, config("parts"), index % 4, 4, False) for index in range(8)]
    assert [finish(process) for process in processes] == [0] * 8
    joined = prepare(config("parts"), progress=False)
    assert joined.train.window(0, len(joined.train)).tolist() == whole.train.window(0, len(whole.train)).tolist()
    assert leftovers(joined.directory) == []
