"""The one-token step of generation on tensors that stay where they are, so that a CUDA graph can replay it.

Launching a step's kernels one by one takes longer than running them; a graph launches all of them at once. It replays
the same kernels on the same memory, so whatever changes from token to token has to live in fixed tensors: the
token, its position, and the layers' states. Layers change those in place, in turns where a state has several tensors:
a system with two slots writes one of them at every second token, so there are as many graphs as slots.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from flash_stu.errors import UserError
from flash_stu.model.cache import FlashSTUCache, state_tensors
from flash_stu.model.modeling import FlashSTUForCausalLM


class StaticStep:
    """Advances one batch of texts token by token; on a GPU as CUDA graphs.

    Args:
        model: a causal model in eval mode without STU layers: those remember more with every token.
        past: its cache after the prompts; the states in it are taken over and change from now on.
        compile: fuse the kernels with torch.compile first, which takes about a minute and pays off for long texts.

    Raises:
        UserError: for a model with STU layers.
    """

    def __init__(self, model: FlashSTUForCausalLM, past: FlashSTUCache, compile: bool = False) -> None:
        if model.config.uses_stu:
            raise UserError("a compiled step needs states of constant size; this model has STU layers: distill it")
        self.model = model
        self.states = tuple(past.states)
        self.tokens = torch.zeros(past.batch_size, 1, dtype=torch.long, device=model.device)
        self.position = torch.full((1,), past.seq_length, device=model.device)
        self.padding = past.padding
        self.step = _compiled_step() if compile else _step
        self.graphs: list[tuple[torch.cuda.CUDAGraph, torch.Tensor]] = []
        self.done = 0
        if model.device.type == "cuda":
            self._capture()

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits (batch, vocab_size) after one more token per row, (batch, 1), valid until the next call."""
        self.tokens.copy_(tokens)
        if not self.graphs:
            return self._run()
        graph, logits = self.graphs[self.done % len(self.graphs)]
        self.done += 1
        graph.replay()
        return logits

    def _run(self) -> torch.Tensor:
        logits, self.states = self.step(self.model, self.tokens, self.position, self.padding, self.states)
        return logits

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield self.position
        for state in self.states:
            yield from state_tensors(state)

    @torch.no_grad()
    def _capture(self) -> None:
        before = [(tensor, tensor.clone()) for tensor in self._tensors()]
        # Kernels are chosen, compiled and loaded in runs before the capture, on a stream of their own
        # (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._cycle(self._run)
        torch.cuda.current_stream().wait_stream(aside)
        self.graphs = self._cycle(self._record)
        for tensor, value in before:
            tensor.copy_(value)

    def _record(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run()
        return graph, logits

    def _cycle(self, run: Callable[[], Any]) -> list[Any]:
        """Run steps until every state's tensors are in the order in which they began; returns their results."""
        first, results = [tensor.data_ptr() for tensor in self._tensors()], [run()]
        while [tensor.data_ptr() for tensor in self._tensors()] != first:
            results.append(run())
        return results


def _step(
    model: FlashSTUForCausalLM,
    tokens: torch.Tensor,
    position: torch.Tensor,
    padding: torch.Tensor | None,
    states: tuple[Any, ...],
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Returns logits and states after one more token, in the memory of the states before; position is advanced."""
    past = FlashSTUCache(len(states))
    past.states, past.padding = list(states), padding
    past.seq_length = position  # pyright: ignore[reportAttributeAccessIssue] - a number elsewhere
    logits = model(tokens, past_key_values=past).logits[:, -1]
    return logits, tuple(_settled(old, new, old) for old, new in zip(states, past.states, strict=True))


def _settled(old: Any, new: Any, state: Any) -> Any:
    """Returns `new`, any tensor that is none of the layer's state before copied to where `old` is."""
    if isinstance(new, torch.Tensor):
        if any(new is tensor for tensor in state_tensors(state)):
            return new
        return old.copy_(new)
    fields = [_settled(before, after, state) for before, after in zip(old, new, strict=True)]
    return type(new)(*fields) if hasattr(new, "_fields") else tuple(fields)


@cache
def _compiled_step() -> Callable[..., Any]:
    return torch.compile(_step, dynamic=False)
