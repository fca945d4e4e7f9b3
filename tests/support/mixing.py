"""The parts that choose a mix, of a real session, without the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.context.context import Session, settle
from imatrix_runner.context.engine_choice import EngineNeeds
from imatrix_runner.context.open_model import freeze
from imatrix_runner.context.requests import EnvironmentRequest, LevelsRequest, MixRequest
from imatrix_runner.documents.corpus import open_corpus
from imatrix_runner.engines.jobs import CollectOptions, QuantizeOptions
from imatrix_runner.events import Sink, ignore
from imatrix_runner.files import sha256
from imatrix_runner.imatrix.formats import read
from imatrix_runner.journal import Journal
from imatrix_runner.mixes.measure_costs import CostMeasurement
from imatrix_runner.mixes.mix_problem import MixProblem, make_problem
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.steps import imatrix_input
from imatrix_runner.workspace import Workspace


@dataclass(frozen=True)
class Mixing:
    """``planner`` of a model's levels; ``imatrix``: a file that they are made with."""

    planner: LevelPlanner
    imatrix: Path

    @classmethod
    def of(cls, model: Path, imatrix: Path, folder: Path, *tensor_types: str, sink: Sink = ignore) -> Mixing:
        """In the workspace ``folder``; ``tensor_types`` as ``--tensor-type`` takes them."""
        workspace, runner = Workspace(folder, folder.name), Runner()
        machine, choice = settle(EnvironmentRequest(folder.parent, engine="embedded"), EngineNeeds(), sink)
        session = Session(workspace, Journal(workspace.journal), machine, choice.make(runner), runner, sink, False)
        workspace.logs.mkdir(parents=True, exist_ok=True)
        frozen = freeze(open_gguf(model, allow_requantize=False, name=folder.name), session)
        request = LevelsRequest(options=QuantizeOptions(tensor_types=tensor_types))
        return cls(LevelPlanner(request, frozen, session), imatrix)

    @property
    def input(self) -> str:
        """The imatrix as an input of levels."""
        return imatrix_input(self.imatrix.name, sha256(self.imatrix))

    def problem(self, types: Sequence[str] = ()) -> MixProblem:
        """With types as ``--types`` takes them; all without any."""
        request = replace(self.planner.request, mix=MixRequest(",".join(types)))
        return make_problem(replace(self.planner, request=request), read(self.imatrix), self.input, None)

    def measurement(self, text: Path, options: CollectOptions) -> CostMeasurement:
        planner, corpus = self.planner, open_corpus(text)
        engine = planner.session.engine
        assert engine.cost_meter is not None
        n_tokens = engine.count_tokens(planner.frozen.model.path, text, parse_special=False, log=None)
        return CostMeasurement(
            planner.frozen,
            planner.session,
            engine.cost_meter,
            read(self.imatrix),
            self.input,
            corpus,
            n_tokens // options.n_ctx,
            options,
            planner.request,
        )
