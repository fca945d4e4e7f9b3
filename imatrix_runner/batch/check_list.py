"""Checks every entry of a list before anything is fetched: whether the model is there, may be fetched, can be converted, how
large it and its levels are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import psutil

from imatrix_runner.batch.batch_journal import PlannedLevel, ThreeLines
from imatrix_runner.batch.batch_list import BatchEntry
from imatrix_runner.batch.level_sizes import about_levels
from imatrix_runner.batch.schedule import Keep, ModelNeeds
from imatrix_runner.context.engine_choice import Machine
from imatrix_runner.context.requests import MODES, LevelsRequest, RunRequest
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, RunnerError, ToolchainError, UsageError
from imatrix_runner.events import Finished, Progress, Sink, Started
from imatrix_runner.extras import CONVERT
from imatrix_runner.files import human_bytes
from imatrix_runner.models.hub import foresee_model
from imatrix_runner.models.model import HubId, LocalDirectory, LocalFile, Source, model_name, open_gguf, parse_source
from imatrix_runner.models.model_folders import check_folder
from imatrix_runner.models.safetensors_file import check_safetensors, read_model_json
from imatrix_runner.models.supported_models import supported_models
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.store import cache_dir

STEP = "check"
"""The step that events of the check carry."""

_BYTES_PER_WEIGHT = 2
"""Of published models, where the hub does not say how many weights one has."""
RequestOf = Callable[[BatchEntry], RunRequest]


@dataclass(frozen=True)
class CheckedModel:
    """An entry with what is known of it before it is fetched. ``name``: of its workspace; ``download``: bytes of its files on
    the hub, ``missing`` of them not in the hub's cache; ``own_download``: they are fetched into the batch's folder (else they
    are the user's). ``source``: bytes of the GGUF that levels are made from, ``converted``: whether that is to be converted;
    ``levels``: with sizes that are estimates. ``problem``: why it cannot be worked on."""

    entry: BatchEntry
    request: RunRequest | None
    name: str
    kind: str = ""
    commit: str = ""
    licence: str = ""
    architecture: str = ""
    gated: bool = False
    download: int = 0
    missing: int = 0
    own_download: bool = False
    source: int = 0
    converted: bool = False
    n_params: int = 0
    levels: tuple[PlannedLevel, ...] = ()
    repo: str = ""
    notes: tuple[str, ...] = ()
    problem: ThreeLines | None = None

    def needs(self, keep: Keep) -> ModelNeeds:
        """The disk that the model takes."""
        return needs_of(
            self.download if self.own_download else 0,
            self.source if self.converted else 0,
            tuple(level.n_bytes for level in self.levels),
            publishes=bool(self.repo),
            keep=keep,
        )


def needs_of(
    download: int, converted: int, levels: tuple[int, ...], *, publishes: bool, keep: Keep, working: int = 0
) -> ModelNeeds:
    """Levels are made one by one where they are removed one by one; otherwise all in one reading of the model."""
    groups = levels if keep == "nothing" and publishes else (sum(levels),) if levels else ()
    return ModelNeeds(download, converted, groups, publishes, keep, working)


@dataclass(frozen=True)
class ListChecker:
    """Checks entries. ``request_of`` makes the request of ``run``; ``check_request`` looks at its levels and at the repository
    that it publishes to, for a model's name. The converter is asked for its models once."""

    request_of: RequestOf
    stop: Stop
    sink: Sink
    check_request: Callable[[RunRequest, str], None] = lambda _request, _name: None
    trust_remote_code: bool = False
    llama_cpp: Path | None = field(default=None)

    def check(self, entries: Sequence[BatchEntry]) -> tuple[CheckedModel, ...]:
        """Check every entry; two that would be published to one repository are a problem of the second."""
        checked: list[CheckedModel] = []
        taken: dict[str, str] = {}
        began = time.monotonic()
        self.sink(Started(STEP, f"Checking {len(entries)} models", float(len(entries)), "models"))
        for number, entry in enumerate(entries, start=1):
            model = self.check_one(entry)
            self.sink(Progress(STEP, float(number), float(len(entries)), entry.model))
            other = taken.setdefault(model.repo.lower(), entry.model) if model.repo else entry.model
            if other != entry.model and model.problem is None:
                error = UsageError(
                    f"{model.repo} is the target of two models",
                    f"{other} is published there, too",
                    "Give one of them another name with publish: ORG/NAME.",
                )
                model = replace(model, problem=ThreeLines.of(error))
            checked.append(model)
        wrong = sum(model.problem is not None for model in checked)
        detail = f"{wrong} of them cannot be made" if wrong else ""
        self.sink(Finished(STEP, "done", detail, time.monotonic() - began))
        return tuple(checked)

    def check_one(self, entry: BatchEntry) -> CheckedModel:
        """Check one entry. Raises only what ends the whole command."""
        known = CheckedModel(entry, None, entry.model)
        try:
            request = self.request_of(entry)
            known = replace(known, request=request)
            _check_files(request)
            source = parse_source(entry.model)
            name = model_name(entry.model if isinstance(source, HubId) else source.path)
            known = replace(known, name=name, repo=entry.repository(name))
            found = self._source(source, request, known)
            self.check_request(request, name)
            assert request.levels is not None
            notes = (*found.notes, *_memory_notes(found.source))
            return replace(found, notes=notes, levels=about_levels(request.levels, found.n_params))
        except InterruptedRunError:
            raise
        except RunnerError as error:
            return replace(known, problem=ThreeLines.of(error))

    def _source(self, source: Source, request: RunRequest, known: CheckedModel) -> CheckedModel:
        if isinstance(source, LocalFile):
            levels = request.levels or LevelsRequest()
            model = open_gguf(source.path.absolute(), allow_requantize=levels.options.allow_requantize)
            return replace(known, kind="gguf", architecture=model.architecture, n_params=model.n_params, source=model.n_bytes)
        if isinstance(source, LocalDirectory):
            check_folder(source.path)
            weights = check_safetensors(source.path)
            named = read_model_json(source.path / "config.json").get("architectures")
            architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
            self.check_architecture(architecture, known.entry.model)
            n_params = sum(tensor.n_elements for tensor in weights.tensors)
            size = sum(path.stat().st_size for path in weights.files)
            return replace(known, kind="checkpoint", architecture=architecture, n_params=n_params, source=size, converted=True)
        return self._on_hub(source, known)

    def _on_hub(self, source: HubId, known: CheckedModel) -> CheckedModel:
        found = foresee_model(source, stop=self.stop, trust_remote_code=self.trust_remote_code)
        converted = found.choice.kind == "checkpoint"
        if converted:
            self.check_architecture(found.listing.architecture, known.entry.model)
        weights = sum(file.size or 0 for file in found.choice.files if file.name.endswith((".safetensors", ".gguf")))
        notes: tuple[str, ...] = ("gated: this account may fetch it",) if found.listing.gated else ()
        if converted and not found.listing.architecture:
            notes += ("the hub does not say its architecture; the converter may refuse it",)
        return replace(
            known,
            kind=found.choice.kind,
            commit=found.listing.commit,
            licence=found.listing.licence or "",
            architecture=found.listing.architecture,
            gated=found.listing.gated,
            download=found.n_bytes,
            missing=found.missing,
            own_download=found.missing > 0,
            source=weights,
            converted=converted,
            n_params=found.listing.n_params or weights // _BYTES_PER_WEIGHT,
            notes=notes,
        )

    def check_architecture(self, architecture: str, model: str) -> None:
        """Raise :class:`RunnerError` for a checkpoint that cannot be converted here; ``architecture``: the class in its
        config.json, empty if it is not known."""
        CONVERT.require(f"Converting {model}")
        supported = self._supported
        if architecture and supported and architecture not in supported:
            raise InvalidDataError(
                f"{model} is a {architecture}, which cannot be converted",
                f"the converter of the llama.cpp in use knows {len(supported)} architectures, and not this one",
                "Wait for a llama.cpp that supports it, or give a GGUF of the model.",
            )

    @cached_property
    def _supported(self) -> frozenset[str]:
        toolchain = Machine(self.llama_cpp).toolchain
        if toolchain is None or toolchain.converter is None:
            raise ToolchainError(
                "The converter convert_hf_to_gguf.py is missing",
                "it comes with llama.cpp's programs, which were not found",
                "Build a complete toolchain with: imatrix-runner tools build",
            )
        return supported_models(toolchain.converter, cache_dir() / "converters")


def _check_files(request: RunRequest) -> None:
    """Raise :class:`UsageError` for a file that an option names and that is not there."""
    mode = request.imatrix.mode
    named = [("the calibration text", request.imatrix.text)]
    named += [("the imatrix", Path(mode).expanduser())] if mode not in MODES else []
    if request.measure is not None:
        named += [("the held-out text", request.measure.text), ("the prompts", request.measure.domain)]
    for what, path in named:
        if path is not None and not path.exists():
            raise UsageError(f"{path} does not exist", f"it was given as {what}", "Check the path.")


def _memory_notes(source: int) -> tuple[str, ...]:
    """What is to be said of a model whose weights do not fit into this machine's memory."""
    memory = psutil.virtual_memory().total
    if source <= memory:
        return ()
    sizes = f"its weights (about {human_bytes(source)}) are larger than this machine's memory ({human_bytes(memory)})"
    return (f"{sizes}: an imatrix and measurements are computed from the disk, which is slow",)
