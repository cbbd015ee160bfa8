"""Whether a GPU computes what the CPU does: a small whole model forward and backward, trained, distilled, generating.

    python scripts/bench/agreement.py [--compile] [--output results/gpu]

The reference runs on the CPU in float32: the convolution as a direct sum, attention in bands, the loss in chunks.
Compared with it is every combination of back ends that is available here, in float32 and under bfloat16 autocast; then
three optimizer steps, the distilled model, and greedy generation (on a GPU as one CUDA graph). Differences are relative
to the reference's norm; of gradients the worst parameter's counts; of generation it is how far a chosen token's logit
is below the largest in the reference, in standard deviations of the logits. Exits with 1 if a difference is out of its
bound or a back end fails. Without a GPU the CPU's own back ends are compared. --compile also compiles, which is the
default on a GPU.

Bounds are multiples of the unit roundoff u of the products: 2^-9 in bfloat16, 2^-11 where flex_attention multiplies
float32 as TF32, and 2^-22 in float32, whose own is 2^-24, since there the sums are rounded like the factors. Roundings
add up like a random walk: four blocks of about sixteen give 8 u, here allowed three times; gradients pass through all
of them twice, and the worst of some forty parameters counts.
"""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import attempt
from plots import bars

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.arguments import output_directory
from flash_stu.devices import default_device
from flash_stu.distributed import World
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.generation.loop import generate_tokens
from flash_stu.generation.sampling import Sampling
from flash_stu.ops import attention, conv, cross_entropy
from flash_stu.results import environment, finish, page, save, table
from flash_stu.training import RunConfig
from flash_stu.training.initialization import build_model
from flash_stu.training.optimizer import build_optimizers
from flash_stu.training.parallel import parallelize
from flash_stu.training.step import train_step
from spectralds import distill

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "sliding_window": 100,
    "max_position_embeddings": 640,
    "num_filters": 16,
    "attn_logit_softcapping": 2.0,  # well inside the scores' range
}
BATCH, LENGTH, STEPS, GENERATED, STATES = 2, 512, 3, 64, 48
UNITS = {"float32": 2.0**-22, "bfloat16": 2.0**-9}
TF32 = 2.0**-11
BOUNDS = {"loss": 24, "logits": 24, "gradient": 96, "losses of steps": 24, "generated": 96}  # in u
REFERENCE = {"conv_backend": "direct", "attention_backend": "banded", "loss_backend": "chunked"}
CHOICES = {
    "conv_backend": conv.BACKENDS,
    "attention_backend": attention.BACKENDS,
    "loss_backend": cross_entropy.BACKENDS,
}


def build(device: torch.device, **changes: Any) -> FlashSTUForCausalLM:
    """The small model with the same weights wherever and with whatever back ends it is built; scores are large."""
    torch.manual_seed(0)
    model = FlashSTUForCausalLM(FlashSTUConfig(**(SHAPE | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter *= 2
    torch.nn.Module.to(model, device)
    return model


def text() -> torch.Tensor:
    """Random windows, (BATCH, LENGTH + 1)."""
    return torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def outcome(model: FlashSTUForCausalLM, dtype: str) -> dict[str, dict[str, torch.Tensor]]:
    """Loss, logits and gradients by name, on the CPU."""
    windows, device = text().to(model.device), model.device.type
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        out = model(windows[:, :-1], shift_labels=windows[:, 1:], use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": {"": out.loss.detach().cpu()}, "logits": {"": out.logits.detach().cpu()}, "gradient": gradients}


def differences(ours: dict[str, dict], exact: dict[str, dict]) -> dict[str, float]:
    """The worst relative difference of each kind; a missing or infinite tensor is infinitely different."""
    found = {}
    for kind, tensors in exact.items():
        found[kind] = max(_relative(ours[kind].get(name), tensor) for name, tensor in tensors.items())
    return found


def _relative(ours: torch.Tensor | None, exact: torch.Tensor) -> float:
    if ours is None:
        return torch.inf
    ours, exact = ours.double(), exact.double()
    difference = ((ours - exact).norm() / exact.norm()).item()
    return difference if difference == difference else torch.inf


def forward_and_backward(device: torch.device) -> Iterator[dict]:
    """Back ends that are not available, and every combination of those that are."""
    exact = {cap: outcome(build(CPU, **REFERENCE, attn_logit_softcapping=cap), "float32") for cap in (None, 2.0)}

    def compare(dtype: str, **backends: str) -> dict[str, float]:
        cap = None if backends["attention_backend"] == "sdpa" else 2.0
        model = build(device, **backends, attn_logit_softcapping=cap)
        return differences(outcome(model, dtype), exact[cap])

    for dtype in UNITS:
        usable: dict[str, list[str]] = {key: [] for key in CHOICES}
        for key, names in CHOICES.items():
            for name in names:
                if name == "auto":
                    continue
                backends = REFERENCE | {key: name}
                row = checked("model", dtype, lambda d=dtype, b=backends: compare(d, **b), backends)
                if "unavailable" in row:
                    yield row
                else:
                    usable[key].append(name)
        for names in itertools.product(*usable.values()):
            backends = dict(zip(usable, names, strict=True))
            yield checked("model", dtype, lambda d=dtype, b=backends: compare(d, **b), backends)


def checked(
    what: str, dtype: str, compare: Callable[[], dict[str, float]], backends: dict[str, str] | None = None
) -> dict:
    """One row: the differences, their bounds, and whether all are within; or why there are none."""

    def compared() -> dict[str, float] | str:
        try:
            return compare()
        except UserError as error:
            return str(error).partition(";")[0]

    row: dict = {"what": what, "dtype": dtype, "backends": backends or {}}
    found, reason = attempt(compared)
    if reason is not None:
        return row | {"failed": reason, "within": False}
    if isinstance(found, str):
        return row | {"unavailable": found}
    flex = row["backends"].get("attention_backend", "flex_attention" if torch.cuda.is_available() else "banded")
    unit = TF32 if dtype == "float32" and flex == "flex_attention" else UNITS[dtype]
    bounds = {kind: BOUNDS[kind] * unit for kind in found}
    return row | {"differences": found, "bounds": bounds, "within": all(found[kind] <= bounds[kind] for kind in found)}


def steps(device: torch.device, dtype: str, optimizer: str, compile: bool, exact: dict) -> dict[str, float]:
    """The losses of a few optimizer steps, as the trainer takes them, beside those of the CPU in float32."""

    def losses(device: torch.device, dtype: str, compile: bool, backends: dict) -> torch.Tensor:
        settings = {
            "output_dir": "unused",
            "model": SHAPE | backends,
            "data": {"dataset": "embedded", "tokenizer": "bytes"},
            "train": {
                "sequence_length": LENGTH,
                "global_batch_size": BATCH * LENGTH,
                "micro_batch_size": 1,
                "steps": STEPS,
                "dtype": dtype,
                "compile": compile,
            },
            "optimizer": {"name": optimizer, "learning_rate": 1e-3},
        }
        config, world = RunConfig.model_validate(settings), World(device=device)
        torch.compiler.reset()
        model = parallelize(build_model(config.architecture()), config, world)
        optimizers = build_optimizers(model, config.optimizer)
        return torch.tensor([train_step(model, optimizers, text(), config, world).loss for _ in range(STEPS)])

    if optimizer not in exact:
        exact[optimizer] = losses(CPU, "float32", False, REFERENCE)
    return {"losses of steps": _relative(losses(device, dtype, compile, {}), exact[optimizer])}


def generation(device: torch.device, dtype: str, states: int | None, compile: bool) -> dict[str, float]:
    """Greedy text on the device, looked at by the model on the CPU in float32; for a distilled model its logits too."""
    torch.compiler.reset()
    reference, model = build(CPU).eval(), build(device).eval()
    if states:
        reference, model = distill(reference, states), distill(model, states)
    torch.nn.Module.to(model, getattr(torch, dtype))
    prompt = text()[:, : LENGTH // 3]
    tokens = torch.stack(
        list(generate_tokens(model, prompt.to(device), GENERATED, Sampling(temperature=0), compile=compile))
    )
    written = torch.cat([prompt, tokens.t().cpu()], dim=1)
    with torch.no_grad():
        logits = reference(written[:, :-1]).logits
        own = model(written[:, :-1].to(device)).logits.float().cpu()
    at = logits[:, -GENERATED:]
    gap = (at.amax(-1) - at.gather(-1, written[:, -GENERATED:, None]).squeeze(-1)).max() / at.std()
    return {"logits": _relative(own, logits), "generated": gap.item()}


def rows(device: torch.device, compile: bool) -> Iterator[dict]:
    """All of them."""
    yield from forward_and_backward(device)
    exact: dict[str, torch.Tensor] = {}
    ways = (False, True) if compile else (False,)
    for dtype, optimizer, way in itertools.product(UNITS, ("adamw", "muon"), ways):
        what = f"{STEPS} steps, {optimizer}{', compiled' * way}"
        yield checked(what, dtype, lambda d=dtype, o=optimizer, w=way: steps(device, d, o, w, exact))
    graph = ", CUDA graph" * (device.type == "cuda")
    for dtype in UNITS:
        yield checked("generation, STU", dtype, lambda d=dtype: generation(device, d, None, False))
        for way in ways:
            what = f"generation, distilled{graph}{', compiled' * way}"
            yield checked(what, dtype, lambda d=dtype, w=way: generation(device, d, STATES, w))


def render(results: dict) -> str:
    """One table, and how many are out of their bounds."""
    header = ["what", "dtype", "convolution", "attention", "loss", *BOUNDS, "verdict"]
    cells = []
    for row in results["rows"]:
        backends = row["backends"].values() or ["", "", ""]
        found, bounds = row.get("differences", {}), row.get("bounds", {})
        figures = [f"{found[kind]:.1e} / {bounds[kind]:.0e}" if kind in found else "" for kind in BOUNDS]
        verdict = "ok" if row.get("within") else f"failed: {row['failed']}" if "failed" in row else "OUT OF BOUND"
        verdict = row.get("unavailable", verdict)
        cells.append([row["what"], row["dtype"], *backends, *figures, verdict])
    ran = [row for row in results["rows"] if "unavailable" not in row]
    bad = sum(not row["within"] for row in ran)
    summary = f"Difference / bound. {len(ran)} comparisons, {bad} out of their bounds or failed."
    return page(results, summary, table(header, cells))


def plot(results: dict, path: Path) -> None:
    shares = {}
    for number, row in enumerate(results["rows"]):
        if found := row.get("differences"):
            name = f"{number}: {row['what']}, {row['dtype']}, {'/'.join(row['backends'].values())}"
            shares[name] = [max(found[kind] / row["bounds"][kind] for kind in found)]
    bars({"worst difference over its bound": shares}, path, log=True)


def main() -> int:
    device = default_device()
    parser = ArgumentParser(__doc__)
    parser.add_argument("--compile", action="store_true", default=device.type == "cuda", help="compiled steps too")
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write agreement.json and .png there")
    args: Namespace = parser.parse_args()
    results = {"environment": environment(device), "rows": []}
    for row in rows(device, args.compile):
        results["rows"].append(row)
        save("agreement", results, args.output)
    finish("agreement", results, render, plot, args.output)
    return int(not all(row.get("within", True) for row in results["rows"]))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
