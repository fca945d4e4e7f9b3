"""Runs a request of ``run``, ``quantize``, ``demo`` or ``imatrix generate`` and prints plan and result."""

from __future__ import annotations

from imatrix_runner.cli.options import TalkOptions
from imatrix_runner.cli.work import at_work, stay_offline
from imatrix_runner.context.requests import RunRequest
from imatrix_runner.errors import SomeLevelsFailedError


def perform(request: RunRequest, talk: TalkOptions, *, dry_run: bool, offline: bool = False) -> int:
    """The exit code is 0, 4 when not all is on the hub that should be, or 100 when levels failed."""
    from imatrix_runner.app.run import run
    from imatrix_runner.cli.views.console import stderr_console, stdout_console
    from imatrix_runner.cli.views.failures import print_error
    from imatrix_runner.cli.views.json_documents import print_document, run_document
    from imatrix_runner.cli.views.plan_table import print_failures, print_plan, print_result
    from imatrix_runner.quantize.plan import Plan

    stay_offline(offline)
    with at_work(talk) as work:

        def show(plan: Plan) -> None:
            if not dry_run:
                print_plan(plan, work.console)

        result = run(request, work.context, dry_run=dry_run, on_plan=show)
    unmeasured = result.evaluated.failed if result.evaluated is not None else {}
    failed = bool(result.plan.failing if dry_run else result.failed) or bool(unmeasured)
    code = SomeLevelsFailedError.exit_code if failed else 0
    code = result.unpublished.exit_code if result.unpublished is not None else code
    if talk.as_json:
        print_document(run_document(result, code))
    elif dry_run:
        print_plan(result.plan, stdout_console())
    elif talk.quiet:
        print_failures(result, stderr_console())
    else:
        print_result(result, stdout_console())
    if result.unpublished is not None:
        print_error(result.unpublished, stderr_console())
    return code
