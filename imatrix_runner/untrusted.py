"""Values that another program, person or version wrote: decoded by type, bounded in depth, refused in this program's own words.

JSON from files, hubs and workers and TOML and YAML from people all pass through here, so every fault in them raises one
exception, :class:`UnreadableError`; the caller turns it into the error its user can act on. Sizes are bounded where the bytes
are read.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import msgspec

T = TypeVar("T")

MAX_DEPTH = 100
"""Levels of lists and objects inside one another. JSON schemas of tools, the deepest real documents, have about twenty."""

_MOST_DIGITS = 18
_NO_KEY = object()
_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"
_HALF = "it holds half of a surrogate pair, which is not a character"
_PLACE = re.compile(r" - at `([^`]+)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")
_TYPES = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")


class UnreadableError(ValueError):
    """What is wrong with a value, as a clause that begins with "it" or names the field: ``$.size is str, not int``."""


class NotUtf8Error(UnreadableError):
    """It is text, but in another encoding."""


def from_json(data: bytes | str, kind: type[T], dec_hook: Callable[[type, Any], Any] | None = None) -> T:
    """Decode strict JSON (no NaN, no lone surrogates) of the type ``kind``. Raises :class:`UnreadableError`."""
    try:
        value = msgspec.json.decode(data, type=kind, dec_hook=dec_hook)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeError are ValueErrors
        raise _why_not(data, error) from error
    if _brackets(data) > MAX_DEPTH:
        _refuse_depth(value)
    return value


def as_type(value: Any, kind: type[T], *, str_keys: bool = False) -> T:
    """A value that another library decoded, as the type ``kind``. ``str_keys``: numbers that are keys are written as text.
    Raises :class:`UnreadableError`."""
    try:
        found = msgspec.convert(value, kind, str_keys=str_keys)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(_unfit(error) if isinstance(error, msgspec.ValidationError) else _DEEP) from error
    _refuse_depth(found)
    _refuse_halves(found)
    return found


def from_lenient_json(data: bytes) -> Any:
    """Decode JSON as Python writes it, with bare ``NaN`` and ``Infinity``. Raises :class:`UnreadableError`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _broken(data, error) from error
    _refuse_depth(value)
    if b"\\ud" in data.lower():
        _refuse_halves(value)
    return value


def from_toml(data: bytes) -> dict[str, Any]:
    """Decode TOML. Raises :class:`UnreadableError`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotUtf8Error(f"it is not valid UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise UnreadableError(_DEEP) from error
    except ValueError as error:
        # The library's sentence names the line. It is for people: nothing depends on its words.
        raise UnreadableError(str(error)[:200]) from error
    _refuse_depth(document)
    return document


def from_yaml(data: bytes) -> Any:
    """Decode YAML of texts, lists and mappings. Every scalar stays the text that was written (``on`` is not true, ``1:30`` no
    number), so that options read it as they read a command line; an empty one is "". Raises :class:`UnreadableError`, also
    for a key that a mapping has twice, for anchors and aliases (a small file could mean a huge value), and for tags.
    """
    import yaml

    try:
        text = data.decode("utf-8-sig")
        value = _only_document(yaml, text)
    except UnicodeDecodeError as error:
        raise NotUtf8Error(f"it is not valid UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise UnreadableError(_DEEP) from error
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        line = f"line {place.line + 1}: " if place is not None else ""
        raise UnreadableError(f"{line}{str(error.problem or error.context)[:200]}") from error
    except yaml.YAMLError as error:
        raise UnreadableError(f"it is not YAML: {str(error)[:200]}") from error
    _refuse_depth(value)
    return value


def _only_document(yaml: Any, text: str) -> Any:
    """The one document of a YAML text, built from its events; None for an empty text."""
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    holders: list[tuple[Any, Any]] = []
    """The lists and mappings that are open, each with the key that waits for its value."""
    result, documents = None, 0

    def refuse(event: Any, why: str) -> UnreadableError:
        return UnreadableError(f"line {event.start_mark.line + 1}: {why}")

    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise refuse(event, "a second document begins, and one is expected")
            continue
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise refuse(event, "anchors and aliases (& and *) are not allowed: write the value out")
        if getattr(event, "tag", None) is not None:
            raise refuse(event, "tags (!) are not allowed")
        if isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            value, _ = holders.pop()
        elif isinstance(event, yaml.ScalarEvent):
            value = event.value
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            if len(holders) >= MAX_DEPTH:
                raise UnreadableError(_DEEP)
            holders.append(([] if isinstance(event, yaml.SequenceStartEvent) else {}, _NO_KEY))
            continue
        else:
            continue
        if not holders:
            result = value
            continue
        holder, key = holders[-1]
        if isinstance(holder, list):
            holder.append(value)
        elif key is not _NO_KEY:
            holder[key] = value
            holders[-1] = (holder, _NO_KEY)
        elif not isinstance(value, str):
            raise refuse(event, "a key is a list or a mapping, and a text is expected")
        elif value in holder:
            raise refuse(event, f"the key {value[:80]!r} is there twice")
        else:
            holders[-1] = (holder, value)
    return result


def _refuse_halves(value: Any) -> None:
    """Raise :class:`UnreadableError` for text with a lone surrogate, which cannot be written as UTF-8."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str) and not is_unicode(found):
            raise UnreadableError(_HALF)
        waiting += found.keys() if isinstance(found, Mapping) else ()
        waiting += _children(found)


def whole_number(text: str) -> int | None:
    """The number that a text of decimal digits is; None for any other text, and for more digits than 64 bits hold."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None


def split_url(text: str) -> SplitResult:
    """The parts of a web address; all empty for what cannot be one, such as ``http://[`` or a port of 99999."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # parsed only when it is read
    except ValueError:
        return urlsplit("")
    return parts


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate, which stands for a byte of a name that is not
    UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_depth(value: Any) -> None:
    """Raise :class:`UnreadableError` for a value deeper than :data:`MAX_DEPTH`: code that walks it later would fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for holder in level for child in _children(holder) if not isinstance(child, (str, bytes, int, float))]
        if not level:
            return
    raise UnreadableError(_DEEP)


def first_non_finite(value: Any) -> str | None:
    """Where the first NaN or infinite number in a value is, such as ``kld.value``; None if all are finite."""
    waiting = [("", value)]
    while waiting:
        place, found = waiting.pop()
        if isinstance(found, float) and not math.isfinite(found):
            return place.lstrip(".") or "the value"
        waiting += [(f"{place}.{name}", child) for name, child in _named_children(found)]
    return None


def _children(value: Any) -> Iterator[Any]:
    return (child for _, child in _named_children(value))


def _named_children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, msgspec.Struct):
        yield from ((name, getattr(value, name)) for name in value.__struct_fields__)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def _brackets(data: bytes | str) -> int:
    return data.count("[") + data.count("{") if isinstance(data, str) else data.count(b"[") + data.count(b"{")


def _why_not(data: bytes | str, error: Exception) -> UnreadableError:
    return UnreadableError(_unfit(error)) if isinstance(error, msgspec.ValidationError) else _broken(data, error)


def _broken(data: bytes | str, error: Exception) -> UnreadableError:
    """Why something is not JSON. The place comes from the standard library, whose errors carry it as a number."""
    if isinstance(error, RecursionError):
        return UnreadableError(_DEEP)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError as flaw:
        return NotUtf8Error(f"it is not valid UTF-8 (byte {flaw.start})")
    if not is_unicode(text):
        return NotUtf8Error("it is not valid UTF-8")
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except UnreadableError as flaw:
        return flaw
    except json.JSONDecodeError as flaw:
        if not text[flaw.pos :].strip():
            return UnreadableError("it is cut short: the JSON has no end")
        line = f"line {flaw.lineno}, " if "\n" in text.strip() else ""
        return UnreadableError(f"it is not valid JSON ({line}column {flaw.colno})")
    except RecursionError:
        return UnreadableError(_DEEP)
    except ValueError:
        return UnreadableError("it holds a number with too many digits")
    return UnreadableError(_HALF)


def _refuse_constant(name: str) -> None:
    raise UnreadableError(f"it holds {name}, which JSON does not have")


def _unfit(error: Exception) -> str:
    """Which value has another type or range than expected, as far as the library's message says it."""
    text = str(error)
    place = _PLACE.search(text)
    where = place[1] if place else "it"
    if missing := _MISSING.search(text):
        return f"{where} has no field {missing[1]!r}"
    if types := _TYPES.search(text):
        return f"{where} is {types[2]}, not {types[1]}"
    return f"{where} has a type or value that is not allowed there"
