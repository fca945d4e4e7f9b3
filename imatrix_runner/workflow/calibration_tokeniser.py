"""Whose tokenizer a calibration text is counted with: a GGUF's, a Hugging Face directory's, or one fetched from a hub."""

from __future__ import annotations

import os
from pathlib import Path

from imatrix_runner.calibration.tokenisers import GgufTokeniser, HuggingFaceTokeniser
from imatrix_runner.calibration.tokens import Tokeniser
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.embedded.find import Unusable, find
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.models.hub import Hub, is_offline
from imatrix_runner.models.sources import HubId, LocalDirectory, LocalFile, parse_source
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.store import cache_dir
from imatrix_runner.workflow.context import Context

_NEEDED = "tokenizer.json"
_HELPFUL = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json")
_LIMIT = 256 << 20


def tokenizer_files(model: str, context: Context, *, offline: bool) -> Path:
    """The path of a GGUF (its first shard), or of a directory with a tokenizer; of a hub's model only that is fetched."""
    path = Path(model).expanduser()
    if path.is_dir() and (path / _NEEDED).is_file():
        return path
    source = parse_source(model)
    if isinstance(source, LocalFile):
        return source.path.with_name(shard_names(source.path)[0])
    if isinstance(source, LocalDirectory):
        raise _no_tokenizer(str(source.path))
    return _fetched(source, context, offline=offline)


def _fetched(source: HubId, context: Context, *, offline: bool) -> Path:
    hub = Hub(context.stop, context.sink, offline=offline or is_offline())
    listing = hub.repository(source.repo)
    files = {file.name: file for file in listing.files}
    if _NEEDED not in files:
        raise _no_tokenizer(source.repo)
    paths = [hub.fetch(listing, files[name], limit=_LIMIT) for name in (_NEEDED, *_HELPFUL) if name in files]
    return paths[0].parent


def _no_tokenizer(where: str) -> InvalidDataError:
    return InvalidDataError(
        f"{where} has no {_NEEDED}",
        "without it nobody but the converter can read its tokenizer",
        "Convert the model first (imatrix-runner run …) and give the GGUF with --model.",
    )


def find_tokeniser(model: Path, runner: Runner) -> Tokeniser:
    """What counts tokens as this model will see them. Raises errors of ours."""
    if model.is_dir():
        return HuggingFaceTokeniser(model)
    header = read_header(model)
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise InvalidDataError(
            f"{model} holds no vocabulary",
            "the metadata key tokenizer.ggml.tokens is missing",
            "Give the model's own GGUF (of a split one the first shard).",
        )
    bindings = find(os.environ, cache_dir())
    if isinstance(bindings, Unusable):
        raise bindings
    return GgufTokeniser(EmbeddedEngine(bindings, runner), model)
