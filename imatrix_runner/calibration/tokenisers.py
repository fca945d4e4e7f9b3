"""Tokenisers for calibration texts: llama.cpp for a GGUF, the ``tokenizers`` library for a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from imatrix_runner.chat.tokenizer_config import read_config, special_text, unusable_tokenizer
from imatrix_runner.context.context import Context
from imatrix_runner.context.engine_choice import make_tokeniser
from imatrix_runner.engines.abilities import TextTokeniser
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.models.hub import Hub, is_offline
from imatrix_runner.models.model import HubId, LocalDirectory, LocalFile, parse_source
from imatrix_runner.process import Runner

if TYPE_CHECKING:
    import tokenizers


_MAX_TOKENIZER = 256 << 20


@dataclass
class GgufTokeniser:
    """Tokenises with the vocabulary of a GGUF (a model, or ``ggml-vocab-*``), through an engine that reads it."""

    tokeniser: TextTokeniser
    model: Path
    _vocabulary: Vocabulary | None = field(default=None, init=False)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self.tokenise([], parse_special=False)
        assert self._vocabulary is not None
        return self._vocabulary

    def tokenise(self, texts: Sequence[str], *, parse_special: bool) -> list[TextTokens]:
        found = self.tokeniser.tokenise(self.model, texts, parse_special=parse_special, log=None)
        self._vocabulary = Vocabulary(found.n_vocab, found.special, found.bos, found.eos, found.add_bos)
        cuts = np.cumsum(found.lengths)
        each = zip(texts, np.split(found.ids, cuts), np.split(found.sizes, cuts), strict=False)
        special = np.fromiter(found.special, np.int64, len(found.special))
        return [TextTokens(ids, _ends(sizes, np.isin(ids, special), text)) for text, ids, sizes in each]


_MARK = "▁"
"""SentencePiece's mark for a space. One in a text is decoded as a space."""


def _ends(sizes: npt.NDArray[np.int32], special: npt.NDArray[np.bool_], text: str) -> npt.NDArray[np.int64] | None:
    """Byte offsets at which tokens end in ``text``, from the sizes of their decoded texts; None if they do not add up.

    SentencePiece puts a space before the text, and before what follows a control token.
    """
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
    """Ends in ``text``, from the ends in the same text with each mark replaced by a space."""
    gaps = np.cumsum([len(part.encode()) + 1 for part in text.split(_MARK)[:-1]], dtype=np.int64)
    wider = ends + (len(_MARK.encode()) - 1) * np.searchsorted(gaps, ends, side="right")
    return np.asarray(wider, np.int64)


class HuggingFaceTokeniser:
    """Tokenises with the ``tokenizer.json`` of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tokenizer.json"
        self._config = read_config(directory / "tokenizer_config.json")

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            if self._path.stat().st_size > _MAX_TOKENIZER:
                raise unusable_tokenizer(self._path, f"it is larger than {_MAX_TOKENIZER >> 20} MiB")
            return tokenizers.Tokenizer.from_buffer(self._path.read_bytes())
        except FileNotFoundError as error:
            raise unusable_tokenizer(self._path, "there is no such file") from error
        except OSError as error:
            raise from_os_error(error, "reading the tokenizer", self._path) from error
        except InvalidDataError:
            raise
        except BaseException as error:
            # The library panics (a BaseException) on some broken files.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise unusable_tokenizer(self._path, f"the tokenizers library rejects it: {str(error)[:200]}") from error

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
    """Byte ends from the library's character offsets; None if they do not cover the text."""
    places = np.cumsum([0, *(len(character.encode()) for character in text)], dtype=np.int64)
    ends = places[np.array([end for _, end in offsets], np.int64)] if offsets else np.empty(0, np.int64)
    whole = bool(np.all(np.diff(ends) >= 0)) and (int(ends[-1]) if len(ends) else 0) == int(places[-1])
    return ends if whole else None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's vocabulary. ``special``: id -> text of control tokens; ``bos`` and ``eos`` are ids, None if there is no
    such token; ``add_bos``: every chunk of a calibration begins with ``bos``."""

    n_tokens: int
    special: Mapping[int, str]
    bos: int | None
    eos: int | None
    add_bos: bool


@dataclass(frozen=True)
class TextTokens:
    """The tokens of one text. ``ids`` int32 [n]; ``ends`` int64 [n]: byte offset in the UTF-8 text at which each token ends, or
    None if the decoded tokens do not add up to the text (a tokenizer that normalises)."""

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.ids)


class Tokeniser(Protocol):
    """Tokenises as the model will. Raises :class:`RunnerError`."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def tokenise(self, texts: Sequence[str], *, parse_special: bool) -> list[TextTokens]:
        """The tokens of each text by itself, without those that a vocabulary adds at the ends. ``parse_special``: control
        tokens written out in a text (``<|im_start|>``) are parsed as such."""
        ...


_NEEDED = "tokenizer.json"

_HELPFUL = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json")

_LIMIT = 256 << 20


def tokenizer_files(model: str, context: Context, *, offline: bool) -> Path:
    """The path of a GGUF (its first shard) or of a directory with a tokenizer; of a hub's model only the tokenizer is
    fetched."""
    path = Path(model).expanduser()
    if path.is_dir() and (path / _NEEDED).is_file():
        return path
    source = parse_source(model)
    if isinstance(source, LocalFile):
        return source.path.with_name(shard_names(source.path)[0])
    if isinstance(source, LocalDirectory):
        raise _no_tokenizer(str(source.path))
    return _fetched(source, context, offline=offline)


def _fetched(source: HubId, context: Context, *, offline: bool) -> Path:
    hub = Hub(context.stop, context.sink, offline=offline or is_offline())
    listing = hub.repository(source.repo)
    files = {file.name: file for file in listing.files}
    if _NEEDED not in files:
        raise _no_tokenizer(source.repo)
    paths = [hub.fetch(listing, files[name], limit=_LIMIT) for name in (_NEEDED, *_HELPFUL) if name in files]
    return paths[0].parent


def _no_tokenizer(where: str) -> InvalidDataError:
    return InvalidDataError(
        f"{where} has no {_NEEDED}",
        "without that file only llama.cpp's converter can read its tokenizer",
        "Convert the model first (imatrix-runner run …) and give the GGUF with --model.",
    )


def find_tokeniser(model: Path, runner: Runner) -> Tokeniser:
    """The tokeniser of a local model: a GGUF, or a directory with ``tokenizer.json``. Raises :class:`RunnerError`."""
    if model.is_dir():
        return HuggingFaceTokeniser(model)
    header = read_header(model)
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise InvalidDataError(
            f"{model} has no vocabulary",
            "the metadata key tokenizer.ggml.tokens is missing",
            "Give the model's own GGUF (for a split one, its first shard).",
        )
    return GgufTokeniser(make_tokeniser(runner), model)
