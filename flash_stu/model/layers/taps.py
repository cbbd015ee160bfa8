"""The taps of an STU or LDS layer: a few inputs added to its outputs, and a recurrence in its last outputs.

    y[t] = sum_{i=1..k_u} M_u[i] u[t + 1 - i] + sum_{i=1..k_y} M_y[i] y[t - i] + the layer without taps

With stu_type "tensordot" M_u and M_y are diagonal and u is M_inputs x, as everywhere in such a layer; with "full" they
are matrices, whose rows are inputs, and u is x. They begin at zero: the layer then is the one without taps. The paper
lets its spectral features begin two tokens late, where its taps end; here they begin at the token itself, as in Flash
STU. With shared branches M_u is all that an STU layer sees of the inputs at odd lags.

M_y stays in float32 like the decays of an LDS layer: half precision would round an eigenvalue of 0.999 to 1.

Source: Agarwal et al. 2023, Spectral State Space Models (arXiv 2312.06837), eq. 4 for M^u, eq. 6 for M^y.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers.exact import KeepFloat32
from flash_stu.ops.parts import Past
from flash_stu.ops.recurrence import recurrence
from flash_stu.ops.taps import add_taps


class TappedState(NamedTuple):
    """The state that a layer with taps carries from token to token.

    Attributes:
        core: the state of the layer without taps, LDSState or ConvState.
        inputs: its last k_u - 1 inputs, oldest first, (batch, k_u - 1, channels).
        outputs: its last k_y outputs, oldest first, (batch, k_y, channels), float32 or wider.
    """

    core: Any
    inputs: torch.Tensor
    outputs: torch.Tensor

    def select(self, rows: torch.Tensor) -> "TappedState":
        """Returns the state of these rows of the batch."""
        return TappedState(
            self.core.select(rows), self.inputs.index_select(0, rows), self.outputs.index_select(0, rows)
        )


class InputOutputTaps(KeepFloat32):
    """Adds the taps to what a layer computes without them.

    Args:
        config: hidden_size, stu_type, stu_input_taps and stu_output_taps are read.
    """

    M_u: torch.Tensor | None
    M_y: torch.Tensor | None

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__()
        shape = (config.hidden_size,) * (1 if config.stu_type == "tensordot" else 2)
        self.inputs, self.outputs = config.stu_input_taps, config.stu_output_taps
        self.M_u = nn.Parameter(torch.zeros(self.inputs, *shape)) if self.inputs else None
        self.M_y = nn.Parameter(torch.zeros(self.outputs, *shape)) if self.outputs else None
        self.exact = ("M_y",) if self.outputs else ()

    def reset_parameters(self, init: ModuleType) -> None:
        """Set the taps to zero; `init` is transformers.initialization, which spares loaded weights."""
        for weight in self.parameters(recurse=False):
            init.zeros_(weight)

    def forward(
        self,
        y: torch.Tensor | Callable[[torch.Tensor | None], torch.Tensor],
        inputs: torch.Tensor,
        past: Past | None = None,
    ) -> torch.Tensor:
        """Returns the layer's outputs (batch, length, channels) for a whole sequence, or a part of one.

        The parts' recurrences have to wait for each other: each begins with the last outputs of the part before.

        Args:
            y: outputs without taps, (batch, length, channels), or a function that makes of M_u those with the taps of
                the inputs: called in here, where FSDP has the weights.
            inputs: the layer's, (batch, length, channels).
            past: the parts before; None for a whole sequence.
        """
        if callable(y):
            y = y(self.M_u)
        elif self.M_u is not None:
            known = inputs if past is None else torch.cat([past.halo(inputs, self.inputs - 1), inputs], dim=1)
            y = add_taps(y, known, self.M_u)
        if self.M_y is None:
            return y
        if past is None:
            return recurrence(y, self.M_y).to(y.dtype)
        before = past.receive(self._zero(y).requires_grad_(torch.is_grad_enabled()))
        solved = recurrence(y, self.M_y, before)
        last = torch.cat([before, solved.to(before.dtype)], dim=1)[:, -self.outputs :]
        return past.hand_on(solved, last).to(y.dtype)

    def _zero(self, y: torch.Tensor) -> torch.Tensor:
        """Returns the outputs before the first of y (batch, length, channels)."""
        return y.new_zeros((len(y), self.outputs, y.shape[2]), dtype=torch.promote_types(y.dtype, torch.float32))

    def start(self, core: Any, inputs: torch.Tensor) -> TappedState:
        """Returns the state before the first of inputs (batch, length, channels), with the core's."""
        batch, _, channels = inputs.shape
        return TappedState(core, inputs.new_zeros((batch, max(self.inputs - 1, 0), channels)), self._zero(inputs))

    def proceed(
        self, y: torch.Tensor, inputs: torch.Tensor, state: TappedState, core: Any
    ) -> tuple[torch.Tensor, TappedState]:
        """As forward, after the tokens in `state`; also returns the state after these, with the core's new one."""
        last, outputs = state.inputs, state.outputs
        if self.M_u is not None:
            known = torch.cat([last, inputs], dim=1)
            y, last = add_taps(y, known, self.M_u), known[:, known.shape[1] - last.shape[1] :]
        if self.M_y is not None:
            y = recurrence(y, self.M_y, outputs)
            outputs = torch.cat([outputs, y.to(outputs.dtype)], dim=1)[:, -outputs.shape[1] :]
        return y, TappedState(core, last, outputs)
