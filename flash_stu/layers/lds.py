"""A distilled STU layer: the spectral filters replaced by a diagonal linear dynamical system.

Constant time and memory per token. With shared branches the STU only has even lags, so the system runs with dilation
2: each token touches the states of its own parity, lds_state_dim / 2 of them.

    S[t] = decay * S[t - dilation] + u[t]
    tensordot:  y[t, d] = sum_j readout[j, d] S[t][j, d]        u = M_inputs x
    full:       y[t] = sum_f M_f (sum_j readout[j, f] S[t][j])  u = x, f over the filters of all branches

Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), section 4.
"""

import torch
from torch import nn

from flash_stu.config import FlashSTUConfig
from flash_stu.layers.constants import KeepFloat32
from flash_stu.layers.context import SequenceContext
from flash_stu.layers.state import LDSState
from flash_stu.ops.causal_conv import causal_conv
from flash_stu.ops.lds import final_state, free_response, lds_advance, powers, zero_state

_CHUNK = 8192  # tokens convolved at a time: bounds the memory of a prefill whatever its length


class LDS(KeepFloat32):
    """One LDS layer: (batch, length, hidden_size) to the same, causal, of any length.

    Args:
        config: hidden_size, lds_state_dim, num_filters, stu_type, stu_branches and conv_backend are read.
    """

    exact = ("decay", "readout")

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.dilation = config.stu_dilation
        self.backend = config.conv_backend
        self.tensordot = config.stu_type == "tensordot"
        states = config.lds_state_dim // self.dilation
        self.register_buffer("decay", torch.zeros(states, dtype=torch.float32))
        if self.tensordot:
            self.in_proj = nn.Linear(size, size, bias=False)
            self.readout = nn.Parameter(torch.empty(states, size, dtype=torch.float32))
        else:
            features = config.num_filters * (2 if config.stu_branches == "separate" else 1)
            self.readout = nn.Parameter(torch.empty(states, features, dtype=torch.float32))
            self.M_phi = nn.Parameter(torch.empty(features, size, size))

    def reset_parameters(self, init) -> None:
        """An LDS layer is made by distillation; until its weights are loaded it puts out zeros."""
        for tensor in (self.decay, *self._parameters.values()):
            init.zeros_(tensor)

    def forward(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Run over a whole sequence (batch, length, channels) from the zero state."""
        return self._run(x, context, None, keep_state=False)[0]

    def prefill(
        self, x: torch.Tensor, context: SequenceContext, state: LDSState | None = None
    ) -> tuple[torch.Tensor, LDSState]:
        """Run over a sequence after `state`: outputs by convolution, the new state by one matrix product."""
        return self._run(x, context, state, keep_state=True)

    def _run(self, x, context, state, keep_state) -> tuple[torch.Tensor, LDSState]:
        inputs = self._inputs(x, context)
        fresh = state is None
        slots = self._zero(inputs) if fresh else state.slots
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            chunks = inputs.split(_CHUNK, dim=1)
            for number, chunk in enumerate(chunks, start=1):
                outputs.append(self._run_chunk(chunk, None if fresh else slots))
                if keep_state or number < len(chunks):
                    slots, fresh = final_state(chunk, self.decay, slots), False
        return torch.cat(outputs, dim=1).to(x.dtype), LDSState(slots)

    def step(self, x: torch.Tensor, context: SequenceContext, state: LDSState) -> tuple[torch.Tensor, LDSState]:
        """One more token x (batch, 1, channels), in constant time."""
        slots = lds_advance(self._inputs(x, context)[:, 0], self.decay, state.slots)
        with torch.autocast(x.device.type, enabled=False):
            y = self._read(slots[-1])
        return y[:, None].to(x.dtype), LDSState(slots)

    def _inputs(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        x = context.without_padding(x)
        return self.in_proj(x) if self.tensordot else x

    def _zero(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return zero_state(inputs.shape[0], len(self.decay), inputs.shape[2], self.dilation, inputs.device)

    def _read(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, states, channels) -> (batch, channels)."""
        if self.tensordot:
            return (self.readout.double() * states).sum(dim=1)
        features = torch.einsum("jf,bjd->bfd", self.readout.double(), states.double()).float()
        return torch.einsum("bfd,fde->be", features, self.M_phi.float())

    def _run_chunk(self, inputs: torch.Tensor, slots: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        length = inputs.shape[1]
        kernel = powers(self.decay, -(-length // self.dilation))
        taps = (kernel @ self.readout.double()).float()
        if self.tensordot:
            y = causal_conv(inputs.float(), taps, self.backend, self.dilation)
            return y if slots is None else y + free_response(self.decay, self.readout, slots, length).float()
        y = 0
        for f in range(taps.shape[1]):
            feature = taps[:, f : f + 1].expand(-1, inputs.shape[-1])
            response = causal_conv(inputs.float(), feature, self.backend, self.dilation)
            if slots is not None:
                response = response + free_response(self.decay, self.readout[:, f : f + 1], slots, length).float()
            y = y + response @ self.M_phi[f].float()
        return y
