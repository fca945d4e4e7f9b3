"""What the parent asks of a worker (one JSON argument) and what the worker answers (JSON lines on stdout)."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

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
from imatrix_runner.events import Metric, Notice, Progress


class Probe(msgspec.Struct, frozen=True, tag_field="ask", tag="probe"):
    """Load the library, prove that it is what we take it for, and say what it can do."""


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

    n_tokens: int


class Tokenized(msgspec.Struct, frozen=True, tag_field="type", tag="tokenized"):
    """Texts are tokenised. ``special``: the vocabulary's control tokens, id -> text; ``bos`` and ``eos`` are -1 for none."""

    n_vocab: int
    special: dict[int, str]
    bos: int
    eos: int
    add_bos: bool


class Collected(msgspec.Struct, frozen=True, tag_field="type", tag="collected"):
    """A range is complete in ``path``. ``seconds`` it took, ``watching_seconds`` of them in the evaluation callback; the sums
    of the scored tokens' nll and its square."""

    first: int
    count: int
    path: Path
    seconds: float
    load_seconds: float
    nll: float
    nll2: float
    scored: int
    watching_seconds: float


class Judged(msgspec.Struct, frozen=True, tag_field="type", tag="judged"):
    """All chunks are there (``done``), or a stop left the first ``chunks`` of them."""

    chunks: int
    done: bool
    seconds: float
    load_seconds: float


class Answered(msgspec.Struct, frozen=True, tag_field="type", tag="answered"):
    """All prompts are answered (``done``), or a stop left ``prompts`` of them."""

    prompts: int
    done: bool
    seconds: float
    load_seconds: float


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

encode = msgspec.json.Encoder(enc_hook=str).encode
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer, dec_hook=lambda kind, value: kind(value))
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request, dec_hook=lambda kind, value: kind(value))


def decode_answer(line: str) -> Answer:
    """Raises ``msgspec.MsgspecError`` for a line that is none."""
    return _answers.decode(line)


def decode_request(text: str) -> Request:
    return _requests.decode(text)
