"""Audits a file: sampled rows of every tensor first, then, if all are wanted, each tensor with what explained its sample."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from imatrix_runner.audit.matrix_candidates import FoundMatrix
from imatrix_runner.audit.metadata_comparison import DeclaredMaking, MetadataFinding, not_of_this_source
from imatrix_runner.audit.verdicts import (
    ORDER,
    AuditedTensor,
    TensorVerdict,
    choose_matrix,
    counted_verdicts,
    tensor_verdict,
)
from imatrix_runner.engines.abilities import TensorAuditor
from imatrix_runner.engines.audit_jobs import SAMPLE, WITHOUT, AuditCandidate, AuditJob, AuditTensor, TensorFindings
from imatrix_runner.engines.files.covariance_file import stored_covariances
from imatrix_runner.engines.roundings import FEEDBACK, REFINED, STOCK, rounding_of
from imatrix_runner.errors import InvalidDataError, SomeLevelsFailedError
from imatrix_runner.events import Sink
from imatrix_runner.models.model import Model

STEP = "audit"


@dataclass(frozen=True)
class Audit:
    """What an audit found. ``matrix``: the place in ``matrices`` of the one that explains the file (WITHOUT: made without);
    ``full``: every row was looked at. ``metadata``: differences, those of the rendered chat template among them."""

    file: Model
    source: Model
    declared: DeclaredMaking
    matrices: tuple[FoundMatrix, ...]
    matrix: int
    tensors: tuple[AuditedTensor, ...]
    full: bool
    metadata: tuple[MetadataFinding, ...] = ()
    seconds: float = 0.0

    @property
    def made_with(self) -> FoundMatrix | None:
        return self.matrices[self.matrix] if self.matrix != WITHOUT else None

    @property
    def counts(self) -> Mapping[TensorVerdict, int]:
        return counted_verdicts(self.tensors)

    @property
    def verdict(self) -> TensorVerdict:
        """The file's verdict: the worst of its tensors'; tensors that its metadata declares to be made without the imatrix are
        as they should be."""
        worst: TensorVerdict = max((tensor.verdict for tensor in self.tensors), key=ORDER.index, default="identical")
        some = any(tensor.matrix == self.matrix for tensor in self.tensors if tensor.verdict == "identical")
        return "identical" if worst == "identical without imatrix" and some and self.is_declared else worst

    @property
    def is_declared(self) -> bool:
        """Whether the tensors that were made without an imatrix are those that the metadata declares."""
        without = [tensor.name for tensor in self.tensors if tensor.verdict == "identical without imatrix"]
        if not without or not self.declared.has_imatrix:
            return True
        if self.made_with is None or self.declared.entries is None:
            return False
        left_out = sum(name in self.made_with.entries for name in without)
        return self.declared.entries <= len(self.made_with.entries) - left_out

    @property
    def share(self) -> float:
        """The share of the file's weights that was looked at."""
        total = sum(tensor.findings.n_elements for tensor in self.tensors)
        looked = sum(
            tensor.findings.n_elements * tensor.findings.rows / max(1, tensor.findings.n_rows) for tensor in self.tensors
        )
        return looked / total if total else 1.0

    @property
    def exit_code(self) -> int:
        """0: as declared; 6: damaged, or of another source; 100: something differs."""
        if self.verdict in ("damaged", "another source"):
            return InvalidDataError.exit_code
        as_declared = self.verdict == "identical" or (self.verdict == "identical without imatrix" and self.is_declared)
        return 0 if as_declared and not any(each.serious for each in self.metadata) else SomeLevelsFailedError.exit_code


@dataclass(frozen=True)
class Auditor:
    """Audits one file. ``given``: the user named the first of ``matrices``, so that the file is judged by that one.
    ``covariances``: the folder of those of the workspace, if there is one."""

    engine: TensorAuditor
    file: Model
    source: Model
    declared: DeclaredMaking
    matrices: tuple[FoundMatrix, ...]
    sink: Sink = field(repr=False)
    given: bool = False
    covariances: Path | None = None
    threads: int | None = None
    log: Path | None = None
    kernels: bool = True

    def run(self, *, full: bool) -> Audit:
        """Raises :class:`InvalidDataError` if nothing of the file is of the source."""
        comparable, others = self._pairs()
        sampled = self._compare([AuditTensor(name, self._candidates(name)) for name in comparable], SAMPLE)
        order = (*range(len(self.matrices)), WITHOUT) if self.declared.has_imatrix else (WITHOUT, *range(len(self.matrices)))
        matrix = 0 if self.given else choose_matrix(sampled, order)
        found = self._all_rows(sampled, matrix) if full else sampled
        verdicts = [tensor_verdict(each, matrix, self.declared.rounding) for each in found]
        return Audit(self.file, self.source, self.declared, self.matrices, matrix, (*verdicts, *others), full)

    def _pairs(self) -> tuple[list[str], list[AuditedTensor]]:
        """The tensors of the file that the source has, too; and verdicts on those that only one has."""
        own = {tensor.name: tensor for tensor in self.file.tensors}
        other = {tensor.name: tensor for tensor in self.source.tensors}
        comparable, others = [], []
        for name, tensor in own.items():
            wanted = other.get(name)
            unknown = tensor.n_bytes is None or (wanted is not None and wanted.n_bytes is None)
            if wanted is not None and wanted.shape == tensor.shape and not unknown:
                comparable.append(name)
                continue
            why = (
                f"its shape is {list(tensor.shape)}, the source's {list(wanted.shape)}"
                if wanted
                else "the source has no such tensor"
            )
            why = f"its type, {tensor.type_name}, is not known here" if wanted and wanted.shape == tensor.shape else why
            nothing = TensorFindings(
                name, tensor.type_name, wanted.type_name if wanted else "", 0, 0, tensor.n_elements, False, 0, ()
            )
            others.append(AuditedTensor(nothing, "another quantiser" if unknown and wanted else "another source", why))
        for name, tensor in other.items():
            if name not in own:
                nothing = TensorFindings(name, "", tensor.type_name, 0, 0, tensor.n_elements, False, 0, ())
                others.append(AuditedTensor(nothing, "another source", "the file has no such tensor"))
        if not comparable:
            raise not_of_this_source(self.file, self.source, "no tensor has the same name and shape in both")
        return comparable, others

    def _candidates(self, name: str) -> tuple[AuditCandidate, ...]:
        """Every way in which a tensor may have been made: with each matrix and without, rounded as declared or as stock."""
        roundings = [STOCK]
        if self.declared.rounding != STOCK:
            kind = self._types[name]
            declared = rounding_of(kind, self.declared.rounding, has_covariance=name in self._covered)
            others = [declared, rounding_of(kind, REFINED, has_covariance=False)]
            roundings = list(dict.fromkeys((*others, STOCK)))
        places = (*range(len(self.matrices)), WITHOUT)
        return tuple(AuditCandidate(place, rounding) for rounding in roundings for place in places)

    @cached_property
    def _types(self) -> Mapping[str, str]:
        return {tensor.name: tensor.type_name for tensor in self.file.tensors}

    @cached_property
    def _covered(self) -> frozenset[str]:
        if self.declared.rounding != FEEDBACK or self.covariances is None:
            return frozenset()
        return frozenset(stored_covariances(self.covariances))

    def _all_rows(self, sampled: Sequence[TensorFindings], matrix: int) -> tuple[TensorFindings, ...]:
        """Compare all rows of every tensor with what explained its sample; where nothing did, with the supposed matrix."""
        wanted = []
        for found in sampled:
            same = [each.candidate for each in found.candidates if each.equal_rows == found.rows]
            near = sorted(found.candidates, key=lambda each: (-each.equal_rows, each.candidate.matrix != matrix))
            candidates = tuple(same) or tuple(each.candidate for each in near[:1]) or self._candidates(found.name)
            wanted.append(AuditTensor(found.name, candidates))
        known = {each.name: each for each in sampled if each.rows == each.n_rows}
        left = [each for each in wanted if each.name not in known]
        whole = known | {each.name: each for each in (self._compare(left, None) if left else ())}
        return tuple(whole[each.name] for each in wanted)

    def _compare(self, tensors: Sequence[AuditTensor], sample: int | None) -> tuple[TensorFindings, ...]:
        job = AuditJob(
            STEP,
            self.source.files,
            self.file.files,
            tuple(tensors),
            tuple(matrix.path for matrix in self.matrices),
            self._seed,
            sample,
            self.threads,
            self.log,
            self.covariances if self.declared.rounding == FEEDBACK and self._covered else None,
            self.kernels,
        )
        return self.engine.audit_tensors(job, self.sink)

    @property
    def _seed(self) -> int:
        """Follows from the file, so that every audit of it looks at the same rows."""
        header = self.file.header
        with header.path.open("rb") as handle:
            return int.from_bytes(hashlib.sha256(handle.read(min(header.data_offset, 1 << 20))).digest()[:4], "little")


def with_metadata(audit: Audit, findings: Sequence[MetadataFinding], seconds: float) -> Audit:
    return replace(audit, metadata=tuple(findings), seconds=seconds)
