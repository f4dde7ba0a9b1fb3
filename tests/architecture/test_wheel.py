"""The wheel holds the five packages with their types, the licence and the entry points, and nothing else."""

from __future__ import annotations

import configparser
import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from source_tree import FRAMEWORKS, PACKAGES, REPOSITORY, files_of, run_python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the installed hatchling, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Every path inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, ending: str) -> str:
    """The one file of the wheel with this ending."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(ending)]
        return archive.read(name).decode()


def test_the_wheel_holds_every_module_of_the_five_packages(names: set[str]) -> None:
    expected = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in files_of(package)
    }
    assert expected - names == set()


def test_the_wheel_holds_nothing_but_packages_and_metadata(names: set[str]) -> None:
    top_level = {name.split("/")[0] for name in names}
    metadata = {name for name in top_level if name.endswith(".dist-info")}
    assert top_level - metadata == set(PACKAGES)
    assert len(metadata) == 1


def test_every_package_is_marked_as_typed(names: set[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_the_licence_travels_with_the_wheel(wheel: Path) -> None:
    licence = read(wheel, ".dist-info/licenses/LICENSE")
    assert licence == (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert email.message_from_string(read(wheel, "METADATA"))["License-Expression"] == "Apache-2.0"


def test_no_framework_is_a_hard_requirement(wheel: Path) -> None:
    requirements = [
        Requirement(text) for text in email.message_from_string(read(wheel, "METADATA")).get_all("Requires-Dist", [])
    ]
    hard = {requirement.name for requirement in requirements if requirement.marker is None}
    assert hard & FRAMEWORKS == set()
    assert all(requirement.specifier for requirement in requirements if not requirement.extras), (
        "a range, not any version"
    )
    assert [str(r) for r in requirements for s in r.specifier if s.operator in ("==", "===")] == [], (
        "pins stand in constraints.txt"
    )


def test_the_entry_points_of_the_wheel_are_found_and_each_names_something_real(wheel: Path) -> None:
    """Ours are registered as a third party's are; that the names resolve needs only the light half of each adapter."""
    points = configparser.ConfigParser()
    points.read_string(read(wheel, "entry_points.txt"))
    assert set(points["polyaccel.backends"]) == {"torch", "xla", "jax"}
    assert set(points["polyaccel.bridges"]) == {"torch_to_jax", "flax_to_torch"}
    assert points["console_scripts"]["polyaccel"] == "polyaccel.cli.main:main"
    light = [*points["polyaccel.backends"].values(), points["console_scripts"]["polyaccel"]]
    for value in light:
        module, _, attribute = value.partition(":")
        assert run_python(f"import json, {module} as m; print(json.dumps(callable(m.{attribute})))"), value


def test_the_packages_import_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import json, {', '.join(PACKAGES)}\n"
        f"print(json.dumps([m.__file__ for m in ({', '.join(PACKAGES)})]))"
    )
    assert all(Path(file).is_relative_to(tmp_path) for file in run_python(code, "-I", "-S"))
