"""Linear layers whose initial weights are not those of nn.Linear: the draw depends on the depth, or on the parts."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class DepthScaledLinear(nn.Linear):
    """A linear layer with weights drawn (2 layers)^-1/2 smaller than others: one in every branch that is linear in it.

    The variance of the residual stream, to which the branches are added, then does not grow with the depth.
    Source: Radford et al. 2019, GPT-2, section 2.3.
    """


class ValueEmbedding(nn.Linear):
    """Numbers to hidden states, as small as those of token ids: config.initializer_range, for inputs of variance 1.

    The first blocks would hardly count beside larger ones. Its bias is drawn like its weights: without one the norm of
    the first block would leave of a single number nothing but its sign.
    """


class FusedLinear(nn.Linear):
    """Several linear layers of the same inputs as one product, their outputs side by side.

    Attributes:
        parts: how many outputs each of them has, by the name that it would have as a layer of its own. Its initial
            weights are drawn under that name, and stored models that hold it under that name load.
    """

    def __init__(self, name: str, in_features: int, outputs: tuple[int, ...], bias: bool) -> None:
        """Join the layers that `FUSED` lists for a name; `outputs` are theirs."""
        super().__init__(in_features, sum(outputs), bias=bias)
        self.parts = dict(zip(FUSED[name], outputs, strict=True))

    def separate(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yields the layers by name; their tensors are views of this one's."""
        start = 0
        for name, rows in self.parts.items():
            layer = nn.Linear(self.in_features, rows, bias=self.bias is not None, device="meta")
            for key, tensor in self.named_parameters():
                part = nn.Parameter(tensor.detach()[start : start + rows], requires_grad=False)
                part._is_hf_initialized = getattr(tensor, "_is_hf_initialized", False)  # pyright: ignore  # noqa: SLF001
                setattr(layer, key, part)
            start += rows
            yield name, layer


def separate_layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields a module under its full name, or in place of a fused layer the layers that it joins, under theirs."""
    if not isinstance(module, FusedLinear):
        yield name, module
        return
    parent = name.rpartition(".")[0]
    for part, layer in module.separate():
        yield f"{parent}.{part}", layer


def join(name: str) -> tuple[str, int] | None:
    """Returns the name of the tensor that a separate layer's is a part of, and which part; None for another tensor."""
    words = name.split(".")
    for fused, parts in FUSED.items():
        for number, part in enumerate(parts):
            if part in words:
                return ".".join(fused if word == part else word for word in words), number
    return None


def join_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a model's tensors by name, those of separate layers joined."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        whole, number = join(name) or (name, 0)
        parts.setdefault(whole, {})[number] = tensor
    return {
        name: torch.cat([part for _, part in sorted(found.items())]) if len(found) > 1 else next(iter(found.values()))
        for name, found in parts.items()
    }
