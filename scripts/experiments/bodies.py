"""Bodies of MuJoCo that walk: gymnasium's environments, a gait for each, and their trajectories as parquet files.

A gait is a central pattern generator: every joint follows a sine of its own centre, amplitude and phase, all of one
frequency, with a term that leans against the torso's pitch, through a PD controller whose torques are clipped to the
actuators' range. Its numbers are found by the cross-entropy method: those that carry the body furthest without a
fall. For the data every trajectory has its own frequency, amplitudes and phase, and torques have smooth noise.

Sources: Todorov et al. 2012 (MuJoCo); Ijspeert 2008 (central pattern generators); de Boer et al. 2005 (cross-entropy).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flash_stu import UserError
from flash_stu.files import replacing_file

SETTLE = 128  # steps of a trajectory before what is kept: from the start to the gait
STIFFNESS, DAMPING = 1.5, 0.05  # of the PD controller, torque per radian and per radian/s, 1 being the greatest
NOISE, MEMORY = 0.15, 0.9  # of the torques: standard deviation, and what is left of it a step later


@dataclass(frozen=True)
class Body:
    """One environment.

    Attributes:
        name: gymnasium's.
        roaming: entries of the position that grow without bound: x, or x and y.
        groups: names of the groups of features that are scaled alike, and how many entries each has, in the order of
            the state (positions, then velocities).
        joints: angles at rest, radians, in the order of the actuators; the search starts around them.
        frequency: of the gait, hertz, where the search starts.
    """

    name: str
    roaming: tuple[int, ...]
    groups: tuple[tuple[str, int], ...]
    joints: tuple[float, ...]
    frequency: float


def _planar(name: str, joints: tuple[float, ...], frequency: float) -> Body:
    groups = (("moved", 1), ("height", 1), ("pitch", 1), ("angles", 6))
    speeds = (("speed", 2), ("pitch rate", 1), ("joint rates", 6))
    return Body(name, (0,), groups + speeds, joints, frequency)


BODIES = {
    "ant": Body(
        "Ant-v5",
        (0, 1),
        (("moved", 2), ("height", 1), ("orientation", 4), ("angles", 8), ("speed", 3), ("turning", 3), ("rates", 8)),
        (0.0, 0.9, 0.0, 0.9, 0.0, -0.9, 0.0, -0.9),
        1.5,
    ),
    "halfcheetah": _planar("HalfCheetah-v5", (0.0,) * 6, 2.0),
    "walker2d": _planar("Walker2d-v5", (-0.2, -0.3, 0.0, -0.2, -0.3, 0.0), 1.5),
}


@dataclass(frozen=True)
class Trajectories:
    """What a body did.

    Attributes:
        states: positions and velocities, (trajectories, steps + 1, entries), float32.
        torques: between a state and the next, (trajectories, steps, joints), float32.
        facts: how it was made: the gait, speed, falls; what JSON keeps.
    """

    states: np.ndarray
    torques: np.ndarray
    facts: dict[str, Any]


class Simulator:
    """A body in MuJoCo that its gait can drive."""

    def __init__(self, body: Body) -> None:
        os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is drawn
        try:
            import gymnasium
            import mujoco  # noqa: F401
        except ImportError:
            raise UserError("robotics needs MuJoCo and gymnasium: pip install 'flash-stu[robotics]'") from None
        self.body = body
        self.environment: Any = gymnasium.make(body.name).unwrapped
        model = self.environment.model
        joints = model.actuator_trnid[:, 0]
        self.positions, self.velocities = model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self.step_seconds = float(self.environment.dt)

    @property
    def state(self) -> np.ndarray:
        return np.concatenate([self.environment.data.qpos, self.environment.data.qvel])

    def upright(self) -> bool:
        """Returns whether the body is in the range that gymnasium calls healthy, HalfCheetah's pitch within 1 radian."""
        if hasattr(self.environment, "is_healthy"):
            return bool(self.environment.is_healthy)
        return abs(self.environment.data.qpos[2]) < 1

    def pitch(self) -> tuple[float, float]:
        """Returns a planar body's pitch and its rate, radians and radians/s; of others 0."""
        data = self.environment.data
        return (data.qpos[2], data.qvel[2]) if len(self.body.roaming) == 1 else (0.0, 0.0)

    def drive(self, gait: np.ndarray, steps: int, random: np.random.Generator, vary: float = 1.0) -> tuple[Any, Any]:
        """Run a gait from rest, until a fall at most.

        Args:
            gait: as `Gait`'s numbers.
            steps: of the environment.
            random: of the start, and of what differs between trajectories.
            vary: how much that is, 0 for the gait itself.

        Returns:
            states (steps done + 1, entries) and torques (steps done, joints).
        """
        joints = len(self.body.joints)
        frequency, (centres, amplitudes, phases, lean, lean_rate) = gait[0], gait[1:].reshape(5, joints)
        frequency = frequency * (1 + vary * random.uniform(-0.15, 0.15))
        amplitudes = amplitudes * (1 + vary * random.uniform(-0.2, 0.2, joints))
        start = vary * random.uniform(0, 2 * np.pi)
        self.environment.reset(seed=int(random.integers(2**31)))
        data, noise = self.environment.data, np.zeros(joints)
        states, torques = [self.state], []
        for step in range(steps):
            pitch, rate = self.pitch()
            angle = 2 * np.pi * frequency * step * self.step_seconds + start + phases
            target = centres + amplitudes * np.sin(angle) + lean * pitch + lean_rate * rate
            noise = MEMORY * noise + vary * NOISE * np.sqrt(1 - MEMORY**2) * random.standard_normal(joints)
            error = target - data.qpos[self.positions]
            torque = np.clip(STIFFNESS * error - DAMPING * data.qvel[self.velocities] + noise, -1, 1)
            self.environment.do_simulation(torque, self.environment.frame_skip)
            torques.append(torque)
            states.append(self.state)
            if not self.upright():
                break
        return np.array(states), np.array(torques)


def search(simulator: Simulator, generations: int, random: np.random.Generator, population: int = 32) -> np.ndarray:
    """Find a gait by the cross-entropy method: 400 steps each, metres forward, less where it falls.

    Returns:
        its numbers: the frequency, then five of each joint: centre, amplitude, phase, gains of pitch and its rate.
    """
    rest = np.array(simulator.body.joints)
    ones, steps = np.ones(len(rest)), 400
    mean = np.concatenate([[simulator.body.frequency], rest, 0.4 * ones, 0 * ones, 0 * ones, 0 * ones])
    width = np.concatenate([[0.5], 0.2 * ones, 0.2 * ones, 1.5 * ones, 0.3 * ones, 0.1 * ones])
    for _ in range(generations):
        gaits = mean + width * random.standard_normal((population, len(mean)))
        gaits[0] = mean
        scores = []
        for gait in gaits:
            states, torques = simulator.drive(gait, steps, random, vary=0.5)
            scores.append(states[-1, 0] - states[0, 0] + 3 * len(torques) / steps)
        best = gaits[np.argsort(scores)[-population // 4 :]]
        mean, width = best.mean(0), best.std(0) + 0.01
        print(f"gait of {simulator.body.name}: best {max(scores):.2f}, mean {np.mean(scores):.2f}", flush=True)
    return mean


def collect(body: Body, count: int, steps: int, seed: int, generations: int) -> Trajectories:
    """Find a gait and let it run: trajectories in which the body fell are dropped, and counted.

    Raises:
        UserError: if MuJoCo is missing, or fewer than one trajectory in ten is without a fall.
    """
    simulator, random = Simulator(body), np.random.default_rng(seed)
    gait = search(simulator, generations, random)
    kept, tried = [], 0
    for states, torques in _runs(simulator, gait, SETTLE + steps, random):
        tried += 1
        if len(torques) == SETTLE + steps:
            kept.append((states[SETTLE:], torques[SETTLE:]))
        if len(kept) == count:
            break
        if tried >= 20 and len(kept) < tried / 10:
            raise UserError(f"{body.name} fell in {tried - len(kept)} of {tried} trajectories: the gait is of no use")
    states, torques = (np.array(part, np.float32) for part in zip(*kept, strict=True))
    moved = (states[:, -1, 0] - states[:, 0, 0]) / (steps * simulator.step_seconds)
    facts = {
        "gait": gait.round(4).tolist(),
        "metres_per_second": float(moved.mean()),
        "without_a_fall": count / tried,
        "step_seconds": simulator.step_seconds,
    }
    return Trajectories(states, torques, facts)


def _runs(
    simulator: Simulator, gait: np.ndarray, steps: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        yield simulator.drive(gait, steps, random)
