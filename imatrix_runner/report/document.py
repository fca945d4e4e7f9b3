"""``report.json``: all facts about a workspace's model. Every other form of the report is a view of it.

Read and written by msgspec; a field's name is its key. New fields may be added, with a default; no field changes its meaning.
Sizes are in bytes, times in seconds, shares from 0 to 1, divergences in nats. Files are given by name, without folders, so that
a report can be published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

from imatrix_runner import safe_text
from imatrix_runner.engines.measures import Divergence, Estimate
from imatrix_runner.engines.roundings import Rounding
from imatrix_runner.engines.speed_jobs import MemoryBuffer
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.evaluate.ab_verdict import Comparison
from imatrix_runner.evaluate.answer_agreement import DomainResult
from imatrix_runner.evaluate.measurements import OtherMeasured, ReportEvaluation
from imatrix_runner.evaluate.mix_verdict import MixVerdict
from imatrix_runner.evaluate.recommendations import Pick
from imatrix_runner.evaluate.speed_figures import SpeedSetting, TokenRate
from imatrix_runner.evaluate.tasks.task_verdict import TaskScores
from imatrix_runner.files import encode_json
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import UnreadableError, from_json

SCHEMA: Final = "imatrix-runner/report"

VERSION: Final = 1


@dataclass(frozen=True)
class ReportFile:
    """A file of the workspace; ``sha256`` is empty if it was not computed."""

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
class ReportMix:
    """How the types of a mix were chosen.

    ``targets``: what was asked for (``MIX@4GiB``). ``ratio``: its KLD relative to that of the level ``stock``, on chunks of the
    calibration text that no cost was measured on; ``typical``: the geometric mean of the chunks' own ratios; ``same_top``: the
    difference of the shares of tokens with the source's top token. ``types``: ggml type -> number of tensors; ``unweighted``:
    tensors that are rounded without the imatrix; ``digest``: that of the types in the file's metadata. ``recipe`` and
    ``tensor_types`` (for llama-quantize) are files next to the level; None if they are gone or were changed. ``held_out``: the
    mix compared with the measured stock levels.
    """

    targets: tuple[str, ...]
    stock: str
    digest: str
    types: Mapping[str, int] = field(default_factory=dict)
    unweighted: tuple[str, ...] = ()
    ratio: Estimate | None = None
    typical: float | None = None
    same_top: float | None = None
    recipe: ReportFile | None = None
    tensor_types: ReportFile | None = None
    held_out: MixVerdict | None = None

    @property
    def files(self) -> tuple[ReportFile, ...]:
        return tuple(file for file in (self.recipe, self.tensor_types) if file is not None)


@dataclass(frozen=True)
class ReportRounding:
    """How a level's numbers are rounded, where not as llama-quantize does.

    ``kind``: refined or feedback. ``stock``: the level of the same types that it was compared with on the calibration text
    (empty for a mix, which has a comparison of its own), ``ratio`` its KLD relative to that level's, ``typical``: the
    geometric mean of the chunks' own ratios; ``same_top``: the difference of the shares of tokens with the source's top token.
    ``refined``: tensors that are refined because error feedback could not round them. ``held_out``: the level compared with the
    measured stock levels.
    """

    kind: Rounding
    stock: str = ""
    ratio: Estimate | None = None
    typical: float | None = None
    same_top: float | None = None
    refined: tuple[str, ...] = ()
    held_out: MixVerdict | None = None


@dataclass(frozen=True)
class KeptStock:
    """What was asked for, and the stock level that was kept, because no mix, or no other rounding, was better by two standard
    errors."""

    target: str
    stock: str


@dataclass(frozen=True)
class ReportSpeed:
    """How fast a file runs, in tokens per second of a prompt and of generation; ``buffers``: the memory that llama.cpp
    allocates for it."""

    prompt: TokenRate
    generation: TokenRate
    buffers: tuple[MemoryBuffer, ...] = ()

    @property
    def n_bytes(self) -> int:
        return sum(buffer.n_bytes for buffer in self.buffers)


@dataclass(frozen=True)
class ReportLevel:
    """One finished level. ``seconds``: time to make it; for a level made in a single pass the time of the whole pass, of whose
    work ``pass_share`` was this level's. ``measured`` is None if the level was not measured.

    ``ppl_ratio``: its perplexity divided by the source's own; ``measured.ratio`` is llama-perplexity's, whose reference file
    keeps no probability below e^-16.

    ``is_source``: no tensor's type differs from the source's. ``same_as``: the level whose file holds the same tensors, and in
    whose row this one is shown; ``others``: the levels that are shown in this one's row. ``mix``: how its types were chosen;
    None for a stock level. ``rounding``: of its numbers; None for llama-quantize's. ``speed``: None if it was not timed.
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
    mix: ReportMix | None = None
    rounding: ReportRounding | None = None
    speed: ReportSpeed | None = None

    @property
    def against(self) -> ReportMix | ReportRounding | None:
        """What it is compared with stock by: its types, else its rounding; None for a stock level."""
        return self.mix or self.rounding

    @property
    def own_seconds(self) -> float:
        """Seconds for this level alone; of a single pass, its share."""
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
    """How tokens were distributed over one tensor's experts (:class:`~imatrix_runner.imatrix.statistics.ExpertStatistics`)."""

    layer: int | None
    kind: str
    experts: int
    without_tokens: int
    fewest: int
    median: float
    most: int


@dataclass(frozen=True)
class ReportTensorCost:
    """What rounding one tensor costs, in nats; ``measured`` in this tensor, else taken from others of its kind."""

    layer: int | None
    kind: str
    cost: float
    measured: bool = True


@dataclass(frozen=True)
class ReportCosts:
    """What rounding each tensor with the relative error ``relative_error`` costs, measured on chunks of ``chunk_size`` tokens
    of the calibration text ``text``."""

    text: str
    sha256: str
    chunk_size: int
    relative_error: float
    tensors: tuple[ReportTensorCost, ...]


@dataclass(frozen=True)
class ReportCurvePoint:
    """Estimated error after ``chunks`` chunks: ``worst`` that of ``tensor``, which has the largest; ``median`` over tensors."""

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
    """The text that an imatrix was collected from; ``manifest``: the fingerprint of a text made by ``calibration build``."""

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
    published one: ``repo@commit:file``, and ``repo`` its repository.
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
    repo: str = ""


@dataclass(frozen=True)
class WithoutBaseline:
    """A level without a baseline; ``why`` completes a sentence that begins with its name."""

    level: str
    why: str


@dataclass(frozen=True)
class ReportStep:
    """One step of how the files were made: the command that reproduces it (may be empty), and how long it took."""

    what: str
    seconds: float
    finished: str
    command: str = ""


@dataclass(frozen=True)
class Report:
    """The report of one workspace. ``made``: ISO 8601 in UTC; ``command``: the line that was typed; ``toolchain``: the engine's
    identity.

    ``caveats``: sentences without which the figures would mislead, shown wherever the figures are. ``quantized_by``: the maker
    of these files, as the model card names them; ``repo``: the hub id in the card's commands, where the files are or will be.
    Both are empty if not given. ``others``: files that were not made here. ``without_twin``: levels without a baseline.
    ``kept_stock``: targets for which no mix was better than a stock level; ``costs``: those from which the types of mixes were
    chosen; ``speed_setting``: what all speeds hold for, ``source_speed``: the source's.
    """

    model: ReportModel
    levels: tuple[ReportLevel, ...]
    made: str
    program: str
    command: str = ""
    toolchain: str = ""
    imatrix: ReportImatrix | None = None
    kept_stock: tuple[KeptStock, ...] = ()
    costs: ReportCosts | None = None
    evaluation: ReportEvaluation | None = None
    comparisons: tuple[Comparison, ...] = ()
    without_twin: tuple[WithoutBaseline, ...] = ()
    others: tuple[OtherMeasured, ...] = ()
    domain: tuple[DomainResult, ...] = ()
    tasks: tuple[TaskScores, ...] = ()
    picks: tuple[Pick, ...] = ()
    caveats: tuple[str, ...] = ()
    steps: tuple[ReportStep, ...] = ()
    quantized_by: str = ""
    repo: str = ""
    speed_setting: SpeedSetting | None = None
    source_speed: ReportSpeed | None = None
    schema: Literal["imatrix-runner/report"] = SCHEMA
    version: Literal[1] = VERSION

    @property
    def rows(self) -> tuple[ReportLevel, ...]:
        """The levels that tables and charts show: one of those that hold the same tensors."""
        names = {level.name for level in self.levels}
        return tuple(level for level in self.levels if level.same_as not in names - {level.name})


MOST_BYTES = 64 << 20
"""Largest report that is read: ten times the size of one with 512 tensors, 40 levels and 10,000 answers."""


class _Envelope(msgspec.Struct, frozen=True):
    """The fields that identify a report of any version."""

    schema: str = ""
    version: int = 0


def encode_report(report: Report) -> bytes:
    """The report as JSON, indented by two, with a final newline; fractions as keys become strings."""
    return msgspec.json.format(encode_json(report), indent=2) + b"\n"


def read_report(path: Path) -> Report:
    """Read a report. Unknown keys, which later versions may write, are ignored.

    Raises :class:`InvalidDataError` if the file is not a report, is of another version, or is damaged.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _bad(path, f"it is larger than {MOST_BYTES >> 20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise from_os_error(error, "reading the report", path) from error
    try:
        envelope = from_json(content, _Envelope)
        if envelope.schema != SCHEMA:
            raise _bad(path, f"its schema is {printable(envelope.schema)[:80]!r}, not {SCHEMA}")
        if envelope.version != VERSION:
            raise _bad(path, f"it is of version {envelope.version}; this program reads version {VERSION}")
        return from_json(content, Report)
    except UnreadableError as error:
        raise _bad(path, printable(str(error))[:300]) from error


def _bad(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(f"{path} cannot be read as a report", why, "Make it again with: imatrix-runner report WORKSPACE")


def source_kind(model: ReportModel) -> str:
    """The kind of source that figures are measured against: ``BF16``, ``quantised Q8_0``, ``dequantised fp8``."""
    if model.dequantised:
        return safe_text.shown(f"dequantised {model.dequantised}")
    return safe_text.shown(f"quantised {model.quantised}" if model.quantised else model.type)
