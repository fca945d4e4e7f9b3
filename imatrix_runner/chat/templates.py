"""Finds the chat template of a model.

A template is an untrusted program: here it is only read, with bounds. It runs in :mod:`.render_worker`, nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imatrix_runner.chat.tokenizer_config import read_config, special_text
from imatrix_runner.documents.conversations import text_flaw
from imatrix_runner.errors import InvalidDataError, UsageError, from_os_error
from imatrix_runner.models.gguf_file import GgufHeader, LongArray, long_array, read_header
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.safe_text import printable

MAX_TEMPLATE = 1 << 20
"""Bytes; the longest published one is below 40 KB."""

_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_KEY = "tokenizer.chat_template"
_MAX_VARIANTS = 64

# Names of special tokens in templates (transformers' special_tokens_map) -> the GGUF key that holds the id.
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # so spelt in every GGUF
    "pad_token": "tokenizer.ggml.padding_token_id",
    "cls_token": "tokenizer.ggml.cls_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the texts of the special tokens it may write.

    ``origin``: where it is from, for people; ``with_tools``: the model's template for conversations with tools (empty if there
    is none); ``others``: special tokens other than ``bos`` and ``eos``, by their names in templates.
    """

    source: str
    bos: str
    eos: str
    origin: str
    with_tools: str = ""
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The hex SHA-256 of the template in UTF-8, followed, if there is ``with_tools``, by a NUL and that template."""
        both = self.source + ("\0" + self.with_tools if self.with_tools else "")
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def special(self) -> dict[str, str]:
        """The model's special tokens by their names in templates. Tokens that the model lacks are absent."""
        named = {"bos_token": self.bos, "eos_token": self.eos, **self.others}
        return {name: text for name, text in named.items() if text}


@dataclass(frozen=True)
class _Found:
    text: str
    origin: str


def load_template(model: Path, file: Path | None = None, name: str = "") -> ChatTemplate:
    """The template of a GGUF or a Hugging Face directory, or that of ``file`` with the model's special tokens.

    A model may have several: ``name`` selects one; else ``default`` is used, and ``tool_use`` for conversations with tools, as
    in transformers. Raises :class:`InvalidDataError` if there is none (it is never guessed) or it is unusable, and
    :class:`UsageError` for an unknown name.
    """
    if model.is_dir():
        special = _special_of_directory(model)
        found = {} if file is not None else _of_directory(model)
    else:
        # Only the first shard of a split model has the metadata.
        first = model.with_name(shard_names(model)[0])
        header = read_header(first if first.is_file() else model)
        special = _special_of_gguf(header)
        found = {} if file is not None else _of_gguf(header)
    if file is not None:
        found = _of_file(file)
    owner = file if file is not None else model
    if not found:
        raise _none(owner)
    chosen = _choose(found, name, owner)
    with_tools = found[_WITH_TOOLS].text if _WITH_TOOLS in found and not name and found[_WITH_TOOLS] is not chosen else ""
    for each in (chosen, *((found[_WITH_TOOLS],) if with_tools else ())):
        _check(each)
    bos, eos = special.pop("bos_token", ""), special.pop("eos_token", "")
    return ChatTemplate(chosen.text, bos, eos, chosen.origin, with_tools, special)


def _choose(found: Mapping[str, _Found], name: str, owner: Path) -> _Found:
    if (name or _DEFAULT) in found:
        return found[name or _DEFAULT]
    names = ", ".join(printable(each)[:40] for each in sorted(found)[:_MAX_VARIANTS])
    if name:
        raise UsageError(
            f"{owner} has no chat template named {printable(name)[:80]!r}", f"it has: {names}", "Choose one of these."
        )
    if len(found) == 1:
        return next(iter(found.values()))
    raise InvalidDataError(
        f"{owner} has several chat templates and none is the default",
        f"it has: {names}",
        "Save the one you want to a file and give it with --chat-template-file FILE.",
    )


def _check(found: _Found) -> None:
    if len(found.text) > MAX_TEMPLATE:
        raise _unusable(found.origin, f"it is longer than {MAX_TEMPLATE >> 20} MiB")
    flaw = text_flaw(found.text)
    if flaw:
        raise _unusable(found.origin, f"it {flaw}")
    if "messages" not in found.text:
        # Some old GGUFs have a bare name here, such as "rwkv-world", which would render as the same word every time.
        raise _unusable(found.origin, "it never uses `messages`, so its output would contain no conversation")


# -- where templates are kept ---------------------------------------------------------------------------------------------


def _of_gguf(header: GgufHeader) -> dict[str, _Found]:
    found = {}
    for key, value in header.metadata.items():
        variant = _DEFAULT if key == _KEY else key.removeprefix(f"{_KEY}.") if key.startswith(f"{_KEY}.") else ""
        if variant and isinstance(value, str):
            found[variant] = _Found(value, f"{key} of {header.path.name}")
    return found


def _of_directory(directory: Path) -> dict[str, _Found]:
    """The templates of a directory, from the newest of the places present (older ones are leftovers), and the variants in
    ``additional_chat_templates``."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        found = {_DEFAULT: _Found(_read(jinja), f"{jinja.name} of {directory.name}")}
    else:
        found = _of_json(directory / "chat_template.json") or _of_json(directory / "tokenizer_config.json")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))[:_MAX_VARIANTS]:
        found[path.stem] = _Found(_read(path), f"{path.name} of {directory.name}")
    return found


def _of_json(path: Path) -> dict[str, _Found]:
    value = read_config(path).get("chat_template")
    origin = f"{path.name} of {path.absolute().parent.name}"
    return {name: _Found(text, origin) for name, text in _variants(value).items()}


def _variants(value: Any) -> dict[str, str]:
    """The templates by name in a ``chat_template`` value: a text, a list of ``{"name", "template"}``, or an object name ->
    text."""
    if isinstance(value, str):
        return {_DEFAULT: value}
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else []
    return {name: text for name, text in pairs[:_MAX_VARIANTS] if isinstance(name, str) and isinstance(text, str)}


def _of_file(file: Path) -> dict[str, _Found]:
    """The templates of a user's file: Jinja, or JSON with a ``chat_template``."""
    if file.suffix.lower() != ".json":
        return {_DEFAULT: _Found(_read(file), str(file))}
    if not file.is_file():
        raise _unusable(str(file), "there is no such file")
    return {name: _Found(each.text, str(file)) for name, each in _of_json(file).items()}


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise _unusable(str(path), "it is a folder" if path.is_dir() else "there is no such file")
        if path.stat().st_size > MAX_TEMPLATE:
            raise _unusable(str(path), f"it is longer than {MAX_TEMPLATE >> 20} MiB")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise from_os_error(error, "reading the chat template", path) from error
    except UnicodeDecodeError as error:
        raise _unusable(str(path), f"byte {error.start} is not valid UTF-8") from error


# -- special tokens ----------------------------------------------------------------------------------------------------------


def _special_of_gguf(header: GgufHeader) -> dict[str, str]:
    ids = {name: header.integer(key) for name, key in _SPECIAL.items()}
    if all(number is None for number in ids.values()):
        return {}
    key = "tokenizer.ggml.tokens"
    kept = header.metadata.get(key)
    tokens = long_array(header.path, key) if isinstance(kept, LongArray) else kept
    if not isinstance(tokens, tuple):
        return {}
    # Like llama.cpp, ignore ids outside the vocabulary.
    texts = {name: tokens[number] for name, number in ids.items() if number is not None and 0 <= number < len(tokens)}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _special_of_directory(directory: Path) -> dict[str, str]:
    legacy = read_config(directory / "special_tokens_map.json")
    config = {**legacy, **read_config(directory / "tokenizer_config.json")}
    return {name: text for name in _SPECIAL if (text := special_text(config, name))}


# -- errors --------------------------------------------------------------------------------------------------------------------


def _none(owner: Path) -> InvalidDataError:
    todo = "Give the instruct model's GGUF, a template with --chat-template-file FILE, or one field as plain text with --field."
    if owner.is_dir() and any(owner.glob("*.gguf")):
        todo = "Give the GGUF file in it."
    return InvalidDataError(
        f"{owner} has no chat template",
        "conversations are rendered with the model's own template, which base models lack; a guessed one would not fit it",
        todo,
    )


def _unusable(origin: str, why: str) -> InvalidDataError:
    what = f"The chat template {printable(origin)} cannot be used"
    return InvalidDataError(
        what, why, "Give another one with --chat-template-file FILE, in Jinja as the model's publisher wrote it."
    )
