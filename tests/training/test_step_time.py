"""The estimate of a step's time: its counts against operators that run, and its sums by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flash_stu.training import load_config
from flash_stu.training.run_size import describe
from flash_stu.training.step_time import DATA_SHEETS, PARTS, DataSheet, Measured, Work, count_work, estimate_step

CPU = torch.device("cpu")
QUICK = [
    "model.stu_branches=shared",
    "model.conv_backend=fft",
    "train.micro_batch_size=2",
    "train.global_batch_size=1024",
]


@pytest.fixture
def config():
    return lambda *changes: load_config("configs/quickstart.yaml", [*QUICK, *changes])


def linear_flops(work: Work) -> float:
    return sum(6 * tokens * inputs * outputs for tokens, inputs, outputs in work.linears)


def test_linear_layers_are_those_that_run(config, tiny_model):
    """The forward pass of a model of the config's shape, counted by PyTorch; a step is three times that."""
    quick = config("train.sequence_length=64", "train.global_batch_size=128")
    model = tiny_model(**quick.model)
    windows = torch.randint(0, 256, (2, 65))
    counter = FlopCounterMode(display=False, depth=None)
    with counter, torch.no_grad():
        model(windows[:, :-1], use_cache=False)
    seen = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    work = count_work(quick, fused=False)
    ran = sum(count for name, count in seen.items() if name.endswith("mlp"))
    assert linear_flops(work["MLP"]) == 3 * ran
    names = ("mixer.in_proj", "mixer.qkv_proj", "mixer.o_proj")
    ran = sum(count for name, count in seen.items() if name.endswith(names))
    assert linear_flops(work["projections"]) == 3 * ran
    assert linear_flops(work["head + loss"]) == 3 * seen["FlashSTUForCausalLM.lm_head"]


def test_a_data_sheet_adds_up_products_and_bytes():
    sheet = DataSheet("a", flops=1000.0, bandwidth=10.0)
    assert sheet.seconds(Work(bytes=20, strided=10, cached=10)) == 4
    assert sheet.seconds(Work(flops=500)) == 0.5
    assert DataSheet("b", 10.0, 1e9).seconds(Work(products=[(3, 2, 3, 5)])) == 3 * 2 * 2 * 3 * 5 / 10
    assert sheet.seconds(Work(products=[(1, 1, 5, 1)])) == pytest.approx(2 * 11 / 10)  # by its traffic
    assert DataSheet("b", 10.0, 1e9).seconds(Work(linears=[(2, 3, 5)])) == 6 * 2 * 3 * 5 / 10


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_multiply_all_but_the_optimizer(config, optimizer):
    changes = f"optimizer.name={optimizer}"
    one, four = (
        estimate_step(config(changes, f"train.global_batch_size={n * 512}"), 1, DATA_SHEETS["H100"]) for n in (1, 4)
    )
    assert set(one) == set(PARTS) and min(one.values()) > 0
    assert four == {name: pytest.approx(value * (1 if name == "optimizer" else 4)) for name, value in one.items()}


def test_the_340m_step_is_no_faster_than_its_flops():
    config = load_config("configs/flash_stu_340m.yaml", ["train.global_batch_size=32768"])
    step = sum(estimate_step(config, 1, DATA_SHEETS["H100"]).values())
    assert 2.1e9 * 32768 / 798e12 < step < 3 * 2.1e9 * 32768 / 798e12


def test_measured_ceilings_time_every_shape_once(config):
    ticks = iter(range(10**9))
    here = Measured(CPU, torch.float32, lambda: float(next(ticks)))
    step = estimate_step(config(), 1, here)
    before = next(ticks)
    assert estimate_step(config(), 1, here) == step and next(ticks) == before + 1
    here.again()
    assert next(ticks) > before + 20
    # every call takes a tick: 2 GFLOP are timed as eight times a quarter
    assert here.seconds(Work(products=[(1, 1024, 1024, 1024)])) == 8


@pytest.mark.parametrize(
    "changes", [["model.conv_backend=chunked"], ["train.dtype=bfloat16"], ["model.layer_types=[sliding_attention]"]]
)
def test_a_dry_run_prints_it(config, changes):
    text = describe(config("model.num_hidden_layers=1", "train.sequence_length=64", *changes), 1)
    rows = {line.split("  ")[0]: line.split() for line in text.partition("estimate, ms")[2].splitlines()[1:]}
    assert set(rows) == {*PARTS, "step", "tokens/s", "MFU"}
    assert len(rows["step"]) == 1 + 1 + len(DATA_SHEETS) and len(rows["MFU"]) == 1 + len(DATA_SHEETS)
