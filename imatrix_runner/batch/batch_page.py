"""``batch.html``: the state of a batch as one self-contained page, which reloads itself while the batch runs.

jinja2 escapes every text. A Content-Security-Policy allows nothing but this style, by its hash: no script, no connection.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from imatrix_runner.batch.overview import BatchView, watch_line
from imatrix_runner.errors import RunnerError
from imatrix_runner.events import Sink, warning
from imatrix_runner.files import atomic_writer, human_bytes, human_seconds
from imatrix_runner.safe_text import shown
from imatrix_runner.untrusted import split_url

if TYPE_CHECKING:
    import jinja2

TEMPLATES: Final = Path(__file__).parent / "templates"
RELOAD_SECONDS = 10


def render_page(view: BatchView) -> str:
    """The page of a batch."""
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _template().render(
        view=view, style=style, style_hash=digest, reload=RELOAD_SECONDS if view.state == "running" else 0
    )


def write_page(view: BatchView, path: Path, sink: Sink) -> None:
    """Write the page. If that fails, the work goes on, with a warning."""
    try:
        with atomic_writer(path) as handle:
            handle.write(render_page(view).encode())
    except RunnerError as error:
        sink(warning(error.sentence()))


@lru_cache(maxsize=1)
def _style() -> str:
    return (TEMPLATES / "batch.css").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds, "shown": _shown, "web": _web, "watch": watch_line}
    return environment.get_template("batch.html.j2")


def _shown(text: Any) -> str:
    return shown(str(text), 500)


def _web(url: str) -> bool:
    """Whether an address may be a link."""
    return split_url(url).scheme in ("http", "https")
