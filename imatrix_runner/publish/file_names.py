"""Names under which files are published, checked against the rules of the hub, llama.cpp and Ollama. Pure.

For users, the name decides whether a file exists (:mod:`~imatrix_runner.models.hub.label_rules`). Each level's file ends with a
label that the hub knows and that agrees with ``general.file_type``; what else distinguishes the level stands in a word after
the label, which the hub allows, or before it:

=============================  =============================
level                          published as
=============================  =============================
``Q4_K_M``                     ``Q4_K_M``
``Q6_K_L``, ``Q3_K_XL``        the same: the hub knows them
``Q4_K_L``, ``Q5_K_L``         ``Q4_K_M_L``, ``Q5_K_M_L``
``FEEDBACK-Q4_K_M``            ``Q4_K_M_FEEDBACK``
``FEEDBACK-Q2_K_S``            ``Q2_K_SFEEDBACK``: the hub reads ``Q2_K`` and one word
``MIX-4.25bpw-IQ4_XS``         ``4.25bpw-IQ4_XS_MIX``
=============================  =============================

So a level's published name depends on nothing else that is published, and stock levels, mixes and roundings of one type fit
into one repository.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from imatrix_runner.engines.levels import split_rounding
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.models.hub.label_rules import (
    FILE_TYPES,
    describes,
    hub_label,
    is_model_for_llama_cpp,
    is_ollama_tag,
    llama_cpp_finds,
    llama_cpp_slug,
)
from imatrix_runner.safe_text import shown

DEFAULT_TEMPLATE = "{model}-{level}"
FIELDS = ("model", "level", "label")

MOST_PATH = 200
"""Most characters of a path in a repository: Windows' limit for whole paths is 260, and a folder of the user comes before."""

_MOST_NAME = 255  # bytes; file systems' limit
_MOST_SHARDS = 99_999  # llama-gguf-split writes five digits
_FIELD = re.compile(r"\{([^{}]*)\}")
_MIX = re.compile(r"MIX-(.+)", re.DOTALL)
_VARIANT = re.compile(r"_(L|XL)\Z")
_FORBIDDEN = frozenset('<>:"/\\|?*')
_DEVICES = re.compile(r"(?:CON|PRN|AUX|NUL|COM[0-9¹²³]|LPT[0-9¹²³])(?:\..*)?", re.IGNORECASE | re.DOTALL)
_RENAME = "Choose other words with --name-template, for example --name-template 'Model-{level}'"


@dataclass(frozen=True)
class PublishedFile:
    """A file to publish. ``name``: its path in the workspace, by which errors name it. A level has ``level``, its name in the
    workspace (``FEEDBACK-Q4_K_M``); ``model``, for the template; ``file_type``, the number ``general.file_type`` in it; and
    ``n_shards``, 0 if it is not split. Other files keep their names."""

    name: str
    level: str = ""
    model: str = ""
    file_type: int | None = None
    n_shards: int = 0


@dataclass(frozen=True)
class NamedFile:
    """A file and its paths in the repository, one for each shard. ``label`` is the hub's; ``tag``, what follows the colon in
    ``llama-cli -hf REPOSITORY:TAG`` and ``ollama run hf.co/REPOSITORY:TAG``; both empty for files that are no levels.
    ``remarks``: sentences about what works less well under this name, where no better name exists."""

    file: PublishedFile
    paths: tuple[str, ...]
    label: str = ""
    tag: str = ""
    remarks: tuple[str, ...] = ()


def checked_names(files: Sequence[PublishedFile], template: str = DEFAULT_TEMPLATE) -> tuple[NamedFile, ...]:
    """The names of all files of one repository, in order.

    ``template``: the stem of a level's file, of ``{model}``, ``{level}`` (as published) and ``{label}`` (that of the file type
    alone). Raises :class:`UsageError` for a template that leads to names against a rule, and :class:`InvalidDataError` for a
    file whose own data is; both say which file, which rule and what to do.
    """
    _check_template(template)
    named = [_level_file(file, template) if file.level else NamedFile(file, (file.name,)) for file in files]
    for each in named:
        for path in each.paths:
            _check_path(each.file, path)
        if not each.file.level:
            _check_other(each)
    _check_same_paths(named)
    _check_labels(named)
    return tuple(_check_tags(each, named) for each in named)


def published_level(level: str, file_type: int | None) -> str:
    """A level's published name: it ends with a label of the hub that agrees with its file type, whatever else is published.
    The level's own name if the hub knows no label for its file type."""
    label = FILE_TYPES.get(file_type) if file_type is not None else None
    if label is None:
        return level
    rounding, rest = split_rounding(level)
    words = [rounding.upper()] if rounding != STOCK else []
    mix = _MIX.fullmatch(rest)
    before = ""
    if mix is not None:
        before = level[len(level) - len(mix[1]) :].removesuffix(label)  # in the case of letters that the level has
        words.append("MIX")
    elif (own := hub_label(rest)) is not None and own.text == rest and describes(own, label):
        if not own.size or not words:
            label = rest
        else:
            words.append(own.size)
    elif variant := _VARIANT.search(rest):
        words.append(variant[1])
    elif rest != "COPY":
        before = f"{rest}-"  # an alias, or a name that only this llama.cpp knows
    found = hub_label(label)
    # To the hub, Q2_K_S is Q2_K with a word, and it reads no second one.
    joint = "" if found is not None and found.size else "_"
    return before + joint.join(filter(None, (label, "".join(words))))


def _check_template(template: str) -> None:
    unknown = [name for name in _FIELD.findall(template) if name not in FIELDS]
    why = ""
    if unknown or set("{}") & set(_FIELD.sub("", template)):
        why = f"{{{shown(unknown[0])}}} is not a field of it" if unknown else "a brace in it belongs to no field"
    elif not template.endswith(("{level}", "{label}")):
        why = "it does not end with {level} or {label}, and the hub and llama.cpp read the end of a name"
    if why:
        fix = (
            f"Write it with {', '.join(f'{{{name}}}' for name in FIELDS)}, for example --name-template '{{model}}-i1-{{level}}'"
        )
        raise UsageError(f"Invalid --name-template {shown(template)!r}", why, fix)


def _level_file(file: PublishedFile, template: str) -> NamedFile:
    label = FILE_TYPES.get(file.file_type) if file.file_type is not None else None
    level = published_level(file.level, file.file_type)
    values = {"model": file.model, "level": level, "label": label or level}
    stem = _FIELD.sub(lambda field: values[field[1]], template)
    if not 0 <= file.n_shards <= _MOST_SHARDS:
        _refuse(file, f"llama-gguf-split numbers at most {_MOST_SHARDS:,} shards", "Use a larger --split-max-size")
    n = file.n_shards
    if "/" in stem:
        _refuse(file, f"Windows allows no '/' in a name such as {shown(stem, 80)!r}", _RENAME)
    paths = tuple(f"{stem}/{stem}-{shard:05d}-of-{n:05d}.gguf" for shard in range(1, n + 1)) if n else (f"{stem}.gguf",)
    found = hub_label(paths[0])
    if label is None:
        number = "no general.file_type" if file.file_type is None else f"the file type {file.file_type}"
        remark = f"The hub knows no label for {number}, and leaves {shown(paths[0])} out of the model page's panel"
        return NamedFile(file, paths, remarks=(f"{remark}.",))
    if found is None or not stem.upper().endswith(found.text):
        text = found.text if found is not None else "nothing"
        _refuse(file, f"the hub reads {text} from the name {stem!r}, which must end with a label", _RENAME)
    own = hub_label(file.level)
    said = own if own is not None and file.level.upper().endswith(own.text) and not describes(own, label) else found
    if not describes(said, label):
        raise InvalidDataError(
            f"{shown(file.name)} cannot be published",
            f"its name says {said.text}, and general.file_type in the file says {label}",
            f"Make the level again: imatrix-runner quantize --force --levels {shown(file.level)}",
        )
    return NamedFile(file, paths, found.text, found.text)


def _check_path(file: PublishedFile, path: str) -> None:
    """Refuse what the hub or a file system does not take."""
    if len(path) > MOST_PATH:
        _refuse(file, f"a path in a repository may have {MOST_PATH} characters, and this has {len(path)}", _RENAME)
    for name in path.split("/"):
        shortest = shown(name, 80)
        if len(name.encode(errors="replace")) > _MOST_NAME:
            _refuse(file, f"{shortest!r} has more than {_MOST_NAME} bytes", _RENAME)
        bad = next((each for each in name if each in _FORBIDDEN or not each.isprintable()), None)
        if bad is not None:
            _refuse(file, f"Windows allows no {bad!r} in a name such as {shortest!r}", _RENAME)
        if not name or name in (".", "..", ".git") or name[-1] in ". " or name[0] in " -":
            _refuse(file, f"{shortest!r} is no name for a file on every system: check how it begins and ends", _RENAME)
        if _DEVICES.fullmatch(name):
            _refuse(file, f"{shortest!r} is a device on Windows", _RENAME)


def _check_other(each: NamedFile) -> None:
    path = each.paths[0]
    if path.endswith(".gguf") and is_model_for_llama_cpp(path):
        fix = "Rename it so that its name contains 'imatrix' or 'mmproj', or leave it out"
        _refuse(each.file, f"llama.cpp takes {shown(path)!r} for a model, by its name", fix)


def _check_same_paths(named: Sequence[NamedFile]) -> None:
    """Refuse two paths that differ in the case of letters only, or not at all. A folder counts as one path."""
    taken: dict[str, tuple[str, PublishedFile]] = {}
    for each in named:
        for path in (*each.paths, *{path.rpartition("/")[0] for path in each.paths if "/" in path}):
            key = unicodedata.normalize("NFC", path).casefold()
            other, owner = taken.setdefault(key, (path, each.file))
            if owner is not each.file and ("." in path.rpartition("/")[2] or other != path):
                _refuse(
                    each.file,
                    f"{shown(path)!r} and {shown(other)!r} ({shown(owner.name)}) are one file on Windows and macOS",
                    "Leave one out, or choose a --name-template that tells them apart",
                )


def _check_labels(named: Sequence[NamedFile]) -> None:
    taken: dict[str, NamedFile] = {}
    for each in named:
        other = taken.setdefault(each.label, each) if each.label else each
        if other is not each:
            _refuse(
                each.file,
                f"{shown(other.file.name)} has the label {each.label}, too; programs show and load one file of each label",
                "Publish one of them, with --levels, or put it into a repository of its own",
            )


def _check_tags(each: NamedFile, named: Sequence[NamedFile]) -> NamedFile:
    """The file with remarks on its tag. Raises if a program would load another file, or none."""
    if not each.label:
        return each
    path, tag = each.paths[0], each.tag
    if not is_model_for_llama_cpp(path):
        words = "mmproj, imatrix, mtp-, eagle3-, dflash- or dspark-"
        _refuse(each.file, f"llama.cpp takes a file with {words} in its name for no model: {shown(path)!r}", _RENAME)
    if not llama_cpp_finds(path, tag) or llama_cpp_slug(path) != tag.removeprefix("UD-") or not is_ollama_tag(tag):
        _refuse(each.file, f"llama.cpp or Ollama do not find {shown(path)!r} by the tag {shown(tag)!r}", _RENAME)
    remarks = list(each.remarks)
    for other in named:
        if other is each or not other.file.level or not llama_cpp_finds(other.paths[0], tag):
            continue
        if not other.label.endswith(tag):
            _refuse(
                each.file,
                f"llama.cpp may load {shown(other.paths[0])!r} for the tag {tag}, because that name contains {tag}, too",
                _RENAME,
            )
        remarks.append(
            f"llama.cpp may load {shown(other.paths[0])} for the tag {tag}, which is the end of {other.label}: name the file "
            f"instead, with --hf-file {shown(path)}."
        )
    return NamedFile(each.file, each.paths, each.label, tag, tuple(remarks))


def _refuse(file: PublishedFile, why: str, fix: str) -> NoReturn:
    raise UsageError(f"{shown(file.name)} cannot be published under this name", why, f"{fix}.")
