"""Commands that run a level: from the hub, and from a file on this computer."""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from imatrix_runner import safe_text
from imatrix_runner.models.hub.label_rules import hub_label, is_ollama_tag, without_shard
from imatrix_runner.models.origin import repository_in
from imatrix_runner.report.document import Report, ReportLevel
from imatrix_runner.report.views.markdown import Markdown, code, fenced

LM_STUDIO_FOLDER: Final = "~/.lmstudio/models"

_SHARD = re.compile(r"(.+)-00001-of-(\d{5})\.gguf", re.DOTALL)


def shown_level(report: Report, levels: Sequence[ReportLevel]) -> ReportLevel:
    """The level that commands name: a recommended one, else Q4_K_M, else the one of middle size. ``levels`` by size."""
    picked = {pick.why: pick.level for pick in report.picks}
    wanted = next((picked[why] for why in ("target", "speed", "balanced", "quality", "small") if why in picked), "Q4_K_M")
    return next((each for each in levels if each.name == wanted), levels[len(levels) // 2])


def tag_of(level: ReportLevel) -> str:
    """The label by which programs find a level's file in a repository; empty if the name has none at its end."""
    first = level.files[0].name
    label = hub_label(first)
    ends = label is not None and without_shard(first).upper().endswith(label.text)
    return label.text if label is not None and ends and is_ollama_tag(label.text) else ""


def card_commands(report: Report, levels: Sequence[ReportLevel], repo: str) -> Markdown:
    """How to download and run one level of the repository ``repo``; empty without levels."""
    if not levels:
        return Markdown("")
    level = shown_level(report, levels)
    first, tag = level.files[0].name, tag_of(level)
    shard = _SHARD.fullmatch(first) if len(level.files) > 1 else None
    what = f"--include {_word(f'{glob.escape(shard[1])}-*')}" if shard else _word(first)
    parts: list[str] = []
    if tag:
        lines = [f"llama-server -hf {repo}:{tag}", f"llama-cli -hf {repo}:{tag}"]
        lines += [f"ollama run hf.co/{repo}:{tag}"] if not shard else []
        title = "Straight from this page:" if not shard else "Straight from this page, with llama.cpp:"
        parts += [title, fenced("\n".join(lines), "sh")]
    lines = [f"hf download {repo} {what} --local-dir .", f"llama-cli -m {_word(first)}", f"llama-server -m {_word(first)}"]
    parts += ["With a downloaded file:", fenced("\n".join(lines), "sh")]
    folder = code(f"{LM_STUDIO_FOLDER}/{repo}/")
    if shard:
        parts.append(f"LM Studio finds the files in {folder}. Ollama loads no models in shards.")
    else:
        name = ollama_name(report.model.name, level.name)
        lines = [
            f"echo {_word(f'FROM ./{first}')} > Modelfile && ollama create {name} -f Modelfile && ollama run {name}",
            f"lms import --copy --user-repo {repo} {_word(first)}",
        ]
        parts += [f"In Ollama, and in LM Studio, which keeps it in {folder}:", fenced("\n".join(lines), "sh")]
    return Markdown("\n\n".join(parts))


def local_commands(report: Report, folder: Path, modelfiles: Mapping[str, Path]) -> list[tuple[str, str]]:
    """How to run a finished level where it is, as pairs of a program's name and a command. ``modelfiles``: by level."""
    levels = sorted(report.rows, key=lambda level: -level.n_bytes)
    if not levels:
        return []
    level = shown_level(report, levels)
    path = shlex.quote(str(folder / level.files[0].name))
    found = [("llama.cpp", f"llama-server -m {path}")]
    if (modelfile := modelfiles.get(level.name)) is not None:
        name = ollama_name(report.model.name, level.name)
        found.append(("Ollama", f"ollama create {name} -f {shlex.quote(str(modelfile))} && ollama run {name}"))
    if len(level.files) == 1:
        owner = (
            repository_in(report.repo)
            or f"{plain_name(report.quantized_by) or 'local'}/{plain_name(report.model.name) or 'model'}"
        )
        found.append(("LM Studio", f"lms import --symbolic-link --user-repo {owner} {path}"))
    return found


def ollama_name(model: str, level: str) -> str:
    """A name for Ollama's list: ``model:q4_k_m``, of letters, digits and ``._-``."""
    return f"{plain_name(model).lower() or 'model'}:{plain_name(level).lower() or 'latest'}"


def plain_name(text: str) -> str:
    """The text as a part of a name: everything but letters, digits and ``._-`` becomes a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text[:80]).strip("-._")


def _word(text: str) -> str:
    return shlex.quote(safe_text.shown(text, 300))
