"""The model of a run: found, fetched or converted, and fingerprinted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from imatrix_runner.context.context import Session
from imatrix_runner.context.ownership import RELEASED, SourcePlace, claim, hub_of, place_of, remember_hub
from imatrix_runner.context.requests import OutType, SourceRequest
from imatrix_runner.context.source_hashes import Hasher, checkpoint_content, stamped_fingerprint
from imatrix_runner.errors import InvalidDataError, ToolchainError, UsageError, from_os_error
from imatrix_runner.events import Sink, info, no_effect, warning
from imatrix_runner.files import Stamp, human_bytes, joint_sha256, publish, sha256, stamp
from imatrix_runner.journal import StepOutput, StepRecord, differences
from imatrix_runner.models.checkpoint_quantisation import checkpoint_quantisation, refuse_quantised
from imatrix_runner.models.kind import require_loadable
from imatrix_runner.models.model import HubId, LocalDirectory, LocalFile, Model, Provenance, Source, directory_name, open_gguf
from imatrix_runner.models.safetensors_file import check_safetensors
from imatrix_runner.steps import FOLDER_INPUT, step_id

_NO_CONVERTER = "it comes with llama.cpp's programs, which were not found; llama-cpp-python does not bring it"


class ConvertedFacts(msgspec.Struct, frozen=True):
    """Facts of a conversion. ``dequantised``: the quantised form of the published model, which the conversion lost."""

    dequantised: str | UnsetType = UNSET


@dataclass(frozen=True)
class Frozen:
    """A model whose content is known: ``fingerprint`` for the journal, ``stamps`` to notice a change while running."""

    model: Model
    fingerprint: str
    stamps: tuple[Stamp, ...]

    def check_unchanged(self) -> None:
        """Raise :class:`InvalidDataError` if a file of the model changed since it was fingerprinted."""
        for path, before in zip(self.model.files, self.stamps, strict=True):
            try:
                same = stamp(path) == before
            except OSError as error:
                raise from_os_error(error, "looking at the model", path) from error
            if not same:
                raise InvalidDataError(
                    f"The model file {path.name} changed while it was in use",
                    "another program wrote to it, so the results would come from different models",
                    "Let the download or copy finish, then run the same command again.",
                )


def open_source(source: Source, request: SourceRequest, session: Session, *, allow_requantize: bool) -> Model:
    """Turn what the user named into a checked GGUF: as it is, downloaded, or converted into the workspace.

    Raises :class:`InvalidDataError` for a model that llama.cpp could not load, nor any level of it.
    """
    model = _opened(source, request, session, allow_requantize=allow_requantize)
    require_loadable(model)
    return model


def _opened(source: Source, request: SourceRequest, session: Session, *, allow_requantize: bool) -> Model:
    if isinstance(source, LocalFile):
        _warn_unused(request, session.sink)
        return open_gguf(source.path.absolute(), allow_requantize=allow_requantize, name=session.workspace.model)
    if isinstance(source, HubId):
        return _from_hub(source, request, session, allow_requantize=allow_requantize)
    provenance = Provenance("directory", str(source.path))
    place = place_of(source)
    return _converted(source, place, provenance, request, session, allow_requantize=allow_requantize)


def _from_hub(source: HubId, request: SourceRequest, session: Session, *, allow_requantize: bool) -> Model:
    from imatrix_runner.models.hub import fetch_model

    if (before := _converted_before(source, request, session)) is not None:
        return before
    if session.dry_run:
        raise UsageError(
            f"{source} cannot be planned before it is downloaded",
            "the plan is made from the model's own tensors",
            f"Run without --dry-run, or download it and name the file: hf download {source.repo}",
        )
    fetched = fetch_model(
        source,
        trust_remote_code=request.trust_remote_code,
        stop=session.stop,
        sink=session.sink,
        cache=request.cache,
    )
    provenance = Provenance("hub", str(source), repo=fetched.repo, revision=source.revision, commit=fetched.commit)
    remember_hub(session.journal, fetched.repo, fetched.commit)
    if fetched.path.is_dir():
        directory, place = LocalDirectory(fetched.path), place_of(source)
        return _converted(directory, place, provenance, request, session, allow_requantize=allow_requantize)
    _warn_unused(request, session.sink)
    return open_gguf(fetched.path, allow_requantize=allow_requantize, name=session.workspace.model, source=provenance)


def _converted_before(source: HubId, request: SourceRequest, session: Session) -> Model | None:
    """The model as it was converted, where the files that it was converted from were removed on purpose
    (:func:`~imatrix_runner.context.ownership.release_original`); None if they were not, or if its GGUF is gone."""
    journal, workspace = session.journal, session.workspace
    if journal.fact("original") != RELEASED:
        return None
    made = {name: record for name, record in journal.of_kind("convert").items() if request.outtype in ("auto", name)}
    for name, record in made.items():
        if journal.still_there(step_id("convert", name), save=not session.dry_run):
            repo, commit = hub_of(journal)
            dequantised = record.facts_as(ConvertedFacts).dequantised or ""
            provenance = Provenance("hub", str(source), repo, source.revision, commit, dequantised)
            model = open_gguf(workspace.root / record.output.name, allow_requantize=True, name=workspace.model)
            return replace(model, source=provenance)
    return None


def _warn_unused(request: SourceRequest, sink: Sink) -> None:
    if request.typed:
        sink(warning(no_effect(request.typed, "the model is a GGUF, which is not converted.")))


def _converted(
    source: LocalDirectory,
    place: SourcePlace,
    provenance: Provenance,
    request: SourceRequest,
    session: Session,
    *,
    allow_requantize: bool,
) -> Model:
    """The GGUF of a Hugging Face directory, converted once into the workspace."""
    from imatrix_runner.models.convert import resolve_outtype
    from imatrix_runner.models.model_folders import check_folder

    check_folder(source.path)
    dequantised = _dequantised(source, session.sink, allow_requantize=allow_requantize)
    workspace, journal = session.workspace, session.journal
    outtype = request.outtype if request.outtype != "auto" else resolve_outtype(source.path)
    out = workspace.root / f"{workspace.model}-{outtype.upper()}.gguf"
    step = step_id("convert", outtype)
    record = journal.get(step)
    if session.dry_run and record is None:
        raise _unconverted(source)
    content = checkpoint_content(source.path, _hasher(session))
    if not session.dry_run:
        claim(journal, place, content.weights, content.n_bytes)
    inputs = {FOLDER_INPUT: content.fingerprint, "outtype": outtype}
    if record is not None and record.inputs.get(FOLDER_INPUT) == stamped_fingerprint(source.path):
        record = replace(record, inputs={**record.inputs, FOLDER_INPUT: content.fingerprint})  # of an earlier version
        if not session.dry_run:
            journal.record(step, record)
    if (toolchain := session.machine.toolchain) is not None:
        inputs["engine"] = toolchain.identity()
    elif record is not None:  # its converter is gone, but the converted file is still valid
        inputs["engine"] = record.inputs.get("engine", "")
    ours = journal.still_there(step, save=not session.dry_run)
    if record is None or differences(record, inputs) or not ours:
        if session.dry_run:
            raise _unconverted(source)
        if out.exists() and not ours:
            raise InvalidDataError(
                f"{out} is in the way",
                "it was not converted here (or was changed since), and your files are never overwritten",
                f"Use it as the model (imatrix-runner run {out}), or move it away.",
            )
        began = time.monotonic()

        def conclude(part: Path, final: Path) -> None:
            outputs = [StepOutput(final.name, stamp(part), sha256(part))]
            facts = ConvertedFacts(dequantised or UNSET)
            seconds = time.monotonic() - began
            made = StepRecord.now(inputs, outputs, "the model is a Hugging Face directory", seconds, facts=facts)
            journal.conclude(step, made, [(part, final)])
            journal.remember_hash(final, stamp(final), outputs[0].sha256)

        _convert(source, out, outtype, request, session, mmproj=False, conclude=conclude)
    projector = workspace.root / f"mmproj-{workspace.model}-{outtype.upper()}.gguf"
    if request.mmproj and not projector.exists() and not session.dry_run:
        _convert(source, projector, outtype, request, session, mmproj=True)
    # Some models are published with 4-bit experts; the plan reports whether a level would quantise those again.
    model = open_gguf(out, allow_requantize=True, name=workspace.model)
    return replace(model, source=replace(provenance, dequantised=dequantised))


def _unconverted(source: LocalDirectory) -> UsageError:
    return UsageError(
        f"{source.path} cannot be planned before it is converted",
        "the plan is made from the tensors of its GGUF",
        "Run without --dry-run, or convert it first and name the GGUF.",
    )


def _dequantised(source: LocalDirectory, sink: Sink, *, allow_requantize: bool) -> str:
    """Return the quantised form that converting a checkpoint dequantises; empty if there is none. Raises unless allowed."""
    found = checkpoint_quantisation(source.path, check_safetensors(source.path))
    if found is None:
        return ""
    if found.copied:
        sink(info(f"{source.path.name} is published in {found.label}; the converter keeps these blocks as they are."))
        return ""
    if not allow_requantize:
        raise refuse_quantised(source.path, found)
    sink(warning(f"{source.path.name} is published in {found.label}: it is dequantised, and levels of it are quantised twice."))
    return found.label


def _convert(
    source: LocalDirectory,
    out: Path,
    outtype: OutType,
    request: SourceRequest,
    session: Session,
    *,
    mmproj: bool,
    conclude: Callable[[Path, Path], None] = publish,
) -> None:
    from imatrix_runner.models.convert import convert

    toolchain = session.machine.toolchain
    if toolchain is None or toolchain.converter is None:
        only = f"{toolchain.directory} ({toolchain.origin}) has only programs" if toolchain is not None else _NO_CONVERTER
        raise ToolchainError(
            "The converter convert_hf_to_gguf.py is missing",
            only,
            "Build a complete toolchain with: imatrix-runner tools build",
        )
    named = directory_name(source.path)  # the converter takes the directory's own name, which in a hub's cache is a commit
    convert(
        source.path,
        out,
        converter=toolchain.converter,
        outtype=outtype,
        trust_remote_code=request.trust_remote_code,
        mmproj=mmproj,
        runner=session.runner,
        sink=session.sink,
        log=session.workspace.log("convert-mmproj" if mmproj else "convert"),
        name=None if named == source.path.absolute().name else named,
        conclude=conclude,
    )


def freeze(model: Model, session: Session) -> Frozen:
    """Fingerprint the model's content. Hashes are remembered with the file's stamp, so a second run reads nothing."""
    stamps = tuple(stamp(path) for path in model.files)
    hashes = hash_files(model.files, session)
    frozen = Frozen(model, joint_sha256(hashes), stamps)
    frozen.check_unchanged()
    return frozen


def hash_files(files: Sequence[Path], session: Session) -> list[str]:
    """Return the SHA-256 of each file, from the journal where the file is unchanged, with progress where it takes a while."""
    return _hasher(session)(files)


def _hasher(session: Session) -> Hasher:
    return Hasher(session.journal, session.sink, session.stop, keep=not session.dry_run)


def announce(model: Model, sink: Sink) -> None:
    shards = f" in {len(model.files)} shards" if model.is_split else ""
    sink(
        info(
            f"Model {model.name}: {model.architecture}, {model.n_params / 1e6:,.1f} M weights, "
            f"{model.main_type}, {human_bytes(model.n_bytes)}{shards}"
        )
    )
