"""Models of other libraries with the way in and the heads of ours: Mamba-2 (transformers) and S5 (s5-pytorch).

Each takes a FlashSTUConfig for its task, width and depth, and is called like the class of ours for it: a predictor if
config.num_output_channels is given, else a classifier.

Sources: Dao and Gu 2024 (arXiv 2405.21060) for Mamba-2; Smith et al. 2023 (arXiv 2208.04933) for S5, a state space
layer of the S4 family with several inputs and outputs.
"""

from typing import Any

import torch
from torch import nn
from transformers import Mamba2Config, Mamba2Model
from transformers.modeling_outputs import SequenceClassifierOutput

from flash_stu import FlashSTUConfig, UserError
from flash_stu.model.classification import Pooler, pair_rows
from flash_stu.model.prediction import PredictionOutput, squared_error


class Peer(nn.Module):
    """A classifier or predictor around layers of another library.

    Args:
        config: what it reads and answers; hidden_size is the layers'.
        layers: called with hidden states (batch, length, hidden_size) and a mask (batch, length), 0 at padding; or
            None.
    """

    def __init__(self, config: FlashSTUConfig, layers: nn.Module) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        size, channels = config.hidden_size, config.num_input_channels
        if channels is None:
            self.into = nn.Embedding(config.vocab_size, size)  # ours are smaller, with which Mamba-2 learns less
        else:
            self.into = nn.Linear(channels, size)
            for weight in self.into.parameters():  # as small as ours
                nn.init.normal_(weight, std=config.initializer_range * channels**-0.5)
        self.pooler = None if config.num_output_channels else Pooler(config)
        self.head = nn.Linear(size, config.num_output_channels or len(config.id2label or {}))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput | PredictionOutput:
        """Returns what the class of ours does; see there for the arguments."""
        inputs = input_ids if input_values is None else input_values
        assert inputs is not None
        mask = attention_mask
        if self.config.classifier_towers == 2:
            inputs, mask = pair_rows("inputs", inputs), None if mask is None else pair_rows("attention_mask", mask)
        hidden = self.layers(self.into(inputs), mask)
        if self.pooler is None:
            predictions = self.head(hidden)
            loss = None if labels is None else squared_error(predictions, labels, mask)
            return PredictionOutput(loss=loss, predictions=predictions)
        logits = self.head(self.pooler(hidden, input_ids if input_ids is None else inputs, mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Mamba2Layers(nn.Module):
    """Mamba-2 as transformers has it, causal."""

    def __init__(self, config: FlashSTUConfig, state_size: int, head_dim: int, expand: int) -> None:
        super().__init__()
        shape: dict[str, Any] = {
            "vocab_size": 1,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_heads": expand * config.hidden_size // head_dim,
            "head_dim": head_dim,
            "expand": expand,
            "state_size": state_size,
            "n_groups": 1,
            "chunk_size": 64,
            "use_cache": False,
        }
        shape |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        self.model = Mamba2Model(Mamba2Config(**shape))
        self.model.embeddings.requires_grad_(False)  # of the one token that it has to have

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.model(inputs_embeds=hidden, attention_mask=mask).last_hidden_state


class S5Layers(nn.Module):
    """Blocks of S5 and a gated MLP, both ways if the configuration says so."""

    def __init__(self, config: FlashSTUConfig, state_size: int, ff_mult: float) -> None:
        super().__init__()
        try:
            from s5 import S5Block  # pyright: ignore[reportMissingImports] - optional
        except ImportError:
            raise UserError("S5 needs the package s5-pytorch: pip install 'flash-stu[experiments]'") from None
        blocks = [
            S5Block(config.hidden_size, state_size, config.bidirectional, ff_mult=ff_mult)
            for _ in range(config.num_hidden_layers)
        ]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(config.hidden_size)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        keep = None if mask is None else mask[:, :, None].to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden if keep is None else hidden * keep)
        return self.norm(hidden)


def mamba2(config: FlashSTUConfig, state_size: int = 64, head_dim: int = 16, expand: int = 2) -> Peer:
    """Returns a Mamba-2 of the configuration's width and depth; the others are its own sizes."""
    return Peer(config, Mamba2Layers(config, state_size, head_dim, expand))


def s5(config: FlashSTUConfig, state_size: int = 64, ff_mult: float = 2.0) -> Peer:
    """Returns an S5 of the configuration's width and depth; the others are its own sizes.

    Raises:
        UserError: if s5-pytorch is not installed.
    """
    return Peer(config, S5Layers(config, state_size, ff_mult))
