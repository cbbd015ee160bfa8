"""Symmetric systems to try identification on, and noisy data from them."""

from dataclasses import dataclass

import numpy as np
import torch

from spectralds.identification.system import SymmetricLDS

# Agarwal et al. 2023, Spectral State Space Models (arXiv 2312.06837), the synthetic system of section 3
_A = (-0.9999, 0.9999, -0.9999, 0.9999)
_B = (
    (0.36858183, -0.34219486, 0.1407376),
    (0.18933886, -0.1243964, 0.21866894),
    (0.14593862, -0.5791096, -0.06816235),
    (-0.3095346, -0.21441863, 0.08696061),
)
_C = (
    (0.5528727, -0.51329225, 0.21110639, 0.2840083),
    (-0.18659459, 0.3280034, 0.21890792, -0.8686644),
    (-0.10224352, -0.46430188, -0.32162794, 0.1304409),
)
_D = (1.5905786, -0.45901108, 0.3238576)


def marginal() -> SymmetricLDS:
    """Returns four states at +-0.9999 with three inputs and outputs (arXiv 2312.06837).

    The paper's state reaches the output one step later, y_t = C x_t + D u_t with x_{t+1} = A x_t + B u_t, which is the
    same system with output weights C / A and the direct term D - C B / A.
    """
    A, B, C = (np.array(values) for values in (_A, _B, _C))
    C = C / A
    return SymmetricLDS.of(A, B, C, np.diag(_D) - C @ B)


def dense(seed: int, states: int = 100, channels: int = 3, delta: float = 1e-3) -> SymmetricLDS:
    """Returns a system of Gaussian eigenvalues, the largest at 1 - delta in magnitude (arXiv 2505.17868, Fig. 1).

    Args:
        seed: of the draw; states: h; channels: of the input and of the output; delta: distance to marginal stability.
    """
    draw = np.random.default_rng(seed)
    A = draw.standard_normal(states)
    A *= (1 - delta) / np.abs(A).max()
    return _with_weights(A, channels, draw)


def slow(seed: int, states: int = 100, channels: int = 3, slowest: float = 1e-4) -> SymmetricLDS:
    """Returns a system with 1 - |a| log-uniform on [slowest, 1] and random signs; arguments as in `dense`."""
    draw = np.random.default_rng(seed)
    A = 1 - slowest ** draw.random(states)
    A *= draw.choice([-1.0, 1.0], states)
    return _with_weights(A, channels, draw)


def _with_weights(A: np.ndarray, channels: int, draw: np.random.Generator) -> SymmetricLDS:
    B = draw.standard_normal((len(A), channels)) / channels
    C = draw.standard_normal((channels, len(A))) / len(A)
    return SymmetricLDS.of(A, B, C, np.zeros((channels, channels)))


@dataclass(frozen=True)
class Trial:
    """One training and one test sequence of a system, float64.

    Attributes:
        system: the truth.
        inputs, outputs: (time, channels), the outputs with noise.
        fresh_inputs, fresh_outputs: another sequence, without noise.
        noise_variance: of each output's noise, (channels,).
    """

    system: SymmetricLDS
    inputs: torch.Tensor
    outputs: torch.Tensor
    fresh_inputs: torch.Tensor
    fresh_outputs: torch.Tensor
    noise_variance: torch.Tensor

    def relative_error(self, found: SymmetricLDS) -> float:
        """Returns the squared error on the fresh sequence over the power of its outputs."""
        return float(self._error(found).sum() / self.fresh_outputs.square().mean(dim=0).sum())

    def excess(self, found: SymmetricLDS) -> float:
        """Returns the squared error on the fresh sequence over the variance of the training data's noise."""
        return float(self._error(found).sum() / self.noise_variance.sum())

    def _error(self, found: SymmetricLDS) -> torch.Tensor:
        return (found.simulate(self.fresh_inputs) - self.fresh_outputs).square().mean(dim=0)


def trial(system: SymmetricLDS, length: int, sigma: float, seed: int) -> Trial:
    """Returns data of a system at rest under standard normal inputs.

    Args:
        system: the truth.
        length: time steps of either sequence.
        sigma: standard deviation of the noise in the training outputs, relative to that of each output.
        seed: of the draw.
    """
    draw = np.random.default_rng([seed, 1])
    channels = system.B.shape[1]
    inputs, fresh = (torch.from_numpy(draw.standard_normal((length, channels))) for _ in range(2))
    clean = system.simulate(inputs)
    scale = sigma * clean.std(dim=0)
    noise = torch.from_numpy(draw.standard_normal(tuple(clean.shape)))
    return Trial(system, inputs, clean + scale * noise, fresh, system.simulate(fresh), scale.square())
