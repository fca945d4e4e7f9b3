"""Events cross process borders as JSON lines: what is sent is what arrives."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.events import Event, Finished, Metric, Notice, Progress, Saved, Started, ignore, info, warning

# JSON has no lone surrogates.
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
FIGURES = st.floats(allow_nan=False, allow_infinity=False)
EVENTS = st.one_of(
    st.builds(Started, step=TEXTS, title=TEXTS, total=st.none() | FIGURES, unit=TEXTS),
    st.builds(Progress, step=TEXTS, done=FIGURES, total=st.none() | FIGURES, note=TEXTS),
    st.builds(Finished, step=TEXTS, status=st.sampled_from(("done", "skipped", "failed")), detail=TEXTS, seconds=FIGURES),
    st.builds(Notice, level=st.sampled_from(("info", "warning")), text=TEXTS),
    st.builds(Metric, step=TEXTS, name=TEXTS, value=FIGURES),
    st.builds(Saved, path=TEXTS, what=TEXTS, bytes=st.integers(0, 1 << 60)),
)


@given(EVENTS)
def test_an_event_survives_json(event: Event) -> None:
    line = msgspec.json.encode(event)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=Event) == event


@pytest.mark.parametrize(
    ("event", "tag"),
    [
        (Started("s", "t"), "started"),
        (Progress("s", 1), "progress"),
        (Finished("s", "done"), "finished"),
        (Notice("info", "x"), "notice"),
        (Metric("s", "ppl", 1.5), "metric"),
        (Saved("p", "level"), "saved"),
    ],
)
def test_the_type_of_an_event_is_written_into_it(event: Event, tag: str) -> None:
    assert msgspec.to_builtins(event)["type"] == tag


@pytest.mark.parametrize(
    "line", ['{"type":"unheard-of"}', '{"step":"no type"}', '{"type":"finished","step":"s","status":"so-so"}']
)
def test_what_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(line, type=Event)


def test_shorthands() -> None:
    assert info("x") == Notice("info", "x")
    assert warning("x") == Notice("warning", "x")
    assert ignore(info("x")) is None
