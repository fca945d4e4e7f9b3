"""Joins the sources of every option's value (default < file < environment < flag) and shows where each came from."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.config import ENV_PREFIX, OTHER_VARIABLES, FileSettings, check_names, check_programs, find_settings
from imatrix_runner.errors import UsageError
from imatrix_runner.files import not_utf8
from imatrix_runner.untrusted import is_unicode

F = TypeVar("F", bound=Callable[..., Any])

_ORIGINS = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.DEFAULT: "default",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.PROMPT: "prompt",
}


class Setting(click.Option):
    """An option that can also come from ``IMATRIX_RUNNER_<NAME>`` and from the settings file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.envvar = ENV_PREFIX + (self.name or "").upper()


def setting(*names: str, **kwargs: Any) -> Callable[[F], F]:
    """``click.option`` whose value may come from any source."""
    return click.option(*names, cls=Setting, **kwargs)


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
    """The value as it would be typed, so that an option takes from a file what it takes from a command line, and no more."""
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


def typed(*names: str) -> tuple[str, ...]:
    """The options among these parameters that were given on the command line of the running command, by their first name."""
    ctx = click.get_current_context()
    given = {option.name: option.opts[0] for option in ctx.command.params if isinstance(option, click.Option)}
    return tuple(
        given[name]
        for name in names
        if name in given and ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.PROMPT)
    )


def warn_of_environment(ctx: click.Context) -> None:
    """Warn of every ``IMATRIX_RUNNER_…`` variable that no option or other part of the program reads."""
    assert isinstance(ctx.command, click.Group)
    if isinstance(ctx.obj, Invocation) and {"-q", "--quiet"} & {*ctx.obj.arguments}:
        return
    suspects = [name for name, value in os.environ.items() if name.startswith(ENV_PREFIX) and value]
    if all(name in OTHER_VARIABLES for name in suspects):
        return  # knowing all settings means importing all commands
    known = {ENV_PREFIX + name.upper() for name, _ in _settings_of(ctx.command, ctx)} | OTHER_VARIABLES
    for name in sorted(set(suspects) - known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        click.echo(f"Warning: the environment variable {name} has no effect: it is not a setting.{hint}", err=True)


class SettingsCommand(click.Command):
    """A command with ``--show-config``: print every setting, its value and origin, instead of running.

    ``takes_extra``: whether it runs llama-imatrix, which is given the options after ``--``.
    """

    def __init__(self, *args: Any, takes_extra: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.takes_extra = takes_extra

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        needed = [each for each in self.params if isinstance(each, click.Argument) and each.required]
        if "--show-config" not in args:
            return super().parse_args(ctx, args)
        try:
            for argument in needed:
                argument.required = False
            return super().parse_args(ctx, args)
        finally:
            for argument in needed:
                argument.required = True

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params.pop("show_config", False):
            return print_settings(ctx)
        if isinstance(ctx.obj, Invocation) and ctx.obj.extra and not self.takes_extra:
            raise UsageError(
                f"{ctx.command_path} takes no options after --",
                f"{shlex.join(ctx.obj.extra)} would go to llama-imatrix, which this command does not run",
                f"Leave them out, or see what it takes: {ctx.command_path} --help",
            )
        return super().invoke(ctx)


def print_settings(ctx: click.Context) -> None:
    """One line per setting of the command at hand, or with ``--json`` one document."""
    rows = list(_rows(ctx))
    if ctx.params.get("as_json"):
        from imatrix_runner.cli.documents import document, print_document

        settings = [{"name": name, "value": value, "from": origin} for name, value, origin in rows]
        print_document(document("config", exit_code=0, settings=settings))
        return
    from rich.table import Table

    from imatrix_runner.cli.console import stdout_console

    table = Table("Setting", "Value", "From", box=None, pad_edge=False, header_style="bold")
    for name, value, origin in rows:
        table.add_row(name, _shown(value), origin)
    stdout_console().print(table)


def _rows(ctx: click.Context) -> Iterator[tuple[str, Any, str]]:
    """Name, value and origin of every setting."""
    settings: FileSettings = ctx.find_root().meta["imatrix_runner.settings"]
    for option in ctx.command.params:
        if not isinstance(option, Setting) or option.name is None:
            continue
        source = ctx.get_parameter_source(option.name) or ParameterSource.DEFAULT
        origin = _ORIGINS.get(source, "default")
        if source is ParameterSource.DEFAULT_MAP:
            origin = str(settings.path)
        elif source is ParameterSource.ENVIRONMENT:
            origin = f"environment {option.envvar}"
        value = ctx.params.get(option.name)
        yield option.name.replace("_", "-"), str(value) if isinstance(value, Path) else value, origin


def _shown(value: Any) -> str:
    if value is None or value in ("", ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
