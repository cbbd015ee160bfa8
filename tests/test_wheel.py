"""The wheel holds what the packages read, and serves outside a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flash_stu import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = ("flash_stu", "spectralds")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what `pip install .` puts into site-packages."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"  # what pip asks of the project
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_holds_every_file_of_the_packages(installed):
    for package in PACKAGES:
        files = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()}
        expected = {path for path in files if "__pycache__" not in path.parts}
        assert {path.relative_to(installed) for path in (installed / package).rglob("*") if path.is_file()} == expected


def test_the_wheel_has_the_version_of_the_package(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in metadata.read_text()


def test_the_suites_and_embedded_tasks_run_from_the_wheel(installed, tmp_path):
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    here = tmp_path / "tests" / "test_here.py"
    here.write_text(
        "import flash_stu, spectralds\n"
        "def test_here():\n"
        f"    assert {str(installed)!r} in flash_stu.__file__ and {str(installed)!r} in spectralds.__file__\n"
    )
    tests = [here, *(tmp_path / "tests" / "evaluation" / name for name in ("test_suite.py", "test_embedded_tasks.py"))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
