"""Source and levels of a workspace answer somebody's prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imatrix_runner.context.context import Session, settle
from imatrix_runner.context.engine_choice import EngineNeeds
from imatrix_runner.context.open_model import Frozen, freeze
from imatrix_runner.context.requests import EnvironmentRequest
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.errors import InvalidDataError, RunnerError, UsageError
from imatrix_runner.evaluate.answer_agreement import SHOWN, DomainResult
from imatrix_runner.evaluate.measurements import answered, content_of, levels_made
from imatrix_runner.evaluate.prompt_answers import DomainRequest, answer_levels
from imatrix_runner.events import Event, Finished, Notice, Progress, Started, ignore
from imatrix_runner.journal import Journal
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.workspace import Workspace
from support.answers import OPTIONS
from support.command_line import run_command
from support.dialogues import TEMPLATE

LEVELS = ("Q8_0", "Q2_K")
ASKED = [{"prompt": f"def {name}("} for name in ("main", "get", "__init__", "read", "parse", "close", "run", "test_it", "walk")]


@dataclass
class Bench:
    """A workspace with levels, and what was told while they answered."""

    session: Session
    frozen: Frozen
    prompts: Path
    events: list[Event]

    @property
    def folder(self) -> Path:
        return self.session.workspace.evaluation

    def levels(self, names: Sequence[str] = LEVELS) -> list[tuple[str, Path, str]]:
        made, root = levels_made(self.session.journal), self.session.workspace.root
        return [(name, root / made[name].outputs[0].name, content_of(made[name])) for name in names]

    def answer(
        self, names: Sequence[str] = LEVELS, *, n_predict: int = 24, again: bool = False
    ) -> dict[str, DomainResult | RunnerError]:
        self.events.clear()
        request = DomainRequest(self.prompts, n_predict, OPTIONS, again=again)
        self.folder.mkdir(exist_ok=True)
        return answer_levels(request, self.frozen, self.levels(names), self.session, self.folder)

    @property
    def computed(self) -> list[str]:
        """The steps for which an engine answered."""
        return list(
            dict.fromkeys(event.step for event in self.events if isinstance(event, Progress) and event.step != "prompts")
        )


def make(model: Path, folder: Path) -> Path:
    """A workspace with both levels."""
    done = run_command("run", model, "--imatrix", "none", "--levels", ",".join(LEVELS), "-q", cwd=folder)
    assert done.code == 0, done.err
    return next((folder / "work").iterdir())


def bench(model: Path, root: Path) -> Bench:
    workspace = Workspace(root, root.name)
    machine, choice = settle(EnvironmentRequest(root.parent), EngineNeeds(), ignore)
    runner, events = Runner(), list[Event]()
    session = Session(workspace, Journal(workspace.journal), machine, choice.make(runner), runner, events.append, False)
    prompts = root.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(each) + "\n" for each in ASKED), encoding="utf-8")
    return Bench(session, freeze(open_gguf(model, allow_requantize=False, name=root.name), session), prompts, events)


@pytest.fixture(scope="module")
def made(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(demo_model, tmp_path_factory.mktemp("made"))


@pytest.fixture
def demo(demo_model: Path, made: Path, tmp_path: Path) -> Bench:
    return bench(demo_model, Path(shutil.copytree(made, tmp_path / "work" / made.name)))


def results(found: dict[str, DomainResult | RunnerError]) -> list[DomainResult]:
    assert all(isinstance(result, DomainResult) for result in found.values())
    return [result for result in found.values() if isinstance(result, DomainResult)]


def test_levels_answer_once_and_again_only_for_a_reason(demo: Bench) -> None:
    first = demo.answer()
    fine, coarse = results(first)
    assert list(first) == list(LEVELS)
    assert (fine.n_prompts, fine.n_predict, len(fine.pairs)) == (9, 24, 9)
    assert fine.shared > coarse.shared
    assert fine.agreement_mean > coarse.agreement_mean
    assert [pair.prompt for pair in fine.pairs] == [each["prompt"] for each in ASKED]
    assert all(one.source == other.source for one, other in zip(fine.pairs, coarse.pairs, strict=True))
    assert demo.computed == ["answer source", "answer Q8_0", "answer Q2_K"]
    started = [event for event in demo.events if isinstance(event, Started) and event.step.startswith("answer")]
    assert {(event.total, event.unit) for event in started} == {(9, "prompts")}
    assert sum(isinstance(event, Finished) for event in demo.events) == sum(isinstance(event, Started) for event in demo.events)

    assert demo.answer() == first
    assert demo.events == []
    assert answered(Journal(demo.session.journal.path)) == first

    (demo.folder / "Q2_K.answers").unlink()
    assert demo.answer(again=True) == first
    assert len(demo.computed) == 3

    demo.answer(n_predict=8)
    assert demo.session.journal["answer Q8_0"].reason == "changed: options"
    demo.prompts.write_text('"Return the"\n', encoding="utf-8")
    [result, _] = results(demo.answer(n_predict=8))
    assert demo.session.journal["answer Q8_0"].reason == "changed: prompts"
    assert result.n_prompts == 1


def test_one_level_more_does_not_ask_the_source_again(demo: Bench) -> None:
    demo.answer(["Q8_0"])
    both = demo.answer()
    assert demo.computed == ["answer Q2_K"]
    assert list(both) == list(LEVELS)


def test_hundreds_of_prompts(demo: Bench) -> None:
    demo.prompts.write_text("".join(f'"def f{number}("\n' for number in range(300)), encoding="utf-8")
    [result] = results(demo.answer(["Q2_K"], n_predict=4))
    assert (result.n_prompts, len(result.pairs)) == (300, SHOWN)


def test_a_level_that_cannot_answer_does_not_keep_the_others_from_it(demo: Bench) -> None:
    [(_, file, _)] = demo.levels(["Q8_0"])
    file.write_bytes(file.read_bytes()[:100_000])
    found = demo.answer()
    assert isinstance(found["Q8_0"], RunnerError)
    assert isinstance(found["Q2_K"], DomainResult)
    assert [event.step for event in demo.events if isinstance(event, Finished) and event.status == "failed"] == ["answer Q8_0"]
    assert "answer Q8_0" not in demo.session.journal.steps()


def test_without_a_template_it_is_said_how_prompts_are_read(demo: Bench) -> None:
    demo.answer(["Q8_0"], n_predict=2)
    told = [event.text for event in demo.events if isinstance(event, Notice)]
    assert told == ["demo-model has no chat template: it goes on from each prompt as plain text."]
    assert json.loads((demo.folder / "prompts.jsonl").read_text().splitlines()[0]) == {
        "text": "def main(",
        "parse_special": False,
    }


def test_a_chat_model_is_asked_in_its_own_format(chat_model: Path, tmp_path: Path) -> None:
    chat = bench(chat_model, make(chat_model, tmp_path))
    rows = [{"prompt": "Why?"}, {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Why?"}]}]
    chat.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    [result] = results(chat.answer(["Q8_0"], n_predict=4))
    assert [pair.prompt for pair in result.pairs] == ["Why?", "system: Brief.\nuser: Why?"]
    written = [json.loads(line) for line in (chat.folder / "prompts.jsonl").read_text().splitlines()]
    assert [each["parse_special"] for each in written] == [True, True]
    assert written[0]["text"].endswith("user\nWhy?</s>\n")
    assert written[1]["text"].count("</s>") == 2
    template = tmp_path / "other.jinja"
    template.write_text(TEMPLATE.replace("user", "human"), encoding="utf-8")
    request = DomainRequest(chat.prompts, 4, OPTIONS, chat_template=template)
    with pytest.raises(InvalidDataError, match="cannot be written down for this model"):
        answer_levels(request, chat.frozen, chat.levels(["Q8_0"]), chat.session, chat.folder)


def test_the_binaries_engine_is_refused(demo: Bench) -> None:
    _, choice = settle(EnvironmentRequest(engine="binaries"), EngineNeeds(), ignore)
    demo.session = replace(demo.session, engine=choice.make(Runner()))
    assert not isinstance(demo.session.engine, EmbeddedEngine)
    with pytest.raises(UsageError, match="embedded engine"):
        demo.answer()
