"""The result of a method of identification: a sum of exponentials and a direct term, in scaled units."""

from dataclasses import dataclass

import numpy as np
import torch

from spectralds.identification.records import IMPULSE
from spectralds.identification.system import SymmetricLDS, realise


@dataclass(frozen=True)
class Response:
    """A system in the units of the records, and the variance of what it leaves unexplained.

    Attributes:
        A: (states,); B: (states, inputs); C: (outputs, states); D: (outputs, inputs).
        noise: variance of each output's noise, (outputs,).
    """

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    noise: np.ndarray

    @classmethod
    def of_weights(cls, poles: np.ndarray, weights: np.ndarray, noise: np.ndarray, max_states: int) -> "Response":
        """Returns the response of regression weights on the states of each pole, then the inputs.

        Args:
            poles: (poles,); weights: ((poles + 1) * inputs, outputs); noise: (outputs,).
            max_states: the largest number of states.
        """
        residues = weights.reshape(len(poles) + 1, -1, weights.shape[1]).transpose(0, 2, 1)
        return cls(*realise(poles, residues[:-1], max_states), residues[-1], noise)

    def system(
        self, input_scale: np.ndarray | float = 1.0, output_scale: np.ndarray | float = 1.0, impulses: int = 0
    ) -> tuple[SymmetricLDS, torch.Tensor]:
        """Returns the system in the units of the data, and the state that each impulse leaves, (impulses, states).

        Args:
            input_scale: what the inputs but for the impulses were divided by; output_scale: and the outputs.
            impulses: how many inputs, the last, are impulses of `Records.started`.
        """
        inputs = self.D.shape[1] - impulses
        to_outputs = np.broadcast_to(output_scale, len(self.C))[:, None]
        B, D = self.B[:, :inputs] / input_scale, self.D[:, :inputs] / input_scale * to_outputs
        states = torch.from_numpy(IMPULSE * self.B[:, inputs:].T.copy())
        return SymmetricLDS.of(self.A, B, self.C * to_outputs, D), states
