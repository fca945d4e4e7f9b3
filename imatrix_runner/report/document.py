"""``report.json``: everything that is known of a workspace's model, once. Every other form of the report is a view of it.

Read and written by msgspec; a field's name is its key. New fields may come, with a default; none changes its meaning. Sizes are
bytes, times seconds, shares 0..1, divergences nats. Paths are names inside the workspace, or names of files elsewhere: whoever
gets a report learns nothing of somebody's folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from imatrix_runner.engines.measures import Divergence, Estimate
from imatrix_runner.evaluate.answers import DomainResult
from imatrix_runner.evaluate.picks import Pick
from imatrix_runner.evaluate.twins import Comparison

SCHEMA: Final = "imatrix-runner/report"
VERSION: Final = 1


@dataclass(frozen=True)
class ReportFile:
    """A file of the workspace; ``sha256`` is empty where nobody computed it."""

    name: str
    n_bytes: int
    sha256: str = ""


@dataclass(frozen=True)
class ReportModel:
    """The source. ``fingerprint`` is ``sha256:…`` of its content; ``origin`` the hub id, or the name of the file or directory.

    ``base_models`` are hub ids (``org/name``), of the model itself first; where its own is not known, ``tuned_from`` may be
    that of the model it was tuned from. ``license`` as the source's metadata has it (an SPDX-like id), with the name and link
    of one that is ``other``. ``prompt_format`` is the chat template applied to a system message and a user's, with
    ``{system_prompt}`` and ``{prompt}`` in their places; empty without a template. ``dequantised``: the quantised form
    (``fp8``) in which the source was published, where it was dequantised before these files were made.
    """

    name: str
    architecture: str
    n_params: int
    n_bytes: int
    type: str
    origin: str
    files: tuple[ReportFile, ...]
    fingerprint: str
    repo: str = ""
    commit: str = ""
    base_models: tuple[str, ...] = ()
    tuned_from: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    context_length: int | None = None
    n_layers: int | None = None
    n_experts: int = 0
    prompt_format: str = ""
    dequantised: str = ""
    quantised: str = ""
    """The block format of a source that is quantised itself; empty for an F32, F16 or BF16 one."""


@dataclass(frozen=True)
class ReportLevel:
    """One finished level. ``seconds``: of its making (of the whole pass, for levels made in one, of whose work it had the part
    ``pass_share``); ``measured`` None: not.

    ``ppl_ratio``: its perplexity over the source's own, which people compare; ``measured.ratio`` is llama-perplexity's, whose
    reference knows no token rarer than e^-16.

    ``is_source``: no tensor's type differs from the source's. ``same_as``: the level whose file holds the same tensors, in
    whose row this one is shown; ``others`` are the levels in this one's row.
    """

    name: str
    ftype: str
    files: tuple[ReportFile, ...]
    n_bytes: int
    bits_per_weight: float | None
    needs_imatrix: bool
    used_imatrix: bool
    fallbacks: int
    fallback_share: float
    seconds: float
    finished: str
    command: str = ""
    measured: Divergence | None = None
    ppl_ratio: Estimate | None = None
    pass_share: float | None = None
    is_source: bool = False
    same_as: str = ""
    others: tuple[str, ...] = ()

    @property
    def own_seconds(self) -> float:
        """Seconds for this level alone: of a pass, its share."""
        return self.seconds if self.pass_share is None else self.seconds * self.pass_share

    @property
    def label(self) -> str:
        """Its name, and those of the levels that are shown in its row."""
        return f"{self.name} (= {', '.join(self.others)})" if self.others else self.name


@dataclass(frozen=True)
class ReportTensor:
    """One tensor of the imatrix (:class:`~imatrix_runner.imatrix.statistics.TensorStatistics`): ``kind`` such as ``attn_q``,
    ``total`` Σ(Act²), ``active`` the share of columns above 1e-5, ``entropy`` the share of its maximum."""

    layer: int | None
    kind: str
    total: float
    active: float
    entropy: float


@dataclass(frozen=True)
class ReportExperts:
    """How the tokens fell on one tensor's experts (:class:`~imatrix_runner.imatrix.statistics.ExpertStatistics`)."""

    layer: int | None
    kind: str
    experts: int
    without_tokens: int
    fewest: int
    median: float
    most: int


@dataclass(frozen=True)
class ReportCurvePoint:
    """After ``chunks`` chunks: how much ``tensor``, the one that changed most, and the median one differ from before."""

    chunks: int
    worst: float
    tensor: str
    median: float


@dataclass(frozen=True)
class CalibrationSource:
    name: str
    sha256: str = ""
    licence: str = ""
    share: float | None = None


@dataclass(frozen=True)
class ReportCalibration:
    """The text an imatrix was collected from; ``manifest`` is the fingerprint of one built by ``calibration build``."""

    name: str
    n_bytes: int
    sha256: str
    manifest: str = ""
    parse_special: bool = False
    template: str = ""
    sources: tuple[CalibrationSource, ...] = ()


@dataclass(frozen=True)
class ReportImatrix:
    """``made_here``: collected in this workspace; then ``ppl``, ``curve``, ``calibration`` and ``seconds`` may be known.

    ``tokens`` it was collected from; ``stopped`` is ``chunks``, ``converged``, ``covered`` or ``text``; ``origin`` of a
    published one: ``repo@commit:file``.
    """

    file: ReportFile
    format: str
    entries: int
    chunks: int
    chunk_size: int
    datasets: tuple[str, ...]
    made_here: bool
    tokens: int | None = None
    ppl: float | None = None
    ppl_error: float | None = None
    stopped: str = ""
    seconds: float = 0.0
    engine: str = ""
    calibration: ReportCalibration | None = None
    tensors: tuple[ReportTensor, ...] = ()
    without_data: tuple[str, ...] = ()
    experts: tuple[ReportExperts, ...] = ()
    curve: tuple[ReportCurvePoint, ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class ReportEvaluation:
    """What every level was measured with: the same text, chunks and reference. ``overlap``: share of the text's stretches of
    13 words that stand in the calibration text too; None when that text is not known."""

    text: str
    sha256: str
    n_chunks: int
    n_ctx: int
    n_tokens: int
    engine: str
    reference: str
    ppl: Estimate
    overlap: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class WithoutTwin:
    """A level that is not compared with one made without imatrix, and why, as the rest of a sentence about it."""

    level: str
    why: str


@dataclass(frozen=True)
class ReportStep:
    """One line of how it was made: the command that reproduces it (may be empty), and how long it took."""

    what: str
    seconds: float
    finished: str
    command: str = ""


@dataclass(frozen=True)
class Report:
    """One workspace. ``made`` is ISO 8601 in UTC; ``command`` the line that was typed; ``toolchain`` the engine's identity.

    ``caveats``: sentences without which the figures would mislead, shown wherever the figures are. ``quantized_by``: whom the
    model card names as the maker of these files; ``repo``: the hub id that the files have or will have, which the card's
    commands name. Empty where not given.
    """

    model: ReportModel
    levels: tuple[ReportLevel, ...]
    made: str
    program: str
    command: str = ""
    toolchain: str = ""
    imatrix: ReportImatrix | None = None
    evaluation: ReportEvaluation | None = None
    comparisons: tuple[Comparison, ...] = ()
    without_twin: tuple[WithoutTwin, ...] = ()
    domain: tuple[DomainResult, ...] = ()
    picks: tuple[Pick, ...] = ()
    caveats: tuple[str, ...] = ()
    steps: tuple[ReportStep, ...] = ()
    quantized_by: str = ""
    repo: str = ""
    schema: Literal["imatrix-runner/report"] = SCHEMA
    version: Literal[1] = VERSION

    @property
    def rows(self) -> tuple[ReportLevel, ...]:
        """The levels that tables and charts show: of those that hold the same tensors one."""
        names = {level.name for level in self.levels}
        return tuple(level for level in self.levels if level.same_as not in names - {level.name})
