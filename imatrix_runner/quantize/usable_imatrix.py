"""The imatrix for one level: the entries llama-quantize will use, and what they lack for the level's types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.imatrix.expected import ExpectedMatrix
from imatrix_runner.imatrix.matrix import TOKEN_EMBEDDINGS, Matrix

# src/llama-quant.cpp, tensor_requires_imatrix(): these types are useless without one ...
_REQUIRE_IMATRIX = frozenset(("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"))
# ... except for these tensors, which never have activations to weigh; but ggml_quantize_chunk() of ggml.c aborts without
# weights for these types, whatever the tensor.
OUTPUT = "output.weight"
NEVER_WEIGHED = (*TOKEN_EMBEDDINGS, OUTPUT)
_ABORT_WITHOUT_WEIGHTS = frozenset(("IQ2_XXS", "IQ2_XS", "IQ1_S"))

_LACKING = "the imatrix has no data for it"

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Failure:
    """Why a level cannot be made, as a phrase, and what to do about it, as a sentence that names the option."""

    why: str
    todo: str


NO_IMATRIX = Failure(
    "it needs an importance matrix and there is none",
    "Give one with --imatrix FILE, or generate one: imatrix-runner run MODEL --imatrix generate.",
)


@dataclass(frozen=True)
class UsableImatrix:
    """The imatrix as llama-quantize sees it: entry name -> number of values, after include/exclude, and what it will write into
    the metadata. ``absent``: why a tensor has no entry, where that is known."""

    file_name: str
    sizes: Mapping[str, int]
    dataset: str | None
    chunks: int
    unseen: frozenset[str] = frozenset()
    """Entries that counted no token: llama-quantize gives all their columns the weight 1."""
    absent: Mapping[str, Failure] = field(default_factory=dict)

    def without(self, excluded: Sequence[str]) -> UsableImatrix:
        """Without the entries whose names contain one of ``excluded``: a level's own ``--exclude-weights``."""
        left = {name: size for name, size in self.sizes.items() if not any(part in name for part in excluded)}
        return replace(self, sizes=left, unseen=self.unseen & left.keys()) if excluded else self


def usable_weights(
    matrix: Matrix, path: Path, options: QuantizeOptions, uncollected: Mapping[str, str] | None = None
) -> UsableImatrix:
    """Return the entries that ``--include-weights`` / ``--exclude-weights`` (parts of entry names) leave of a matrix.

    ``uncollected``: why collecting from this model gives a tensor no entry (:mod:`imatrix_runner.imatrix.expected`).
    """
    sizes = {name: matrix.values_per_entry(name) for name in matrix.entries}
    kept = chosen(sizes, options)
    unseen = frozenset(name for name in kept if not matrix.counts(name).any())
    dataset = matrix.datasets[0] if matrix.datasets else None
    absent = _absent(sizes, kept, uncollected or {})
    return UsableImatrix(path.name, kept, dataset, matrix.chunk_count, unseen, absent)


def expected_weights(expected: ExpectedMatrix, options: QuantizeOptions) -> UsableImatrix:
    """Return the same for an imatrix that is still to be collected."""
    kept = chosen(expected.sizes, options)
    absent = _absent(expected.sizes, kept, expected.absent)
    return UsableImatrix(expected.file_name, kept, expected.dataset, expected.chunks, absent=absent)


def chosen(entries: Mapping[str, _Value], options: QuantizeOptions) -> dict[str, _Value]:
    """Return the entries that the options leave, as llama-quantize chooses them."""
    include, exclude = options.include_weights, options.exclude_weights
    return {
        name: value
        for name, value in entries.items()
        if (not include or any(part in name for part in include)) and not any(part in name for part in exclude)
    }


def requires_imatrix(name: str, kind: str, ftype: str) -> bool:
    """Return whether a tensor cannot become ``kind`` without imatrix data."""
    if name in NEVER_WEIGHED:
        return kind in _ABORT_WITHOUT_WEIGHTS
    return kind in _REQUIRE_IMATRIX or (kind == "Q2_K" and ftype.upper() == "Q2_K_S")


class Lacks:
    """What an imatrix lacks for a recipe, tensor by tensor."""

    def __init__(self, weights: UsableImatrix, options: QuantizeOptions) -> None:
        self.weightless: list[str] = []
        self.unseen: list[str] = []
        self.starved: dict[str, str] = {}
        self._weights, self._options = weights, options
        self._misfits: list[Failure] = []

    def check(self, name: str, shape: tuple[int, ...], kind: str, *, required: bool) -> None:
        """Check one tensor that becomes ``kind``; ``required``: that type requires data."""
        shape = (*shape, 1, 1)
        have, want = self._weights.sizes.get(name), shape[0] * shape[2]
        if have is not None and have != want and name not in TOKEN_EMBEDDINGS:
            why = f"the imatrix has {have} values for {name}, the model needs {want}"
            self._misfits.append(Failure(why, "Use an imatrix made from this model: --imatrix generate makes one."))
        elif have != want and required:
            self.starved[name] = kind
        elif have != want and name not in NEVER_WEIGHED:
            self.weightless.append(name)
        elif name in self._weights.unseen:
            self.unseen.append(name)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Return why the level cannot be made; tensors that lack data for the same reason are one failure."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, kind in self.starved.items():
            known = self._weights.absent.get(name, Failure(_LACKING, ""))
            todo = _other_type(name, self._options) or known.todo or _pin(name)
            groups.setdefault((known.why, todo), []).append(f"{name} becomes {kind}")
        found = [
            Failure(f"{tensors[0]}{_more(tensors)}, which requires imatrix data, and {why}", todo)
            for (why, todo), tensors in groups.items()
        ]
        return (*self._misfits, *found)


def _absent(sizes: Mapping[str, int], kept: Mapping[str, int], uncollected: Mapping[str, str]) -> dict[str, Failure]:
    found = {name: Failure(why, _pin(name)) for name, why in uncollected.items()}
    for name in sizes:
        if name not in kept:
            todo = "Leave these tensors in with --include-weights or --exclude-weights, or give them a type that needs no "
            found[name] = Failure("--include-weights or --exclude-weights leave it out", f"{todo}data: --uncovered q4_k")
    return found


def _pin(name: str) -> str:
    collect = ", or collect data for it with --process-output" if name == OUTPUT else ""
    return f"Give tensors without data a type that needs none: --uncovered q4_k{collect}."


def _other_type(name: str, options: QuantizeOptions) -> str:
    """Return the remedy where an option fixes the type: llama-quantize then ignores ``--tensor-type``."""
    if name == OUTPUT and options.output_tensor_type:
        return "Choose another --output-tensor-type, for example q6_k, or collect data for it with --process-output."
    if name in TOKEN_EMBEDDINGS and options.token_embedding_type:
        return "Choose another --token-embedding-type, for example q4_k."
    return ""


def _more(tensors: list[str]) -> str:
    return f" (and {len(tensors) - 1} more tensors likewise)" if len(tensors) > 1 else ""
