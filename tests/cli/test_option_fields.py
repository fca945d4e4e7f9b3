"""Options classes: every field holds what its annotation says, and a mistake in a class ends the import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import click
import pytest

from imatrix_runner.cli.command import OptionsCommand, command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, declared, fill, option, typed
from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.types import Duration, LevelNames, Names, Share, Size, WeightCount
from support.in_process import every_command

COMMANDS = {words: each for words, each in every_command().items() if isinstance(each, OptionsCommand)}


def annotations(options: type[Any]) -> dict[str, Any]:
    """The annotation of every option in a class and in the classes that it is made of."""
    own = {name for name, _, _ in declared(options)}
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(options).items():
        if name in own:
            found[name] = hint
        elif name != "SECTION":
            found |= annotations(hint)
    return found


def converted(kind: click.ParamType[Any]) -> set[Any]:
    """The annotations that fit what a type of Click converts to."""
    if isinstance(kind, click.Choice):
        return {str, Literal[tuple(kind.choices)]}
    for click_type, python_type in (
        (click.types.BoolParamType, bool),
        ((click.types.IntParamType, Size, WeightCount), int),
        ((click.types.FloatParamType, Duration, Share), float),
        (click.types.StringParamType, str),
        (click.Path, Path),
        ((LevelNames, Names), tuple[str, ...]),
    ):
        if isinstance(kind, click_type):
            return {python_type}
    raise AssertionError(f"{kind} is not known to this test")


def fitting(parameter: click.Parameter, ctx: click.Context) -> set[Any]:
    """The annotations that fit a parameter's values, and nothing wider; ``ctx`` of a command line without any option."""
    kinds = converted(parameter.type)
    if parameter.nargs == -1 or parameter.multiple:
        return {tuple[kind, ...] for kind in kinds}
    absent = not parameter.required and ctx.params[parameter.name or ""] is None
    return {kind | None for kind in kinds} if absent else kinds


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_annotations_say_what_click_gives(words: tuple[str, ...]) -> None:
    found = COMMANDS[words]
    ctx, hints = found.make_context("", [], resilient_parsing=True), annotations(found.options)
    assert list(hints) == [parameter.name for parameter in found.params]
    for parameter in found.params:
        assert hints[parameter.name or ""] in fitting(parameter, ctx), parameter.name


def test_a_class_is_filled_with_those_that_it_is_made_of() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Options:
        name: str = argument()
        talk: TalkOptions

    given = {"name": "x", "as_json": True, "quiet": False, "verbose": True, "show_config": False}
    filled = fill(Options, given)
    assert filled == Options(name="x", talk=TalkOptions(as_json=True, quiet=False, verbose=True, show_config=False))


def test_a_field_that_is_no_option_ends_the_import() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Undeclared:
        level: str

    with pytest.raises(TypeError, match=r"Undeclared\.level is neither an option nor a class of options"):
        command(Undeclared)


def test_a_name_that_two_classes_declare_ends_the_import() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Twice:
        quiet: bool = option("--silent", is_flag=True)
        talk: TalkOptions

    with pytest.raises(TypeError, match="Twice declares twice: quiet"):
        command(Twice)


def test_what_was_typed_is_asked_for_by_fields_only() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Options:
        first: str = option("-f", "--first", default="1")
        second: str = option("--second", default="2")

    told = []

    @command(Options)
    def run(_invocation: Invocation, options: Options) -> int:
        told.append(typed(options, "first", "second"))
        with pytest.raises(TypeError, match="Options has no third"):
            typed(options, "third")
        return 0

    run(["--first", "1"], standalone_mode=False)
    assert told == [("-f",)]
