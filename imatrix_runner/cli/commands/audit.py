"""``audit``: whether a quantised file is what llama-quantize makes of its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from imatrix_runner.cli.command import command
from imatrix_runner.cli.invocation import Invocation
from imatrix_runner.cli.option_fields import argument, listed, option, setting
from imatrix_runner.cli.options import TalkOptions, WorkDirOptions
from imatrix_runner.cli.types import FILE
from imatrix_runner.cli.work import at_work, print_result

_WHAT = "What to audit"


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    file: Path = argument(type=FILE)
    source: str = option(
        "--source", required=True, metavar="MODEL", section=_WHAT, help="The model that it was made from: F32, F16 or BF16."
    )
    imatrix: Path | None = option(
        "--imatrix", type=FILE, metavar="FILE", section=_WHAT, help="The imatrix that it should be made with (default: found)."
    )
    full: bool = setting("--full", is_flag=True, section=_WHAT, help="Compare every row, not some of each tensor.")
    attestation: Path | None = option(
        "--attestation", type=FILE, metavar="FILE", section=_WHAT, help="Check this attestation, of ggufpacker or of audit."
    )
    attest: Path | None = option(
        "--attest",
        type=FILE,
        metavar="OUT",
        section=_WHAT,
        help="Make the file again, and write an attestation if it is the same.",
    )
    place: WorkDirOptions = listed(_WHAT)
    threads: int | None = setting(
        "-t", "--threads", type=click.IntRange(min=1), metavar="N", section=_WHAT, help="CPU threads (default: all)."
    )
    talk: TalkOptions


@command(
    AuditOptions,
    examples=(
        "imatrix-runner audit model-Q4_K_M.gguf --source model-BF16.gguf",
        "imatrix-runner audit model-Q4_K_M.gguf --source model-BF16.gguf --imatrix imatrix.gguf --full",
    ),
)
def audit(invocation: Invocation, options: AuditOptions) -> int:
    """Compare the quantised FILE with what llama-quantize makes of its source, tensor by tensor, and its metadata.

    Each tensor is identical, identical without imatrix, made with another matrix, by another quantiser, damaged, or of another
    source. Exit code 0 if all is as the file declares, 100 if some tensors or the metadata differ, 6 if the file is damaged or
    was made from another source.
    """
    from imatrix_runner.app.audit import AuditRequest, audit_file
    from imatrix_runner.cli.views.audit_table import audit_document, print_audit
    from imatrix_runner.context.requests import EnvironmentRequest, SourceRequest

    request = AuditRequest(
        options.file,
        SourceRequest(options.source),
        EnvironmentRequest(options.place.work_dir, command=invocation.command),
        options.imatrix,
        options.full,
        options.attest,
        options.attestation,
        options.threads,
    )
    with at_work(options.talk) as work:
        result = audit_file(request, work.context)
    print_result(options.talk, lambda: audit_document(result), lambda console: print_audit(result, console))
    return result.audit.exit_code
