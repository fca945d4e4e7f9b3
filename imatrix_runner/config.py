"""Settings from files: ``imatrix-runner.toml``, else the table ``[tool.imatrix-runner]`` of ``pyproject.toml``.

Flags and environment variables win over them; the command line does that joining (and reports it with ``--show-config``).
A key is an option's long name without dashes: ``work-dir = "/data/work"``, ``levels = ["Q4_K_M", "IQ3_XXS"]``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.errors import InvalidDataError, UsageError, from_os_error
from imatrix_runner.untrusted import UnreadableError, from_toml

FILE = "imatrix-runner.toml"
ENV_PREFIX = "IMATRIX_RUNNER_"
_MOST_BYTES = 1 << 20

OTHER_VARIABLES = frozenset(
    ENV_PREFIX + name for name in ("CACHE", "LLAMA_CPP", "RELEASES_URL", "CALIBRATION_URL", "PASS_ENV", "CHILD_OF")
)
"""Variables with the prefix that are read without being the setting of every command."""

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
            if table is not None:
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


def check_programs(settings: FileSettings) -> None:
    """Refuse programs that lie next to the settings file: both may have come with a model."""
    if settings.path is None:
        return
    home, named = settings.path.parent.resolve(), settings.values.get("llama_cpp")
    if isinstance(named, str) and (home / named).resolve().is_relative_to(home):
        raise UsageError(
            "llama-cpp in a file cannot name programs next to it",
            f"{settings.path} names {named!r}, and a folder that came with a model would run its own programs",
            "Remove it there, and give --llama-cpp on the command line or IMATRIX_RUNNER_LLAMA_CPP in the environment.",
        )


def _read(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidDataError(f"{path} is too large", f"more than {_MOST_BYTES} bytes of settings", "Shorten it.")
        return from_toml(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, "reading the settings", path) from error
    except UnreadableError as error:
        raise InvalidDataError(f"{path} is not valid TOML", str(error), "Correct the line it names.") from error


def _values(table: object, path: Path) -> dict[str, Value]:
    if not isinstance(table, dict):
        raise UsageError(
            "The settings of imatrix-runner are not a table",
            f"{path} gives {repr(table)[:100]} as tool.imatrix-runner",
            "Write them below a line [tool.imatrix-runner].",
        )
    values: dict[str, Value] = {}
    for key, value in table.items():
        items = value if isinstance(value, list) else [value]
        if not all(map(_is_usable, items)):
            raise UsageError(
                f"The setting {key!r} has no usable value",
                f"{path} gives it {repr(value)[:100]}",
                "Give text, a number, true/false or a list of these.",
            )
        values[key.replace("-", "_")] = [str(item) for item in value] if isinstance(value, list) else value
    return values


def _is_usable(value: object) -> bool:
    """Whether an option could hold it: no path may hold NUL, and no option takes NaN or infinity."""
    if isinstance(value, str):
        return "\0" not in value
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
