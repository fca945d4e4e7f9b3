"""The list of a batch: models with the options of ``run``, in YAML or JSON lines.

Every value is kept as the text that would be typed on a command line, so that ``run``'s own options read and refuse it.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from imatrix_runner.errors import RunnerError, UsageError, from_os_error
from imatrix_runner.files import encode_json
from imatrix_runner.mixes.targets import PREFIX, is_mix, split_names
from imatrix_runner.models.origin import repository_in
from imatrix_runner.safe_text import shown
from imatrix_runner.untrusted import UnreadableError, from_json, from_yaml, whole_number

OptionText: TypeAlias = str | tuple[str, ...]
"""The value of an option, as typed; several for an option that may be given several times, or for a list."""

JSON_LINES = (".jsonl", ".ndjson")
OWN_KEYS = ("model", "publish", "priority")
"""Keys of an entry that are not options of ``run``."""
RENAMED = {"calibration": "text", "file": "text", "mix": "levels"}
"""Other names that a list may use for options of ``run``."""

_MOST_BYTES = 1 << 20
MOST_ENTRIES = 1000
_MOST_VALUES = 200
_MOST_TEXT = 4096
_MOST_PRIORITY = 1_000_000
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_WHAT_TO_MAKE = ("levels", "preset")
_MODEL = "{model}"


@dataclass(frozen=True)
class BatchEntry:
    """One model of a list. ``options``: those of ``run`` by the names of their settings, with underscores. ``publish``: the
    repository ``ORG/NAME``, which may contain ``{model}``; empty: not published. A higher ``priority`` comes first. ``where``:
    the entry's place, for messages."""

    model: str
    options: Mapping[str, OptionText] = field(default_factory=dict)
    publish: str = ""
    priority: int = 0
    where: str = ""

    @property
    def fingerprint(self) -> str:
        """A digest of everything that decides what is made and published."""
        known = (self.model, sorted(self.options.items()), self.publish)
        return hashlib.sha256(encode_json(known)).hexdigest()[:16]

    def repository(self, name: str) -> str:
        """The repository that a model of this ``name`` is published to; empty if it is not."""
        return self.publish.replace(_MODEL, name)


def read_list(path: Path, known: Collection[str], *, may_be_empty: bool = False) -> tuple[BatchEntry, ...]:
    """The entries of a list. ``known``: the options of ``run`` that a list may give, with underscores; ``may_be_empty``: models
    come from elsewhere.

    Raises :class:`UsageError` for anything in it that is not understood.
    """
    raw, defaults = _raw_entries(path, _read(path))
    common = _common(path, defaults, known)
    entries = [_entry(each, common, known, f"{path}, entry {number}") for number, each in enumerate(raw, start=1)]
    if not entries and not may_be_empty:
        todo = "Write a line for each:  - org/name; or look for new ones with --watch."
        raise UsageError(f"{path} names no models", "the list is empty", todo)
    refuse_twice(entries)
    return tuple(entries)


def read_defaults(path: Path, known: Collection[str]) -> Mapping[str, OptionText]:
    """The defaults of a list, which stand under every entry. Raises :class:`UsageError`."""
    return _common(path, _raw_entries(path, _read(path))[1], known)


def read_additions(
    path: Path, known: Collection[str], there: Sequence[BatchEntry], common: Mapping[str, OptionText]
) -> tuple[tuple[BatchEntry, ...], tuple[RunnerError, ...]]:
    """The entries that ``batch add`` appended, and an error for each line that is not understood or names a model that is
    ``there`` already. ``common``: the list's defaults. A last line without its end is still being written, and left out."""
    if not path.exists():
        return (), ()
    entries: list[BatchEntry] = []
    faults: list[RunnerError] = []
    lines = _read(path).split(b"\n")[:-1]
    for number, line in enumerate(lines[:MOST_ENTRIES], start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = _entry(_line(line, where), common, known, where)
            refuse_twice([*there, *entries, entry])
            entries.append(entry)
        except RunnerError as error:
            faults.append(error)
    return tuple(entries), tuple(faults)


def added_models(path: Path) -> tuple[int, frozenset[str]]:
    """The number of lines that were appended to a list, and the models that they name, understood or not."""
    lines = _read(path).splitlines() if path.exists() else []
    names: set[str] = set()
    for line in lines:
        with suppress(UnreadableError):  # a torn line, or one that was reported already
            raw = from_json(line, object)
            model = raw.get("model") if isinstance(raw, dict) else raw
            names |= {model} if isinstance(model, str) else set()
    return len(lines), frozenset(names)


def parse_entry(raw: Mapping[str, Any], known: Collection[str], where: str, common: Mapping[str, OptionText]) -> BatchEntry:
    """An entry that was not read from a file, on the list's defaults. Raises :class:`UsageError`."""
    return _entry(raw, common, known, where)


def _common(path: Path, defaults: Any, known: Collection[str]) -> Mapping[str, OptionText]:
    return _options_of(defaults, known, f"{path}, defaults", own=OWN_KEYS[1:])


def as_bool(text: str) -> bool | None:
    """What a text says as the value of a switch; None for anything but ``true``, ``yes``, ``on`` and their opposites."""
    return True if text.lower() in _TRUE else False if text.lower() in _FALSE else None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            data = handle.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", "it was given as the list of models", "Check the path.") from error
    except OSError as error:
        raise from_os_error(error, "reading the list of models", path) from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"{path} is too large", f"a list has at most {_MOST_BYTES >> 20} MiB", "Split it into several.")
    return data


def _raw_entries(path: Path, data: bytes) -> tuple[list[Any], Any]:
    """The entries and the defaults of a list as its file has them."""
    if path.suffix.lower() in JSON_LINES:
        lines = [_line(line, f"{path}, line {number}") for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        first = lines[0] if lines else None
        if isinstance(first, dict) and set(first) == {"defaults"}:
            return lines[1:], first["defaults"]
        return lines, {}
    try:
        value = from_yaml(data)
    except UnreadableError as error:
        raise UsageError(f"{path} cannot be read as a list", str(error), "Correct the line it names.") from error
    defaults: Any = {}
    if isinstance(value, dict):
        _check_keys(value, ("defaults", "models"), str(path))
        defaults, value = value.get("defaults") or {}, value.get("models")
    if value in (None, ""):
        value = []
    if not isinstance(value, list):
        raise UsageError(
            f"{path} holds no list of models",
            f"{'models: ' if defaults else ''}a list is expected, and there is {_kind(value)}",
            "Write a line for each model:  - org/name",
        )
    if len(value) > MOST_ENTRIES:
        raise UsageError(f"{path} has too many models", f"{len(value)}, and at most {MOST_ENTRIES}", "Split it into several.")
    return value, defaults


def _line(line: bytes, where: str) -> Any:
    try:
        return from_json(line, object)
    except UnreadableError as error:
        raise UsageError(f"{where} cannot be read", str(error), "Write one JSON object or text a line.") from error


def _entry(raw: Any, common: Mapping[str, OptionText], known: Collection[str], where: str) -> BatchEntry:
    own = _options_of({"model": raw} if isinstance(raw, str) else raw, known, where, own=OWN_KEYS)
    if {*_WHAT_TO_MAKE} & {*own}:
        common = {name: value for name, value in common.items() if name not in _WHAT_TO_MAKE}
    values = {**common, **own}
    model = _single(values.pop("model", ""), "model", where).strip()
    if not model:
        raise UsageError(f"{where} names no model", "it has no key 'model'", "Write  model: org/name  or a path.")
    options = {name: value for name, value in values.items() if name not in OWN_KEYS}
    _refuse_levels_twice(options, where)
    return BatchEntry(
        model,
        options,
        _target(_single(values.get("publish", ""), "publish", where).strip(), where),
        _priority(values.get("priority", "0"), where),
        where,
    )


def _options_of(raw: Any, known: Collection[str], where: str, *, own: Sequence[str]) -> dict[str, OptionText]:
    """The keys and values of a mapping, checked and spelt as settings are."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is {_kind(raw)}", "a model's name or a mapping is expected", "Write  - model: org/name")
    _check_keys(raw, [name.replace("_", "-") for name in (*own, *known, *RENAMED)], where)
    found: dict[str, OptionText] = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        texts = _texts(value, key, where)
        if name == "mix":
            texts = tuple(each if is_mix(each) else PREFIX + each for each in texts)
        name = RENAMED.get(name, name)
        if name == "levels":
            texts = tuple(each for text in texts for each in split_names(text))
            before = found.get("levels", ())
            texts = (*before, *texts)
        elif name in found:
            raise UsageError(f"{where} gives {name!r} twice", f"{key!r} is another name of it", "Leave one out.")
        found[name] = texts if isinstance(value, list) or name == "levels" else texts[0]
    return found


def _check_keys(raw: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in raw:
        if key.replace("_", "-") not in known or len(key) > _MOST_VALUES:
            near = difflib.get_close_matches(key.replace("_", "-")[:_MOST_VALUES], known, n=1)
            raise UsageError(
                f"Unknown key {shown(key)!r}",
                f"{where} has it, and it is neither a key of a list nor an option of run that a list may give",
                f"Did you mean {near[0]!r}?" if near else "See the keys in docs/batch.md, or: imatrix-runner run --help",
            )


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    texts = tuple("true" if each is True else "false" if each is False else each for each in values)
    plain = tuple(str(each) if isinstance(each, (int, float)) else each for each in texts)
    if not plain or len(plain) > _MOST_VALUES or not all(isinstance(each, str) and _usable(each) for each in plain):
        raise UsageError(
            f"The key {shown(key)!r} has no usable value",
            f"{where} gives it {shown(repr(value), 100)}",
            "Give a text, a number, true or false, or a list of these.",
        )
    return plain


def _usable(text: str) -> bool:
    return bool(text.strip()) and len(text) <= _MOST_TEXT and text.isprintable()


def _single(value: OptionText, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"The key {key!r} takes one value", f"{where} gives it a list", "Give one value.")
    return value


def _priority(value: OptionText, where: str) -> int:
    text = _single(value, "priority", where)
    number = whole_number(text.removeprefix("-"))
    if number is None or number > _MOST_PRIORITY:
        raise UsageError(f"Invalid priority {shown(text)!r}", f"{where} gives it", "Give a whole number; higher is first.")
    return -number if text.startswith("-") else number


def _target(text: str, where: str) -> str:
    """``ORG/NAME`` of a publish target; ``ORG`` alone is ``ORG/{model}-GGUF``."""
    target = text if "/" in text or not text else f"{text}/{_MODEL}-GGUF"
    if target and repository_in(target.replace(_MODEL, "model")) is None:
        raise UsageError(
            f"Invalid publish target {shown(text)!r}",
            f"{where} gives it, and a repository is ORG or ORG/NAME, perhaps with {_MODEL}",
            f"For example:  publish: my-org/{_MODEL}-GGUF",
        )
    return target


def _refuse_levels_twice(options: Mapping[str, OptionText], where: str) -> None:
    names = [name.upper() for name in options.get("levels", ())]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{shown(twice)} is there twice", f"{where} names the level twice", "Leave one out.")


def refuse_twice(entries: Sequence[BatchEntry]) -> None:
    """Raise :class:`UsageError` for a model or a repository that an earlier entry has, too."""
    models: dict[str, BatchEntry] = {}
    targets: dict[str, BatchEntry] = {}
    for entry in entries:
        before = models.setdefault(_plain(entry.model), entry)
        if before is not entry:
            raise UsageError(
                f"{shown(entry.model)} is there twice",
                f"{before.where} and {entry.where} name the same model",
                "Leave one out, or give all its levels in one entry.",
            )
        if entry.publish and _MODEL not in entry.publish and targets.setdefault(entry.publish.lower(), entry) is not entry:
            raise UsageError(
                f"Two models would be published to {entry.publish}",
                f"{targets[entry.publish.lower()].where} and {entry.where} name it",
                f"Give each its own, for example with {_MODEL} in the name.",
            )


def _plain(model: str) -> str:
    return repository_in(model.removesuffix("@main")) or model


def _kind(value: object) -> str:
    names = {list: "a list", dict: "a mapping", str: "a text", type(None): "nothing"}
    return names.get(type(value), "a number or a switch")


def spelt_options(entry: BatchEntry) -> Iterator[tuple[str, OptionText]]:
    """The options of an entry by their names with hyphens, in order."""
    yield from ((name.replace("_", "-"), value) for name, value in entry.options.items())
