"""Messages between the parent and a worker: a job (the worker's one argument, JSON) and replies (JSON lines on stdout)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec

from imatrix_runner.engines.audit_jobs import AuditJob, TensorFindings
from imatrix_runner.engines.cost_jobs import RoundingError, RoundingErrorsJob, TrialResult, TrialsJob
from imatrix_runner.engines.covariance_jobs import CovarianceJob
from imatrix_runner.engines.jobs import (
    CheckJob,
    CollectJob,
    Fallback,
    PassedLevel,
    PassedUnit,
    PassFigures,
    PassJob,
    QuantizeJob,
)
from imatrix_runner.engines.measures import AnswerJob, MeasureJob, ReferenceJob
from imatrix_runner.engines.pass_parts import PassWork
from imatrix_runner.engines.speed_jobs import SpeedJob, TimedRuns
from imatrix_runner.engines.task_jobs import TaskJob
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Metric, Notice, Progress
from imatrix_runner.files import not_utf8
from imatrix_runner.untrusted import UnreadableError, first_non_finite, from_json

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]

MOST_BYTES = 16 << 20
"""Upper bound, in bytes, for one message: the control tokens of a large vocabulary take 2 MiB."""


@dataclass(frozen=True)
class ProbeJob:
    """Load the library, check its memory layout and its products, and report what it can do.

    ``folder`` takes temporary files. ``repack``: also multiply with weights in the processor's own formats (ggml's extra
    buffer types: AMX, repacking), as models are loaded by default.
    """

    folder: Path
    repack: bool = True


@dataclass(frozen=True)
class CountTokensJob:
    """Count the tokens of the file ``text``."""

    model: Path
    text: Path
    parse_special: bool


@dataclass(frozen=True)
class TokeniseJob:
    """Tokenise each text of the JSON list in the file ``texts`` by itself; the tokens go to ``out`` (see
    :mod:`~imatrix_runner.engines.worker.tokens`)."""

    model: Path
    texts: Path
    out: Path
    parse_special: bool


LEVEL_MARK = "planning level "
"""Prefix of the stderr line before llama.cpp's messages about the next level of a :class:`DryRunsJob`."""


@dataclass(frozen=True)
class DryRunsJob:
    """Several dry runs in one process, whose start costs more than one of them. Each gets a Planned or a Failed, in order."""

    levels: tuple[QuantizeJob, ...]


@dataclass(frozen=True)
class PreparePassJob:
    """Create the outputs of a pass, or continue them, and report what is left to compute; the pass itself comes later."""

    job: PassJob


Job = (
    ProbeJob
    | CountTokensJob
    | TokeniseJob
    | CollectJob
    | CovarianceJob
    | ReferenceJob
    | MeasureJob
    | AnswerJob
    | TaskJob
    | DryRunsJob
    | PassJob
    | PreparePassJob
    | CheckJob
    | RoundingErrorsJob
    | TrialsJob
    | AuditJob
    | SpeedJob
)
"""Every job that a worker takes. Those defined in this module serve the engine itself; its callers give the others."""

_KINDS: dict[str, type[Job]] = {kind.__name__: kind for kind in get_args(Job)}


class _Request(msgspec.Struct, frozen=True):
    """A job as sent: the name of its class, and its fields."""

    job: str
    fields: msgspec.Raw


class Proven(msgspec.Struct, frozen=True, tag_field="type", tag="proven"):
    """Reply to a probe. ``library`` is the directory that the libraries were loaded from, ``features`` llama.cpp's own line
    about the processor, ``ftypes`` the numbers of the file types that the bindings name."""

    version: str
    library: Path
    ggml: str
    features: str
    devices: tuple[str, ...]
    backends: tuple[str, ...]
    ftypes: dict[str, int]


class Counted(msgspec.Struct, frozen=True, tag_field="type", tag="counted"):
    """Reply to a :class:`CountTokensJob`."""

    n_tokens: Count


class Tokenized(msgspec.Struct, frozen=True, tag_field="type", tag="tokenized"):
    """Reply to a :class:`TokeniseJob`. ``special``: the vocabulary's control tokens, id -> text; ``bos`` and ``eos`` are -1
    if it has none."""

    n_vocab: Count
    special: dict[int, str]
    bos: int
    eos: int
    add_bos: bool


class Collected(msgspec.Struct, frozen=True, tag_field="type", tag="collected"):
    """A range is complete in ``path``. ``seconds``: time it took, ``watching_seconds`` of it in the evaluation callback.
    ``nll`` and ``nll2``: sums of -ln p and of its square over ``scored`` tokens."""

    first: Count
    count: Count
    path: Path
    seconds: Seconds
    load_seconds: Seconds
    nll: float
    nll2: float
    scored: Count
    watching_seconds: Seconds


class CovariancesCollected(msgspec.Struct, frozen=True, tag_field="type", tag="covariances"):
    """All covariances of a job are in its folder (``done``), or sums that the same job continues because of a stop. ``groups``:
    how often the text was computed now, ``seconds``: time it took, ``watching_seconds`` of it in the evaluation callback."""

    done: bool
    groups: Count
    seconds: Seconds
    watching_seconds: Seconds


class TokensMeasured(msgspec.Struct, frozen=True, tag_field="type", tag="judged"):
    """All chunks are measured (``done``), or only the first ``chunks`` because of a stop."""

    chunks: Count
    done: bool
    seconds: Seconds
    load_seconds: Seconds


class Answered(msgspec.Struct, frozen=True, tag_field="type", tag="answered"):
    """All prompts are answered (``done``), or only ``prompts`` of them because of a stop."""

    prompts: Count
    done: bool
    seconds: Seconds
    load_seconds: Seconds


class TasksAnswered(msgspec.Struct, frozen=True, tag_field="type", tag="tasks"):
    """All requests of a task job are computed (``done``), or only ``requests`` of them because of a stop."""

    requests: Count
    done: bool
    seconds: Seconds
    load_seconds: Seconds


class Planned(msgspec.Struct, frozen=True, tag_field="type", tag="planned"):
    """Reply to one dry run."""

    types: dict[str, str]
    fallbacks: tuple[Fallback, ...]
    needs_imatrix: bool


class Passed(msgspec.Struct, frozen=True, tag_field="type", tag="passed"):
    """One level of a pass has ended. The last reply has no level, but the figures of the pass."""

    level: PassedLevel | None
    figures: PassFigures | None = None


class Prepared(msgspec.Struct, frozen=True, tag_field="type", tag="prepared"):
    """Replies to a :class:`PreparePassJob`, each with some of what is left. The last has ``slab``, the elements of a
    checksum."""

    works: tuple[PassWork, ...]
    slab: Count = 0


class UnitPassed(msgspec.Struct, frozen=True, tag_field="type", tag="unit"):
    """A unit of a pass's part is on the disk, and recorded or in its scratch file."""

    unit: PassedUnit


class Checked(msgspec.Struct, frozen=True, tag_field="type", tag="checked"):
    """Reply to a :class:`CheckJob`: the first invalid tensor and why; both empty if there is none."""

    tensor: str
    why: str


class Costed(msgspec.Struct, frozen=True, tag_field="type", tag="costed"):
    """All costs of a job are measured (``done``), or some of them because of a stop."""

    done: bool


class ErrorsMeasured(msgspec.Struct, frozen=True, tag_field="type", tag="errors"):
    """The errors of the group of tensors at this place of an ordered job."""

    place: Count
    errors: tuple[RoundingError, ...]


class TrialMeasured(msgspec.Struct, frozen=True, tag_field="type", tag="trial"):
    """The result of the trial at this place of an ordered job."""

    place: Count
    result: TrialResult


class TensorAudited(msgspec.Struct, frozen=True, tag_field="type", tag="tensor-audited"):
    """A tensor of an audit is compared."""

    found: TensorFindings


class Audited(msgspec.Struct, frozen=True, tag_field="type", tag="audited"):
    """All tensors of an audit are compared (``done``), or some of them because of a stop."""

    done: bool


class Timed(msgspec.Struct, frozen=True, tag_field="type", tag="timed"):
    """All repetitions of a :class:`~imatrix_runner.engines.speed_jobs.SpeedJob` (``done``), or some because of a stop."""

    runs: TimedRuns
    done: bool


class Failed(msgspec.Struct, frozen=True, tag_field="type", tag="failed"):
    """The worker failed for a known reason. ``exit_code`` selects the error (3 no engine, 5 it failed, 6 invalid data, 8 no
    space).

    ``todo`` is empty where llama-cpp-python has to be installed again: the parent knows the command for that.
    """

    what: str
    why: str
    todo: str
    exit_code: int


ReplyT = TypeVar(
    "ReplyT",
    Counted,
    Tokenized,
    CovariancesCollected,
    TokensMeasured,
    Answered,
    TasksAnswered,
    Checked,
    Costed,
    Audited,
    Timed,
)

Reply = (
    Proven
    | Counted
    | Tokenized
    | CovariancesCollected
    | TokensMeasured
    | Answered
    | TasksAnswered
    | Collected
    | Planned
    | Passed
    | Prepared
    | UnitPassed
    | Checked
    | Costed
    | ErrorsMeasured
    | TrialMeasured
    | TensorAudited
    | Audited
    | Timed
    | Failed
    | Progress
    | Metric
    | Notice
)

Send = Callable[[Reply], None]
"""Sends one reply to the parent; passed to each function of a worker."""


def _spelled(value: Any) -> str:
    """Return a path for JSON, made absolute because a worker runs in another directory."""
    if isinstance(value, Path):
        return str(value.absolute())
    raise TypeError(f"{type(value).__name__} is not part of a message")


_encode = msgspec.json.Encoder(enc_hook=_spelled).encode


def encode(reply: Reply) -> bytes:
    """Return a reply as one line of JSON, without a newline.

    JSON has no NaN or infinity. Raises :class:`InvalidDataError` for such a number, and for a path that is not UTF-8.
    """
    if place := first_non_finite(reply):
        raise InvalidDataError(
            "The model produced NaN or infinite numbers",
            f"{place} of the worker's message {type(reply).__name__} is NaN or infinite",
            "The model file is damaged or overflows: download or convert it again, or try its BF16 file.",
        )
    return _as_json(reply)


def encode_job(job: Job) -> bytes:
    """Return the request for a job as JSON. Raises :class:`InvalidDataError` for a path that is not UTF-8."""
    return _as_json(_Request(type(job).__name__, msgspec.Raw(_as_json(job))))


def _as_json(message: Reply | Job | _Request) -> bytes:
    try:
        return _encode(message)
    except UnicodeEncodeError as error:
        raise not_utf8(str(error.object)) from error


def decode_reply(line: str) -> Reply:
    """Return the reply on a line. Raises :class:`~imatrix_runner.untrusted.UnreadableError` if it is not one."""
    reply: Reply = from_json(line, Reply, _hook)  # type: ignore[arg-type]
    return reply


def decode_job(text: str) -> Job:
    """Return the job in a request. Raises :class:`~imatrix_runner.untrusted.UnreadableError` if the text is not one."""
    request = from_json(text, _Request)
    kind = _KINDS.get(request.job)
    if kind is None:
        raise UnreadableError(f"{request.job[:40]!r} is not a job")
    return from_json(bytes(request.fields), kind, _hook)


def _hook(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    raise ValueError("not a path")
