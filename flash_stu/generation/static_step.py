"""The one-token step of generation on tensors that stay where they are, so that a CUDA graph can replay it.

Launching a step's kernels one by one takes longer than running them; a graph launches all of them at once. It replays
the same kernels on the same memory, so whatever changes from token to token has to live in fixed tensors: the
token, its position, and the layers' states, into which the states that the layers return are copied.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from flash_stu.errors import UserError
from flash_stu.model.cache import FlashSTUCache, state_tensors
from flash_stu.model.modeling import FlashSTUForCausalLM


class StaticStep:
    """Advances one batch of texts token by token; on a GPU as one CUDA graph.

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
        self.position = torch.full((1, 1), past.seq_length, device=model.device)
        self.step = _compiled_step() if compile else _step
        self.graph = None
        if model.device.type == "cuda":
            self._capture()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits (batch, vocab_size) after one more token per row, (batch, 1); overwritten by the next call."""
        self.tokens.copy_(tokens)
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.logits

    def _run(self) -> torch.Tensor:
        return self.step(self.model, self.tokens, self.position, self.states)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield self.position
        for state in self.states:
            yield from state_tensors(state)

    def _capture(self) -> None:
        before = [tensor.clone() for tensor in self._tensors()]
        # Kernels are chosen, compiled and loaded in runs before the capture, on a stream of their own
        # (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._run()
        for tensor, value in zip(self._tensors(), before, strict=True):
            tensor.copy_(value)


def _step(
    model: FlashSTUForCausalLM, tokens: torch.Tensor, position: torch.Tensor, states: tuple[Any, ...]
) -> torch.Tensor:
    """Returns logits after one more token; position and states are advanced in place."""
    past = FlashSTUCache(len(states))
    past.states = list(states)
    logits = model(tokens, position_ids=position, past_key_values=past).logits[:, -1]
    for old, new in zip(states, past.states, strict=True):
        # A state's tensors are ordered so that one that moves up in it is read before it is overwritten.
        for target, value in zip(state_tensors(old), state_tensors(new), strict=True):
            if target is not value:
                target.copy_(value)
    position += 1
    return logits


@cache
def _compiled_step() -> Callable[..., torch.Tensor]:
    return torch.compile(_step, dynamic=False)
