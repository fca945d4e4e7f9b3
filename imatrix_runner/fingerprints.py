"""The fingerprint of options: the text that says which of them a result depends on.

A finished or unfinished result is used again only while its fingerprint is the same, so a forgotten option would silently mix
two computations. Therefore every field of a dataclass of options counts, unless its class states that it does not, and why. A
field that is added later counts automatically, at any value but its default: finished work stays valid until the option is
used.

The text goes into journals, so it may never change for values that were possible before: fields stand in it in the order of
their class, spelt as the class says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Result = Literal["imatrix", "level", "content", "figures", "answers"]
"""What options can be harmless for: a collected imatrix, the bytes of a level, what a level of known tensor types holds (values
and metadata), its figures against the source, a model's answers to prompts."""

RESULTS: tuple[Result, ...] = get_args(Result)

_SPELLING = "spelling"


def spelt(name: str, *, always: bool = False, form: str = "{}") -> Mapping[str, Any]:
    """Metadata of a field that counts: ``name`` and the value in ``form``, for each value of a tuple; of a bool the name alone.

    The field's default is left out, unless ``always``.
    """
    return {_SPELLING: (name, always, form)}


def harmless(why: str, *results: Result) -> Mapping[str, Any]:
    """Metadata of a field that changes nothing in these results (in any result, if none is named), with the reason."""
    return dict.fromkeys(results or RESULTS, why)


def counted_apart(what: str, *results: Result) -> Mapping[str, Any]:
    """Metadata of a field whose value reaches these results (all, if none is named) through another input or text: ``what``."""
    return harmless(f"counted apart, as {what}", *results)


def fingerprint_of(options: DataclassInstance, result: Result) -> str:
    """Return the options that ``result`` depends on, as one text; empty if all of them have their defaults."""
    return " ".join(filter(None, map(" ".join, _words(options, result))))


def words_of(options: DataclassInstance, result: Result) -> list[str]:
    """Return the same as words of a command; a value is never split."""
    return [word for words in _words(options, result) for word in words]


def _words(options: DataclassInstance, result: Result) -> Iterator[list[str]]:
    """The words of each field that counts."""
    for field in fields(options):
        if result not in field.metadata:
            yield _words_of_field(field, getattr(options, field.name))


def _words_of_field(field: Field[Any], value: Any) -> list[str]:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    name, always, form = field.metadata.get(_SPELLING, ("", False, ""))
    if value == default and not always:
        return []
    if not form:  # the class does not mention the field
        return [f"{field.name}={value!r}"]
    if isinstance(value, bool):
        return [name]
    values = value if isinstance(value, tuple) else (value,)
    return [word for each in values for word in (*([name] if name else []), form.format(each))]
