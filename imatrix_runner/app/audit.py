"""``audit``: whether a file's bytes are those that llama-quantize makes of its source, and statements about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from imatrix_runner.audit.attestation import (
    AttestedFile,
    BuildIdentity,
    HashedFile,
    SayableRecipe,
    Statement,
    make_statement,
    read_statement,
    refuted,
    require_files,
    write_statement,
)
from imatrix_runner.audit.audit_file import Audit, Auditor, with_metadata
from imatrix_runner.audit.matrix_candidates import FoundMatrix, find_matrices
from imatrix_runner.audit.metadata_comparison import (
    MetadataFinding,
    compare_metadata,
    declared_making,
    template_differs,
)
from imatrix_runner.audit.rederive import Rederiver, named_matrix
from imatrix_runner.context.context import Context, Session
from imatrix_runner.context.engine_choice import Machine, make_embedded
from imatrix_runner.context.open_model import open_source
from imatrix_runner.context.ownership import find_workspace
from imatrix_runner.context.requests import EnvironmentRequest, SourceRequest
from imatrix_runner.engines.abilities import TensorAuditor
from imatrix_runner.engines.contract import Engine
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.events import Finished, Started
from imatrix_runner.files import sha256
from imatrix_runner.journal import Journal
from imatrix_runner.models.model import LocalFile, Model, open_gguf, parse_source
from imatrix_runner.process import Runner
from imatrix_runner.publish.template_check import check_template
from imatrix_runner.workspace import Workspace

STEP = "audit"


class AuditingEngine(Engine, TensorAuditor, Protocol):
    """An engine that compares tensors and makes levels."""


@dataclass(frozen=True)
class AuditRequest:
    """``file``: the quantised GGUF, or the first of its shards; ``imatrix``: the matrix that it should be made with.

    ``attest``: where a statement goes, once it is proven; ``attestation``: a statement to check.
    """

    file: Path
    source: SourceRequest
    environment: EnvironmentRequest = field(default_factory=EnvironmentRequest)
    imatrix: Path | None = None
    full: bool = False
    attest: Path | None = None
    attestation: Path | None = None
    threads: int | None = None
    kernels: bool = True


@dataclass(frozen=True)
class AuditResult:
    """The audit; ``attested``: where the statement was written; ``proven``: the given statement was proven."""

    audit: Audit
    attested: Path | None = None
    proven: Statement | None = None


def audit_file(request: AuditRequest, context: Context) -> AuditResult:
    """Audit a file. Writes nothing but the statement that was asked for.

    Raises :class:`InvalidDataError` for a file that cannot be compared with the source, and for a statement that is refused.
    """
    began = time.monotonic()
    statement = read_statement(request.attestation) if request.attestation is not None else None
    machine, runner = Machine(request.environment.llama_cpp), context.runner(request.environment)
    engine = make_embedded(machine, runner, "An audit")
    file = open_gguf(request.file.expanduser().absolute(), allow_requantize=True)
    source, workspace = _source(request, context, machine, engine, runner)
    if {path.resolve() for path in file.files} & {path.resolve() for path in source.files}:
        raise UsageError(
            f"{file.path.name} is its own source",
            "the file and --source are the same",
            "Name the F32, F16 or BF16 model that it was made from with --source.",
        )
    declared = declared_making(file.header)
    names = {kind.number: kind.name for kind in engine.types if kind.number is not None and not kind.alias_of}
    findings = list(compare_metadata(file, source, names))
    given = request.imatrix.expanduser().absolute() if request.imatrix is not None else None
    matrices = find_matrices(given, declared, file, source, workspace, context.sink)
    covariances = workspace.covariances if workspace is not None and workspace.covariances.is_dir() else None
    context.sink(Started(STEP, file.path.name, None, "weights"))
    auditor = Auditor(
        engine,
        file,
        source,
        declared,
        matrices,
        context.sink,
        given is not None,
        covariances,
        request.threads,
        None,
        request.kernels,
    )
    found = auditor.run(full=request.full)
    findings += _template(file, source, runner)
    if declared.has_imatrix and found.made_with is None and found.verdict == "another quantiser":
        name = declared.imatrix or "one without a name"
        what = f"it says that it was made with the imatrix {name}, which is not among the candidates: give it with --imatrix"
        findings.append(MetadataFinding("imatrix", what, False))
    audit = with_metadata(found, findings, time.monotonic() - began)
    context.sink(Finished(STEP, "done", audit.verdict, audit.seconds))
    statements = _Statements(audit, engine, context, request)
    if statement is not None and request.attestation is not None:
        statements.check(statement, request.attestation)
    attested = statements.write(request.attest) if request.attest is not None else None
    return AuditResult(audit, attested, statement)


def _source(
    request: AuditRequest, context: Context, machine: Machine, engine: Engine, runner: Runner
) -> tuple[Model, Workspace | None]:
    """The source, and its workspace if there is one; nothing is downloaded, converted or written."""
    wanted = request.source.model
    source = parse_source(wanted)
    workspace = find_workspace(source, wanted, request.environment.work_dir, context.sink, context.stop)
    known = workspace if workspace.root.is_dir() else None
    if isinstance(source, LocalFile):
        return open_gguf(source.path.absolute(), allow_requantize=False), known
    session = Session(workspace, Journal(workspace.journal), machine, engine, runner, context.sink, dry_run=True)
    return open_source(source, request.source, session, allow_requantize=False), known


def _template(file: Model, source: Model, runner: Runner) -> Iterator[MetadataFinding]:
    """Differences in the chat template, by what it renders."""
    if not template_differs(file, source):
        return
    checked = check_template(file.path, source.path, runner)
    serious = [each for each in checked.findings if each.kind in ("broken", "difference")]
    for each in serious:
        yield MetadataFinding("chat template", each.sentence().rstrip("."), True)
    if not serious:
        yield MetadataFinding("chat template", "its text is not the source's, and it renders the same prompts", False)


@dataclass(frozen=True)
class _Statements:
    """Writes and checks statements about the audited file, by making it again."""

    audit: Audit
    engine: AuditingEngine
    context: Context
    request: AuditRequest

    def check(self, statement: Statement, path: Path) -> None:
        """Raise :class:`InvalidDataError` unless everything that a statement says is so."""
        recipe = statement.recipe
        file, source = self._hashed(self.audit.file), self._hashed(self.audit.source)
        matrix = self._matrix_of(recipe.imatrix.sha256) if recipe.imatrix is not None else None
        wanted: dict[str, tuple[AttestedFile, HashedFile | None]] = {}
        wanted["the file"], wanted["the source"] = (statement.file, file), (statement.source, source)
        if recipe.imatrix is not None:
            here = HashedFile(matrix.name, matrix.sha256, matrix.path.stat().st_size) if matrix is not None else None
            wanted["the imatrix"] = (recipe.imatrix, here)
        require_files(path, wanted)
        again = SayableRecipe(recipe.quant_type, recipe.token_embedding_type or "", recipe.output_tensor_type or "")
        if again.ftype.upper() not in {kind.name.upper() for kind in self.engine.types}:
            raise refuted(path, statement, "no file: this llama.cpp has no such type")
        name = recipe.imatrix.name if recipe.imatrix is not None else ""
        with self._made(again, matrix, name) as made:
            if (got := sha256(made)) != statement.file.sha256:
                raise refuted(path, statement, got)

    def write(self, out: Path) -> Path:
        """Prove that the file is what its recipe gives, and write the statement. Raises :class:`InvalidDataError`."""
        if self.audit.exit_code or self.audit.declared.rounding != "stock":
            raise _not_attested(self.audit.file, f"the audit's verdict is: {self.audit.verdict}")
        file, source = self._hashed(self.audit.file), self._hashed(self.audit.source)
        matrix = self.audit.made_with if self.audit.declared.has_imatrix else None
        declared = self.audit.declared.imatrix
        if matrix is None and self.audit.declared.has_imatrix:
            raise _not_attested(self.audit.file, f"its imatrix ({declared}) is not here")
        if "/" in declared or "\\" in declared:
            raise _not_attested(
                self.audit.file, f"its metadata names the imatrix by a path ({declared}), which is part of its bytes"
            )
        recipe = self._rederiver.find_recipe(self.audit.file, matrix.path if matrix is not None else None)
        with self._made(recipe, matrix, declared) as made:
            if sha256(made) != file.sha256:
                raise _not_attested(self.audit.file, "made again, its tensors are equal and its metadata is not")
        said = HashedFile(declared, matrix.sha256, matrix.path.stat().st_size) if matrix is not None else None
        write_statement(out, make_statement(file, source, recipe, said, build_identity(self.engine)))
        return out

    @contextmanager
    def _made(self, recipe: SayableRecipe, matrix: FoundMatrix | None, name: str) -> Iterator[Path]:
        path = matrix.path if matrix is not None else None
        with (
            named_matrix(path, name, self._folder) as imatrix,
            self._rederiver.make(recipe, imatrix, self.audit.file.path.name, self.audit.file.n_bytes) as made,
        ):
            yield made

    @property
    def _folder(self) -> Path:
        """Where the file is made again: next to where the statement goes, else next to the file."""
        return (self.request.attest or self.audit.file.path).absolute().parent

    @property
    def _rederiver(self) -> Rederiver:
        return Rederiver(self.engine, self.audit.source, self._folder, self.context.sink, self.request.threads)

    def _hashed(self, model: Model) -> HashedFile:
        if model.is_split:
            raise _not_attested(model, "it is split into shards, and a statement is about one file")
        digest = sha256(model.path, lambda _bytes: self.context.stop.check())
        return HashedFile(model.path.name, digest, model.n_bytes)

    def _matrix_of(self, digest: str) -> FoundMatrix | None:
        return next((matrix for matrix in self.audit.matrices if matrix.sha256 == digest), None)


def build_identity(engine: AuditingEngine) -> BuildIdentity:
    """What computes here."""
    return BuildIdentity(engine.identity(), engine.libraries_digest, engine.fp_contract())


def _not_attested(file: Model, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{file.path.name} is not attested",
        why,
        "An attestation says that anybody can make these very bytes; run the audit without --attest to see what differs.",
    )
