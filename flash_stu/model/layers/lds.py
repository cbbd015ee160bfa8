"""A distilled STU layer: the spectral filters replaced by a diagonal linear dynamical system.

Constant time and memory per token. With shared branches the STU only has even lags, so the system runs with dilation
2: each token touches the states of its own parity, lds_state_dim / 2 of them.

    S[t] = decay * S[t - dilation] + u[t]
    tensordot:  y[t, d] = sum_j readout[j, d] S[t][j, d]        u = M_inputs x
    full:       y[t] = sum_f M_f (sum_j readout[j, f] S[t][j])  u = x, f over the filters of all branches

Taps of inputs and of outputs are those of the STU layer, see flash_stu.model.layers.taps.

Decays and readout are constants of the fit, exact in float32. If config.lds_trainable, the layer learns changes of
them: a factor on each rate -log|decay| and a term added to the readout. Zeros are the distilled layer itself, and no
change makes it unstable. The terms of a fitted sum are a hundred times larger than the sum, and an optimizer's step on
them would drown it; so a change is measured by what it does to the output: one of e in every entry moves that by
about e.

Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), section 4; the trainable form is ours.
"""

import math
from types import ModuleType

import torch
from torch import nn

from flash_stu.filters.exponentials import powers
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.layers.exact import KeepFloat32
from flash_stu.model.layers.linear import DepthScaledLinear
from flash_stu.model.layers.mixer import Mixer
from flash_stu.model.layers.state import LDSState
from flash_stu.model.layers.taps import InputOutputTaps, TappedState
from flash_stu.ops.conv.choice import any_filter_backend, causal_conv
from flash_stu.ops.lds import State, final_state, free_response, lds_advance, lds_chunked, scale_rates, zero_state
from flash_stu.ops.parts import Past

_CHUNK = 8192  # tokens convolved at a time: bounds the memory of a long input


class LDS(KeepFloat32, Mixer):
    """One LDS layer: (batch, length, hidden_size) to the same, causal, of any length.

    Args:
        config: hidden_size, lds_state_dim, lds_trainable, num_filters, num_hidden_layers, max_position_embeddings,
            stu_type, stu_branches, stu_input_taps, stu_output_taps and conv_backend are read; decode_backend and
            lds_state_dtype at every prefill.
    """

    exact = ("decay", "readout")
    decay: torch.Tensor
    readout: torch.Tensor

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__()
        if config.lds_state_dim is None:
            raise ValueError("lds_state_dim is None; an LDS layer needs a number of states")
        size = config.hidden_size
        self.config = config
        self.dilation = config.stu_dilation
        self.backend = any_filter_backend(config.conv_backend)
        self.tensordot = config.stu_type == "tensordot"
        states = config.lds_state_dim // self.dilation
        if self.tensordot:
            columns = size
            self.in_proj = DepthScaledLinear(size, size, bias=False)  # the output is linear in it
        else:
            columns = config.num_filters * (2 if config.stu_branches == "separate" else 1)
            self.M_phi = nn.Parameter(torch.empty(columns, size, size))
        self.taps = InputOutputTaps(config)
        self.register_buffer("decay", torch.zeros(states, dtype=torch.float32))
        self.register_buffer("readout", torch.zeros(states, columns, dtype=torch.float32))
        self.trainable = config.lds_trainable
        if self.trainable:
            self.log_rate_change = nn.Parameter(torch.zeros(states, dtype=torch.float32))
            self.readout_change = nn.Parameter(torch.zeros(states, columns, dtype=torch.float32))
            self.exact = (*self.exact, "log_rate_change", "readout_change")

    def reset_parameters(self, init: ModuleType) -> None:
        """Draw this module's own weights, for a layer that is trained from scratch: a distilled layer's are the fit's.

        Decays get rates spread evenly in the log, from the filters' length to a token or less, and both signs where
        odd lags count. The readout undoes the gain of each state, so that the output has the variance of u.

        Args:
            init: transformers.initialization, whose functions spare loaded weights.
        """
        states, size = len(self.decay), self.config.hidden_size
        slowest = math.log(self.dilation / self.config.max_position_embeddings)
        decay = (-torch.linspace(slowest, math.log(3.0), states, dtype=torch.float64).exp()).exp()
        if self.dilation == 1:
            decay[1::2] *= -1
        init.copy_(self.decay, decay)
        unit = ((1 - decay**2) / states).sqrt().float()[:, None].to(self.readout.device)
        init.copy_(self.readout, torch.randn_like(self.readout) * unit)
        if self.trainable:
            init.zeros_(self.log_rate_change)
            init.zeros_(self.readout_change)
        if not self.tensordot:
            features = len(self.M_phi)
            residual = (2 * self.config.num_hidden_layers) ** -0.5
            init.normal_(self.M_phi, std=(features * size) ** -0.5 * residual)

    def system(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the system in use: decay (states,), float32, and readout (states, channels or features), float64.

        The decay has the same rounding wherever it is used, since a^8192 amplifies it.
        """
        decay, readout = self.decay, self.readout.double()
        if self.trainable:
            gain = (1 - decay.double() ** 2).rsqrt()  # of a state, for white inputs
            share = 1 / len(decay)  # all states may move the same way
            loudness = readout.square().mean(dim=1).sqrt() * gain
            decay = scale_rates(decay, self.log_rate_change.double() * (share / (1 + loudness))).float()
            readout = readout + self.readout_change.double() * (share / gain)[:, None]
        return decay, readout

    def whole(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Run over a whole sequence (batch, length, channels) from the zero state, or a part of one, by convolution."""
        inputs, (decay, readout), past = self._inputs(x, context), self.system(), context.past
        slots = None if past is None else self._before(inputs, decay, past)
        return self.taps(self._convolve(inputs, decay, readout, slots)[0], inputs, past).to(x.dtype)

    def _before(self, inputs: torch.Tensor, decay: torch.Tensor, past: Past) -> State:
        """Returns the states before a part of a sequence, float64: its sums are of large terms that cancel."""
        own = self._zero(inputs, torch.float64)
        with torch.autocast(inputs.device.type, enabled=False):
            for chunk in inputs.split(_CHUNK, dim=1):
                own = final_state(chunk, decay, own)
            stacked = torch.stack(own, dim=1).transpose(2, 3)  # (batch, dilation, channels, states)
            before = past.states(stacked, decay.double(), inputs.shape[1] // self.dilation)
        return before.transpose(2, 3).unbind(1)

    def prefill(
        self, x: torch.Tensor, context: SequenceContext, state: TappedState | None = None
    ) -> tuple[torch.Tensor, TappedState]:
        """Run over a sequence after `state`, as matrix products."""
        inputs = self._inputs(x, context)
        state = self.taps.start(self._start(inputs), inputs) if state is None else state
        core: LDSState = state.core
        with torch.autocast(x.device.type, enabled=False):
            if self.tensordot:
                y, slots = lds_chunked(inputs, core.decay, core.readout, core.slots)
            else:
                y, slots = self._convolve(inputs, core.decay, core.readout, core.slots)
        y, state = self.taps.proceed(y, inputs, state, core._replace(slots=slots))
        return y.to(x.dtype), state

    def step(self, x: torch.Tensor, context: SequenceContext, state: TappedState) -> tuple[torch.Tensor, TappedState]:
        """One more token x (batch, 1, channels), in constant time; `state` is taken over."""
        inputs = self._inputs(x, context)
        core: LDSState = state.core
        slots = lds_advance(inputs[:, 0], core.decay, core.slots)
        if self.tensordot:
            y = (slots[-1] * core.weights).sum(dim=2, dtype=torch.float64)
        else:
            with torch.autocast(x.device.type, enabled=False):
                features = (slots[-1].double() @ core.readout).mT
                y = features.to(self.M_phi.dtype).flatten(1) @ self.M_phi.flatten(0, 1)
        y, state = self.taps.proceed(y[:, None], inputs, state, core._replace(slots=slots))
        return y.to(x.dtype), state

    def _inputs(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        x = context.without_padding(x)
        return self.in_proj(x) if self.tensordot else x

    def _start(self, inputs: torch.Tensor) -> LDSState:
        """Returns the state before the first token."""
        self.config.resolve_decode_backend()  # refuses one that an LDS layer does not have
        dtype = getattr(torch, self.config.lds_state_dtype)
        decay, readout = self.system()
        return LDSState(self._zero(inputs, dtype), decay.to(dtype), readout, readout.to(dtype).t().contiguous())

    def _zero(self, inputs: torch.Tensor, dtype: torch.dtype) -> State:
        return zero_state(inputs.shape[0], inputs.shape[2], len(self.decay), self.dilation, inputs.device, dtype)

    def _convolve(
        self, inputs: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, slots: State | None
    ) -> tuple[torch.Tensor, State | None]:
        """Returns outputs for inputs after the states in `slots` (None: zero), and the states after them."""
        outputs = []
        with torch.autocast(inputs.device.type, enabled=False):
            chunks = inputs.split(_CHUNK, dim=1)
            for number, chunk in enumerate(chunks, start=1):
                outputs.append(self._convolve_chunk(chunk, decay, readout, slots))
                if slots is not None or number < len(chunks):
                    slots = final_state(chunk, decay, slots or self._zero(inputs, torch.float32))
        return torch.cat(outputs, dim=1), slots

    def _convolve_chunk(
        self, inputs: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, slots: State | None
    ) -> torch.Tensor:
        length = inputs.shape[1]
        kernel = powers(decay, (length + self.dilation - 1) // self.dilation)
        taps = (kernel @ readout).float()
        if self.tensordot:
            y = causal_conv(inputs.float(), taps, self.backend, self.dilation)
            return y if slots is None else y + free_response(decay, readout, slots, length).float()
        y = readout.new_zeros((), dtype=torch.float32)
        for f in range(taps.shape[1]):
            feature = taps[:, f : f + 1].expand(-1, inputs.shape[-1])
            response = causal_conv(inputs.float(), feature, self.backend, self.dilation)
            if slots is not None:
                response = response + free_response(decay, readout[:, f : f + 1], slots, length).float()
            y = y + response @ self.M_phi[f].float()
        return y
