"""An identified system as a layer that can be trained on."""

import torch
from torch import nn

from flash_stu.ops.scan import diagonal_scan
from spectralds.identification.system import SymmetricLDS

_LARGEST = 10.0  # atanh of a pole: 1 - |a| stays above 4e-9


class SymmetricLDSLayer(nn.Module):
    """The system S_t = a S_{t-1} + sqrt(1 - a^2) B u_t, y_t = C S_t + D u_t with a = tanh(logit).

    Every value of the parameters is a stable system. The factor gives a state the same variance whatever its memory,
    for white inputs, so that steps of one size suit all output weights. Arithmetic is in float64, because the terms of
    a sum over states may be much larger than the sum.

    Args:
        system: whose constants the layer begins with.
        dtype: of the parameters.
    """

    def __init__(self, system: SymmetricLDS, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        gain = ((1 - system.A) * (1 + system.A)).rsqrt()
        values = {
            "logit": system.A.atanh(),
            "B": system.B * gain[:, None],
            "C": system.C,
            "D": system.D,
        }
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.to(dtype, copy=True)))

    logit: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter
    D: nn.Parameter

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run over a sequence, without a loop over time.

        Args:
            inputs: (batch, time, inputs).
            state: before the first input, (batch, states); None: zero.

        Returns:
            outputs (batch, time, outputs) in the inputs' dtype, and the state after the last input, float64.
        """
        decay, B, C, D = self._constants()
        wide = inputs.double()
        if state is None:
            state = wide.new_zeros(len(inputs), len(decay))
        states = diagonal_scan(wide @ B.T, decay, state)
        outputs = states @ C.T + wide @ D.T
        return outputs.to(inputs.dtype), states[:, -1] if inputs.shape[1] else state

    def step(self, inputs: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward` for one time step, (batch, inputs) to (batch, outputs)."""
        decay, B, C, D = self._constants()
        wide = inputs.double()
        driven = wide @ B.T
        state = driven if state is None else decay * state + driven
        return (state @ C.T + wide @ D.T).to(inputs.dtype), state

    def system(self) -> SymmetricLDS:
        """Returns the system with the layer's present constants."""
        A, B, C, D = (tensor.detach().cpu().clone() for tensor in self._constants())
        return SymmetricLDS(A, B, C, D)

    def _constants(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns A, B, C and D of the system in float64; as `SymmetricLDS`, B with the factor."""
        logit = self.logit.double().clamp(-_LARGEST, _LARGEST)
        return logit.tanh(), self.B.double() / logit.cosh()[:, None], self.C.double(), self.D.double()
