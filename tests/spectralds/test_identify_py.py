"""scripts/identify.py from the outside: every format of data, what it writes, and what bad data gets."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from flash_stu.errors import run_cli
from flash_stu.files import verify
from spectralds.identification.system import SymmetricLDS
from spectralds.identification.systems import dense, trial

SCRIPT = Path(__file__).parents[2] / "scripts" / "identify.py"


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the script in a folder of its own; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(data, inputs="u,v", outputs="y", *more):
        capsys.readouterr()
        arguments = ["--data", data, "--inputs", inputs, "--outputs", outputs, "--output", "out", *more]
        monkeypatch.setattr(sys, "argv", ["identify.py", *map(str, arguments)])
        return run_cli(main), *capsys.readouterr()

    return run


@pytest.fixture
def signal():
    data = trial(dense(0, states=3, channels=2), 200, 0.05, 0)
    return data.inputs.numpy(), data.outputs.numpy()


def table(signal):
    u, y = signal
    return pa.table({"time": np.arange(len(u)), "u": u[:, 0], "v": u[:, 1], "y": y[:, 0], "z w": y[:, 1]})


def test_every_format_gives_the_same_system(command, signal, tmp_path, monkeypatch):
    u, y = signal
    csv.write_csv(table(signal), "a.csv")
    parquet.write_table(table(signal), "a.parquet")
    np.savez("a.npz", both=u, u=u[:, 0], v=u[:, 1], y=y[:, 0], z=y[:, 1])
    found = []
    for data, inputs, outputs in (
        ("a.csv", "u,v", "y,z w"),
        ("a.parquet", "u,v", "y,z w"),
        ("a.npz", "u,v", "y,z"),
        ("a.npz", "both", "y,z"),
    ):
        status, out, err = command(data, inputs, outputs)
        assert status == 0 and not err and "held-out error" in out, err
        verify(tmp_path / "out")
        found.append(SymmetricLDS.load("out/system.safetensors"))
        report = json.loads(Path("out/identification.json").read_text())
        assert report == found[-1].report
        assert report["states"] == len(found[-1].A) and report["poles"] == sorted(set(found[-1].A.tolist()))
        if len(found) == 1:
            assert all(Path(f"out/{name}.png").stat().st_size > 1000 for name in ("prediction", "poles"))
            monkeypatch.setattr("spectralds.identification.directory.save_figure", lambda figure, path: path.touch())
    for other in found[1:]:
        np.testing.assert_allclose(other.simulate(u), found[0].simulate(u), rtol=1e-9, atol=1e-9)
    assert np.square(found[0].simulate(u) - y).mean() < 0.02 * np.square(y).mean()


def test_trajectories_and_settings(command, signal):
    u, y = (array.reshape(5, 40, 2) for array in signal)
    np.savez("a.npz", u=u.astype(np.float32), y=y)
    assert command("a.npz", "u", "y", "--method", "grid", "--max-states", "7")[0] == 0
    report = json.loads(Path("out/identification.json").read_text())
    assert report["method"] == "grid" and report["states"] <= 7 and report["samples"] == 200
    assert "seconds" not in report


def test_the_output_of_somebody_else_stays(command, signal):
    csv.write_csv(table(signal), "a.csv")
    Path("out").mkdir()
    Path("out/mine").touch()
    status, _, err = command("a.csv")
    assert status == 2 and "was not written by this program" in err and Path("out/mine").exists()


HEAD = "u,v,y\n"
LINES = "".join(f"{a},{b},{a + b}\n" for a, b in np.random.default_rng(0).standard_normal((30, 2)))
BAD = {
    "missing column": (HEAD + LINES, "u,w", "y", "column 'w' is not there; columns: 'u', 'v', 'y'"),
    "text": (HEAD + "1,x,3\n" + LINES, "u,v", "y", "column 'v' has 'x' in row 1"),
    "not finite": (HEAD + LINES + "1,inf,3\n", "u,v", "y", "column 'v' is inf in row 31"),
    "not a number": (HEAD + LINES + "1,nan,3\n", "u,v", "y", "column 'v' has no value in row 31"),
    "no value": (HEAD + LINES + "1,,3\n", "u,v", "y", "column 'v' has no value in row 31"),
    "ragged": (HEAD + LINES + "1,2\n", "u,v", "y", "cannot be read"),
    "no rows": (HEAD, "u,v", "y", "has no rows"),
    "empty": ("", "u,v", "y", "cannot be read"),
    "twice": ("u,v,y,u\n" + "1,2,3,4\n" * 20, "u,v", "y", "column 'u' is there more than once"),
    "dates": (HEAD + "2020-01-01,2,3\n" * 20, "u,v", "y", "column 'u' is of type date32"),
    "constant": (HEAD + "1,2,3\n" * 20, "u,v", "y", "inputs are constant in channel 0"),
    "short": (HEAD + "1,2,3\n4,5,6\n", "u,v", "y", "time steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(command, case):
    text, inputs, outputs, words = BAD[case]
    Path("a.csv").write_text(text)
    status, _, err = command("a.csv", inputs, outputs)
    assert status == 2 and words in err and err.count("\n") == 1 and not Path("out").exists()


def test_bad_files(command):
    u = np.random.default_rng(0).standard_normal((30, 2))
    np.savez("lengths.npz", u=u, y=u[:-1])
    np.savez("sides.npz", u=u, v=u[:-1], y=u)
    np.savez("objects.npz", u=np.array([{}]), y=u)
    np.savez("numbers.npz", u=u[0, 0], y=u)
    np.save("one.npz.npy", u)
    Path("one.npy.npz").write_bytes(Path("one.npz.npy").read_bytes())
    for name in ("noise.npz", "noise.parquet", "noise.csv"):
        Path(name).write_bytes(b"\xff\x00PK\x03\x04 nothing of the kind" * 20)
    Path("half.npz").write_bytes(Path("lengths.npz").read_bytes()[:300])
    for name in ("empty.npz", "empty.parquet", "a.txt"):
        Path(name).touch()
    for name, words in (
        ("lengths.npz", "the times must be the same"),
        ("objects.npz", "cannot be read"),
        ("numbers.npz", "array 'u' has shape ()"),
        ("one.npy.npz", "not an archive"),
        *(
            (f"{name}", "cannot be read")
            for name in ("noise.npz", "noise.parquet", "half.npz", "empty.npz", "empty.parquet")
        ),
        ("noise.csv", "noise.csv"),
        ("a.txt", "must end in one of .csv, .npz, .parquet"),
    ):
        status, _, err = command(name, "u", "y")
        assert status == 2 and words in err and err.count("\n") == 1 and not Path("out").exists(), (name, err)
    assert "array 'v' has shape (29, 2)" in command("sides.npz", "u,v", "y")[2]
