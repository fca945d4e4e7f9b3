"""Settings files: which one applies, and what is wrong with a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.cli.settings import FILE, FileSettings, check_names, find_settings
from imatrix_runner.errors import InvalidDataError, UsageError

KNOWN = ("work_dir", "levels", "jobs", "pure")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def project(folder: Path, table: str) -> Path:
    return write(folder / "pyproject.toml", table)


def test_nothing_there_nothing_set(tmp_path: Path) -> None:
    assert find_settings(tmp_path) == FileSettings(None, {})


def test_every_kind_of_value_arrives(tmp_path: Path) -> None:
    path = write(tmp_path / FILE, 'work-dir = "/data"\nlevels = ["Q4_K_M", "IQ3_XXS"]\njobs = 2\npure = true\ntimeout = 1.5\n')
    settings = find_settings(tmp_path)
    assert settings.path == path
    assert settings.values == {
        "work_dir": "/data",
        "levels": ["Q4_K_M", "IQ3_XXS"],
        "jobs": 2,
        "pure": True,
        "timeout": 1.5,
    }


def test_the_nearest_folder_wins(tmp_path: Path) -> None:
    write(tmp_path / FILE, "jobs = 1")
    write(tmp_path / "a" / FILE, "jobs = 2")
    (tmp_path / "a" / "b").mkdir()
    assert find_settings(tmp_path / "a" / "b").values == {"jobs": 2}
    assert find_settings(tmp_path).values == {"jobs": 1}


def test_our_own_file_wins_over_pyproject_beside_it(tmp_path: Path) -> None:
    write(tmp_path / FILE, "jobs = 1")
    project(tmp_path, "[tool.imatrix-runner]\njobs = 2")
    assert find_settings(tmp_path).values == {"jobs": 1}


def test_the_table_of_pyproject_counts(tmp_path: Path) -> None:
    path = project(tmp_path, '[tool.imatrix-runner]\nwork-dir = "w"')
    assert find_settings(tmp_path) == FileSettings(path, {"work_dir": "w"})


def test_a_pyproject_without_our_table_is_stepped_over(tmp_path: Path) -> None:
    write(tmp_path / FILE, "jobs = 1")
    project(tmp_path / "a", "[tool.other]\nx = 1")
    project(tmp_path / "a" / "b", '[project]\nname = "x"')
    assert find_settings(tmp_path / "a" / "b").values == {"jobs": 1}


@pytest.mark.parametrize("content", ["jobs = = 1\n", "jobs\n", '"\n'])
def test_bad_toml_names_file_and_place(tmp_path: Path, content: str) -> None:
    write(tmp_path / FILE, content)
    with pytest.raises(InvalidDataError, match="is not valid TOML") as caught:
        find_settings(tmp_path)
    assert FILE in caught.value.what
    assert "line 1" in caught.value.why


def test_a_file_that_is_not_utf8_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes('work-dir = "stra\xdfe"'.encode("latin-1"))
    with pytest.raises(InvalidDataError, match="is not valid TOML"):
        find_settings(tmp_path)


@pytest.mark.parametrize("value", ["2026-01-01", "{ a = 1 }"])
def test_a_value_no_option_can_have_is_refused(tmp_path: Path, value: str) -> None:
    write(tmp_path / FILE, f"work-dir = {value}")
    with pytest.raises(UsageError, match="'work-dir' has no usable value"):
        find_settings(tmp_path)


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    settings = FileSettings(tmp_path / FILE, {"jobs": 1, "work_dri": "x"})
    with pytest.raises(UsageError, match="Unknown setting 'work-dri'") as caught:
        check_names(settings, KNOWN)
    assert "'work-dir'" in caught.value.todo
    assert str(tmp_path / FILE) in caught.value.why


def test_an_unknown_key_like_no_other_points_to_the_help(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        check_names(FileSettings(tmp_path / FILE, {"zzzzzz": 1}), KNOWN)
    assert "--help" in caught.value.todo


def test_known_keys_pass(tmp_path: Path) -> None:
    check_names(FileSettings(tmp_path / FILE, dict.fromkeys(KNOWN, 1)), KNOWN)
