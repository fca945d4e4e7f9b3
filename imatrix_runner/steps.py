"""The ids of steps, under which the journal keeps its records: built and parsed only here.

The content of each kind of record is a type in the package that does the step: inputs (:class:`Inputs`) that decide the step,
and facts for later steps and reports. :class:`~imatrix_runner.journal.StepRecord` writes them, and refuses others when it
reads.

=========== ======================= ==============================================================================
kind        id                      what was done
=========== ======================= ==============================================================================
convert     ``convert bf16``        the source became a GGUF of this type
imatrix     ``imatrix``             an imatrix was collected into its usual place (``imatrix PATH``: to another)
range       ``imatrix-…``           a range of chunks, in workspaces of before there were checkpoints
snapshot    ``snapshot PATH``       the imatrix of the first chunks was left on the way
costs       ``costs``               what rounding each tensor costs was measured
mix         ``mix MIX@4.25bpw``     the types of a mix were chosen
covariances ``covariances``         the covariances of the model's inputs were collected
rounding    ``rounding FEEDBACK-…`` a level's rounding was compared with llama-quantize's
level       ``level-Q4_K_M``        a level was made
reference   ``reference 0-64``      the source computed these chunks of the text that is measured on
evaluate    ``evaluate Q4_K_M``     a level was measured
compare     ``compare Q4_K_M``      a level was compared with one made without imatrix
alone       ``alone Q4_K_M``        why a level has nothing to be compared with
against     ``against MIX-…``       a mix was compared with stock levels on the held-out text
other       ``other NAME``          a file that was not made here was compared with levels
answer      ``answer Q4_K_M``       a level answered prompts
speed       ``speed Q4_K_M``        a level, or the source, was timed on a machine
tasks       ``tasks Q4_K_M``        a level was scored on tasks
modelfile   ``modelfile Q4_K_M``    a Modelfile for Ollama was written next to a level
report      ``report``              a report was written
=========== ======================= ==============================================================================
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal[
    "convert",
    "imatrix",
    "range",
    "snapshot",
    "costs",
    "mix",
    "covariances",
    "rounding",
    "level",
    "reference",
    "evaluate",
    "compare",
    "alone",
    "against",
    "other",
    "answer",
    "speed",
    "tasks",
    "modelfile",
    "report",
]

_BEGINNINGS: dict[Kind, str] = {
    "convert": "convert ",
    "imatrix": "imatrix ",
    "range": "imatrix-",
    "snapshot": "snapshot ",
    "costs": "costs ",
    "mix": "mix ",
    "covariances": "covariances ",
    "rounding": "rounding ",
    "level": "level-",
    "reference": "reference ",
    "evaluate": "evaluate ",
    "compare": "compare ",
    "alone": "alone ",
    "against": "against ",
    "other": "other ",
    "answer": "answer ",
    "speed": "speed ",
    "tasks": "tasks ",
    "modelfile": "modelfile ",
}
_CONTENT = " sha256:"
_NAMELESS: tuple[Kind, ...] = ("imatrix", "costs", "covariances", "report")


MODEL_INPUT = "model file"
"""The name under which every step that reads a GGUF has its fingerprint among its inputs."""
TEXT_INPUT = "calibration text"
"""The same for the text that an imatrix is collected from."""
FOLDER_INPUT = "model directory"
"""The same for a step that reads a model's folder."""
LEVEL_INPUT = "level file"
"""The name under which a step that measures a level has the level's content among its inputs: the figures of a level that was
made again no longer count."""
WITHOUT_IMATRIX = "none"
"""The imatrix input of a level made without an imatrix; other levels have :func:`imatrix_input`."""


def imatrix_input(name: str, sha256: str) -> str:
    """Return a level's imatrix input: the file's name, which goes into the level's metadata, and its content."""
    return f"{name}{_CONTENT}{sha256}"


def imatrix_in(text: str) -> tuple[str, str]:
    """The name and content of an imatrix that :func:`imatrix_input` wrote; both empty in any other text."""
    name, between, sha256 = text.rpartition(_CONTENT)
    return (name, sha256) if between else ("", "")


def step_id(kind: Kind, name: str = "") -> str:
    """The id of a step; ``name`` may be empty where there is one of its kind in a workspace."""
    if not name:
        assert kind in _NAMELESS, kind
        return kind
    return _BEGINNINGS[kind] + name


def name_in(step: str, kind: Kind) -> str | None:
    """The name in the id of a step, empty where it has none; None for a step of another kind."""
    if step == kind and kind in _NAMELESS:
        return ""
    beginning = _BEGINNINGS.get(kind)
    return step[len(beginning) :] if beginning and step.startswith(beginning) else None


class Inputs(msgspec.Struct, frozen=True, kw_only=True, rename=lambda name: name.replace("_", " ")):
    """The inputs of one kind of step, whose names have spaces in the journal."""

    def named(self) -> dict[str, str]:
        """Return the values by their names in the journal."""
        named: dict[str, str] = msgspec.to_builtins(self)
        return named
