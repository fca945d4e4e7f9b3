"""What a user asked for, as frozen values; made by the command line (or by any other caller) and never changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imatrix_runner.engines.base import CollectOptions, QuantizeOptions

OutType = Literal["auto", "f16", "bf16", "f32"]

DEFAULT_TOLERANCE = 0.05
"""``--until-converged`` without a number: in no tensor more than an estimated 5 % of the importance lies in wrong columns.

On the demo model (``scripts/bench convergence``) stopping at 0.2 cost up to 2.7 % of divergence and at 0.1 nothing measurable;
this is half of that.
"""

MODES = ("auto", "there", "none", "generate", "published")
"""What ``ImatrixRequest.mode`` can be besides a file's path."""


@dataclass(frozen=True)
class ImatrixRequest:
    """``mode``: ``auto`` (what lies in the workspace, else for a hub's model a published one, else generate), ``there`` (what
    lies there, else none), ``published``, ``generate``, ``none``, or a file's path.

    ``text`` None means the shipped calibration text. ``chunks`` limits, ``first_chunk`` skips;
    ``output_frequency`` None lets the size of ranges follow from the model; ``save_frequency`` 0 leaves no snapshots.
    ``until_converged``: the tolerance (:mod:`imatrix_runner.imatrix.convergence`) below which it stops before that;
    ``min_expert_tokens``: it goes on after that until every expert saw so many tokens, or the text ends (0: it does not).
    ``parse_as_built``: a text that was built with a chat template has its special tokens parsed, whatever ``options`` says.
    ``typed``: options given by hand that only matter where an imatrix is generated.
    """

    mode: str = "auto"
    text: Path | None = None
    options: CollectOptions = field(default_factory=CollectOptions)
    chunks: int | None = None
    first_chunk: int = 0
    output_frequency: int | None = None
    save_frequency: int = 0
    until_converged: float | None = None
    min_expert_tokens: int = 0
    out: Path | None = None
    parse_as_built: bool = True
    typed: tuple[str, ...] = ()


@dataclass(frozen=True)
class LevelsRequest:
    """Which levels (by name, or a preset; both empty: the default set) and how. ``uncovered``: what becomes of tensors for
    which the imatrix has no data (``fail``, ``keep``, or a type). ``one_by_one``: each level has its name before the next is
    begun, so that the disk need not hold all half files at once. ``verify``: names, types and sizes, or every row too.
    ``kernels``: ours where they are proven to give ggml's bytes, or only ggml's."""

    names: tuple[str, ...] = ()
    preset: str = ""
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    jobs: int | None = None
    threads: int | None = None
    uncovered: str = "fail"
    one_by_one: bool = False
    verify: Literal["header", "full"] = "header"
    kernels: Literal["auto", "ggml"] = "auto"


@dataclass(frozen=True)
class MeasureRequest:
    """What is measured and how. ``levels`` empty: all that are there. ``text`` None means the shipped held-out text; of its
    chunks the first ``chunks``, all without. ``max_disk``: bytes that files of the measurement may take at once. ``base``: a
    file of log-probabilities to compare with, in place of text and source. ``again``: whatever is known is measured anew.

    ``twins``: each level is compared with one made without imatrix. ``domain``: a file of prompts that source and levels
    answer, in ``n_predict`` tokens at most, written with ``chat_template`` (None: the model's own). ``target_kld`` (nats) and
    ``target_size`` (bytes) decide which level is picked.
    """

    levels: tuple[str, ...] = ()
    text: Path | None = None
    options: CollectOptions = field(default_factory=CollectOptions)
    chunks: int | None = None
    max_disk: int | None = None
    base: Path | None = None
    again: bool = False
    twins: bool = False
    domain: Path | None = None
    n_predict: int = 128
    chat_template: Path | None = None
    target_kld: float | None = None
    target_size: int | None = None


@dataclass(frozen=True)
class SourceRequest:
    """The model as named by the user and how to turn it into a GGUF if it is none.

    ``typed``: options given by hand that only matter where a model is converted.
    """

    model: str
    outtype: OutType = "auto"
    mmproj: bool = False
    trust_remote_code: bool = False
    typed: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnvironmentRequest:
    """Where to work and with what. ``hang_seconds`` 0 never gives up on a silent child; ``command`` is the line that was
    typed, for whoever finds the workspace held or unfinished; ``force`` takes over the workspace of another source."""

    work_dir: Path = Path("work")
    engine: str = "auto"
    llama_cpp: Path | None = None
    hang_seconds: float = 600.0
    command: str = ""
    force: bool = False


@dataclass(frozen=True)
class RunRequest:
    """``run`` and ``quantize`` (with ``levels``), or ``imatrix generate`` (without). ``measure``: what comes after;
    ``warnings``: what can be said of the options before anything is opened."""

    source: SourceRequest
    environment: EnvironmentRequest
    imatrix: ImatrixRequest
    levels: LevelsRequest | None
    measure: MeasureRequest | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluateRequest:
    """``evaluate``; ``making`` is how levels were made, for their twins; ``warnings`` as for :class:`RunRequest`."""

    source: SourceRequest
    environment: EnvironmentRequest
    measure: MeasureRequest
    making: LevelsRequest
    warnings: tuple[str, ...] = ()
