"""Makes a file again from its source, to compare the whole of it: what an attestation and a rebuild stand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.audit.attestation import SayableRecipe
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.jobs import DryRun, PassJob, PassLevel, QuantizeJob, QuantizeOptions, TensorTarget
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, ToolchainError
from imatrix_runner.events import Sink
from imatrix_runner.files import require_space
from imatrix_runner.models.model import Model
from imatrix_runner.quantize.pass_levels import buffer_bytes
from imatrix_runner.scratch import scratch_folder

STEP = "rederive"
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
_GUESSED = 1024


@dataclass(frozen=True)
class Rederiver:
    """Makes files from one source. ``folder``: where the copy is while it is compared."""

    engine: Engine
    source: Model
    folder: Path
    sink: Sink = field(repr=False)
    threads: int | None = None
    log: Path | None = None

    def find_recipe(self, file: Model, imatrix: Path | None) -> SayableRecipe:
        """The recipe that gives the types of a file: its file type, and perhaps other types of embeddings and output.

        Raises :class:`InvalidDataError` if an attestation has no words for it.
        """
        number = file.header.integer("general.file_type")
        names = [kind.name for kind in self.engine.types if kind.number is not None and not kind.alias_of]
        known = {kind.number: kind.name for kind in self.engine.types if kind.number is not None and not kind.alias_of}
        if number is None or number & ~_GUESSED not in known:
            raise cannot_say(file, f"general.file_type is {number}, and llama.cpp here has {len(names)} others")
        recipe = SayableRecipe(known[number & ~_GUESSED])
        wanted = {tensor.name: tensor.type_name.lower() for tensor in file.tensors}
        found = self._types(recipe, imatrix)
        other = {name: kind for name, kind in wanted.items() if found.get(name) != kind}
        if other and other.keys() <= {_EMBEDDINGS, _OUTPUT}:
            recipe = replace(
                recipe,
                token_embedding_type=other.get(_EMBEDDINGS, ""),
                output_tensor_type=other.get(_OUTPUT, ""),
            )
            found = self._types(recipe, imatrix)
            other = {name: kind for name, kind in wanted.items() if found.get(name) != kind}
        if other:
            name = next(iter(other))
            why = f"{len(other)} tensors have other types than {recipe.ftype} gives, first {name} ({other[name]})"
            raise cannot_say(file, why)
        return recipe

    def _types(self, recipe: SayableRecipe, imatrix: Path | None) -> Mapping[str, str]:
        dry = self.engine.dry_run(self._job(recipe.ftype, options_of(recipe), imatrix, Path("unused")))
        return {name: kind.lower() for name, kind in dry.types.items()}

    def _job(self, ftype: str, options: QuantizeOptions, imatrix: Path | None, out: Path) -> QuantizeJob:
        return QuantizeJob(STEP, self.source.path, out, ftype, options, imatrix, self.threads, self.log)

    @contextmanager
    def make(self, recipe: SayableRecipe, imatrix: Path | None, name: str, n_bytes: int) -> Iterator[Path]:
        """Yield the file of a recipe; it is gone afterwards. ``n_bytes``: about its size."""
        options = options_of(recipe)
        dry = self.engine.dry_run(self._job(recipe.ftype, options, imatrix, Path("unused")))
        assert isinstance(dry, DryRun)
        targets = [TensorTarget(tensor, tensor, kind) for tensor, kind in dry.types.items()]
        with self.make_tensors(recipe.ftype, options, targets, imatrix, name, n_bytes) as made:
            yield made[0]

    @contextmanager
    def make_tensors(
        self,
        ftype: str,
        options: QuantizeOptions,
        targets: Sequence[TensorTarget],
        imatrix: Path | None,
        name: str,
        n_bytes: int,
        *,
        shards: tuple[int, ...] = (),
        covariances: Path | None = None,
    ) -> Iterator[tuple[Path, ...]]:
        """Yield the files of a level whose tensors are given, in order; they are gone afterwards."""
        make = self.engine.one_pass
        if make is None:
            raise ToolchainError(
                "A file can only be made again by the embedded engine",
                "the programs of llama.cpp do not take a type for each tensor",
                "Install llama-cpp-python; see imatrix-runner doctor.",
            )
        require_space(self.folder, n_bytes, "making the file again")
        with scratch_folder(self.folder) as scratch:
            out = scratch / "level" / name
            job = replace(self._job(ftype, options, imatrix, out), shards=shards)
            level = PassLevel("again", job, tuple(targets), "rederived")
            work = PassJob(
                STEP,
                self.source.files,
                (level,),
                (),
                "rederived",
                imatrix,
                self.threads,
                buffer_bytes(None),
                self.log,
                covariances=covariances,
            )
            (passed,), _ = make(work, self.sink)
            if passed.why:
                raise EngineError(f"{name} could not be made again", f"{passed.tensor}: {passed.why}", "Check its source.")
            yield tuple(sorted(out.parent.glob("*.gguf")))


@contextmanager
def named_matrix(path: Path | None, name: str, folder: Path) -> Iterator[Path | None]:
    """Yield a matrix under the name that is written into the file: itself, or a link to it."""
    if path is None or path.name == name:
        yield path
        return
    with scratch_folder(folder) as scratch:
        link = scratch / name
        with suppress(OSError):
            link.symlink_to(path.absolute())
        if not link.exists():
            link.write_bytes(path.read_bytes())
        yield link


def options_of(recipe: SayableRecipe) -> QuantizeOptions:
    return QuantizeOptions(token_embedding_type=recipe.token_embedding_type, output_tensor_type=recipe.output_tensor_type)


def cannot_say(file: Model, why: str) -> RunnerError:
    return InvalidDataError(
        f"{file.path.name} cannot be attested",
        f"{why}; an attestation names one type, and those of embeddings and output",
        "Its recipe (FILE.recipe.json) says more: imatrix-runner rebuild FILE.recipe.json",
    )
