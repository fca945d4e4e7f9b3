"""What the mixes of a model choose among: its tensors, the sizes of files, the stock recipes to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.levels import PLAIN_FTYPES, offered
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.imatrix.expected import ExpectedMatrix, uncollected
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.mixes.mix_recipe import level_of
from imatrix_runner.mixes.mix_tensors import MixTensor, allowed_types, mix_tensors
from imatrix_runner.mixes.rounding_facts import marked
from imatrix_runner.mixes.targets import BitsTarget, KldTarget, LikeTarget, MemoryTarget, SizeTarget, SpeedTarget, Target
from imatrix_runner.models.ggml_types import IGNORE_WEIGHTS
from imatrix_runner.models.gguf_file import padded
from imatrix_runner.models.tensor_patterns import overrides
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.quantize.recipe import ALIGNMENT, Recipe
from imatrix_runner.quantize.usable_imatrix import Failure, UsableImatrix, requires_imatrix

_ANY_FINGERPRINT = "sha256:" + 64 * "0"

_REFERENCE = "Q4_K_M"
"""Any level shows which tensors llama.cpp quantises; this one can be made of every model that can be quantised at all."""


@dataclass(frozen=True)
class MixProblem:
    """``stock``: the recipes of the levels that can be made, by name, ``failures``: why the others cannot; ``others``: bytes of
    each tensor without a choice; ``header_bytes`` of a file's header; ``n_elements`` of the whole model; ``weights``: the
    entries of the imatrix that levels use; ``reserve``: bytes that running the model takes besides its weights.
    ``mark_bytes``: of ``header_bytes``, what only a mix with the wanted rounding takes, to say so."""

    tensors: tuple[MixTensor, ...]
    stock: Mapping[str, Recipe]
    others: Mapping[str, int]
    header_bytes: int
    n_elements: int
    weights: UsableImatrix | None
    options: QuantizeOptions
    failures: Mapping[str, Failure]
    reserve: int
    mark_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """The size of a file without ``tensors``."""
        return self.header_bytes + sum(self.others.values())

    def sizes(self, types: Mapping[str, str]) -> dict[str, int]:
        """The bytes of every tensor of a file, by its name."""
        return {**self.others, **{tensor.name: tensor.padded_bytes(types[tensor.name]) for tensor in self.tensors}}

    def file_bytes(self, types: Mapping[str, str]) -> int:
        """The size of a file with these types of ``tensors``."""
        return self.header_bytes + sum(self.sizes(types).values())

    @property
    def range(self) -> tuple[int, int]:
        """The sizes of the smallest and of the largest file."""
        sizes = [[tensor.padded_bytes(kind) for kind in tensor.choices] for tensor in self.tensors]
        return self.fixed_bytes + sum(map(min, sizes)), self.fixed_bytes + sum(map(max, sizes))

    def budget(self, target: Target) -> int | None:
        """The most bytes that a target's file may take; None for a target that is not a size. Raises :class:`UsageError` for a
        level that is unknown, :class:`InvalidDataError` for one that cannot be made."""
        match target:
            case SizeTarget(n_bytes):
                return n_bytes
            case BitsTarget(bits_per_weight):
                return self.header_bytes + int(bits_per_weight * self.n_elements / 8)
            case LikeTarget(level):
                return self._stock_bytes(level, target)
            case MemoryTarget(ram, vram):
                return ram + vram - self.reserve
            case KldTarget() | SpeedTarget():
                return None

    def _stock_bytes(self, level: str, target: Target) -> int:
        recipe = self.stock.get(level)
        if (failure := self.failures.get(level)) is not None:
            raise InvalidDataError(f"{target.spelling} names a level that cannot be made", failure.why, failure.todo)
        if recipe is None or recipe.file_bytes is None:
            raise UsageError(
                f"{target.spelling} names no level that can be made",
                f"{level} is unknown to the llama.cpp in use, or quantises nothing",
                f"Choose among: {', '.join(sorted(self.stock))}.",
            )
        return recipe.file_bytes

    def bits_per_weight(self, n_bytes: int) -> float:
        """Bits of tensor data per weight of the model in a file of ``n_bytes``."""
        return 8 * (n_bytes - self.header_bytes) / self.n_elements

    def stock_near(self, n_bytes: int) -> str:
        """The largest stock level that is not larger than ``n_bytes``; if all are, the smallest."""
        sizes = {name: recipe.file_bytes for name, recipe in self.stock.items() if recipe.file_bytes is not None}
        fit = {name: size for name, size in sizes.items() if size <= n_bytes}
        return max(fit, key=lambda name: (fit[name], name)) if fit else min(sizes, key=lambda name: (sizes[name], name))

    def may_leave_out(self, tensor: MixTensor, kind: str) -> bool:
        """Whether a tensor has imatrix data that its type makes use of, and can be rounded without."""
        return (
            not self.options.include_weights  # llama-quantize takes no --exclude-weights then
            and self.weights is not None
            and tensor.original in self.weights.sizes
            and kind != tensor.source_type
            and kind not in IGNORE_WEIGHTS
            and not requires_imatrix(tensor.original, kind, "")
        )


def make_problem(
    planner: LevelPlanner, matrix: MatrixFile | None, imatrix: str, expected: ExpectedMatrix | None, reserve: int = 0
) -> MixProblem:
    """Plan every stock level, and find the tensors and types to choose among.

    Raises :class:`InvalidDataError` for a model that cannot be quantised."""
    levels = {level for name, level in offered(planner.session.engine.types).items() if name not in PLAIN_FTYPES}
    # With the mark of a mix in its metadata, its file without the tensors has the size that a mix's has.
    plain = level_of("mark", _REFERENCE, {})
    rounding = planner.request.rounding
    other = marked(replace(plain, name="both marks", rounding=rounding), _ANY_FINGERPRINT) if rounding != STOCK else plain
    recipes = dict(planner.recipes((*sorted(levels, key=lambda level: level.name), plain, other), matrix, imatrix, expected))
    reference, most = recipes.pop(plain.name), recipes.pop(other.name, None)
    if reference.failures or reference.file_bytes is None:
        failure = reference.failures[0] if reference.failures else None
        raise InvalidDataError(
            "No mix of this model can be made",
            failure.why if failure else "llama.cpp cannot plan it",
            failure.todo if failure else "See the plan of stock levels with --dry-run.",
        )
    options = planner.request.options
    weights = planner.weights_or_expected(matrix, imatrix, expected)
    allowed, uncovered = allowed_types(planner.request.mix.types), planner.request.uncovered
    unreached = uncollected(planner.frozen.model)
    tensors = tuple(
        replace(tensor, reached=tensor.original not in unreached or not tensor.original.startswith("blk."))
        for tensor in mix_tensors(reference, weights, _fixed(reference, options), allowed, uncovered)
    )
    mark_bytes = (most.file_bytes or 0) - reference.file_bytes if most is not None else 0
    chosen = {tensor.name for tensor in tensors}
    sizes = {tensor.name: padded(tensor.n_bytes or 0, ALIGNMENT) for tensor in reference.tensors}
    return MixProblem(
        tensors,
        {name: recipe for name, recipe in recipes.items() if not recipe.failures},
        {name: size for name, size in sizes.items() if name not in chosen},
        reference.file_bytes + mark_bytes - sum(sizes.values()),
        reference.n_elements,
        weights,
        options,
        {name: recipe.failures[0] for name, recipe in recipes.items() if recipe.failures},
        reserve,
        mark_bytes,
    )


def _fixed(reference: Recipe, options: QuantizeOptions) -> frozenset[str]:
    """The tensors whose type the user's options decide."""
    entries = [("--tensor-type", entry) for entry in options.tensor_types]
    if options.tensor_type_file is not None:
        words = options.tensor_type_file.read_text(encoding="utf-8", errors="surrogateescape").split()
        entries += [("--tensor-type-file", entry) for entry in words]
    found = {name for each in overrides(entries, [tensor.name for tensor in reference.tensors]) for name in each.claimed}
    found |= {"output.weight"} if options.output_tensor_type else set()
    found |= {"token_embd.weight"} if options.token_embedding_type else set()
    return frozenset(found)
