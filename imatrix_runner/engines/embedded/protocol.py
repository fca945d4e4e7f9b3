"""What the parent asks of a worker (one JSON argument) and what the worker answers (JSON lines on stdout)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from imatrix_runner.engines.base import (
    CollectOptions,
    Donor,
    Fallback,
    PassedLevel,
    PassFigures,
    PassLevel,
    QuantizeOptions,
)
from imatrix_runner.engines.embedded.compiled import Native
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Metric, Notice, Progress
from imatrix_runner.files import not_utf8
from imatrix_runner.untrusted import first_non_finite, from_json

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]

MOST_BYTES = 16 << 20
"""Upper bound of one message: the control tokens of a large vocabulary take 2 MiB."""


class Probe(msgspec.Struct, frozen=True, tag_field="ask", tag="probe"):
    """Load the library, prove that it is what we take it for and that it multiplies, and say what it can do.

    ``folder`` takes files that are needed meanwhile. ``repack``: multiply also with weights in the processor's own formats
    (ggml's extra buffer types: AMX, repacking), as models are loaded by default.
    """

    folder: Path
    repack: bool = True


class Tokenize(msgspec.Struct, frozen=True, tag_field="ask", tag="tokenize"):
    """Count the tokens of a text."""

    model: Path
    text: Path
    parse_special: bool


class TokenizeTexts(msgspec.Struct, frozen=True, tag_field="ask", tag="tokenize-texts"):
    """Tokenise each text of a JSON list in the file ``texts`` alone; the tokens go to ``out`` (see :mod:`.tokens`)."""

    model: Path
    texts: Path
    out: Path
    parse_special: bool


class Collect(msgspec.Struct, frozen=True, tag_field="ask", tag="collect"):
    """Collect ranges of chunks, ``(first, count)`` each; see :class:`~imatrix_runner.engines.base.CollectJob`."""

    step: str
    model: Path
    text: Path
    ranges: tuple[tuple[int, int], ...]
    folder: Path
    options: CollectOptions
    fingerprint: str


class Refer(msgspec.Struct, frozen=True, tag_field="ask", tag="refer"):
    """Write what the reference model says of a text, chunks ``first`` .. ``first + count - 1``, into a
    :mod:`~imatrix_runner.engines.logits_file`; what is there of it already, from the same ``fingerprint``, is continued."""

    step: str
    model: Path
    text: Path
    out: Path
    first: int
    count: int
    options: CollectOptions
    fingerprint: str
    scored: tuple[Path, str] | None


class Judge(msgspec.Struct, frozen=True, tag_field="ask", tag="judge"):
    """Compare a level with the reference in ``base``; scored tokens go to ``out`` (see :mod:`.scored`), continued likewise."""

    step: str
    model: Path
    base: Path
    out: Path
    first: int
    limit: int | None
    options: CollectOptions
    fingerprint: str


class Generate(msgspec.Struct, frozen=True, tag_field="ask", tag="generate"):
    """Answer prompts; see :class:`~imatrix_runner.engines.measures.AnswerJob`."""

    step: str
    model: Path
    prompts: Path
    out: Path
    n_predict: int
    options: CollectOptions
    fingerprint: str


class Quantize(msgspec.Struct, frozen=True, tag_field="ask", tag="quantize"):
    """Write (or with ``dry_run`` only plan) one level; see :class:`~imatrix_runner.engines.base.QuantizeJob`."""

    step: str
    source: Path
    out: Path
    ftype: str
    options: QuantizeOptions
    imatrix: Path | None
    threads: int | None
    dry_run: bool


class Plan(msgspec.Struct, frozen=True, tag_field="ask", tag="plan"):
    """Several dry runs in one process: starting it costs more than one of them. Each gets a Planned or a Failed, in order."""

    levels: tuple[Quantize, ...]


class Pass(msgspec.Struct, frozen=True, tag_field="ask", tag="pass"):
    """Write many levels at once; see :class:`~imatrix_runner.engines.base.PassJob`."""

    step: str
    sources: tuple[Path, ...]
    levels: tuple[PassLevel, ...]
    donors: tuple[Donor, ...]
    lineage: str
    imatrix: Path | None
    threads: int | None
    buffer_bytes: int
    native: Native | None


class Check(msgspec.Struct, frozen=True, tag_field="ask", tag="check"):
    """Read a finished output again; see :class:`~imatrix_runner.engines.base.CheckJob`."""

    step: str
    files: tuple[Path, ...]
    ledger: Path | None
    threads: int | None


Request = Probe | Tokenize | TokenizeTexts | Collect | Refer | Judge | Generate | Quantize | Plan | Pass | Check


class Proven(msgspec.Struct, frozen=True, tag_field="type", tag="proven"):
    """The answer to a probe. ``library`` is the directory the libraries were loaded from, ``features`` llama.cpp's own line
    about the processor, ``ftypes`` the numbers of the file types the bindings name."""

    version: str
    library: Path
    ggml: str
    features: str
    devices: tuple[str, ...]
    backends: tuple[str, ...]
    ftypes: dict[str, int]


class Counted(msgspec.Struct, frozen=True, tag_field="type", tag="counted"):
    """The answer to a tokenisation."""

    n_tokens: Count


class Tokenized(msgspec.Struct, frozen=True, tag_field="type", tag="tokenized"):
    """Texts are tokenised. ``special``: the vocabulary's control tokens, id -> text; ``bos`` and ``eos`` are -1 for none."""

    n_vocab: Count
    special: dict[int, str]
    bos: int
    eos: int
    add_bos: bool


class Collected(msgspec.Struct, frozen=True, tag_field="type", tag="collected"):
    """A range is complete in ``path``. ``seconds`` it took, ``watching_seconds`` of them in the evaluation callback; the sums
    of the scored tokens' nll and its square."""

    first: Count
    count: Count
    path: Path
    seconds: Seconds
    load_seconds: Seconds
    nll: float
    nll2: float
    scored: Count
    watching_seconds: Seconds


class Judged(msgspec.Struct, frozen=True, tag_field="type", tag="judged"):
    """All chunks are there (``done``), or a stop left the first ``chunks`` of them."""

    chunks: Count
    done: bool
    seconds: Seconds
    load_seconds: Seconds


class Answered(msgspec.Struct, frozen=True, tag_field="type", tag="answered"):
    """All prompts are answered (``done``), or a stop left ``prompts`` of them."""

    prompts: Count
    done: bool
    seconds: Seconds
    load_seconds: Seconds


class Planned(msgspec.Struct, frozen=True, tag_field="type", tag="planned"):
    """The answer to a dry run."""

    types: dict[str, str]
    fallbacks: tuple[Fallback, ...]
    needs_imatrix: bool


class Written(msgspec.Struct, frozen=True, tag_field="type", tag="written"):
    """A level is written."""

    fallbacks: tuple[Fallback, ...]
    without_weights: tuple[str, ...]


class Passed(msgspec.Struct, frozen=True, tag_field="type", tag="passed"):
    """One level of a pass is over; at last, without one, the figures of the pass."""

    level: PassedLevel | None
    figures: PassFigures | None = None


class Checked(msgspec.Struct, frozen=True, tag_field="type", tag="checked"):
    """An output was read again: the first tensor that is not right and why, or nothing."""

    tensor: str
    why: str


class Failed(msgspec.Struct, frozen=True, tag_field="type", tag="failed"):
    """The worker knows what is wrong; ``exit_code`` picks the error (3 no engine, 5 it failed, 6 invalid data, 8 no space)."""

    what: str
    why: str
    todo: str
    exit_code: int


AnswerT = TypeVar("AnswerT", Counted, Tokenized, Judged, Answered, Planned, Written, Checked)

Answer = (
    Proven
    | Counted
    | Tokenized
    | Judged
    | Answered
    | Collected
    | Planned
    | Written
    | Passed
    | Checked
    | Failed
    | Progress
    | Metric
    | Notice
)

_encode = msgspec.json.Encoder(enc_hook=str).encode


def encode(message: Answer | Request) -> bytes:
    """One message as a line of JSON, without its end.

    JSON has no NaN and no infinity, and no message has a use for them: a measured figure that is one is an error where it was
    computed. Raises :class:`InvalidDataError` for such a number, and for a path that is not UTF-8.
    """
    if place := first_non_finite(message):
        raise InvalidDataError(
            "The model produced NaN or infinite numbers",
            f"{place} of the worker's message {type(message).__name__} is NaN or infinite",
            "The model file is damaged or overflows: download or convert it again, or try its BF16 file.",
        )
    try:
        return _encode(message)
    except UnicodeEncodeError as error:
        raise not_utf8(str(error.object)) from error


def decode_answer(line: str) -> Answer:
    """Raises :class:`~imatrix_runner.untrusted.UnreadableError` for a line that is not an answer."""
    answer: Answer = from_json(line, Answer, _hook)  # type: ignore[arg-type]
    return answer


def decode_request(text: str) -> Request:
    """Raises :class:`~imatrix_runner.untrusted.UnreadableError` for what is not a request."""
    request: Request = from_json(text, Request, _hook)  # type: ignore[arg-type]
    return request


def _hook(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    raise ValueError("not a path")
