"""What counts a calibration text's tokens: llama.cpp for a GGUF, the ``tokenizers`` library for a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.calibration.tokens import TextTokens, Vocabulary
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.untrusted import UnreadableError, from_json

if TYPE_CHECKING:
    import tokenizers

    from imatrix_runner.engines.embedded.engine import EmbeddedEngine

_MAX_TOKENIZER = 256 << 20
_MAX_CONFIG = 16 << 20


@dataclass
class GgufTokeniser:
    """The vocabulary of a GGUF (of weights, or ``ggml-vocab-*``), through a worker of the embedded engine."""

    engine: EmbeddedEngine
    model: Path
    _vocabulary: Vocabulary | None = field(default=None, init=False)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self.tokenise([], parse_special=False)
        assert self._vocabulary is not None
        return self._vocabulary

    def tokenise(self, texts: Sequence[str], *, parse_special: bool) -> list[TextTokens]:
        found = self.engine.tokenise(self.model, texts, parse_special=parse_special, log=None)
        told = found.vocabulary
        bos, eos = (token if token >= 0 else None for token in (told.bos, told.eos))
        self._vocabulary = Vocabulary(told.n_vocab, told.special, bos, eos, told.add_bos)
        cuts = np.cumsum(found.lengths)
        each = zip(texts, np.split(found.ids, cuts), np.split(found.sizes, cuts), strict=False)
        special = np.fromiter(told.special, np.int64, len(told.special))
        return [TextTokens(ids, _ends(sizes, np.isin(ids, special), text)) for text, ids, sizes in each]


_MARK = "▁"
"""How SentencePiece writes a space; one in a text comes back as a space."""


def _ends(sizes: npt.NDArray[np.int32], special: npt.NDArray[np.bool_], text: str) -> npt.NDArray[np.int64] | None:
    """Where tokens end in their text, from the bytes of their pieces. SentencePiece puts a space before the text, and before
    what follows a control token."""
    ends = np.cumsum(sizes, dtype=np.int64)
    if not len(ends):
        return ends if not text else None
    spaces = np.cumsum(~special & np.concatenate([[True], special[:-1]]))
    for mark in ("", _MARK) if _MARK in text else ("",):
        extra = int(ends[-1]) - len((text.replace(mark, " ") if mark else text).encode())
        if extra in (0, int(spaces[-1])):
            ends = ends - spaces if extra else ends
            return _widened(ends, text) if mark else ends
    return None


def _widened(ends: npt.NDArray[np.int64], text: str) -> npt.NDArray[np.int64]:
    """Ends in ``text`` from those in the text whose marks are spaces."""
    gaps = np.cumsum([len(part.encode()) + 1 for part in text.split(_MARK)[:-1]], dtype=np.int64)
    wider = ends + (len(_MARK.encode()) - 1) * np.searchsorted(gaps, ends, side="right")
    return np.asarray(wider, np.int64)


class HuggingFaceTokeniser:
    """``tokenizer.json`` of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tokenizer.json"
        self._config = read_config(directory / "tokenizer_config.json")

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            if self._path.stat().st_size > _MAX_TOKENIZER:
                raise _unusable(self._path, f"it is larger than {_MAX_TOKENIZER >> 20} MiB")
            return tokenizers.Tokenizer.from_buffer(self._path.read_bytes())
        except FileNotFoundError as error:
            raise _unusable(self._path, "there is no such file") from error
        except OSError as error:
            raise from_os_error(error, "reading the tokenizer", self._path) from error
        except InvalidDataError:
            raise
        except BaseException as error:
            # The library panics (a BaseException) on some broken files; Ctrl-C stays what it is.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise _unusable(self._path, f"the tokenizers library refuses it: {str(error)[:200]}") from error

    @cached_property
    def vocabulary(self) -> Vocabulary:
        tokenizer = self._tokenizer
        special = {token: str(each.content) for token, each in tokenizer.get_added_tokens_decoder().items() if each.special}
        ids = {text: token for token, text in special.items()}
        bos, eos = (ids.get(special_text(self._config, name)) for name in ("bos_token", "eos_token"))
        first = tokenizer.encode("", add_special_tokens=True).ids
        return Vocabulary(tokenizer.get_vocab_size(), special, bos, eos, bos is not None and first[:1] == [bos])

    def tokenise(self, texts: Sequence[str], *, parse_special: bool) -> list[TextTokens]:
        self._tokenizer.encode_special_tokens = not parse_special
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            TextTokens(np.array(each.ids, np.int32), _from_offsets(text, each.offsets))
            for text, each in zip(texts, encoded, strict=True)
        ]


def _from_offsets(text: str, offsets: list[tuple[int, int]]) -> npt.NDArray[np.int64] | None:
    """Byte ends from the library's character offsets; None where they leave something of the text out."""
    places = np.cumsum([0, *(len(character.encode()) for character in text)], dtype=np.int64)
    ends = places[np.array([end for _, end in offsets], np.int64)] if offsets else np.empty(0, np.int64)
    whole = bool(np.all(np.diff(ends) >= 0)) and (int(ends[-1]) if len(ends) else 0) == int(places[-1])
    return ends if whole else None


def read_config(path: Path) -> Mapping[str, Any]:
    """A small JSON object of a model's directory; empty if there is no such file."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _MAX_CONFIG:
            raise _unusable(path, f"it is larger than {_MAX_CONFIG >> 20} MiB")
        return from_json(path.read_bytes(), dict[str, Any])
    except OSError as error:
        raise from_os_error(error, "reading the tokenizer's configuration", path) from error
    except UnreadableError as error:
        raise _unusable(path, str(error)) from error


def special_text(config: Mapping[str, Any], name: str) -> str:
    """The text of ``bos_token`` or ``eos_token``: a string, or an object with its ``content``; empty for none."""
    value = config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _unusable(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{path} cannot be used as a tokenizer",
        why,
        "Give the model's GGUF with --model, or a directory with tokenizer.json and tokenizer_config.json.",
    )
