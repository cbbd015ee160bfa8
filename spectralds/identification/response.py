"""What a method of identification found: a sum of exponentials and a direct term, in scaled units."""

from dataclasses import dataclass
from typing import Any

import numpy as np

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
        self, input_scale: np.ndarray | float = 1.0, output_scale: np.ndarray | float = 1.0, report: Any = None
    ) -> SymmetricLDS:
        """Returns the system in the units of the data, whose channels were divided by these scales."""
        to_outputs = np.broadcast_to(output_scale, len(self.C))[:, None]
        return SymmetricLDS.of(
            self.A, self.B / input_scale, self.C * to_outputs, self.D / input_scale * to_outputs, report
        )
