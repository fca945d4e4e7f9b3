"""The card's sentences: what the model is, what the figures mean, how they were measured and how the files were made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.report.document import CalibrationSource, Report, ReportImatrix, ReportLevel, source_kind
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.markdown import Markdown, code, file_address, inline, joined, link

_FEATURES = "https://github.com/ggml-org/llama.cpp/wiki/Feature-matrix"
_UNTIL = {"converged": "until it had converged", "covered": "until every expert had seen enough"}


def facts_of(report: Report, licence: Markdown) -> list[Markdown]:
    """The first facts about the model, a line each: size, licence, measured quality."""
    model = report.model
    found: list[Markdown] = []
    if model.architecture and model.n_params:
        parts = [f"{model.architecture}, {wording.count(model.n_params)} weights"]
        parts += [f"in {wording.many(model.n_layers, 'layer')}"] if model.n_layers else []
        parts += [f"with {wording.many(model.n_experts, 'expert')} each"] if model.n_experts else []
        context = f", a context of up to {model.context_length:,} tokens" if model.context_length else ""
        found.append(inline(f"Model: {' '.join(parts)}{context}"))
    if licence:
        found.append(Markdown(f"Licence: {licence}, carried over from the source"))
    measured = sum(level.measured is not None for level in report.levels)
    if measured and report.evaluation is not None:
        which = "every level" if measured == len(report.levels) else wording.many(measured, "level")
        found.append(
            Markdown(f"Quality: {which} measured against the {inline(source_kind(model))} source, [how](#how-it-was-measured)")
        )
    return found


def notes_of(levels: Sequence[ReportLevel]) -> list[Markdown]:
    """Notes on the table of files: what its figures mean, and which levels differ."""
    found: list[Markdown] = []
    n_measured = sum(level.measured is not None for level in levels)
    if n_measured:
        found.append(
            Markdown(
                "KLD: distance from the source's predictions, 0 is the source itself. Same top token: how often level and "
                "source agree on the likeliest next token. Perplexity: against the source's."
            )
        )
    if n_measured < len(levels):
        which = "The levels without figures were not" if n_measured else "None of these files was"
        found.append(Markdown(f"{which} measured; the advice is what llama.cpp says of such levels."))
    if any(_has_iq(level) for level in levels):
        matrix = link("llama.cpp's feature matrix", _FEATURES)
        found.append(
            Markdown(
                "IQ levels are slower than K levels of the same size on a CPU and on Apple's GPUs, not on those of NVIDIA and "
                f"AMD ({matrix}, March 2024)."
            )
        )
    without = [level.name for level in levels if not level.used_imatrix]
    if without and len(without) < len(levels):
        found.append(Markdown(f"Made without the importance matrix: {inline(', '.join(without))}."))
    return found


def _has_iq(level: ReportLevel) -> bool:
    types = level.mix.types if level.mix is not None else (level.ftype.upper(),)
    return any(kind.startswith("IQ") for kind in types)


def mixes_of(report: Report) -> list[Markdown]:
    """How the types of the mixes were chosen, a line for each mix; empty without any."""
    mixes = [(level, level.mix) for level in report.rows if level.mix is not None]
    if not mixes:
        return []
    found = [
        Markdown(
            "The cost of rounding a tensor was measured on the calibration text: the KLD of the model in which only this "
            "tensor is rounded. Of all choices of types that fit into the file's size, a mix is the one with the least sum of "
            "costs"
        )
    ]
    for level, mix in mixes:
        parts = [f"KLD on other chunks of that text {wording.share_on_calibration(mix)}"] if mix.ratio is not None else []
        if mix.held_out is not None and report.evaluation is not None:
            parts.append(f"on {report.evaluation.text}, at its size, {wording.share_on_held_out(mix)}")
        parts.append(f"tensors by type: {wording.types_of(mix)}" if mix.types else "its recipe is gone")
        files = joined(link(file.name, file_address(file.name)) for file in mix.files)
        found.append(Markdown(f"**{inline(level.name)}**: {inline('; '.join(parts))}{f'; {files}' if files else ''}"))
    return found


def roundings_of(report: Report) -> list[Markdown]:
    """How numbers are rounded otherwise than by llama-quantize, a line for each level; empty without any."""
    levels = [(level, level.rounding) for level in report.rows if level.rounding is not None]
    if not levels:
        return []
    found = [
        Markdown(
            "These levels have the types and the size of stock ones, and other numbers. *Refined*: the scales of every block "
            "are searched further than llama-quantize does. *Feedback*: columns are rounded in order, and the error of each is "
            "fed into those to come, weighted by the covariance of the inputs on the calibration text (GPTQ). Any llama.cpp "
            "loads them"
        )
    ]
    for level, rounding in levels:
        parts: list[str] = [rounding.kind]
        if rounding.ratio is not None:
            parts.append(f"KLD on other chunks of that text {wording.share_on_calibration(rounding)}")
        if rounding.held_out is not None and report.evaluation is not None and level.mix is None:
            parts.append(f"on {report.evaluation.text} {wording.share_on_held_out(rounding)}")
        found.append(Markdown(f"**{inline(level.name)}**: {inline('; '.join(parts))}"))
    return found


def measuring_of(report: Report) -> list[Markdown]:
    """How the levels were measured, a line each; empty if none was."""
    evaluation = report.evaluation
    if evaluation is None:
        return []
    text = f"Text: {code(evaluation.text)}, {wording.many(evaluation.n_chunks, 'chunk')} of {evaluation.n_ctx:,} tokens"
    n_scored = f"{wording.count(evaluation.n_tokens)} of them scored (the second half of every chunk)"
    if evaluation.until is not None:
        n_scored += f"; at most: each level until the standard error of its KLD was below {wording.percent(evaluation.until)}"
    found = [
        Markdown(f"{text}, {n_scored}"),
        Markdown(
            f"Source: {inline(source_kind(report.model))}, with a perplexity of {wording.figure(evaluation.ppl.value)} ± "
            f"{wording.figure(evaluation.ppl.error)} on this text"
        ),
        Markdown(
            "KLD: the mean Kullback-Leibler divergence of the level's next-token probabilities from the source's, in nats, ± "
            "its standard error; the definitions are those of `llama-perplexity --kl-divergence`"
        ),
    ]
    if evaluation.overlap is not None:
        share = wording.percent(evaluation.overlap, 2)
        found.append(Markdown(f"Kept apart: {share} of the text's runs of 13 words also occur in the calibration text"))
    found.append(Markdown(f"Engine: {inline(evaluation.engine)}"))
    if evaluation.sha256:
        found.append(Markdown(f"SHA-256 of the text: {code(evaluation.sha256)}"))
    return found


def making_of(report: Report) -> list[Markdown]:
    """How the files were made, a line each."""
    model = report.model
    at = f" at commit {code(model.commit)}" if model.commit else ""
    found = [Markdown(f"Source: {inline(model.origin or model.name)}{at}, {inline(model.type)}, {human_bytes(model.n_bytes)}")]
    if model.dequantised:
        form = f"The source is published in a quantised form ({model.dequantised}); it was dequantised and quantised again"
        found.append(inline(form))
    if model.fingerprint:
        found.append(Markdown(f"Fingerprint of the source: {code(model.fingerprint)}"))
    if report.imatrix is not None:
        found += _imatrix(report.imatrix)
    if report.toolchain:
        found.append(Markdown(f"Quantised with {inline(report.toolchain)}"))
    if checking := _check_command(report):
        found.append(Markdown(f"Anybody can check these bytes: {code(checking)}"))
    return found


def _check_command(report: Report) -> str:
    """The command that compares a file with what llama-quantize makes of its source; empty without files."""
    level = next((level for level in sorted(report.rows, key=lambda level: -level.n_bytes) if level.files), None)
    if level is None:
        return ""
    source = next(
        (file.name for file in report.model.files if file.name.endswith(".gguf") and "mmproj" not in file.name), "MODEL"
    )
    words = ["imatrix-runner", "audit", level.files[0].name, "--source", source]
    words += ["--imatrix", report.imatrix.file.name] if level.used_imatrix and report.imatrix is not None else []
    return shlex.join(words)


def _imatrix(imatrix: ReportImatrix) -> list[Markdown]:
    parts = ["collected for these files" if imatrix.made_here else "a published one"]
    if imatrix.chunks:
        size = f" of {imatrix.chunk_size:,} tokens" if imatrix.chunk_size else ""
        parts.append(f"{wording.many(imatrix.chunks, 'chunk')}{size}")
        parts[-1] += f" {_UNTIL[imatrix.stopped]}" if imatrix.stopped in _UNTIL else ""
    parts.append(wording.many(imatrix.entries, "tensor"))
    if imatrix.made_here and imatrix.engine:
        parts.append(f"in {human_seconds(imatrix.seconds)} with {imatrix.engine}")
    found = [inline(f"Importance matrix: {', '.join(parts)}")]
    if imatrix.origin and not imatrix.made_here:
        repo = imatrix.repo
        where = link(imatrix.origin, f"https://huggingface.co/{repo}") if repo else inline(imatrix.origin)
        found.append(Markdown(f"It is from {where}"))
    text = imatrix.calibration
    if text is not None:
        special = ", special tokens parsed" if text.parse_special else ""
        template = f", conversations written with {inline(text.template)}" if text.template else ""
        found.append(Markdown(f"Calibration text: {code(text.name)}, {human_bytes(text.n_bytes)}{special}{template}"))
        found += [Markdown(f"SHA-256 of the text: {code(text.sha256)}")] if text.sha256 else []
        found += [Markdown(f"Manifest of the text: {code(text.manifest)}")] if text.manifest else []
        found += [Markdown(f"Sources of the text: {joined(_source(each) for each in text.sources)}")] if text.sources else []
    elif imatrix.datasets:
        found.append(Markdown(f"Calibration text: {joined(code(name) for name in imatrix.datasets)}"))
    if imatrix.file.sha256:
        found.append(Markdown(f"SHA-256 of the importance matrix: {code(imatrix.file.sha256)}"))
    if imatrix.without_data:
        n = wording.many(len(imatrix.without_data), "tensor")
        found.append(Markdown(f"Without data in the importance matrix: {n}, quantised as if all inputs were equally important"))
    return found


def _source(each: CalibrationSource) -> Markdown:
    share = [wording.percent(each.share, 0)] if each.share is not None else []
    return inline(f"{each.name} ({', '.join([each.licence or 'licence unknown', *share])})")
