"""Combines the sources of a setting: default < settings file < environment < command line."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.errors import InvalidDataError, UsageError, from_os_error
from imatrix_runner.files import not_utf8
from imatrix_runner.untrusted import UnreadableError, from_toml, is_unicode

FILE = "imatrix-runner.toml"

ENV_PREFIX = "IMATRIX_RUNNER_"

_MOST_BYTES = 1 << 20

OTHER_VARIABLES = frozenset(
    ENV_PREFIX + name for name in ("CACHE", "LLAMA_CPP", "RELEASES_URL", "CALIBRATION_URL", "PASS_ENV", "CHILD_OF")
)
"""Variables with the prefix that are read, but are not settings of commands."""

Value = str | int | float | bool | list[str]


class Setting(click.Option):
    """An option that can also come from ``IMATRIX_RUNNER_<NAME>`` and from the settings file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.envvar = ENV_PREFIX + (self.name or "").upper()


def apply_settings(ctx: click.Context) -> None:
    """Give the file's values to every subcommand as defaults (``ctx.default_map``)."""
    here = Path.cwd()
    if not is_unicode(str(here)):
        raise not_utf8(str(here))
    settings = find_settings(here)
    ctx.meta["imatrix_runner.settings"] = settings
    if not settings.values:
        return
    assert isinstance(ctx.command, click.Group)
    check_names(settings, {name for name, _ in _settings_of(ctx.command, ctx)})
    check_programs(settings)
    ctx.default_map = _defaults(ctx.command, ctx, settings)


def _settings_of(group: click.Group, ctx: click.Context) -> Iterator[tuple[str, Setting]]:
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from _settings_of(command, ctx)
        elif command is not None:
            yield from ((option.name or "", option) for option in command.params if isinstance(option, Setting))


def _defaults(group: click.Group, ctx: click.Context, settings: FileSettings) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            defaults[name] = _defaults(command, ctx, settings)
        elif command is not None:
            defaults[name] = {option.name: _value(option, settings) for option in command.params if _has(option, settings)}
    return defaults


def _has(option: click.Parameter, settings: FileSettings) -> bool:
    return isinstance(option, Setting) and option.name in settings.values


def _value(option: click.Parameter, settings: FileSettings) -> Any:
    """The value as it would be typed, so that an option accepts the same values from a file as from the command line."""
    value = settings.values[option.name or ""]
    if isinstance(value, list):
        return value if option.multiple else ",".join(value)
    if isinstance(value, bool):
        if not getattr(option, "is_flag", False):
            name = (option.name or "").replace("_", "-")
            raise UsageError(
                f"The setting {name!r} takes a value, not {str(value).lower()}",
                f"{settings.path} gives it {str(value).lower()}",
                "Give the value that would follow the option, or remove the line.",
            )
        return value
    return [str(value)] if option.multiple else str(value)


def warn_of_environment(ctx: click.Context) -> None:
    """Warn of every ``IMATRIX_RUNNER_…`` variable that no option or other part of the program reads."""
    assert isinstance(ctx.command, click.Group)
    if isinstance(ctx.obj, Invocation) and {"-q", "--quiet"} & {*ctx.obj.arguments}:
        return
    suspects = [name for name, value in os.environ.items() if name.startswith(ENV_PREFIX) and value]
    if all(name in OTHER_VARIABLES for name in suspects):
        return  # to know all settings, all commands must be imported
    known = {ENV_PREFIX + name.upper() for name, _ in _settings_of(ctx.command, ctx)} | OTHER_VARIABLES
    for name in sorted(set(suspects) - known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        click.echo(f"Warning: the environment variable {name} has no effect: it is not a setting.{hint}", err=True)


@dataclass(frozen=True)
class FileSettings:
    """The values of a settings file, by option name with underscores; ``path`` is None if there is no such file."""

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
    """Refuse a key that is not an option's name, and suggest the nearest one."""
    for name in settings.values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0].replace('_', '-')!r}?" if near else "See the options with: imatrix-runner run --help"
            raise UsageError(
                f"Unknown setting {name.replace('_', '-')!r}", f"{settings.path} has a key that is not an option", hint
            )


def check_programs(settings: FileSettings) -> None:
    """Refuse programs next to the settings file: both may have come with a model."""
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
    """Whether an option accepts such a value: no NUL in text, no NaN or infinity."""
    if isinstance(value, str):
        return "\0" not in value
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
