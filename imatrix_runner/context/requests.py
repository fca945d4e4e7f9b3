"""The user's requests as frozen values, made by the command line or any other caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imatrix_runner.cluster.cluster_options import ClusterOptions
from imatrix_runner.engines.jobs import CollectOptions, QuantizeOptions
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.fingerprints import counted_apart, harmless, spelt
from imatrix_runner.models.hub import WatchedPlace

OutType = Literal["auto", "f16", "bf16", "f32"]

DEFAULT_TOLERANCE = 0.05
"""``--until-converged`` without a number: in every tensor at most an estimated 5 % of the importance is in wrong columns.

On the demo model (``scripts/bench convergence``) stopping at 0.2 cost up to 2.7 % of divergence and at 0.1 nothing measurable;
this is half of that.
"""

DEFAULT_FEEDBACK_TOKENS = 1 << 16
"""``--feedback-tokens``."""

MODES = ("auto", "there", "none", "generate", "published")
"""The values of ``ImatrixRequest.mode`` other than a file's path."""


@dataclass(frozen=True)
class ImatrixRequest:
    """``mode``: ``auto`` (the one in the workspace, else for a hub's model a published one, else generate), ``there`` (the one
    in the workspace, else none), ``published``, ``generate``, ``none``, or a file's path.

    ``text`` None means the shipped calibration text. ``chunks`` limits, ``first_chunk`` skips;
    ``output_frequency`` None lets the size of ranges follow from the model; ``save_frequency`` 0 leaves no snapshots.
    ``until_converged``: the tolerance (:mod:`imatrix_runner.imatrix.convergence`) below which it stops before that;
    ``min_expert_tokens``: after that it continues until every expert saw that many tokens, or the text ends (0: it does not
    continue). ``parse_as_built``: a text that was built with a chat template has its special tokens parsed, whatever
    ``options`` says. ``typed``: options given by hand that only matter where an imatrix is generated. ``part_of``: the file
    that the user named, where ``text`` is what was left of it after a part was set aside.
    """

    mode: str = field(default="auto", metadata=harmless("whether a matrix is made does not change the one that is made"))
    text: Path | None = field(default=None, metadata=counted_apart("the input 'calibration text'"))
    options: CollectOptions = field(default_factory=CollectOptions, metadata=counted_apart("the input 'options'"))
    chunks: int | None = field(default=None, metadata=counted_apart("the first words of the input 'chunks'"))
    first_chunk: int = field(default=0, metadata=counted_apart("the first words of the input 'chunks'"))
    output_frequency: int | None = field(default=None, metadata=spelt("--output-frequency"))
    save_frequency: int = field(default=0, metadata=spelt("--save-frequency"))
    until_converged: float | None = field(default=None, metadata=spelt("--until-converged", form="{:g}"))
    min_expert_tokens: int = field(default=0, metadata=spelt("--min-expert-tokens"))
    out: Path | None = field(default=None, metadata=harmless("the place of a file does not change its sums"))
    parse_as_built: bool = field(default=True, metadata=counted_apart("the option that it decides, parse_special"))
    typed: tuple[str, ...] = field(default=(), metadata=harmless("only for warnings"))
    part_of: Path | None = field(default=None, metadata=harmless("only for warnings"))


@dataclass(frozen=True)
class MixRequest:
    """How the types of mixes are chosen. ``types``: families and types that they may use (empty: all); ``quality`` ``high``
    measures more types of each tensor, near the solution."""

    types: str = ""
    quality: Literal["normal", "high"] = "normal"


@dataclass(frozen=True)
class LevelsRequest:
    """Which levels (by name, or a preset; both empty: the default set) and how. Names may be those of mixes
    (:mod:`imatrix_runner.mixes.targets`), chosen as ``mix`` says. ``uncovered``: what becomes of tensors for which the imatrix
    has no data (``fail``, ``keep``, or a type). ``one_by_one``: each level has its name before the next is
    begun, so that the disk need not hold all half files at once. ``verify``: names, types and sizes, or every row too.
    ``kernels``: this program's where they are proven to give ggml's bytes, or only ggml's. ``rounding``: of every level that
    does not name its own; ``feedback_tokens``: of the calibration text, for the covariances that error feedback needs."""

    names: tuple[str, ...] = ()
    preset: str = ""
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    jobs: int | None = None
    threads: int | None = None
    uncovered: str = "fail"
    one_by_one: bool = False
    verify: Literal["header", "full"] = "header"
    kernels: Literal["auto", "ggml"] = "auto"
    mix: MixRequest = field(default_factory=MixRequest)
    rounding: Rounding = STOCK
    feedback_tokens: int = DEFAULT_FEEDBACK_TOKENS


@dataclass(frozen=True)
class SpeedRequest:
    """``--speed``: each test is repeated ``repetitions`` times with ``depth`` tokens in the context before. ``least``: tokens/s
    of generation that the picked level reaches."""

    depth: int = 0
    repetitions: int = 5
    least: float | None = None


@dataclass(frozen=True)
class MeasureRequest:
    """What is measured and how. ``levels`` empty: all that are there. ``text`` None means the shipped held-out text; of its
    chunks the first ``chunks``, all without; with ``until_precise`` each level on as many as make the standard error of its KLD
    less than this share of it. ``max_disk``: bytes that files of the measurement may take at once. ``base``: a
    file of log-probabilities to compare with, in place of text and source. ``again``: known figures are measured again.

    ``baselines``: each level is compared with one made without imatrix. ``domain``: a file of prompts that source and levels
    answer, in ``n_predict`` tokens at most, written with ``chat_template`` (None: the model's own). ``tasks``: names of tasks
    that both are scored on, ``task_limit``: the first items of each (None: all), ``allow_code``: programs that models write for
    them may be run. ``target_kld`` (nats) and ``target_size`` (bytes) decide which level is picked. ``speed``: source and
    levels are timed, too.
    """

    levels: tuple[str, ...] = ()
    text: Path | None = None
    options: CollectOptions = field(default_factory=CollectOptions)
    chunks: int | None = None
    until_precise: float | None = None
    max_disk: int | None = None
    base: Path | None = None
    again: bool = False
    baselines: bool = False
    domain: Path | None = None
    n_predict: int = 128
    chat_template: Path | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    allow_code: bool = False
    target_kld: float | None = None
    target_size: int | None = None
    speed: SpeedRequest | None = None


@dataclass(frozen=True)
class SourceRequest:
    """The model as named by the user, and how to convert it to GGUF if needed.

    ``typed``: options given by hand that only matter where a model is converted. ``cache``: where a hub's files are downloaded
    to (None: the hub's own cache).
    """

    model: str
    outtype: OutType = "auto"
    mmproj: bool = False
    trust_remote_code: bool = False
    typed: tuple[str, ...] = ()
    cache: Path | None = None


@dataclass(frozen=True)
class EnvironmentRequest:
    """Where to work and with what. ``hang_seconds`` 0 never ends a silent child; ``command`` is the typed line, shown to others
    while the workspace is held or unfinished; ``force`` takes over the workspace of another source. ``cluster``: where long
    work is spread to."""

    work_dir: Path = Path("work")
    engine: str = "auto"
    llama_cpp: Path | None = None
    hang_seconds: float = 600.0
    command: str = ""
    force: bool = False
    cluster: ClusterOptions | None = None


@dataclass(frozen=True)
class PublishRequest:
    """``publish``. ``model``: a model as for ``run``, or a workspace; ``to``: the repository (``ORG/NAME``).

    ``private`` and ``gated`` are of a repository that is made here; an existing one is gated if asked for, and is never made
    more public. ``licence``: as the hub names it (empty: the source's). ``collection``: a slug, or ``OWNER/TITLE``. ``levels``
    empty: all that are there. ``name_template``: of the published files of levels.
    """

    model: str
    to: str
    environment: EnvironmentRequest = field(default_factory=EnvironmentRequest)
    private: bool = False
    gated: Literal["", "auto", "manual"] = ""
    licence: str = ""
    collection: str = ""
    levels: tuple[str, ...] = ()
    name_template: str = "{model}-{level}"


@dataclass(frozen=True)
class RunRequest:
    """``run`` and ``quantize`` (with ``levels``), or ``imatrix generate`` (without). ``measure``: what comes after;
    ``warnings``: what can be said of the options before anything is opened. ``publish``: where levels are uploaded as they are
    finished; its ``levels`` do not count. ``attest``: leave a statement next to each level."""

    source: SourceRequest
    environment: EnvironmentRequest
    imatrix: ImatrixRequest
    levels: LevelsRequest | None
    measure: MeasureRequest | None = None
    warnings: tuple[str, ...] = ()
    publish: PublishRequest | None = None
    attest: bool = False


@dataclass(frozen=True)
class EvaluateRequest:
    """``evaluate``; ``making`` is how levels were made, for their baselines; ``warnings`` as for :class:`RunRequest`."""

    source: SourceRequest
    environment: EnvironmentRequest
    measure: MeasureRequest
    making: LevelsRequest
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompareRequest:
    """``compare``. ``files``: paths, or ``org/name[@revision][:file.gguf or label]`` on a hub, to compare with levels of the
    source's workspace and with each other. ``keep``: what is fetched stays in the hub's cache; otherwise it is removed when it
    was measured."""

    source: SourceRequest
    environment: EnvironmentRequest
    measure: MeasureRequest
    files: tuple[str, ...]
    keep: bool = False


@dataclass(frozen=True)
class WatchRequest:
    """``batch run --watch``. ``places``: where models appear; they are looked at every ``every`` seconds, for ``lasts`` seconds
    (None: until the command is stopped; 0: once). A look adds ``most`` models at most. Filters: ``most_params``, number of
    weights; ``architectures`` and ``licences``, names of which one must be announced; ``since``: a date, ``YYYY-MM-DD``, before
    which nothing was created (empty: of an owner's models those that appear after the first look)."""

    places: tuple[WatchedPlace, ...]
    every: float = 1800.0
    lasts: float | None = None
    most: int = 5
    most_params: int | None = None
    architectures: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    since: str = ""


@dataclass(frozen=True)
class BatchRequest:
    """``batch run``. ``file``: the list of models; ``keep``: what stays on the disk; ``max_disk``: bytes that downloads,
    sources and levels may take together (None: what is free). ``notify``: addresses to send ends and failures to; ``watch``:
    where new models are looked for. ``lanes``: models that are computed at a time: one, or with ``environment.cluster`` one for
    each of its workers."""

    file: Path
    environment: EnvironmentRequest
    keep: Literal["all", "levels", "nothing"] = "all"
    max_disk: int | None = None
    notify: tuple[str, ...] = ()
    trust_remote_code: bool = False
    watch: WatchRequest | None = None
    lanes: int = 1
