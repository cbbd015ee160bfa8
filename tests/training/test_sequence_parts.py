"""Sequences in parts train like whole ones: in pieces on one device, and in shards over the ranks of a group."""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from processes import ProcessError, run_processes

from flash_stu import UserError
from flash_stu.distributed import World
from flash_stu.model.layers import attention
from flash_stu.model.layers.context import SequenceContext
from flash_stu.ops.parts import Piece, Shard
from flash_stu.training import Trainer, join_world, watchdog
from flash_stu.training.initialization import build_model
from flash_stu.training.metrics import read_metrics
from flash_stu.training.optimizer import build_optimizers
from flash_stu.training.parallel import check_context, parallelize
from flash_stu.training.run_config import ParallelConfig, load_config
from flash_stu.training.run_size import describe, handed_on
from flash_stu.training.step import train_step

BOUND = 1e-5
# every kind of layer once; odd lengths, one and two sequences at a time
VARIANTS = {
    "shared": ["train.sequence_length=201", "model.position_embedding=alibi"],
    "separate": ["train.sequence_length=135", "model.stu_branches=separate", "train.micro_batch_size=2"],
    "positive": ["train.sequence_length=150", "model.stu_branches=positive", "model.num_key_value_heads=1"],
    "hankel_l": ["train.sequence_length=151", "model.filter_basis=hankel_l", "model.position_embedding=none"],
    "taps": ["train.sequence_length=141", "model.stu_input_taps=3", "model.stu_output_taps=2"],
    "full": ["train.sequence_length=137", "model.stu_type=full", "model.stu_input_taps=2", "train.micro_batch_size=2"],
    "full taps": ["train.sequence_length=133", "model.stu_type=full", "model.stu_output_taps=2"],
    "lds": ["train.sequence_length=143", "model.lds_state_dim=8", "model.stu_input_taps=2"],
    "trainable lds": ["train.sequence_length=137", "model.lds_state_dim=8", "model.lds_trainable=true"],
    "full lds": ["train.sequence_length=133", "model.lds_state_dim=8", "model.stu_type=full"],
    "wide window": ["train.sequence_length=149", "model.sliding_window=100", "model.attn_logit_softcapping=null"],
    "few lags": ["train.sequence_length=23", "model.max_position_embeddings=23"],
    "very few lags": ["train.sequence_length=5", "model.max_position_embeddings=8"],
}
STEPS = dict.fromkeys(VARIANTS, 2)  # the second sees whether the gradients of the first were right
MANY_STEPS = STEPS | {"separate": 20, "taps": 20}  # which would add up what is wrong


@pytest.fixture
def config_of(config_file, settings):
    """Write the tiny config, with settings that do not amplify rounding.

    A norm of small embeddings would, and AdamW, which divides by gradients: by 1e-4 in 20 steps, as much as whole
    sequences in float32 then differ from float64, where parts and wholes agree to 2e-6.
    """
    settings["model"] |= {"max_position_embeddings": 256, "initializer_range": 0.5}
    settings["train"] |= {"micro_batch_size": 1}
    settings["optimizer"] |= {"learning_rate": 2e-3, "min_learning_rate": 1e-4, "eps": 1e-4}
    config_file.write_text(yaml.safe_dump(settings))
    return str(config_file)


def records(config_file: str, steps: dict[str, int], *overrides: str) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of so many steps of these variants, on batches of two sequences of random tokens."""
    with join_world(load_config(config_file, list(overrides))) as world:
        return records_in(world, config_file, steps, *overrides)


def records_in(world: World, config_file: str, steps: dict[str, int], *overrides: str) -> dict:
    """The same where the processes have met."""
    found = {}
    for name, number in steps.items():
        changes = VARIANTS[name]
        length = int(changes[0].partition("=")[2])
        config = load_config(config_file, [*changes, f"train.global_batch_size={2 * length}", *overrides])
        model = parallelize(build_model(config.architecture()), config, world)
        optimizers = build_optimizers(model, config.optimizer)
        generator, found[name] = torch.Generator().manual_seed(0), []
        for _ in range(number):
            batch = torch.randint(264, (2, length + 1), generator=generator)
            own = batch.chunk(world.data_size)[world.data_rank]
            result = train_step(model, optimizers, own, config, world)
            found[name].append((result.loss, result.grad_norm))
    return found


@pytest.fixture
def assert_alike(config_of, known):
    """Compare records with those of one process that takes sequences whole, by FFT."""

    def check(found: dict) -> None:
        if not known:
            known.update(records(config_of, MANY_STEPS, "model.conv_backend=fft"))
        for name, steps in found.items():
            for got, wanted in zip(steps, known[name][: len(steps)], strict=True):
                assert got == pytest.approx(wanted, rel=BOUND, abs=BOUND), name

    return check


@pytest.fixture(scope="module")
def known() -> dict:
    """The records to compare with, once they are there."""
    return {}


@pytest.mark.parametrize(("chunks", "steps"), [(2, MANY_STEPS), (7, STEPS)], ids=["2", "7"])
def test_pieces_train_like_whole_sequences(config_of, assert_alike, chunks, steps):
    assert_alike(records(config_of, steps, f"train.sequence_chunks={chunks}"))


@pytest.mark.parametrize(
    ("processes", "steps", "overrides"),
    [
        (2, MANY_STEPS, ["parallel.context=2", "parallel.strategy=ddp"]),
        (4, STEPS, ["parallel.context=4", "parallel.strategy=fsdp"]),
        (4, STEPS, ["parallel.context=2", "parallel.replicas=2", "train.micro_batch_size=1"]),
    ],
    ids=["2", "4", "2x2"],
)
def test_shards_train_like_whole_sequences(config_of, assert_alike, processes, steps, overrides):
    found = run_processes(processes, records, config_of, steps, *overrides)
    assert all(other == found[0] for other in found)
    assert_alike(found[0])


def transformed(config_file: str, *overrides: str) -> list[dict]:
    """Records with every kind of checkpointing, and in several processes compiled as traced, without C++."""
    every_exchange = {"taps": 2, "lds": 2}  # halos, states, and what ranks wait for
    with join_world(load_config(config_file, list(overrides))) as world:
        record = partial(records_in, world, config_file)
        ways = [f"train.activation_checkpointing={mode}" for mode in ("full", "selective")]
        found = [record(every_exchange, way, *overrides) for way in ways]
        if world.size > 1:
            torch.compile = partial(torch.compile, backend="aot_eager")
            found.append(record({"shared": 1}, "train.compile=true", *overrides))
        return found


def test_pieces_are_checkpointed(config_of, assert_alike):
    for found in transformed(config_of, "train.sequence_chunks=3"):
        assert_alike(found)


def test_shards_are_checkpointed_and_compiled(config_of, assert_alike):
    overrides = ["parallel.context=2", "parallel.strategy=ddp"]
    for found in run_processes(2, transformed, config_of, *overrides)[0]:
        assert_alike(found)


def states_under_autocast(config_file: str) -> list[torch.Tensor]:
    """The states before a rank, without autocast and under it."""
    with join_world(load_config(config_file, ["parallel.context=2"])) as world:
        past = Shard(8, 16, world.sequence_group).before(0)
        own, decay = torch.rand(2, 3), torch.linspace(0.5, 0.9, 3, dtype=torch.float64)
        states = [past.states(own, decay, 8)]
        with torch.autocast("cpu", torch.bfloat16):
            states.append(past.states(own, decay, 8))
    return states


def test_states_stay_float32_in_bfloat16(config_of):
    for plain, under_autocast in run_processes(2, states_under_autocast, config_of):
        assert plain.dtype == under_autocast.dtype == torch.float32 and torch.equal(plain, under_autocast)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bfloat16_in_parts_is_as_close_as_whole(config_of, strategy):
    """To float32: a product is rounded to 8 bits, a norm sums up more of them than a loss."""
    steps, bfloat16 = {"separate": 2, "full": 2, "lds": 2}, "train.dtype=bfloat16"
    exact = records(config_of, steps)
    parts = run_processes(2, records, config_of, steps, bfloat16, "parallel.context=2", f"parallel.strategy={strategy}")
    for found in (records(config_of, steps, bfloat16, "train.sequence_chunks=3"), parts[0]):
        assert found != exact
        for name, values in found.items():
            losses, norms = zip(*values, strict=True)
            exact_losses, exact_norms = zip(*exact[name], strict=True)
            assert losses == pytest.approx(exact_losses, rel=2**-8), name
            assert norms == pytest.approx(exact_norms, rel=2**-7), name


def order_of_exchange(config_file: str) -> list[str]:
    """The steps of an attention layer in a shard of 12 tokens with a window of 5, forward and backward."""
    events, start, attend = [], dist.batch_isend_irecv, attention.sliding_window_attention

    class Watched:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("waits")
            self.work.wait()

    def watched_start(operations):
        events.append("sends")
        return [Watched(work) for work in start(operations)]

    def watched_attend(query, *arguments, **options):
        y, what = attend(query, *arguments, **options), f"{query.shape[2]} queries"
        events.append(what)
        y.register_hook(lambda _: events.append(what))
        return y

    dist.batch_isend_irecv, attention.sliding_window_attention = watched_start, watched_attend
    config = load_config(config_file, ["parallel.context=2", "model.sliding_window=5"])
    with join_world(config) as world:
        layer = attention.SlidingWindowAttention(config.architecture())
        x = torch.randn(1, 12, layer.config.hidden_size, requires_grad=True)
        context = SequenceContext(past=Shard(12, 24, world.sequence_group).before(0))
        layer.whole(x, context).sum().backward()
    return events


def test_the_halo_of_attention_travels_while_the_rest_is_computed(config_of):
    expected = ["sends", "8 queries", "waits", "4 queries"]  # and in the backward pass
    expected += ["4 queries", "sends", "8 queries", "waits"]
    assert run_processes(2, order_of_exchange, config_of) == [expected] * 2


def train(config_file: str, *overrides: str) -> bool:
    """Train in this process, one of several."""
    config = load_config(config_file, list(overrides))
    with join_world(config) as world:
        return Trainer(config, world).fit()


def test_a_run_goes_on_with_another_number_of_ranks(config_of, tmp_path):
    run = tmp_path / "run"
    assert train(config_of, f"output_dir={tmp_path / 'alone'}")
    assert all(run_processes(2, train, config_of, "parallel.context=2", "train.steps=6"))
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-6")
    assert train(config_of, "train.sequence_chunks=3")
    keys = ("loss", "grad_norm", "validation_loss")
    found, expected = (
        [[record[key] for key in keys if key in record] for record in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, tmp_path / "alone")
    )
    assert len(found) == len(expected) > 6
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, rel=BOUND, abs=BOUND)


def train_until_killed(config_file: str, *overrides: str) -> bool:
    """Train in this process; the second of two is killed at step 3."""
    train_step = Trainer._train_step

    def step(self):
        if self.step == 3 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(self)

    Trainer._train_step, watchdog._LONGEST_INTERVAL = step, 0.3
    with open(f"{config_file}.stderr", "a") as sys.stderr:
        return train(config_file, *overrides)


def test_a_killed_rank_ends_the_job_by_name(config_of):
    """The others name it, long before they would call it stalled."""
    with pytest.raises(ProcessError) as end:
        run_processes(2, train_until_killed, config_of, "parallel.context=2", grace=100)
    assert str(end.value).splitlines() == [
        "process 1: a process ended with exit code -9",
        "process 0: a process ended with exit code 3",
    ]
    told = [line for line in Path(f"{config_of}.stderr").read_text().splitlines() if not line.startswith("token")]
    assert len(told) == 1 and told[0].startswith("error: a connection to a process broke; this ends it. process 1 of 2")
    assert told[0].endswith("does not respond")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.context=2", "train.sequence_chunks=2"], "only one of them may be above 1"),
        (["parallel.context=2", "data.separate_documents=true"], "parallel.context is 2, and data.separate_documents"),
        (
            ["parallel.context=2", "model.conv_backend=fft"],
            "'fft', which needs whole sequences; allowed: auto",
        ),
        (
            ["train.sequence_chunks=2", "model.filter_basis=tensor", "model.tensor_filters=2"],
            "model.filter_basis 'tensor'",
        ),
        (["train.sequence_chunks=0"], "train.sequence_chunks is 0"),
    ],
)
def test_what_parts_do_not_go_with(load, overrides, words):
    with pytest.raises(UserError, match=words):
        load(*overrides)


def test_groups_are_whole(load, fit):
    with pytest.raises(UserError, match="parallel.context is 3; it must divide the 1 processes"):
        fit(load("parallel.context=3"))
    with pytest.raises(UserError, match="parallel.context is 4; it must divide the 4 processes / 2 replicas"):
        check_context(ParallelConfig(context=4, replicas=2), 4)
    check_context(ParallelConfig(context=2, replicas=2), 4)


@pytest.mark.parametrize("variant", ["shared", "separate", "full lds", "wide window", "few lags"])
def test_what_a_piece_hands_on_is_of_the_size_that_is_estimated(config_of, variant):
    length = int(VARIANTS[variant][0].partition("=")[2])
    config = load_config(config_of, [*VARIANTS[variant], f"train.global_batch_size={2 * length}"])
    model, carried = build_model(config.architecture()).to_empty(device="cpu"), {}
    for start in (0, length // 4 * 2):  # the last has all before it that a third would ask for
        piece = Piece(start, length, carried)
        ids = torch.zeros(1, length // 4 * 2, dtype=torch.long)
        model(input_ids=ids, part=piece, use_cache=False, skip_logits=True)
        carried = piece.left
    for layer, kind in enumerate(model.config.block_types):
        found = sum(tensor.nbytes for tensor in carried[layer])
        assert found == sum(handed_on(model.config, kind, 4, "chunked")), kind


def test_the_configuration_of_a_million_tokens_fits_eight_gpus():
    config = load_config(Path(__file__).parents[2] / "configs" / "flash_stu_340m_1m.yaml")
    summary = describe(config, 8)
    assert "1,048,576 tokens = 1 sequences of 1,048,576 = 1 groups of 8 processes" in summary
    assert float(summary.split("memory estimate")[1].split()[0]) < 80
