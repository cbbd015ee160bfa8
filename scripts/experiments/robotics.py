"""Robotics: the next state of walking bodies, one step ahead and in closed loop, by networks and linear models.

    python scripts/experiments/robotics.py [--env ant | halfcheetah | walker2d] [--collect] [--data runs/robotics]
        [--quick | --full] [--output results/experiments]

The states are positions and velocities of a body in MuJoCo, with the torques beside them; bodies.py makes them walk. A
model reads states and torques and predicts the next state; in closed loop it reads its own predictions and the true
torques. Trajectories are collected into the --data folder if they are not there; --collect does that alone, anew. The
results are robotics-ENV.json and .png. MuJoCo is needed: pip install 'flash-stu[robotics]'.

Where a body is grows without bound, so that the entries for it say how far it moved in the last step instead. All
entries have mean 0, and variance 1 over each group of entries (angles, joint rates ...) on the training trajectories;
errors are mean squares in this scale, and all models correct the same base.

Source: Liu et al. 2024, Flash STU (arXiv 2409.10489), section 4, for task, shapes and training.
"""

import numpy as np
import peers
import torch
from bodies import Body, Trajectories
from prediction_training import matched, parameters

from flash_stu import FlashSTUConfig
from flash_stu.model.prediction import FlashSTUForTimeSeriesPrediction

LENGTH, CONTEXT, STEPS, LONG = 512, 256, 100, 1000  # of training; before a closed loop; of it; of the distilled model's
PUBLISHED = {  # slides to the paper; other trajectories: they cannot be compared with ours
    "ant": {"STU": 0.0092, "Transformer": 0.0237, "Mamba-2": 0.0139},
    "walker2d": {"STU": 0.0062, "Transformer": 0.0134, "Mamba-2": 0.0066},
}
SIZES = {
    "quick": {"seeds": 1, "trajectories": 2, "tests": 1, "generations": 0, "speed_steps": 4},
    "default": {"seeds": 1, "trajectories": 600, "tests": 32, "generations": 15, "speed_steps": 10_000},
    "full": {"seeds": 3, "trajectories": 2000, "tests": 64, "generations": 40, "speed_steps": 10_000},
}


class Features:
    """What models read and predict of a body: fitted on training trajectories.

    Attributes:
        outputs: entries of a state.
        groups: their names with the numbers of entries.
    """

    def __init__(self, body: Body, data: Trajectories) -> None:
        self.body, self.groups, self.outputs = body, body.groups, data.states.shape[2]
        raw = self._raw(data).reshape(-1, self.outputs + data.torques.shape[2])
        self.mean = raw.mean(0)
        sizes = [size for _, size in body.groups] + [data.torques.shape[2]]
        variance = np.split(raw.var(0), np.cumsum(sizes)[:-1])
        self.scale = np.repeat([np.sqrt(group.mean()) for group in variance], sizes)

    def _raw(self, data: Trajectories) -> np.ndarray:
        """States from the second on with the torques that follow, (trajectories, steps - 1, inputs)."""
        states, roaming = data.states[:, 1:].astype(np.float64), list(self.body.roaming)
        states[:, :, roaming] = np.diff(data.states[:, :, roaming].astype(np.float64), axis=1)
        torques = np.concatenate([data.torques[:, 1:], np.zeros_like(data.torques[:, :1])], axis=1)
        return np.concatenate([states, torques], axis=2)

    def __call__(self, data: Trajectories) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs (trajectories, steps - 1, entries and torques) and targets, the next states; float32."""
        scaled = torch.from_numpy((self._raw(data) - self.mean) / self.scale).float()
        return scaled[:, :-1], scaled[:, 1:, : self.outputs]


def networks(env: str, inputs: int, outputs: int) -> dict:
    """Returns the networks by name, as functions that build them; the Transformer has the parameters of the STU."""
    shape = {
        "num_input_channels": inputs,
        "num_output_channels": outputs,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 1 if env == "ant" else 8,
        "num_filters": 16,
        "stu_branches": "separate",
        "max_position_embeddings": LENGTH,
        "sliding_window": LENGTH,
    }
    stu = {**shape, "layer_types": ["linear_attention"] * 4}
    ar = {**stu, "stu_input_taps": 3, "stu_output_taps": 2}
    attention = {**shape, "layer_types": ["sliding_attention"] * 4}

    def build(settings: dict) -> FlashSTUForTimeSeriesPrediction:
        return FlashSTUForTimeSeriesPrediction(FlashSTUConfig(**settings))

    return {
        "STU": lambda: build(stu),
        "AR-STU": lambda: build(ar),
        "hybrid": lambda: build({**shape, "num_hidden_layers": 2}),
        "Transformer": lambda: matched(FlashSTUConfig(**attention), parameters(build(stu))),
        "Mamba-2": lambda: peers.mamba2(FlashSTUConfig(**{**shape, "num_hidden_layers": 2}), state_size=128),
    }
