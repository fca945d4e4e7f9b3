"""Settings from files: ``imatrix-runner.toml``, else the table ``[tool.imatrix-runner]`` of ``pyproject.toml``.

Flags and environment variables win over them; the command line does that joining (and reports it with ``--show-config``).
A key is an option's long name without dashes: ``work-dir = "/data/work"``, ``levels = ["Q4_K_M", "IQ3_XXS"]``.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.errors import InvalidDataError, UsageError, from_os_error

FILE = "imatrix-runner.toml"
ENV_PREFIX = "IMATRIX_RUNNER_"

Value = str | int | float | bool | list[str]


@dataclass(frozen=True)
class FileSettings:
    """The values of one file, by option name with underscores; ``path`` is None when there is no such file."""

    path: Path | None = None
    values: Mapping[str, Value] = field(default_factory=dict)


def find_settings(directory: Path) -> FileSettings:
    """Read the settings that apply in ``directory``: its own file or that of the nearest parent that has one."""
    for folder in (directory, *directory.parents):
        if (folder / FILE).is_file():
            return FileSettings(folder / FILE, _values(_read(folder / FILE), folder / FILE))
        project = folder / "pyproject.toml"
        if project.is_file():
            tool = _read(project).get("tool", {})
            table = tool.get("imatrix-runner") if isinstance(tool, dict) else None
            if isinstance(table, dict):
                return FileSettings(project, _values(table, project))
    return FileSettings()


def check_names(settings: FileSettings, known: Collection[str]) -> None:
    """Refuse a key that is no option's name, with the nearest that is."""
    for name in settings.values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0].replace('_', '-')!r}?" if near else "See the options with: imatrix-runner run --help"
            raise UsageError(
                f"Unknown setting {name.replace('_', '-')!r}", f"{settings.path} has a key that is no option", hint
            )


def _read(path: Path) -> dict[str, object]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))
        return document
    except OSError as error:
        raise from_os_error(error, "reading the settings", path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidDataError(f"{path} is not valid TOML", str(error), "Correct the line it names.") from error


def _values(table: Mapping[str, object], path: Path) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for key, value in table.items():
        if isinstance(value, list):
            values[key.replace("-", "_")] = [str(item) for item in value]
        elif isinstance(value, (str, int, float, bool)):
            values[key.replace("-", "_")] = value
        else:
            raise UsageError(
                f"The setting {key!r} has no usable value", f"{path}: {value!r}", "Give text, a number, true/false or a list."
            )
    return values
