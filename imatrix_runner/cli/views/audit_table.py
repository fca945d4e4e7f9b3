"""An audit for people, and as a document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imatrix_runner.app.audit import AuditResult
from imatrix_runner.audit.audit_file import Audit
from imatrix_runner.audit.verdicts import AuditedTensor
from imatrix_runner.cli.views.json_documents import document
from imatrix_runner.engines.audit_jobs import WITHOUT

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    "identical": "green",
    "identical without imatrix": "green",
    "another matrix": "yellow",
    "another quantiser": "yellow",
    "damaged": "bold red",
    "another source": "bold red",
}
_MOST_ROWS = 12


def print_audit(result: AuditResult, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    audit = result.audit
    style = _STYLES[audit.verdict]
    line = Text(f"{audit.file.path.name}: ")
    line.append(audit.verdict, style=style)
    console.print(line.append(f"  ({_how(audit)})"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("Verdict", "Tensors"):
        table.add_column(heading, no_wrap=True)
    for verdict, count in audit.counts.items():
        table.add_row(Text(verdict, style=_STYLES[verdict]), str(count))
    console.print(table)
    odd = [tensor for tensor in audit.tensors if tensor.why or tensor.verdict == "another matrix"]
    for tensor in odd[:_MOST_ROWS]:
        console.print(Text(f"  {tensor.name} ({tensor.findings.type}): {_why(tensor, audit)}", style=_STYLES[tensor.verdict]))
    if len(odd) > _MOST_ROWS:
        console.print(f"  … and {len(odd) - _MOST_ROWS} more (--json lists all)")
    for finding in audit.metadata:
        console.print(Text(f"Metadata, {finding.kind}: {finding.what}.", style="bold red" if finding.serious else ""))
    if not audit.full and audit.share < 1:
        console.print("Only some rows of each tensor were compared; --full compares all.")
    if result.proven is not None:
        console.print(Text(f"The attestation is true: {result.proven.file.name} was made again, with the same SHA-256."))
    if result.attested is not None:
        console.print(Text(f"Attested: {result.attested}"))


def _how(audit: Audit) -> str:
    share = "all rows" if audit.full or audit.share >= 1 else f"{100 * audit.share:.2g} % of the weights"
    matrix = f"imatrix {audit.made_with.name}" if audit.made_with is not None else "without imatrix"
    rounding = f", rounding {audit.declared.rounding}" if audit.declared.rounding != "stock" else ""
    return f"{matrix}{rounding}; {share}, {audit.seconds:.1f} s"


def _why(tensor: AuditedTensor, audit: Audit) -> str:
    if tensor.verdict == "another matrix" and tensor.matrix is not None and tensor.matrix != WITHOUT:
        return f"made with {audit.matrices[tensor.matrix].name}"
    return tensor.why


def audit_document(result: AuditResult) -> dict[str, Any]:
    audit = result.audit
    names = [matrix.name for matrix in audit.matrices]
    return document(
        "audit",
        exit_code=audit.exit_code,
        file=str(audit.file.path),
        source=str(audit.source.path),
        verdict=audit.verdict,
        full=audit.full or audit.share >= 1,
        share=round(audit.share, 6),
        imatrix=audit.made_with.name if audit.made_with is not None else None,
        counts=dict(audit.counts),
        candidates=[
            {"name": each.name, "path": str(each.path), "place": each.place, "sha256": each.sha256} for each in audit.matrices
        ],
        declared={
            "imatrix": audit.declared.imatrix or None,
            "dataset": audit.declared.dataset or None,
            "entries": audit.declared.entries,
            "chunks": audit.declared.chunks,
            "rounding": audit.declared.rounding,
        },
        metadata=[{"kind": each.kind, "what": each.what, "serious": each.serious} for each in audit.metadata],
        tensors=[_tensor(tensor, names) for tensor in audit.tensors],
        attestation=str(result.attested) if result.attested is not None else None,
        proven=result.proven is not None,
        seconds=round(audit.seconds, 3),
    )


def _tensor(tensor: AuditedTensor, names: list[str]) -> dict[str, Any]:
    found = tensor.findings
    best = max((each.equal_rows for each in found.candidates), default=0)
    return {
        "name": found.name,
        "type": found.type,
        "source_type": found.source_type,
        "verdict": tensor.verdict,
        "why": tensor.why,
        "imatrix": names[tensor.matrix] if tensor.matrix is not None and tensor.matrix != WITHOUT else None,
        "rounding": tensor.rounding,
        "rows": found.rows,
        "of_rows": found.n_rows,
        "equal_rows": best,
        "invalid_rows": found.invalid_rows,
        "error_ratio": tensor.error_ratio,
    }
