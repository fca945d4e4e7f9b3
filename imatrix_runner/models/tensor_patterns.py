"""Tensor name patterns, as in ``--tensor-type`` and ``--override-tensor``: which tensors of a model each matches. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from imatrix_runner.models.gguf_file import TensorInfo

OUTPUT = "output.weight"

_PART_OF_NAME = re.compile(r"^(?:blk|enc\.blk|dec\.blk)\.\d+\.|\.(?:weight|bias)$")

_WORD = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")

_LITERAL = re.compile(r"[a-z0-9_]+")

_CLOSE = 0.6


@dataclass(frozen=True)
class Override:
    """A ``REGEX=TYPE`` entry. ``option``: the entry as shown to the user; ``claimed``: the tensors it decides (first match)."""

    option: str
    pattern: str
    type: str
    matched: tuple[str, ...]
    claimed: tuple[str, ...]
    shadowed_by: str = ""


def nearest(wanted: str, names: Collection[str]) -> str:
    """The question `` Did you mean …?`` with the most similar kind of tensor; empty if none is similar."""
    words = sorted(_WORD.findall(wanted.replace("\\.", ".").replace("\\d", " ")), key=len, reverse=True)
    kinds = {component(name) for name in names}
    for word in words[:2]:
        if close := difflib.get_close_matches(component(word.lower()), kinds, n=1, cutoff=_CLOSE):
            return f" Did you mean {close[0]}?"
    return ""


def component(name: str) -> str:
    """The part of a tensor's name that is the same in every layer: ``blk.3.ffn_down.weight`` -> ``ffn_down``."""
    return _PART_OF_NAME.sub("", _PART_OF_NAME.sub("", name))


def overrides(entries: Sequence[tuple[str, str]], names: Collection[str]) -> list[Override]:
    """What each ``REGEX=TYPE`` entry, given as (option, entry), matches among tensor names.

    Patterns that Python cannot parse, or parses differently from C++ (POSIX classes), are left out: only llama.cpp checks them.
    """
    found: list[Override] = []
    owner: dict[str, str] = {}
    for option, entry in entries:
        text, _, kind = entry.partition("=")
        pattern = None if "[[" in text else _compiled(text)
        if pattern is None:
            continue
        matched = tuple(name for name in names if pattern.search(name))
        claimed = tuple(name for name in matched if name not in owner)
        first = next((owner[name] for name in matched if name in owner), "")
        owner.update(dict.fromkeys(claimed, entry))
        found.append(Override(f"{option} {entry}", text, kind, matched, claimed, first))
    return found


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def unmatched(entries: Sequence[Override], names: Collection[str]) -> Iterator[str]:
    """A warning for each entry that decides no tensor: it matches none, or earlier entries match all of its tensors."""
    for each in entries:
        if not each.matched:
            yield f"{each.option} matches no tensor of this model.{nearest(each.pattern, names)}"
        elif not each.claimed:
            yield f"{each.option} has no effect: {each.shadowed_by} comes first and matches the same tensors."


def broad(entries: Sequence[Override], tensors: Sequence[TensorInfo]) -> Iterator[str]:
    """A warning for each plain word, such as ``attn_q``, that names one kind of tensor but also matches others as a
    substring."""
    matrices = {tensor.name for tensor in tensors if len(tensor.shape) > 1}
    for each in entries:
        hit = {component(name) for name in each.claimed if name in matrices}
        if _LITERAL.fullmatch(each.pattern) and each.pattern in hit and len(hit) > 1:
            others = ", ".join(sorted(hit - {each.pattern}))
            yield f"{each.option} also matches {others}; write {each.pattern}\\.weight to mean {each.pattern} alone."
