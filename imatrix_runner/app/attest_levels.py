"""``run --attest``: a statement next to each finished level that says how its bytes follow from the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from imatrix_runner.audit.attestation import (
    ENDING,
    BuildIdentity,
    HashedFile,
    SayableRecipe,
    make_statement,
    read_statement,
    write_statement,
)
from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen, hash_files
from imatrix_runner.engines.abilities import TensorAuditor
from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.events import info, warning
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.journal import StepRecord, outputs_intact
from imatrix_runner.quantize.plan import LevelStep


def require_attestable(session: Session) -> None:
    """Raise :class:`UsageError` before the work begins if no statement could be written after it."""
    if not isinstance(session.engine, TensorAuditor):
        raise UsageError(
            "--attest needs the embedded engine",
            "a statement names the library whose bytes were proven, and llama.cpp's programs make these levels",
            "Leave out --engine binaries and --llama-cpp, or attest a file afterwards: imatrix-runner audit FILE --attest OUT",
        )


def attest_levels(steps: Sequence[LevelStep], frozen: Frozen, matrix: MatrixFile | None, session: Session) -> dict[str, Path]:
    """Write the missing statements of finished levels; return all by level.

    The pass has just derived these bytes, and the journal has their hash. Levels that the predicate has no words for get none.
    """
    engine = session.engine
    assert isinstance(engine, TensorAuditor)
    build = BuildIdentity(engine.identity(), engine.libraries_digest, engine.fp_contract())
    inputs = [*frozen.model.files, *([matrix.path] if matrix is not None else [])]
    hashed = [
        HashedFile(path.name, digest, path.stat().st_size)
        for path, digest in zip(inputs, hash_files(inputs, session), strict=True)
    ]
    written: dict[str, Path] = {}
    for step in steps:
        record = session.journal.get(step.step)
        if record is None or not outputs_intact(record, session.workspace.root):
            continue
        output = record.output if len(record.outputs) == 1 else None
        path = step.files[0].with_name(f"{step.files[0].name}{ENDING}")
        state = _there(path, output.sha256) if output is not None and path.exists() else ""
        if state == "same":
            written[step.level.name] = path
            continue
        if state == "foreign":
            session.sink(warning(f"{path.name} is not written: a file that was not made here has this name."))
            continue
        said = _sayable(step, record, frozen)
        if isinstance(said, str) or output is None:
            session.sink(info(f"{step.level.name} is not attested: {said}."))
            continue
        file = HashedFile(Path(output.name).name, output.sha256, output.stamp.size)
        imatrix = hashed[-1] if matrix is not None else None
        write_statement(path, make_statement(file, hashed[0], said, imatrix, build))
        written[step.level.name] = path
    return written


def _there(path: Path, digest: str) -> str:
    """``same`` if the statement that is there is about this content, ``foreign`` if it is no statement; else empty."""
    try:
        return "same" if read_statement(path).file.sha256 == digest else ""
    except InvalidDataError:
        return "foreign"


def _sayable(step: LevelStep, record: StepRecord, frozen: Frozen) -> SayableRecipe | str:
    """What a statement says of a level, or why it cannot."""
    if frozen.model.is_split or len(record.outputs) != 1:
        return "a statement is about one file and one source"
    if step.resolved is None:
        return "it was made before, without --attest; audit FILE --attest OUT writes a statement"
    options = replace(step.resolved.options, max_buffer_size=None)
    recipe = SayableRecipe(step.level.ftype, options.token_embedding_type, options.output_tensor_type)
    plain = QuantizeOptions(token_embedding_type=options.token_embedding_type, output_tensor_type=options.output_tensor_type)
    if options != plain:
        return "a statement has words for llama-quantize's type and those of embeddings and output alone"
    return recipe
