"""Warnings about options that llama-quantize accepts but that have no effect on this model. Pure.

llama-quantize silently accepts a pattern that matches no tensor, a layer that does not exist or an unknown metadata key, so a
typing error can waste hours. ``--tensor-type`` patterns are searched for anywhere in a name and the first that matches wins
(tools/quantize/quantize.cpp, src/llama-quant.cpp: ``llama_tensor_get_type``).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.levels import PLAIN_FTYPES, Level
from imatrix_runner.imatrix.matrix import TOKEN_EMBEDDINGS
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo
from imatrix_runner.models.tensor_patterns import OUTPUT, Override, nearest
from imatrix_runner.untrusted import whole_number

_CLOSE_KEY = 0.8

_MOST_NAMES = 4


def ineffective_options(
    options: QuantizeOptions,
    header: GgufHeader,
    tensors: Sequence[TensorInfo],
    *,
    imatrix: bool,
    entries: Collection[str] | None,
) -> list[str]:
    """Return a warning for each option without effect on this model at any level.

    ``imatrix``: whether levels are made with one; ``entries``: the names in it, None if it is not made yet.
    """
    names = [tensor.name for tensor in tensors]
    return [
        *_of_output_and_embeddings(options, names),
        *_of_weights(options, names, imatrix=imatrix, entries=entries),
        *_of_layers(options, header),
        *_of_metadata(options, header),
    ]


def _of_output_and_embeddings(options: QuantizeOptions, names: Collection[str]) -> Iterator[str]:
    tied, embeddings = OUTPUT not in names, any(name in names for name in TOKEN_EMBEDDINGS)
    if options.leave_output_tensor and tied:
        keep = ". To keep the embeddings: --token-embedding-type bf16" if embeddings else ""
        yield f"--leave-output-tensor has no effect: this model has no {OUTPUT}, its embeddings serve as output{keep}."
    if options.output_tensor_type and options.leave_output_tensor and not tied:
        yield f"--output-tensor-type {options.output_tensor_type} has no effect: --leave-output-tensor keeps {OUTPUT} as it is."
    if options.output_tensor_type and tied and (options.token_embedding_type or options.pure):
        stronger = "--token-embedding-type" if options.token_embedding_type else "--pure"
        yield (
            f"--output-tensor-type {options.output_tensor_type} has no effect: this model has no {OUTPUT}, and {stronger} "
            "decides the type of its embeddings."
        )
    if options.token_embedding_type and not embeddings:
        yield f"--token-embedding-type {options.token_embedding_type} has no effect: this model has no {TOKEN_EMBEDDINGS[0]}."


def _of_weights(
    options: QuantizeOptions, names: Sequence[str], *, imatrix: bool, entries: Collection[str] | None
) -> Iterator[str]:
    given = [("--include-weights", part) for part in options.include_weights]
    given += [("--exclude-weights", part) for part in options.exclude_weights]
    there = names if entries is None else entries
    where = "tensor of this model" if entries is None else "entry of the imatrix"
    for option, part in given:
        if not imatrix:
            yield f"{option} {part} has no effect: no imatrix is used."
        elif not any(part in name for name in there):
            yield f"{option} {part} matches no {where}.{nearest(part, there)}"


def _of_layers(options: QuantizeOptions, header: GgufHeader) -> Iterator[str]:
    count = header.integer(f"{header.text('general.architecture')}.block_count")
    if count is None:
        return
    absent = [part.strip() for part in options.prune_layers.split(",") if (whole_number(part) or 0) >= count]
    if absent:
        yield f"--prune-layers {','.join(absent)}: no such layer; this model has layers 0 to {count - 1}."


def _of_metadata(options: QuantizeOptions, header: GgufHeader) -> Iterator[str]:
    seen: set[str] = set()
    for override in options.override_kv:
        key, _, typed = override.partition("=")
        kind, _, text = typed.partition(":")
        if key in seen:
            yield f"--override-kv {key} is given twice; the last one counts."
        seen.add(key)
        if key not in header.metadata:
            if close := difflib.get_close_matches(key, header.metadata, n=1, cutoff=_CLOSE_KEY):
                yield f"--override-kv {key} adds a new key, which this model does not have. Did you mean {close[0]}?"
            continue
        yield from _of_value(key, kind, text, header.metadata[key])


def _of_value(key: str, kind: str, text: str, before: Any) -> Iterator[str]:
    kinds = {bool: "bool", int: "int", float: "float", str: "str"}
    had = kinds.get(type(before), "an array")
    if kind in kinds.values() and kind != had:
        yield f"--override-kv {key} turns {had} into {kind}: programs that expect {had} there may refuse the file."
    elif (kind == "str" and text == before) or (kind in ("int", "bool") and text == str(before).lower()):
        yield f"--override-kv {key} changes nothing: this model has that value already."


def ineffective_types(
    entries: Sequence[Override], levels: Mapping[Level, tuple[Mapping[str, str], Mapping[str, str]]], options: QuantizeOptions
) -> list[str]:
    """Return a warning for each ``--tensor-type`` entry that changes no tensor's type at any level.

    ``levels``: for each, the types of all tensors with and without the entries, from llama.cpp's dry run.
    """
    affected = {level: types for level, types in levels.items() if level.ftype.upper() not in PLAIN_FTYPES}
    return [
        f"{each.option} changes nothing: {why}."
        for each in entries
        if each.claimed and affected and (why := _why_unchanged(each, affected, options))
    ]


def _why_unchanged(
    each: Override, levels: Mapping[Level, tuple[Mapping[str, str], Mapping[str, str]]], options: QuantizeOptions
) -> str:
    """Return why an entry changes no type; empty if it changes one."""
    reasons: list[str] = []
    for level, (with_it, without) in levels.items():
        types = [(with_it[name], without[name]) for name in each.claimed if name in with_it and name in without]
        if not types or any(now != before for now, before in types):
            return ""
        applied = level.apply(options)
        if all(now.lower() == each.type.lower() for now, _ in types):
            reasons.append(f"{level.name} has {each.type.upper()} there anyway")
        elif applied.token_embedding_type and all(name in TOKEN_EMBEDDINGS for name in each.claimed):
            reasons.append(f"the type of the embeddings of {level.name} is {applied.token_embedding_type.upper()}")
        elif applied.output_tensor_type and each.claimed == (OUTPUT,):
            reasons.append(f"the type of {OUTPUT} of {level.name} is {applied.output_tensor_type.upper()}")
        else:
            some = ", ".join(each.claimed[:_MOST_NAMES]) + (", …" if len(each.claimed) > _MOST_NAMES else "")
            return f"llama.cpp keeps {some} as {types[0][0].upper()}"
    return "; ".join(reasons)
