"""Preflight check of an imatrix: what it covers of a model, and what may come as a surprise.

It states facts about the two files only; the recipe of each level (:mod:`imatrix_runner.quantize`) says what they mean for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imatrix_runner.imatrix.matrix import TOKEN_EMBEDDINGS, Matrix, MatrixEntry

Severity = Literal["error", "warning", "info"]

FEW_TOKENS = 64
"""An expert that saw fewer tokens than this has noisy weights: its mean square has a relative error above 1/sqrt(64/2)."""

_BLOCK = re.compile(r"^blk\.(\d+)\.")
# Never quantised, whatever they are called elsewhere: llama.cpp src/llama-quant.cpp, tensor_allows_quantization().
_NOT_QUANTISED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight|^position_embd\.weight|^token_types\.weight"
    r"|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
)
_NO_ACTIVATIONS = (*TOKEN_EMBEDDINGS, "output.weight")
_FEW_NAMES = 3


@dataclass(frozen=True)
class Finding:
    """One finding: its severity, a kind for programs, a sentence for people, and the tensors it concerns."""

    severity: Severity
    kind: str
    text: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertCoverage:
    """How many tokens the experts of one tensor saw: ``unseen`` saw none, ``few`` fewer than :data:`FEW_TOKENS`."""

    tensor: str
    n_experts: int
    unseen: tuple[int, ...]
    few: tuple[int, ...]
    fewest: int
    median: float


@dataclass(frozen=True)
class Coverage:
    """All findings, worst first, and the expert coverage of every mixture tensor."""

    findings: tuple[Finding, ...]
    experts: tuple[ExpertCoverage, ...]

    @property
    def usable(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)


def examine(matrix: Matrix, shapes: Mapping[str, tuple[int, ...]]) -> Coverage:
    """Compare a matrix with a model's tensors (name -> shape in ggml order, ne0 first)."""
    findings = [*_names(matrix, shapes), *_sizes(matrix, shapes), *_values(matrix), *_origin(matrix)]
    experts = tuple(_experts(name, matrix) for name in matrix.entries if matrix.shape(name)[0] > 1)
    findings += _untouched(experts)
    order = {"error": 0, "warning": 1, "info": 2}
    return Coverage(tuple(sorted(findings, key=lambda finding: order[finding.severity])), experts)


def wants_weights(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one that llama-imatrix collects and llama-quantize quantises."""
    quantised = len(shape) > 1 and name.endswith("weight") and _NOT_QUANTISED.search(name) is None
    return quantised and name not in _NO_ACTIVATIONS


def _names(matrix: Matrix, shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    wanted = {name for name, shape in shapes.items() if wants_weights(name, shape)}
    missing = sorted(wanted - set(matrix.entries))
    extra = sorted(set(matrix.entries) - set(shapes))
    findings: list[Finding] = []
    if not wanted & set(matrix.entries):
        return [Finding("error", "other-model", "none of its entries names a tensor of this model", tuple(extra))]
    bare = _bare_blocks(wanted, missing)
    if bare:
        named = ", ".join(map(str, bare))
        text = f"block{'s' if len(bare) > 1 else ''} {named} without any data"
        if any(".nextn." in name and _block(name) in bare for name in shapes):
            text += ": MTP / NextN layers are never run while collecting"
        findings.append(Finding("warning", "block-without-data", text, tuple(n for n in missing if _block(n) in bare)))
    single = tuple(name for name in missing if _block(name) not in bare)
    if single:
        findings.append(Finding("warning", "missing", f"{len(single)} tensors without an entry: {_some(single)}", single))
    if extra:
        text = f"{len(extra)} entries that name no tensor of the model: {_some(tuple(extra))}"
        findings.append(Finding("warning", "extra", text, tuple(extra)))
    return findings


def _bare_blocks(wanted: set[str], missing: list[str]) -> list[int]:
    blocks = {_block(name) for name in wanted} - {None}
    covered = {_block(name) for name in wanted - set(missing)}
    return sorted(block for block in blocks if block is not None and block not in covered)


def _block(name: str) -> int | None:
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def _sizes(matrix: Matrix, shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    findings: list[Finding] = []
    for name in matrix.entries:
        shape = (*shapes.get(name, ()), 1, 1, 1)
        have, want = matrix.values_per_entry(name), shape[0] * shape[2]
        if name not in shapes or have == want or name in TOKEN_EMBEDDINGS:
            continue
        text = f"{name} has {have} values, the model needs {want}: {_why_size(name, have, shape)}"
        findings.append(Finding("error", "size", text, (name,)))
    return findings


def _why_size(name: str, have: int, shape: tuple[int, ...]) -> str:
    if shape[2] > 1 and have == shape[0]:
        kind = (
            "the matrix was made before experts were merged into one tensor" if "exps" in name else "MLA heads were one matrix"
        )
        return f"one row where there are {shape[2]} ({kind})"
    if "kv_b" in name or "k_b" in name or "v_b" in name:
        return "an MLA model converted by another version of llama.cpp"
    if "gate_up" in name:
        return "a fused gate_up tensor against separate ones"
    if "exps" in name:
        return "another number of experts"
    return "it was made from another model"


def _values(matrix: Matrix) -> list[Finding]:
    bad: dict[str, list[str]] = {"NaN or infinite": [], "negative": [], "zero": [], "columns": [], "uncounted": []}
    for name in matrix.entries:
        entry = matrix.entries[name]
        kind = _worst(entry)
        if kind:
            bad[kind].append(name)
    texts: dict[str, tuple[Severity, str]] = {
        "NaN or infinite": ("error", "hold NaN or infinite values: llama-quantize refuses every level"),
        "negative": ("error", "hold negative values, which no sum of squares can be"),
        "zero": ("warning", "hold only zeros: none of their columns is protected"),
        "columns": ("warning", "have columns that were never active; those are not protected"),
        "uncounted": ("warning", "counted no token: all their columns have equal weights"),
    }
    return [
        Finding(
            texts[kind][0],
            kind.replace(" ", "-").lower(),
            f"{len(names)} entries {texts[kind][1]}: {_some(names)}",
            tuple(names),
        )
        for kind, names in bad.items()
        if names
    ]


def _worst(entry: MatrixEntry) -> str:
    if not np.isfinite(entry.sums).all():
        return "NaN or infinite"
    if (entry.sums < 0).any() or (entry.counts < 0).any():
        return "negative"
    if not entry.counts.any():
        return "uncounted"
    seen = entry.sums[entry.counts > 0] if len(entry.counts) == len(entry.sums) else entry.sums
    if not seen.any():
        return "zero"
    return "columns" if (seen == 0).any() else ""


def _experts(name: str, matrix: Matrix) -> ExpertCoverage:
    counts = matrix.counts(name)
    unseen = tuple(int(index) for index in np.flatnonzero(counts == 0))
    few = tuple(int(index) for index in np.flatnonzero((counts > 0) & (counts < FEW_TOKENS)))
    return ExpertCoverage(name, len(counts), unseen, few, int(counts.min()), float(np.median(counts)))


def _untouched(experts: tuple[ExpertCoverage, ...]) -> list[Finding]:
    findings: list[Finding] = []
    for kind, few in (("experts-without-data", False), ("experts-with-few-tokens", True)):
        hit = [tensor for tensor in experts if (tensor.few if few else tensor.unseen)]
        if not hit:
            continue
        total = sum(len(tensor.few if few else tensor.unseen) for tensor in hit)
        worst = max(hit, key=lambda tensor: len(tensor.few if few else tensor.unseen))
        names = ", ".join(map(str, (worst.few if few else worst.unseen)[:8]))
        what = f"saw fewer than {FEW_TOKENS} tokens" if few else "saw no token and are quantised with equal weights"
        text = f"{total} experts in {len(hit)} tensors {what}; most in {worst.tensor}: {names}"
        findings.append(Finding("warning", kind, text, tuple(tensor.tensor for tensor in hit)))
    return findings


def _origin(matrix: Matrix) -> list[Finding]:
    size = f" of {matrix.chunk_size} tokens" if matrix.chunk_size else " of unknown size (legacy)"
    names = ", ".join(matrix.datasets) or "unknown"
    findings = [Finding("info", "origin", f"{matrix.chunk_count} chunks{size}, dataset {names}")]
    if matrix.chunk_count == 0:
        findings.append(Finding("warning", "no-chunks", "its metadata says that it saw no chunk of text"))
    return findings


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _FEW_NAMES} more" if len(names) > _FEW_NAMES else ""
    return ", ".join(names[:_FEW_NAMES]) + more
