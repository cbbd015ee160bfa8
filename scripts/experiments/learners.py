"""Learners of a linear system by descent: layers given by their impulse responses, networks, and one training loop.

Every layer is parallel in time: its impulse response is a matrix product, and it meets the inputs through an FFT. All
of them have a direct term, run in float64 and start from torch's global generator.

Sources: Orvieto et al. 2023 (arXiv 2303.06349) for the LRU; Gu et al. 2022 (arXiv 2206.11893) for S4D; Agarwal et al.
2023 (arXiv 2312.06837) for the STU; Shah et al. 2025 (arXiv 2505.17868) for the LDS by descent.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from flash_stu.filters.spectral import spectral_filters
from flash_stu.ops.conv.fft import fft_size

_STRIDE = 64  # powers of a decay are products of those below it and those of its multiples
Data = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class Layer(nn.Module):
    """A causal linear map of (batch, time, inputs) to (batch, time, outputs), at rest before the first input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float64))

    def kernel(self, length: int) -> torch.Tensor:
        """Returns the impulse response without the direct term, (length, outputs, inputs)."""
        raise NotImplementedError

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        length = u.shape[1]
        size = fft_size(length, length)
        signal, response = (torch.fft.rfft(x, n=size, dim=d) for x, d in ((u, 1), (self.kernel(length), 0)))
        # entry by entry: a matrix product per frequency is far too small to pay
        y = torch.fft.irfft((response * signal[:, :, None]).sum(dim=-1), n=size, dim=1)
        return y[:, :length] + u @ self.D.T


class STU(Layer):
    """Both branches of the first K spectral filters, full matrices that start at zero.

    Args:
        length: of the filters, and the longest of a sequence.
        filters: K.
        inputs, outputs: channels.
    """

    def __init__(self, length: int, filters: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.features: torch.Tensor
        self.register_buffer("features", both_branches(spectral_filters(length, filters)[1]))
        self.M = nn.Parameter(torch.zeros(2 * filters, outputs, inputs, dtype=torch.float64))

    def kernel(self, length: int) -> torch.Tensor:
        return torch.tensordot(self.features[:length], self.M, 1)


class LDS(Layer):
    """A symmetric system, y_t = sum_j C_j A_j^i B_j u_{t-i}, whose A is kept in [-1, 1].

    Args:
        states: number of eigenvalues.
        inputs, outputs: channels.
        uniform: draw A from (-1, 1) instead of as SpectraLDS does, clip(randn, -1, 1): a third of them is 1 or -1.
    """

    def __init__(self, states: int, inputs: int, outputs: int, uniform: bool = False) -> None:
        super().__init__(inputs, outputs)
        A = torch.randn(states, dtype=torch.float64).clamp(-1, 1)
        self.A = nn.Parameter(2 * torch.rand(states, dtype=torch.float64) - 1 if uniform else A)
        self.B = nn.Parameter(torch.randn(states, inputs, dtype=torch.float64) / inputs)
        self.C = nn.Parameter(torch.randn(outputs, states, dtype=torch.float64) / states)

    def kernel(self, length: int) -> torch.Tensor:
        A = self.A.clamp(-1, 1)
        return diagonal_response(lambda lags: A ** lags[:, None], self.B, self.C, length)


class Complex(Layer):
    """A diagonal system of complex states of which the outputs are the real part: what LRU and S4D share.

    Args:
        states: number of eigenvalues.
        inputs, outputs: channels.
    """

    def __init__(self, states: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        B, C = torch.randn(states, inputs, dtype=torch.complex128), torch.randn(outputs, states, dtype=torch.complex128)
        self.B = nn.Parameter(torch.view_as_real(B / math.sqrt(inputs)))
        self.C = nn.Parameter(torch.view_as_real(C * math.sqrt(2 / states)))

    def logarithms(self) -> torch.Tensor:
        """Returns the logarithms of the eigenvalues, (states,), complex."""
        raise NotImplementedError

    def gain(self, logarithms: torch.Tensor) -> torch.Tensor:
        """Returns the factors of the inputs, (states,), of the eigenvalues' logarithms."""
        raise NotImplementedError

    def kernel(self, length: int) -> torch.Tensor:
        logarithms, C = self.logarithms(), torch.view_as_complex(self.C)
        B = self.gain(logarithms)[:, None] * torch.view_as_complex(self.B)
        return diagonal_response(lambda lags: (lags[:, None] * logarithms).exp(), B, C, length)


class LRU(Complex):
    """A linear recurrent unit: eigenvalues uniform on a ring, r_min <= |a| <= r_max, of phases in [0, max_phase].

    Args:
        states: number of complex eigenvalues.
        inputs, outputs: channels.
        r_min, r_max, max_phase: of the initial eigenvalues; the phase in radians.
        parametrisation: "log" a = exp(-exp(nu) + i exp(theta)), "exponential" a = exp(-nu + i theta), "cartesian"
            a = x + i y; only the first is stable by construction.
        normalise: whether inputs are multiplied by a learned gamma that starts at sqrt(1 - |a|^2).
    """

    def __init__(
        self,
        states: int,
        inputs: int,
        outputs: int,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 6.28,
        parametrisation: str = "log",
        normalise: bool = True,
    ) -> None:
        super().__init__(states, inputs, outputs)
        squared, phase = torch.rand(2, states, dtype=torch.float64)
        rate = -0.5 * torch.log(squared * (r_max**2 - r_min**2) + r_min**2)
        phase = max_phase * phase
        start = {
            "log": (rate.log(), phase.log()),
            "exponential": (rate, phase),
            "cartesian": ((-rate).exp() * phase.cos(), (-rate).exp() * phase.sin()),
        }
        self.parametrisation = parametrisation
        self.first, self.second = (nn.Parameter(values) for values in start[parametrisation])
        self.log_gamma = nn.Parameter(0.5 * (-torch.expm1(-2 * rate)).log()) if normalise else None

    def logarithms(self) -> torch.Tensor:
        if self.parametrisation == "cartesian":
            return torch.complex(self.first, self.second).log()
        if self.parametrisation == "exponential":
            return torch.complex(-self.first, self.second)
        return torch.complex(-self.first.exp(), self.second.exp())

    def gain(self, logarithms: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(logarithms) if self.log_gamma is None else self.log_gamma.exp()


class S4D(Complex):
    """An S4D-style system with several inputs: poles -1/2 + i pi n (S4D-Lin), a step for each state, zero-order hold.

    Args:
        states: number of complex eigenvalues, in groups of 16 frequencies.
        inputs, outputs: channels.
    """

    def __init__(self, states: int, inputs: int, outputs: int) -> None:
        super().__init__(states, inputs, outputs)
        self.log_rate = nn.Parameter(torch.full((states,), math.log(0.5), dtype=torch.float64))
        self.frequency = nn.Parameter(math.pi * (torch.arange(states, dtype=torch.float64) % 16))
        first, last = math.log(1e-3), math.log(1e-1)
        self.log_step = nn.Parameter(first + (last - first) * torch.rand(states, dtype=torch.float64))

    def logarithms(self) -> torch.Tensor:
        return torch.complex(-self.log_rate.exp(), self.frequency) * self.log_step.exp()

    def gain(self, logarithms: torch.Tensor) -> torch.Tensor:
        return (logarithms.exp() - 1) / (logarithms / self.log_step.exp())


class Network(nn.Module):
    """A sequence model of transformers between two linear maps, float32: "mamba2" or "transformer".

    Args:
        kind: of the model; the Transformer is Llama's, with rotary positions.
        inputs, outputs: channels.
        width, layers: of the model.
    """

    def __init__(self, kind: str, inputs: int, outputs: int, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel, Mamba2Config, Mamba2Model

        shared: dict[str, Any] = {
            "vocab_size": 1,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "use_cache": False,
        }
        shared |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        if kind == "mamba2":
            heads: dict[str, Any] = {"num_heads": 4, "head_dim": width // 2, "n_groups": 1}
            self.model = Mamba2Model(Mamba2Config(**shared, **heads, state_size=16, chunk_size=64))
        else:
            self.model = LlamaModel(LlamaConfig(**shared, num_attention_heads=4, intermediate_size=3 * width))
        self.into, self.out_of = nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return self.out_of(self.model(inputs_embeds=self.into(u.float())).last_hidden_state).to(u.dtype)


def both_branches(filters: torch.Tensor) -> torch.Tensor:
    """Returns filters phi (length, K) and (-1)^t phi beside each other, (length, 2 K)."""
    signs = torch.ones(len(filters), 1, dtype=filters.dtype)
    signs[1::2] = -1
    return torch.cat([filters, signs * filters], dim=1)


def diagonal_response(
    powers: Callable[[torch.Tensor], torch.Tensor], B: torch.Tensor, C: torch.Tensor, length: int
) -> torch.Tensor:
    """Returns the real part of sum_j C[:, j] a_j^t B[j] for t < length, (length, outputs, inputs), float64.

    Args:
        powers: of the eigenvalues a at lags (lags,), (lags, states).
        B: (states, inputs); C: (outputs, states).
        length: number of lags.
    """
    steps = torch.arange(max(_STRIDE, -(-length // _STRIDE)), dtype=torch.float64)
    low, high = powers(steps[:_STRIDE]), powers(_STRIDE * steps[: -(-length // _STRIDE)])
    right = (high.T[:, :, None, None] * (C.T[:, :, None] * B[:, None, :])[:, None]).flatten(1)
    if low.is_complex():  # only the real part of the product
        low, right = torch.cat([low.real, -low.imag], dim=1), torch.cat([right.real, right.imag])
    return (low @ right).view(_STRIDE, -1, *C.shape[:1], *B.shape[1:]).transpose(0, 1).flatten(0, 1)[:length]


def descend(
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    steps: int,
    points: list[int],
    measure: Callable[[nn.Module], float],
    cosine: bool = False,
) -> list[list[float]]:
    """Train by the mean squared error, and measure on the way.

    Args:
        learner: maps inputs to outputs.
        optimizer: of its parameters.
        data: gives inputs and outputs, (batch, time, channels), of a step; what it takes is not counted.
        steps: number of them; the rate falls to 0 along a cosine if `cosine`.
        points: numbers of steps after which to measure; what that takes is not counted.
        measure: the error.

    Returns:
        [steps, CPU seconds of this process, error] of each point, until a loss is not finite.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    curve, seconds = [], 0.0
    for step in range(1, steps + 1):
        inputs, outputs = data(step)
        began = time.process_time()
        optimizer.zero_grad()
        loss = (learner(inputs) - outputs).square().mean()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        seconds += time.process_time() - began
        if not loss.isfinite():
            break
        if step in points:
            with torch.no_grad():
                error = measure(learner)
            if not math.isfinite(error):
                break
            curve.append([step, seconds, error])
    return curve


def each(function: Callable[..., Any], jobs: list[tuple], processes: int) -> list:
    """Returns function(*job) of every job, in their order, computed in so many processes of one thread each."""
    if processes == 1:
        return [function(*job) for job in jobs]
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, *zip(*jobs, strict=True)))


def spaced(steps: int, count: int = 24) -> list[int]:
    """Returns about `count` numbers of steps up to `steps`, evenly in their logarithms."""
    return sorted({round(steps ** (i / (count - 1))) for i in range(count)})
