"""A symmetric linear dynamical system that was identified: its constants, its simulation, and its file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.signal import lfilter

from flash_stu.errors import UserError, reason
from flash_stu.files import replacing_file
from spectralds.identification.records import as_array

if TYPE_CHECKING:
    from spectralds.identification.layer import SymmetricLDSLayer

Signal = TypeVar("Signal", np.ndarray, torch.Tensor)
_NAMES = ("A", "B", "C", "D")


@dataclass(frozen=True)
class SymmetricLDS:
    """The system S_t = A S_{t-1} + B u_t, y_t = C S_t + D u_t with a diagonal A, of real eigenvalues.

    Attributes:
        A: eigenvalues in (-1, 1), (states,), float64; there may be no state at all.
        B: input weights, (states, inputs).
        C: output weights, (outputs, states).
        D: direct term, (outputs, inputs).
        report: how it was found, JSON-ready; see `identify`.
    """

    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    report: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray, report: dict[str, Any] | None = None
    ) -> "SymmetricLDS":
        """Returns the system of these arrays."""
        a, b, c, d = (torch.from_numpy(np.array(value, dtype=np.float64)) for value in (A, B, C, D))
        return cls(a, b, c, d, report or {})

    def simulate(self, inputs: Signal, state: torch.Tensor | None = None) -> Signal:
        """Returns the outputs alone, see `run`."""
        return self.run(inputs, state)[0]

    def run(self, inputs: Signal, state: torch.Tensor | None = None) -> tuple[Signal, torch.Tensor]:
        """Run the system over a sequence, in float64.

        Args:
            inputs: (time, inputs) or (batch, time, inputs), a numpy array or a tensor.
            state: S before the first input, (states,) or (batch, states); None: zero.

        Returns:
            outputs, (time, outputs) or (batch, time, outputs), float64, of the kind that the inputs are; and the
            state after the last input, which continues the sequence, (states,) or (batch, states).

        Raises:
            UserError: for inputs that are not finite real numbers of such a shape, or a state of another shape.
        """
        values = as_array(inputs, "inputs")
        if values.shape[-1] != self.D.shape[1]:
            raise UserError(f"inputs have {values.shape[-1]} channels; allowed: the system's {self.D.shape[1]}")
        A, B, C, D = (tensor.numpy() for tensor in (self.A, self.B, self.C, self.D))
        batch = values.shape[:-2]
        before = np.zeros((*batch, len(A))) if state is None else np.asarray(state, dtype=np.float64)
        if before.shape != (*batch, len(A)):
            raise UserError(f"state has shape {before.shape}; allowed: {(*batch, len(A))}")
        outputs, after = values @ D.T, before.copy()
        for j, pole in enumerate(A):
            driven = values @ B[j]
            states, _ = lfilter([1.0], [1.0, -pole], driven, axis=-1, zi=pole * before[..., j, None])
            if values.shape[-2]:
                after[..., j] = states[..., -1]
            outputs += states[..., None] * C[:, j]
        return _like(inputs, outputs), torch.from_numpy(after)

    def to_layer(self, dtype: torch.dtype = torch.float32) -> "SymmetricLDSLayer":
        """Returns a trainable layer with these constants, its parameters of the given dtype."""
        from spectralds.identification.layer import SymmetricLDSLayer

        return SymmetricLDSLayer(self, dtype)

    def save(self, path: str | Path) -> None:
        """Write A, B, C, D and the report to one safetensors file, whole or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        with replacing_file(path) as temporary:
            tensors = {name: getattr(self, name).contiguous() for name in _NAMES}
            save_file(tensors, temporary, metadata={"report": json.dumps(self.report)})

    @classmethod
    def load(cls, path: str | Path) -> "SymmetricLDS":
        """Read a system that `save` wrote.

        Raises:
            UserError: if the file cannot be read or does not hold a stable system.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = [file.get_tensor(name).double() for name in _NAMES]
                report = json.loads((file.metadata() or {}).get("report", "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"system {path} cannot be read: {reason(error)}") from None
        A, B, C, D = tensors
        fits = A.ndim == 1 and D.ndim == 2 and B.shape == (len(A), D.shape[1]) and C.shape == (D.shape[0], len(A))
        if not fits or not all(tensor.isfinite().all() for tensor in tensors) or not bool((A.abs() < 1).all()):
            raise UserError(f"system {path} is not a stable system with A (h,), B (h, i), C (o, h) and D (o, i)")
        return cls(A, B, C, D, report)


def realise(poles: np.ndarray, residues: np.ndarray, max_states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factor the residues of a transfer function into states, as many per pole as its residue has rank.

    Each state has variance one for white inputs, so that the output weights show how much it matters. Parts below
    float64's rounding of the whole are left out, and the smallest ones beyond `max_states`.

    Args:
        poles: (poles,); residues: the impulse response is sum_j residues[j] * poles[j]^t, (poles, outputs, inputs).
        max_states: the largest number of states.

    Returns:
        A (states,), B (states, inputs) and C (outputs, states).
    """
    gain = 1 / np.sqrt((1 - poles) * (1 + poles))
    left, size, right = np.linalg.svd(residues * gain[:, None, None], full_matrices=False)
    order = np.argsort(-size, axis=None, kind="stable")[:max_states]
    order = order[size.flat[order] > np.finfo(float).eps ** 2 * size.max(initial=0)]
    pole, part = np.unravel_index(np.sort(order), size.shape)
    B = right[pole, part] / gain[pole, None]
    C = (left[pole, :, part] * size[pole, part, None]).T
    return poles[pole], B, C


def _like(given: Signal, values: np.ndarray) -> Signal:
    """Returns values as a tensor on the device of a tensor, or else as they are."""
    return cast(Signal, torch.from_numpy(values).to(given.device) if isinstance(given, torch.Tensor) else values)
