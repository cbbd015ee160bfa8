"""Counts the kernels that torch.compile makes of a function for an H100, on a machine without a GPU.

The function is traced on the CPU. Its graph is then given CUDA's devices, and Inductor lowers and schedules it as for a
GPU with the properties below; nothing is compiled or run.
"""

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

GPU = torch.device("cuda:0")
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=2**16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    L2_cache_size=50 * 2**20,
    gcnArchName="",  # of AMD
)


def count_kernels(function: Callable, *arguments: Any) -> int:
    """Returns how many kernels a call of the compiled function launches, those of matrix products included."""
    counts: list[int] = []

    def lower(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        counts.append(_count(graph, inputs))
        return graph

    backend = aot_autograd(
        inference_compiler=lower,
        fw_compiler=lower,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    torch._dynamo.reset()
    torch.compile(function, dynamic=False, fullgraph=True, backend=backend)(*arguments)
    (count,) = counts
    return count


def _count(original: torch.fx.GraphModule, inputs: list) -> int:
    graph = torch.fx.GraphModule(original, torch.fx.Graph())
    graph.graph = torch.fx.Graph()
    graph.graph.output(graph.graph.graph_copy(original.graph, nodes := {}))
    for old, new in nodes.items():
        new.meta = {**old.meta, "val": pytree.tree_map(_on_gpu, old.meta.get("val"))}
        new.args, new.kwargs = pytree.tree_map_only(torch.device, lambda _: GPU, (new.args, new.kwargs))
    inputs = [_on_gpu(tensor) for tensor in inputs]
    with ExitStack() as stack:
        for owner, name, value in (
            (scheduler, "has_triton", True),
            (torch.cuda, "is_available", True),
            (torch.cuda, "device_count", 1),
            (torch.cuda, "current_device", 0),
            (torch.cuda, "get_device_properties", H100),
            (torch.cuda, "get_device_capability", (9, 0)),
            (CudaInterface, "get_compute_capability", 90),
            (CudaInterface, "raise_if_triton_unavailable", None),
            (CudaInterface.Worker, "get_device_properties", H100),
            (CudaInterface, "get_device_properties", H100),
        ):
            stack.enter_context(mock.patch.object(owner, name, lambda *_, value=value, **__: value))
        stack.enter_context(V.set_fake_mode(next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        post_grad_passes(graph, True)
        lowered = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        stack.enter_context(V.set_graph_handler(lowered))
        lowered.run(*inputs)
        lowered._update_scheduler()
        return sum(not isinstance(node, scheduler.NopKernelSchedulerNode) for node in lowered.scheduler.nodes)


def _on_gpu(value: Any) -> Any:
    """Returns a fake tensor of the GPU like one of the CPU."""
    if not isinstance(value, FakeTensor):
        return value
    with unset_fake_temporarily():
        like = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(value.fake_mode, like, GPU)
