"""The options of measuring, for ``evaluate`` and for what comes at the end of ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from imatrix_runner.cli.options import together
from imatrix_runner.cli.settings import setting, typed
from imatrix_runner.cli.types import SIZE
from imatrix_runner.events import no_effect
from imatrix_runner.workflow.request import MeasureRequest

_FILE = click.Path(path_type=Path, dir_okay=False)
_TEXT = click.Path(path_type=Path)  # a folder is refused with the command that makes a text of it

measure_options = together(
    setting(
        "--text",
        "held_out",
        type=_TEXT,
        metavar="HELD_OUT",
        help="Text to measure on; nothing of it may be in the calibration text (default: a shipped one).",
    ),
    setting("--max-disk", type=SIZE, help="Most that the measurement's own files may take at a time (default: 8GiB)."),
    setting("--ab", is_flag=True, help="Measure each level without imatrix too, and say whether it was worth it."),
    setting(
        "--domain",
        type=_FILE,
        metavar="PROMPTS",
        help="Prompts that the source and each level answer, to read side by side (JSON lines or text).",
    ),
    setting(
        "--predict",
        type=click.IntRange(1, 4096),
        metavar="N",
        default=128,
        show_default=True,
        help="Tokens of an answer at most.",
    ),
    setting(
        "--chat-template-file",
        "domain_template",
        type=_FILE,
        metavar="FILE",
        help="Chat template for these prompts (default: the model's own).",
    ),
    setting(
        "--target-kld",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="Name the smallest level with a mean KLD of at most X.",
    ),
    setting("--target-size", type=SIZE, help="Name the best level of at most this size."),
)


def unused_measure_options(given: dict[str, Any], *, measured: bool) -> tuple[str, ...]:
    """A warning for options that were given by hand and need another one; ``measured``: whether anything will be measured."""
    warnings = []
    if not measured and (unused := typed("max_disk")):
        warnings.append(no_effect(unused, "nothing is measured without --evaluate."))
    if given.get("base") is not None and (unused := typed("ctx_size")):
        warnings.append(no_effect(unused, "the file of log-probabilities was written with chunks of its own length."))
    if given["domain"] is None and (unused := typed("predict", "domain_template")):
        warnings.append(no_effect(unused, "nothing is answered without --domain."))
    return tuple(warnings)


def measure_request(given: dict[str, Any], **changes: Any) -> MeasureRequest:
    values = {
        "text": given["held_out"],
        "max_disk": given["max_disk"],
        "twins": given["ab"],
        "domain": given["domain"],
        "n_predict": given["predict"],
        "chat_template": given["domain_template"],
        "target_kld": given["target_kld"],
        "target_size": given["target_size"],
    }
    return MeasureRequest(**{**values, **changes})
