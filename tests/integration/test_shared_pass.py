"""A pass that several workers share, without a cluster: real worker processes that compute parts of it, and a pass that takes
them in. The bytes are those of one worker, which other tests compare with llama-quantize's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.ledger import Ledger, part_ledger, part_ledgers, read
from imatrix_runner.engines.jobs import LEDGER_NAME, PartEnd, PassedUnit, PassJob
from imatrix_runner.engines.pass_parts import LedgerEntry, PassPart, PassWork
from imatrix_runner.engines.pass_units import cut_units
from imatrix_runner.engines.roundings import REFINED
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError
from imatrix_runner.events import ignore
from imatrix_runner.process import Orders, Runner
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.llama_tools import BareTools
from support.passes import Passes, engine_of, set_floats, write_imatrix
from support.tiny_models import write_llama_gguf

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

LEVELS = ("Q4_K_M", "Q4_K_S", "IQ3_XXS", "Q8_0", "BF16")


@dataclass
class Part:
    """A worker's part in a thread: what it reported, how it ended, its process."""

    engine: EmbeddedEngine
    job: PassJob
    on_unit: Callable[[PassedUnit], bool] = lambda _unit: True
    orders: Orders | None = None
    units: list[PassedUnit] = field(default_factory=list)
    end: PartEnd | RunnerError | None = None
    pid: int = 0

    def __post_init__(self) -> None:
        runner = Runner(on_child=lambda pid, alive: setattr(self, "pid", pid if alive else self.pid))
        self._own = EmbeddedEngine(self.engine.bindings, runner, cache_dir())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        def on_unit(unit: PassedUnit) -> bool:
            self.units.append(unit)
            return self.on_unit(unit)

        try:
            self.end = self._own.pass_part(self.job, ignore, on_unit, self.orders)
        except RunnerError as error:
            self.end = error

    def join(self) -> Part:
        self._thread.join(120)
        assert self.end is not None
        return self


@dataclass(frozen=True)
class Shared:
    """One model's levels, made by one worker (``alone``) and by several."""

    passes: Passes
    model: Path
    imatrix: Path
    alone: Mapping[str, list[str]]

    def plan(self, folder: Path, levels: Sequence[str] = LEVELS) -> PassJob:
        return self.passes.plan(self.model, levels, folder, imatrix=self.imatrix, threads=1)

    def units(self, job: PassJob, n_workers: int = 3) -> tuple[tuple[tuple[PassWork, ...], ...], int]:
        prepared = self.passes.engine.prepare_pass(job)
        return cut_units(prepared.works, n_workers, least=1 << 21), prepared.slab

    def part(self, job: PassJob, part: PassPart, on_unit: Callable[[PassedUnit], bool] = lambda _unit: True) -> Part:
        return Part(self.passes.engine, replace(job, part=part), on_unit, Orders() if part.ordered else None)

    def finish(self, job: PassJob) -> dict[str, int]:
        """The pass of one worker; returns how many tensors of each level it did not have to make."""
        made = self.passes.run(job)
        assert made.spoiled == {}
        assert made.digests == self.alone
        for level in job.levels:
            assert part_ledgers(level.job.out.parent) == []
        return {name: level.kept for name, level in made.levels.items()}


def make_shared(passes: Passes, model: Path, folder: Path) -> Shared:
    shared = Shared(passes, model, write_imatrix(folder / "imatrix.gguf", model), {})
    return replace(shared, alone=passes.run(shared.plan(folder / "alone")).digests)


@pytest.fixture(scope="module")
def passes(toolchain: Toolchain, tools: BareTools) -> Passes:
    return Passes(engine_of(toolchain), tools)


@pytest.fixture(scope="module")
def shared(passes: Passes, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    model = write_llama_gguf(folder / "m-BF16.gguf", hidden=256, layers=3, ff=512, vocab=1000)
    return make_shared(passes, model, folder)


def write_entry(folder: Path, entry: LedgerEntry, data: bytes) -> None:
    """What a caller does with a pair that another machine computed."""
    with sorted(folder.glob("*.gguf"))[entry.file].open("r+b") as handle:
        handle.seek(entry.offset)
        handle.write(data)
    found = read(folder / LEDGER_NAME)
    assert found is not None
    ledger = Ledger(part_ledger(folder, "caller"), found[0])
    ledger.append([entry])
    ledger.close()


def entries_of(part: Part) -> int:
    return sum(len(pair.entries) for unit in part.units for pair in unit.written)


def test_workers_write_into_the_same_outputs(shared: Shared, tmp_path: Path) -> None:
    job = shared.plan(tmp_path)
    units, slab = shared.units(job)
    assert len(units) > 6
    workers = [shared.part(job, PassPart(f"w{rank}", units[rank::3], slab)) for rank in range(3)]
    for worker in workers:
        assert worker.join().end == PartEnd(None)
        assert [unit.number for unit in worker.units] == list(range(len(worker.job.part.units if worker.job.part else ())))
    for level in job.levels:
        assert level.job.out.read_bytes()[:4] == b"\0\0\0\0"  # not finished by any of them
    kept = shared.finish(job)
    assert sum(kept.values()) == sum(map(entries_of, workers))


def test_a_killed_worker_loses_nothing_that_it_recorded(shared: Shared, tmp_path: Path) -> None:
    """Another one computes its units again, over the same places; the order is that of the orders."""
    job = shared.plan(tmp_path)
    units, slab = shared.units(job)
    part = PassPart("first", units, slab, ordered=True)
    begun = threading.Event()
    victim = shared.part(job, part, lambda unit: bool(begun.set()) or True)
    assert victim.orders is not None
    for number in (2, 0, 1):
        victim.orders.give(number)
    assert begun.wait(60)
    os.kill(victim.pid, signal.SIGKILL)
    assert isinstance(victim.join().end, EngineError)
    assert victim.units[0].number == 2
    ledgers = [read(path) for level in job.levels for path in part_ledgers(level.job.out.parent)]
    assert sum(len(found[1]) for found in ledgers if found is not None) >= entries_of(victim)

    heir = shared.part(job, replace(part, name="second"), lambda unit: unit.number != 3)
    assert heir.orders is not None
    for number in (2, 0, 3):
        heir.orders.give(number)
    assert heir.join().end == PartEnd(None)
    assert [unit.number for unit in heir.units] == [2, 0, 3]
    kept = shared.finish(job)
    assert sum(kept.values()) >= entries_of(heir)


def test_what_one_machine_began_others_go_on_with(shared: Shared, tmp_path: Path) -> None:
    """An interrupted pass of one worker, then parts of what is left, then one worker again."""
    begun = shared.plan(tmp_path, LEVELS[:1])
    shared.passes.run(begun)
    (level,) = begun.levels
    with level.job.out.open("r+b") as handle:
        handle.write(b"\0\0\0\0")
    job = shared.plan(tmp_path)
    units, slab = shared.units(job, 2)
    wanted = {place.level for unit in units for work in unit for pair in work.pairs for place in pair.places}
    assert wanted == {"Q4_K_S", "IQ3_XXS", "Q8_0"}  # Q4_K_M is there, BF16 is the model's own type
    (worker,) = [shared.part(job, PassPart("w", units[1:], slab)).join()]
    kept = shared.finish(job)
    assert kept["Q4_K_M"] == len(level.tensors)
    assert sum(kept.values()) == len(level.tensors) + entries_of(worker)


def test_pairs_that_return_in_scratch_files(shared: Shared, tmp_path: Path) -> None:
    """As from a machine without a shared folder: each pair once, and the caller writes it to every output that wants it."""
    job = shared.plan(tmp_path / "outputs")
    units, slab = shared.units(job, 2)
    elsewhere = replace(
        job,
        levels=tuple(
            replace(level, job=replace(level.job, out=tmp_path / "none" / level.name / "x.gguf")) for level in job.levels
        ),
    )
    parts = [
        shared.part(elsewhere, PassPart(f"w{rank}", units[rank::2], slab, scratch=tmp_path / f"scratch{rank}"))
        for rank in range(2)
    ]
    n_bytes = 0
    for part in parts:
        assert part.join().end == PartEnd(None)
        for unit in part.units:
            assert unit.scratch is not None
            content = unit.scratch.read_bytes()
            n_bytes += len(content)
            for pair in unit.written:
                for name, entry in pair.entries.items():
                    write_entry(tmp_path / "outputs" / name, entry, content[pair.offset : pair.offset + entry.bytes])
    assert not (tmp_path / "none").exists()
    kept = shared.finish(job)
    assert sum(kept.values()) == sum(map(entries_of, parts))
    total = sum(path.stat().st_size for level in job.levels for path in level.job.out.parent.glob("*.gguf"))
    assert n_bytes < total  # what Q4_K_M and Q4_K_S share came once


def test_shards_and_other_roundings(shared: Shared, tmp_path: Path) -> None:
    """Levels in several files, and one whose numbers are searched further: the same as of one worker."""
    folder = tmp_path / "alone"

    def changed(folder: Path) -> PassJob:
        job = shared.plan(folder, ("Q4_K_M", "Q5_K_S"))
        cut, searched = job.levels
        count = len(cut.tensors)
        cut = replace(cut, job=replace(cut.job, shards=(4, count - 6, 2)))
        refined = [replace(each, rounding=REFINED) if each.type.lower() == "q5_k" else each for each in searched.tensors]
        return replace(job, levels=(cut, replace(searched, tensors=tuple(refined))))

    alone = shared.passes.run(changed(folder))
    assert [len(files) for files in alone.digests.values()] == [3, 1]
    both = replace(shared, alone=alone.digests)
    job = changed(tmp_path / "parts")
    units, slab = both.units(job, 2)
    for worker in [both.part(job, PassPart(f"w{rank}", units[rank::2], slab)) for rank in range(2)]:
        assert worker.join().end == PartEnd(None)
    kept = both.finish(job)
    assert sum(kept.values()) > 20


def test_a_level_that_cannot_be_made_costs_only_itself(shared: Shared, tmp_path: Path) -> None:
    """The worker tells why, and the pass that takes in the others' tensors ends with the same reason."""
    model = shutil.copy(shared.model, tmp_path / "m-BF16.gguf")
    set_floats(model, "blk.1.ffn_up.weight", [float("nan")])
    job = shared.passes.plan(model, ("Q8_0", "Q4_0"), tmp_path / "out", threads=1)
    units, slab = shared.units(job, 1)
    (worker,) = [shared.part(job, PassPart("w", units, slab)).join()]
    assert worker.end == PartEnd(None)
    told = {(lost.name, lost.tensor) for lost in worker.units[-1].spoiled}
    assert told == {("Q8_0", "blk.1.ffn_up.weight"), ("Q4_0", "blk.1.ffn_up.weight")}
    made = shared.passes.run(job)
    assert {tensor for tensor, _ in made.spoiled.values()} == {"blk.1.ffn_up.weight"}
    assert {why for _, why in made.spoiled.values()} == {lost.why for lost in worker.units[-1].spoiled}


@pytest.mark.parametrize("trouble", ["nothing prepared", "another level", "another model"])
def test_what_was_not_prepared_is_not_written(trouble: str, shared: Shared, tmp_path: Path) -> None:
    job = shared.plan(tmp_path / "out", ("Q8_0",))
    units, slab = shared.units(job, 1)
    (level,) = job.levels
    if trouble == "nothing prepared":
        shutil.rmtree(level.job.out.parent)
    elif trouble == "another level":
        job = replace(job, levels=(replace(level, fingerprint="another"),))
    else:
        other = write_llama_gguf(tmp_path / "other-BF16.gguf", hidden=256, layers=3, ff=256, vocab=1000)
        job = replace(job, sources=(other,))
    (worker,) = [shared.part(job, PassPart("w", units, slab)).join()]
    assert isinstance(worker.end, InvalidDataError)
    assert worker.units == []
