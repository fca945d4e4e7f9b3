"""Options as typed values: a frozen dataclass declares options as its fields, and Click's values fill it.

::

    @dataclass(frozen=True, kw_only=True)
    class StatusOptions:
        work_dir: Path = setting("--work-dir", type=..., help="Where the workspaces are.")
        talk: TalkOptions

Each field is one parameter of the same name, so there is no second list that could differ. A field without a declaration is of
another such class, whose options follow at that place. Anything else is an error when the command is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import click
from click.core import ParameterSource

from imatrix_runner.cli.settings import Setting

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

OPTIONS = "Options"
"""Where ``--help`` lists an option that belongs to no other section."""

_DECLARED, _SECTION = "declared", "section"


@dataclass(frozen=True)
class DeclaredParameter:
    """The Click parameter of a field: its class, spellings and arguments. ``section``: where ``--help`` lists it."""

    kind: type[click.Parameter]
    spellings: tuple[str, ...]
    attributes: Mapping[str, Any]
    section: str = ""

    def parameter(self, name: str) -> click.Parameter:
        return self.kind([name, *self.spellings], **self.attributes)


def argument(**attributes: Any) -> Any:
    """A field that is an argument; ``attributes`` are those of :class:`click.Argument`."""
    return field(metadata={_DECLARED: DeclaredParameter(click.Argument, (), attributes)})


def option(*spellings: str, section: str = "", **attributes: Any) -> Any:
    """A field that is an option for the command line only; ``attributes`` are those of :class:`click.Option`."""
    return field(metadata={_DECLARED: DeclaredParameter(click.Option, spellings, attributes, section)})


def setting(*spellings: str, section: str = "", **attributes: Any) -> Any:
    """A field that is an option whose value may also come from the environment or the settings file."""
    return field(metadata={_DECLARED: DeclaredParameter(Setting, spellings, attributes, section)})


def listed(section: str) -> Any:
    """A field that is a class of options, which ``--help`` lists under another section than the class's own."""
    return field(metadata={_SECTION: section})


def declared(options: type[DataclassInstance], section: str = "") -> Iterator[tuple[str, DeclaredParameter, str]]:
    """Yield name, declaration and section of every parameter, in the order of the fields.

    The section is the class's ``SECTION``, by default :data:`OPTIONS`.
    """
    section = section or getattr(options, "SECTION", OPTIONS)
    hints = get_type_hints(options)
    for each in fields(options):
        if (found := each.metadata.get(_DECLARED)) is not None:
            yield each.name, found, found.section or section
        elif isinstance(inner := hints[each.name], type) and is_dataclass(inner):
            yield from declared(inner, each.metadata.get(_SECTION, ""))
        else:
            raise TypeError(f"{options.__name__}.{each.name} is neither an option nor a class of options")


def fill(options: type[T], values: Mapping[str, Any]) -> T:
    """Return the options with the values that Click parsed; ``values``: by the names of the fields."""
    hints = get_type_hints(options)
    return options(
        **{
            each.name: values[each.name] if _DECLARED in each.metadata else fill(hints[each.name], values)
            for each in fields(options)
        }
    )


def typed(options: DataclassInstance, *names: str) -> tuple[str, ...]:
    """Return the options among these fields that were given on the command line, by their first spelling."""
    known = {each.name for each in fields(options)}
    if not known.issuperset(names):
        raise TypeError(f"{type(options).__name__} has no {', '.join(sorted({*names} - known))}")
    ctx = click.get_current_context()
    spelt = {each.name: each.opts[0] for each in ctx.command.params}
    given = (ParameterSource.COMMANDLINE, ParameterSource.PROMPT)
    return tuple(spelt[name] for name in names if ctx.get_parameter_source(name) in given)
