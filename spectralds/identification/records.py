"""The data of an identification: checked, scaled, split, and run through one-pole filters."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.signal import lfilter

from flash_stu.errors import UserError

SHORTEST = 16  # samples
HELD_OUT = 0.2  # of the data
STARTED = 8  # trajectories whose initial states are estimated: each takes an input more
IMPULSE = 8.0  # between the sizes of fast and slow states under inputs of variance one: penalties fall on all alike
_BLOCK_ROWS = 32768  # time steps of several trajectories that are worked on at once


@dataclass(frozen=True)
class Records:
    """Trajectories from rest.

    Attributes:
        inputs: (batch, time, inputs), float64; outputs: (batch, time, outputs), float64.
        impulses: how many of the inputs, the last, are impulses that stand for initial states; see `started`.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    impulses: int = 0

    @property
    def rows(self) -> int:
        """Number of time steps of all trajectories."""
        return self.inputs.shape[0] * self.inputs.shape[1]

    @property
    def rank(self) -> int:
        """The largest rank of a residue: how many states a pole can need."""
        return min(self.inputs.shape[2], self.outputs.shape[2])

    @cached_property
    def largest_logit(self) -> float:
        """atanh of the slowest pole in use: a memory of a hundred times the length looks like an integral."""
        rate = max(1e-2 / self.inputs.shape[1], 1e-8)
        return float(np.arctanh(1 - rate))

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the inputs and outputs of a few trajectories at a time."""
        count = max(1, _BLOCK_ROWS // self.inputs.shape[1])
        for first in range(0, len(self.inputs), count):
            yield self.inputs[first : first + count], self.outputs[first : first + count]

    def split(self, share: float) -> tuple["Records", "Records", int]:
        """Returns the records to fit, those to judge the fit on, and the time step from which on to judge it.

        Of several trajectories from rest the last are held out. Else it is the end of every one, which the fitted
        system reaches from the beginning, never shown an output.

        Args:
            share: of the data that is held out.
        """
        batch, time = self.inputs.shape[:2]
        if batch > 1 and not self.impulses:
            count = max(1, round(share * batch))
            return self[:-count], self[-count:], 0
        start = time - max(1, round(share * time))
        return replace(self, inputs=self.inputs[:, :start], outputs=self.outputs[:, :start]), self, start

    def started(self) -> "Records":
        """Returns the records of trajectories that begin in states which are to be found.

        What an initial state adds to the outputs is the response to an impulse before the first input. So each
        trajectory gets one time step more, at its beginning, with such an impulse as an input of its own; the impulse's
        direct term takes up the output there, which is zero.
        """
        batch, time = self.inputs.shape[:2]
        inputs = np.zeros((batch, time + 1, self.inputs.shape[2] + batch))
        inputs[:, 1:, :-batch] = self.inputs
        inputs[np.arange(batch), 0, self.inputs.shape[2] + np.arange(batch)] = IMPULSE
        outputs = np.concatenate([np.zeros_like(self.outputs[:, :1]), self.outputs], axis=1)
        return Records(inputs, outputs, impulses=batch)

    def __getitem__(self, index: slice) -> "Records":
        return replace(self, inputs=self.inputs[index], outputs=self.outputs[index])


def filtered(inputs: np.ndarray, poles: np.ndarray) -> np.ndarray:
    """Returns S_t = pole S_{t-1} + u_t for every pole and input, (batch, time, poles, inputs).

    Args:
        inputs: u, (batch, time, inputs); poles: (poles,).
    """
    states = np.empty((*inputs.shape[:2], len(poles), inputs.shape[2]))
    for j, pole in enumerate(poles):
        states[:, :, j] = lfilter([1.0], [1.0, -pole], inputs, axis=1)
    return states


def read_records(inputs: Any, outputs: Any) -> tuple[Records, np.ndarray, np.ndarray]:
    """Check the arguments of `identify`.

    Returns:
        the records, every channel scaled to root mean square one; the inputs' scales and the outputs', (channels,).

    Raises:
        UserError: for what cannot be identified from.
    """
    u, y = as_array(inputs, "inputs"), as_array(outputs, "outputs")
    if u.shape[:-1] != y.shape[:-1]:
        raise UserError(f"outputs have shape {y.shape} and inputs {u.shape}; all but the last number must be the same")
    if u.ndim == 2:
        u, y = u[None], y[None]
    needed = max(SHORTEST, 4 * u.shape[2])
    if u.shape[0] * u.shape[1] < needed or u.shape[1] < 2:
        raise UserError(
            f"inputs have {u.shape[0] * u.shape[1]} time steps; {needed} are needed for {u.shape[2]} channels"
        )
    for name, values in (("inputs", u), ("outputs", y)):
        constant = (values == values[:1, :1]).all(axis=(0, 1))
        if constant.any():
            channel = int(np.argmax(constant))
            raise UserError(f"{name} are constant in channel {channel}: nothing can be learned from it; leave it out")
    u_scale, y_scale = _root_mean_square(u), _root_mean_square(y)
    return Records(u / u_scale, y / y_scale), u_scale, y_scale


def as_array(signal: Any, name: str) -> np.ndarray:
    """Returns a signal as float64, (time, channels) or (batch, time, channels).

    Raises:
        UserError: if it is not real and finite, or of another rank, or has no channel.
    """
    if isinstance(signal, torch.Tensor):
        signal = signal.detach().cpu()
        signal = (signal.float() if signal.dtype == torch.bfloat16 else signal).numpy()
    try:
        array = np.asarray(signal)
    except ValueError:
        raise UserError(f"{name} are not an array; allowed: numbers, (time, channels)") from None
    if array.dtype.kind not in "iuf":
        raise UserError(f"{name} are of type {array.dtype}; allowed: real numbers")
    if array.ndim not in (2, 3) or 0 in (array.shape[0], array.shape[-1]):
        raise UserError(f"{name} have shape {array.shape}; allowed: (time, channels) or (batch, time, channels)")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise UserError(f"{name} are {array[place]} at {place}; allowed: finite numbers")
    return array


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    largest = np.abs(values).max(axis=(0, 1))
    return largest * np.sqrt(np.mean((values / largest) ** 2, axis=(0, 1)))
