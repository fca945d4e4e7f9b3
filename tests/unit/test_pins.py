"""What the scripts install is pinned: every dependency, for every supported Python, at the versions that were tested."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from imatrix_runner.toolchain.source import PACKAGE, TESTED_VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def _constraints() -> list[Requirement]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _pins(name: str, python: str) -> list[str]:
    """The versions pinned for that Python on this platform."""
    where = {"python_version": python, "python_full_version": f"{python}.5"}
    pins = [pin for pin in _constraints() if canonicalize_name(pin.name) == canonicalize_name(name)]
    return [str(pin.specifier).removeprefix("==") for pin in pins if pin.marker is None or pin.marker.evaluate(where)]


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    texts = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(text for extra in extras for text in extra),
    ]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_pin_that_its_requirement_admits(python: str) -> None:
    for requirement in _requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python, "extra": ""}):
            continue
        pins = _pins(requirement.name, python)
        assert len(pins) == 1, (str(requirement), pins)
        assert requirement.specifier.contains(pins[0]), (str(requirement), pins)


def test_the_pinned_bindings_are_the_ones_whose_source_is_built_by_default() -> None:
    assert _pins(PACKAGE, "3.11") == [TESTED_VERSION]


def test_a_dependency_of_a_dependency_is_pinned_too() -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("huggingface_hub", "jinja2", "pytest", "rich"):
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert len(_pins(requirement.name, python)) == 1, text
