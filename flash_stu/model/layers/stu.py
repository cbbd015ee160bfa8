"""The Spectral Transform Unit: convolutions with fixed spectral filters, learned linear maps around them.

Features U+_k = phi_k * u and U-_k = ((-1)^t phi_k) * u of the inputs u; the output is a learned contraction of them,

    full:       y_t = sum_k M+_k U+_{t,k} + M-_k U-_{t,k}        with M_k of (channels x channels)
    tensordot:  the same with M_k = M_inputs diag(M_filters[k]), which makes it ONE convolution of M_inputs u with the
                per-channel filter f_d(t) = sum_k phi_k(t) (M+[k, d] + (-1)^t M-[k, d]).

Branches: "separate" learns M+ and M-; "shared" sets M- = M+ as the published models do, and then f vanishes on odd
lags: the layer never mixes tokens an odd distance apart, and costs half; "positive" drops the minus branch.
Taps of inputs and of outputs may come on top, see flash_stu.model.layers.taps.

Source: Agarwal et al. 2023 (arXiv 2312.06837), eq. 5; Liu et al. 2024, Flash STU (arXiv 2409.10489), section 3.2.
"""

from functools import partial
from types import ModuleType

import torch
from torch import nn

from flash_stu.filters.spectral import TENSOR
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.layers.linear import DepthScaledLinear
from flash_stu.model.layers.mixer import Mixer
from flash_stu.model.layers.taps import InputOutputTaps, TappedState
from flash_stu.ops.conv.choice import any_filter_backend, causal_conv, spectral_conv
from flash_stu.ops.conv.partial import PartialConv
from flash_stu.ops.futurefill import ConvState, Taps


class STU(Mixer):
    """One STU layer: (batch, length, hidden_size) to the same, causal.

    Args:
        config: hidden_size, num_filters, num_hidden_layers, stu_type, stu_branches, stu_input_taps, stu_output_taps
            and conv_backend are read; decode_backend at every prefill.
    """

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__()
        size, filters = config.hidden_size, config.num_filters
        self.config = config
        self.branches = config.stu_branches
        self.dilation = config.stu_dilation
        self.oscillating = self.dilation == 1 and (self.branches == "separate" or config.filter_basis == "hankel_l")
        self.backend = config.conv_backend
        self.tensordot = config.stu_type == "tensordot"
        self.residual_scale = (2 * config.num_hidden_layers) ** -0.5
        learned = 2 if self.branches == "separate" else 1
        if self.tensordot:
            self.in_proj = DepthScaledLinear(size, size, bias=False)  # the output is linear in it
            self.M_filters = nn.Parameter(torch.empty(learned, filters, size))
        else:
            self.M_phi = nn.Parameter(torch.empty(learned, filters, size, size))
        self.taps = InputOutputTaps(config)

    def reset_parameters(self, init: ModuleType) -> None:
        """Draw this module's own weights; one factor of each output carries the residual (2 layers)^-1/2.

        Args:
            init: a module with torch.nn.init's normal_ (transformers passes one that spares loaded weights).
        """
        if self.tensordot:
            _, filters, size = self.M_filters.shape
            init.normal_(self.M_filters, std=(2 / (filters + size)) ** 0.5)
        else:
            _, filters, size, _ = self.M_phi.shape
            init.normal_(self.M_phi, std=(filters * size) ** -0.5 * self.residual_scale)

    def features(self, filters: torch.Tensor) -> torch.Tensor:
        """Compute the constant filters that this layer combines, at the lags it uses.

        Args:
            filters: spectral filters (filter_length, num_filters).

        Returns:
            (lags, features), float32; every second lag if the branches are shared.
        """
        filters = filters[:: self.dilation].float()
        if self.branches == "separate":
            signs = torch.ones(len(filters), 1, device=filters.device)
            signs[1::2] = -1
            return torch.cat([filters, signs * filters], dim=1)
        # with shared coefficients U+ and U- add up: twice phi on even lags, nothing on odd ones
        return 2 * filters if self.branches == "shared" else filters

    def kernel(self, filters: torch.Tensor) -> torch.Tensor:
        """Returns the filters this layer convolves with: (lags, channels) for tensordot, the features for full."""
        features = self.features(filters)
        if not self.tensordot:
            return features
        with torch.autocast(features.device.type, enabled=False):
            return features @ self.M_filters.flatten(0, 1).float()

    def whole(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Convolve a sequence (batch, length, channels), at most as long as the filters, or a part of one."""
        inputs, features, past = self._inputs(x, context), self.features(context.spectral_filters()), context.past
        system = {
            "backend": self.backend,
            "dilation": self.dilation,
            "both_signs": self.oscillating,
            "smooth_tail": self.config.filter_basis != TENSOR,  # whose products jump every sqrt(L) lags
        }
        whole = partial(spectral_conv, inputs, **system)
        convolve = whole if past is None else PartialConv(inputs, features, past, **system)
        if self.tensordot:
            weights = self.M_filters.flatten(0, 1)
            if past is None:
                return self.taps(lambda taps: whole(features, weights, taps=taps), inputs)
            return self.taps(convolve(features, weights), inputs, past)
        outputs, same = inputs.new_zeros(()), features.new_ones(1, inputs.shape[-1])
        # one feature at a time: all of them at once is `features` times the memory
        for k, matrix in enumerate(self.M_phi.flatten(0, 1)):
            outputs = outputs + convolve(features[:, k : k + 1], same) @ matrix
        return self.taps(outputs, inputs, past)

    def prefill(
        self, x: torch.Tensor, context: SequenceContext, state: TappedState | None = None
    ) -> tuple[torch.Tensor, TappedState]:
        """Convolve a sequence after the tokens in `state`, whose buffers the state returned takes over."""
        inputs = self._inputs(x, context)
        state = self.taps.start(self._start(inputs, context), inputs) if state is None else state
        core = state.core.extend(inputs)
        y = self._convolve(core.seen(), core.taps.reversed.flip(0))[:, -x.shape[1] :]
        y, state = self.taps.proceed(y, inputs, state, core)
        return y.to(x.dtype), state

    def step(self, x: torch.Tensor, context: SequenceContext, state: TappedState) -> tuple[torch.Tensor, TappedState]:
        """One more token x (batch, 1, channels); `state` is taken over."""
        inputs = self._inputs(x, context)
        y, core = state.core.step(inputs[:, 0])
        y, state = self.taps.proceed(y[:, None], inputs, state, core)
        return y.to(x.dtype), state

    def _start(self, inputs: torch.Tensor, context: SequenceContext) -> ConvState:
        """Returns the convolution before the first token."""
        taps = Taps(self.kernel(context.spectral_filters()), None if self.tensordot else self.M_phi.flatten(0, 1))
        return ConvState.empty(inputs, taps, self.dilation, self.config.resolve_decode_backend())

    def _inputs(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        x = context.without_padding(x)
        return self.in_proj(x) if self.tensordot else x

    def _convolve(self, inputs: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        backend = any_filter_backend(self.backend)
        if self.tensordot:
            return causal_conv(inputs, taps, backend, self.dilation)
        outputs = inputs.new_zeros(())
        for k, matrix in enumerate(self.M_phi.flatten(0, 1)):
            feature = taps[:, k : k + 1].expand(-1, inputs.shape[-1])
            outputs = outputs + causal_conv(inputs, feature, backend, self.dilation) @ matrix
        return outputs
