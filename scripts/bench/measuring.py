"""Parts that the benchmarks share: clocks, taking turns, surviving what fails, and the device's rates."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def forward_and_backward(function: Callable, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Seconds of function(*inputs), and of that with the gradients of those inputs that want one."""
    device = inputs[0].device
    _wait(device)
    start = time.perf_counter()
    y = function(*inputs)
    _wait(device)
    forward = time.perf_counter() - start
    torch.autograd.grad(y, [t for t in inputs if t.requires_grad], torch.ones_like(y))
    _wait(device)
    return forward, time.perf_counter() - start


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Call a function; returns its result and None, or None and in one line why it failed, its memory free again."""
    try:
        return function(), None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        short = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in lines[0]  # the latter on a CPU
        reason = "out of memory" if short else f"{type(error).__name__}: {lines[0]}"[:160]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason


def take_turns(
    functions: Mapping[str, Callable[[], object]], repeats: int, limit: float, failed: dict[str, str] | None = None
) -> dict[str, list]:
    """Results of calling every function `repeats` times in turn, so that a drifting machine hits all alike.

    A first round warms up. One that has taken `limit` seconds in three calls or more is not called again. With `failed`
    one that raises, out of memory or because a kernel does not compile, is left out and the reason put there.
    """
    results: dict[str, list] = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    for turn in range(repeats + 1):
        for name, function in functions.items():
            if name not in results or (spent[name] > limit and len(results[name]) >= 3):
                continue
            start = time.perf_counter()
            if failed is None:
                result = function()
            else:
                result, reason = attempt(function)
                if reason is not None:
                    failed[name] = reason
                    del results[name]
                    continue
            if turn:
                spent[name] += time.perf_counter() - start
                results[name].append(result)
    return results


def device_rates(device: torch.device, dtype: torch.dtype, repeats: int = 9) -> dict[str, float]:
    """FLOP/s of a large matrix product in `dtype` and bytes/s of a large copy, the best of several."""
    side, count = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: factors[0] @ factors[1], "copy": lambda: target.copy_(source)}
    taken = take_turns({name: lambda f=f: seconds(f, device) for name, f in calls.items()}, repeats, 5.0)
    return {"flops": 2 * side**3 / min(taken["product"]), "bytes": 2 * count / min(taken["copy"])}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
