"""``batch.html`` in a real browser: it needs nothing but itself, fits a phone, and shows foreign text as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from imatrix_runner.batch.batch_journal import ThreeLines
from imatrix_runner.batch.batch_page import render_page
from imatrix_runner.batch.overview import BatchView, LevelView, LiveStage, ModelView, WatchView

HOSTILE = "<script>document.title='taken'</script>" + "long-" * 40
ERROR = ThreeLines("download", f"{HOSTILE} is gated", 'a "quoted" <b>why</b>', "Do {{ this }} at javascript:alert(1)")


def a_view(state: str = "running") -> BatchView:
    levels = tuple(
        LevelView(name, 1 << 30, kind) for name, kind in (("Q8_0", "published"), ("Q4_0", "made"), (HOSTILE, "failed"))
    )
    models = (
        ModelView(HOSTILE, "failed", failure=ERROR, failed_at="Check", failed_levels={HOSTILE: ERROR}),
        ModelView(
            "org/b", "running", 3, "me/b", stages=(LiveStage("make", HOSTILE, 0.5), LiveStage("publish", "x")), levels=levels
        ),
        ModelView("org/c", "done", url="https://hub/me/c-GGUF", seconds=5.0),
        ModelView("org/d", "done", url="javascript:alert(1)"),
        ModelView("org/e", "waiting"),
    )
    watches = (WatchView("org", "2026-01-01T00:00:00+0000", 7, 2), WatchView(HOSTILE, problem=HOSTILE, ended=True))
    return BatchView(f"{HOSTILE}.yaml", state, models, 3600.0, HOSTILE, HOSTILE, 5 << 30, 10 << 30, (ERROR,), watches)  # type: ignore[arg-type]


def test_text_from_outside_is_escaped_and_only_web_addresses_are_links() -> None:
    page = render_page(a_view())
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("<a ") == 1
    assert 'http-equiv="refresh"' in page
    assert 'http-equiv="refresh"' not in render_page(a_view("finished"))
    assert "about 1:00:00" in page
    assert "org is watched: last looked at 2026-01-01T00:00:00+0000, 7 models there, 2 added" in page
    assert "was watched: not looked at yet, 0 added. The last look failed" in page


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    from support.browser import browser

    path = tmp_path / "batch.html"
    path.write_text(render_page(a_view()), encoding="utf-8")
    with browser() as window:
        for width, dark in ((1200, False), (360, True)):
            window.open(path, width=width, dark=dark)
            assert window.run("return document.documentElement.scrollWidth") <= width
            assert window.complaints() == []
            assert window.requests() == [path.as_uri()]
            assert window.run("return document.title").startswith("2/5")
        background = window.style("body", "background-color")
        window.media(dark=False)
        assert window.style("body", "background-color") != background
