"""A command: an options class, and a function of the filled options that returns the exit code."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from imatrix_runner.cli.help_context import HELP_OPTIONS, PageCommand
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import OPTIONS, declared, fill
from imatrix_runner.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class OptionsCommand(PageCommand):
    """A command with ``--show-config``: print every setting, its value and origin, instead of running.

    ``options``: the class that its parameters come from. ``sections``: the help page's section of each option, by name.
    ``examples``: command lines that the page shows first.
    ``takes_extra``: whether it runs llama-imatrix, which gets the options after ``--``.
    """

    def __init__(
        self,
        *args: Any,
        options: type[DataclassInstance],
        sections: Mapping[str, str],
        examples: Sequence[str] = (),
        takes_extra: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.options, self.sections = options, sections
        self.examples, self.takes_extra = tuple(examples), takes_extra

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

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from imatrix_runner.cli.views.help_page import write_examples

        super().format_help_text(ctx, formatter)
        if self.examples:
            write_examples(formatter, self.examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from imatrix_runner.cli.views.help_page import write_options

        last = list(self.sections.values())[-1]  # of --help itself, which Click adds
        found: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                found.setdefault(self.sections.get(parameter.name or "", last), []).append(record)
        write_options(formatter, found)

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params.get("show_config"):
            from imatrix_runner.cli.views.settings_table import print_settings

            return print_settings(ctx)
        if isinstance(ctx.obj, Invocation) and ctx.obj.extra and not self.takes_extra:
            raise UsageError(
                f"{ctx.command_path} takes no options after --",
                f"{shlex.join(ctx.obj.extra)} would go to llama-imatrix, which this command does not run",
                f"Leave them out, or see what it takes: {ctx.command_path} --help",
            )
        return super().invoke(ctx)


def command(
    options: type[T], *, name: str = "", examples: Sequence[str] = (), takes_extra: bool = False
) -> Callable[[Callable[[Invocation, T], int]], OptionsCommand]:
    """Make a command from a function: its docstring is the help text, ``options`` its parameters.

    Raises ``TypeError`` if ``options`` declares a name twice, or has a field that is not an option.
    """
    found = list(declared(options))
    if twice := [each for each, count in Counter(each for each, _, _ in found).items() if count > 1]:
        raise TypeError(f"{options.__name__} declares twice: {', '.join(twice)}")

    def decorate(function: Callable[[Invocation, T], int]) -> OptionsCommand:
        def callback(**values: Any) -> int:
            return function(click.get_current_context().find_object(Invocation) or Invocation((), ()), fill(options, values))

        return OptionsCommand(
            name or function.__name__,
            callback=callback,
            help=function.__doc__,
            options=options,
            params=[each.parameter(parameter) for parameter, each, _ in found],
            sections={parameter: section or OPTIONS for parameter, _, section in found},
            examples=examples,
            takes_extra=takes_extra,
            # As the group's, also where a command is used without it: click keeps the option that it makes of the first ones.
            context_settings={"help_option_names": list(HELP_OPTIONS)},
        )

    return decorate
