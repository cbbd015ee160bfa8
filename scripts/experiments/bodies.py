"""Bodies of MuJoCo that walk: gymnasium's environments, a gait for each, and their trajectories as parquet files.

A gait is a central pattern generator: every joint follows a sine of its own centre, amplitude and phase, all of one
frequency, with a term that leans against the torso's pitch, through a PD controller whose torques are clipped to the
actuators' range. Its numbers are found by the cross-entropy method: those that carry the body furthest without a
fall. For the data every trajectory has its own frequency, amplitudes and phase, and torques have smooth noise.

Sources: Todorov et al. 2012 (MuJoCo); Ijspeert 2008 (central pattern generators); de Boer et al. 2005 (cross-entropy).
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flash_stu.errors import UserError, reason
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
        generations: of the search.
        mirrored: whether the second half of the joints does what the first does, half a period later.
    """

    name: str
    roaming: tuple[int, ...]
    groups: tuple[tuple[str, int], ...]
    joints: tuple[float, ...]
    frequency: float
    generations: int
    mirrored: bool = False


def _planar(name: str, joints: tuple[float, ...], frequency: float, generations: int, mirrored: bool) -> Body:
    groups = (("moved", 1), ("height", 1), ("pitch", 1), ("angles", 6))
    speeds = (("speed", 2), ("pitch rate", 1), ("joint rates", 6))
    return Body(name, (0,), groups + speeds, joints, frequency, generations, mirrored)


BODIES = {
    "ant": Body(
        "Ant-v5",
        (0, 1),
        (("moved", 2), ("height", 1), ("orientation", 4), ("angles", 8), ("speed", 3), ("turning", 3), ("rates", 8)),
        (0.0, 0.9, 0.0, 0.9, 0.0, -0.9, 0.0, -0.9),
        1.5,
        24,
    ),
    "halfcheetah": _planar("HalfCheetah-v5", (0.0,) * 6, 2.0, 15, False),
    "walker2d": _planar("Walker2d-v5", (-0.2, -0.3, 0.0, -0.2, -0.3, 0.0), 1.5, 40, True),
}
GAITS: dict[str, list[float]] = json.loads((Path(__file__).parent / "gaits.json").read_text())  # that `search` found


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
            import gymnasium  # pyright: ignore[reportMissingImports] - optional
            import mujoco  # noqa: F401 # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("robotics needs MuJoCo and gymnasium: pip install 'flash-stu[robotics]'") from None
        self.body = body
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # MuJoCo leaves a log where it is
            self.environment: Any = gymnasium.make(body.name).unwrapped
        model = self.environment.model
        joints = model.actuator_trnid[:, 0]
        self.positions, self.velocities = model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self.step_seconds = float(self.environment.dt)

    @property
    def state(self) -> np.ndarray:
        return np.concatenate([self.environment.data.qpos, self.environment.data.qvel])

    def upright(self) -> bool:
        """Returns whether the body is in what gymnasium calls its healthy range; HalfCheetah: pitch within 1 radian."""
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
        joints, rows = len(self.body.joints), gait[1:].reshape(5, -1)
        if self.body.mirrored:
            rows = np.hstack([rows, rows + np.pi * (np.arange(5) == 2)[:, None]])
        frequency, (centres, amplitudes, phases, lean, lean_rate) = gait[0], rows
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


def travelled(body: Body, states: np.ndarray, window: int = 50) -> float:
    """Returns how far a body came, metres: forward, or for one that may turn the way over windows of 50 steps."""
    places = states[::window, list(body.roaming)]
    moves = np.diff(places, axis=0)
    return float(moves.sum() if len(body.roaming) == 1 else np.linalg.norm(moves, axis=1).sum())


def search(body: Body, generations: int, seed: int, population: int = 32) -> np.ndarray:
    """Find a gait by the cross-entropy method over 400 steps: by the way made, 5 m a point, and the time upright.

    Returns:
        its numbers: the frequency, then five of each joint: centre, amplitude, phase, gains of pitch and its rate.

    Raises:
        UserError: if MuJoCo is missing.
    """
    simulator, random, steps = Simulator(body), np.random.default_rng(seed), 400
    rest = np.array(body.joints[: len(body.joints) // (2 if body.mirrored else 1)])
    ones = np.ones(len(rest))
    mean = np.concatenate([[body.frequency], rest, 0.3 * ones, 0 * ones, 0 * ones, 0 * ones])
    width = np.concatenate([[0.5], 0.2 * ones, 0.2 * ones, 1.5 * ones, 0.5 * ones, 0.1 * ones])
    for generation in range(generations):
        gaits = mean + width * random.standard_normal((population, len(mean)))
        gaits[0] = mean
        scores = []
        for gait in gaits:
            states, torques = simulator.drive(gait, steps, random)
            scores.append(travelled(body, states) / 5 + 2 * len(torques) / steps)
        best = gaits[np.argsort(scores)[-population // 4 :]]
        mean, width = best.mean(0), best.std(0) + 0.01
        if generation % 5 == 4:
            print(f"gait of {body.name}: best {max(scores):.2f}, mean {np.mean(scores):.2f}", flush=True)
    return mean


def collect(body: Body, gait: np.ndarray, count: int, steps: int, seed: int) -> Trajectories:
    """Let a gait run: trajectories in which the body fell are dropped, and counted.

    Raises:
        UserError: if MuJoCo is missing, or fewer than one trajectory in ten is without a fall.
    """
    simulator, random = Simulator(body), np.random.default_rng(seed)
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
    seconds = len(states) * steps * simulator.step_seconds
    facts = {
        "gait": gait.round(4).tolist(),
        "metres_per_second": sum(travelled(body, each) for each in states) / seconds,
        "without_a_fall": count / tried,
        "step_seconds": simulator.step_seconds,
    }
    return Trajectories(states, torques, facts)


def _runs(
    simulator: Simulator, gait: np.ndarray, steps: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        yield simulator.drive(gait, steps, random)


def write(trajectories: Trajectories, path: Path) -> None:
    """Leave trajectories as a parquet file: a row per step, with trajectory, step, state, and torque but for the last.

    The facts are JSON under "facts" in the schema's metadata.
    """
    states, torques = trajectories.states, trajectories.torques
    count, length, entries = states.shape
    padded = np.concatenate([torques, np.zeros_like(torques[:, :1])], axis=1)
    last = np.tile(np.arange(length) == length - 1, count)
    columns = {
        "trajectory": pa.array(np.repeat(np.arange(count, dtype=np.int32), length)),
        "step": pa.array(np.tile(np.arange(length, dtype=np.int32), count)),
        "state": pa.FixedSizeListArray.from_arrays(pa.array(states.ravel()), entries),
        "torque": pa.FixedSizeListArray.from_arrays(pa.array(padded.ravel()), torques.shape[2], mask=pa.array(last)),
    }
    table = pa.table(columns).replace_schema_metadata({"facts": json.dumps(trajectories.facts)})
    with replacing_file(path) as temporary:
        pq.write_table(table, temporary, row_group_size=length * 64)


def read(path: Path) -> Trajectories:
    """Read what `write` left.

    Raises:
        UserError: for a file that cannot be read or is not one of these.
    """
    try:
        table = pq.read_table(path)
        length = table["step"].to_numpy().max() + 1
        states = table["state"].combine_chunks().flatten().to_numpy()
        torques = table["torque"].combine_chunks().drop_null().flatten().to_numpy()
        facts = json.loads((table.schema.metadata or {})[b"facts"])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a file of trajectories: {reason(error)}") from None
    count = len(table) // length
    return Trajectories(states.reshape(count, length, -1), torques.reshape(count, length - 1, -1), facts)
