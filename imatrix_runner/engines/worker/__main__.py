"""The worker process: one job as its argument (or in ``@FILE``), replies on stdout, llama.cpp's own output on stderr."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from imatrix_runner.engines.audit_jobs import AuditJob
from imatrix_runner.engines.cost_jobs import RoundingErrorsJob, TrialsJob
from imatrix_runner.engines.covariance_jobs import CovarianceJob
from imatrix_runner.engines.jobs import CheckJob, CollectJob, PassJob
from imatrix_runner.engines.measures import AnswerJob, MeasureJob, ReferenceJob
from imatrix_runner.engines.protocol import (
    CountTokensJob,
    DryRunsJob,
    Failed,
    Job,
    PreparePassJob,
    ProbeJob,
    Reply,
    Send,
    TokeniseJob,
    decode_job,
    encode,
)
from imatrix_runner.engines.speed_jobs import SpeedJob
from imatrix_runner.engines.task_jobs import TaskJob
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.errors import RunnerError

FUNCTIONS: Mapping[type[Job], str] = {
    ProbeJob: "abi_check.prove",
    CountTokensJob: "tokens.count_tokens",
    TokeniseJob: "tokens.tokenise",
    CollectJob: "collect.collect_job.collect",
    CovarianceJob: "collect.covariance_job.collect_covariances",
    ReferenceJob: "evaluate.measure_job.write_reference",
    MeasureJob: "evaluate.measure_job.measure",
    AnswerJob: "generate.answer_job.answer_prompts",
    TaskJob: "tasks.task_job.compute_tasks",
    DryRunsJob: "quantize.llama_quantize.dry_runs",
    PassJob: "quantize.pass_job.single_pass",
    PreparePassJob: "quantize.pass_job.prepare_pass",
    CheckJob: "quantize.check_rows.check_rows",
    RoundingErrorsJob: "cost.errors_job.rounding_errors",
    TrialsJob: "cost.trials_job.measure_trials",
    AuditJob: "audit.audit_job.audit_tensors",
    SpeedJob: "speed.speed_job.measure_speed",
}
"""Job -> module in this package and function in it that does the job: it sends replies, or raises a :class:`Refusal`.

A worker imports its own job's module only: all of them take longer than a small job itself.
"""


def function_of(kind: type[Job]) -> Callable[[Any, Send], None]:
    """The function that does jobs of this kind."""
    module, _, name = FUNCTIONS[kind].rpartition(".")
    function: Callable[[Any, Send], None] = getattr(import_module(f"imatrix_runner.engines.worker.{module}"), name)
    return function


def main() -> int:
    # Native code may print to stdout: replies get a descriptor of their own.
    replies = os.dup(1)
    os.dup2(2, 1)

    lock = threading.Lock()

    def send(reply: Reply) -> None:
        line = encode(reply) + b"\n"
        with lock, suppress(BrokenPipeError):  # the parent is dead: stdin ends as well, and the job stops
            while line:
                line = line[os.write(replies, line) :]

    argument = sys.argv[1]
    job = decode_job(Path(argument[1:]).read_text(encoding="utf-8") if argument.startswith("@") else argument)
    try:
        function_of(type(job))(job, send)
    except Refusal as refusal:
        send(refusal.reply)
        return refusal.reply.exit_code
    except RunnerError as error:  # from modules below the engines, such as readers of files
        send(Failed(error.what, error.why, error.todo, error.exit_code))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
