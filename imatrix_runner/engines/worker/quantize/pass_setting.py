"""What every worker of a pass stands on: the library, the model, the weights, how many threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from imatrix_runner.engines.files.imatrix_weights import ImatrixValues, Values
from imatrix_runner.engines.jobs import PassedLevel, PassJob
from imatrix_runner.engines.protocol import Passed, Send
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.llama_context import usable_cpus
from imatrix_runner.engines.worker.quantize import llama_quantize
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceHeader
from imatrix_runner.engines.worker.quantize.native_kernels import prepare
from imatrix_runner.engines.worker.quantize.output_files import allow_open_files
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import RowRounder
from imatrix_runner.engines.worker.quantize.slabs import SLAB, Doing, Spent, Worker
from imatrix_runner.engines.worker.quantize.work_list import Work
from imatrix_runner.errors import EngineError


@dataclass
class PassSetting:
    """``weights``: by level, what its options leave of the imatrix; ``slab``: elements of a slab, where the job does not give
    them."""

    job: PassJob
    library: Library
    kernels: Kernels
    source: SourceHeader
    weights: Mapping[str, ImatrixValues | None]
    threads: int
    slab: int
    rounder: RowRounder
    send: Send
    doing: Doing = field(default_factory=dict)

    @classmethod
    def of(cls, job: PassJob, send: Send) -> PassSetting:
        allow_open_files()  # each thread reads shards of the source and of donors, and every shard of every level is open
        # ggml builds its tables with OpenMP, whose threads would otherwise spin against each other on a busy machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        library = load()
        kernels = Kernels(library)
        source = SourceHeader.open(job.sources, kernels)
        weights = {level.name: llama_quantize.chosen_weights(job.imatrix, level.job.options) for level in job.levels}
        threads = max(1, job.threads or usable_cpus())
        rounder = RowRounder(kernels, job.native, job.covariances, threads)
        slab = job.part.slab if job.part is not None else _slab(job.buffer_bytes, threads)
        return cls(job, library, kernels, source, weights, threads, slab, rounder, send)

    @property
    def values(self) -> dict[str, Mapping[bytes, Values]]:
        """The values of :attr:`weights` by level; empty for one that is made without."""
        return {name: chosen.values if chosen is not None else {} for name, chosen in self.weights.items()}

    def prepare(self, works: Collection[Work]) -> float:
        """Make the kernels ready for the types that are computed; returns the seconds."""
        llama_quantize.on_abort(self.library, self._aborting)
        parts = [part for work in works for part in work.parts if work.computes(part)]
        seconds = prepare(self.kernels, self.job.native, {(part.kind, part.weighted) for part in parts})
        began = time.monotonic()
        self.rounder.prepare({(part.kind, part.rounding) for part in parts})
        return seconds + time.monotonic() - began

    def serve(self, works: Sequence[Work], spent: Sequence[Spent], serve: Callable[[Worker], None]) -> None:
        """Call ``serve`` in every thread, each with a worker that can process any of ``works``, and wait for all of them.
        ``spent``: one for each thread. Raises the first error."""
        errors: list[BaseException] = []
        workers = [Worker(self.source, works, self.kernels, self.rounder, self.doing, each) for each in spent]

        def run(worker: Worker) -> None:
            try:
                serve(worker)
            except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                errors.append(error)
            finally:
                worker.close()

        threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _aborting(self, message: bytes) -> None:
        """Handle a failed assertion of ggml, after which the process must end: send which levels it spoils. The others continue
        in another worker, from their ledgers."""
        llama_quantize.write(message + b"\n")
        doing = self.doing.get(threading.get_ident())
        if doing is None:
            return
        work, part = doing
        reason = message.decode("utf-8", "replace").strip().rpartition(": ")[2]
        why = f"ggml aborted while quantising it to {part.kind.name}: {reason}"
        for output, _ in part.alive:
            self.send(Passed(PassedLevel(output.level.name, work.name, why)))
        os._exit(EngineError.exit_code)


def _slab(buffer_bytes: int, threads: int) -> int:
    """Elements of a slab; fewer than :data:`SLAB` only if the bound on memory requires it (12 bytes per element: source,
    float32 and quantised data)."""
    return min(SLAB, max(1, buffer_bytes // (12 * threads)))
