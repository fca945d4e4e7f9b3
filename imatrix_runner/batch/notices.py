"""Tells people of ends and failures, through the services that Apprise knows (ntfy, Discord, mail, the desktop, …).

A notification that cannot be sent is a warning and never ends the work. Addresses hold secrets: only their scheme is shown.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence

from imatrix_runner.batch.overview import BatchView
from imatrix_runner.errors import UsageError
from imatrix_runner.events import Sink, warning
from imatrix_runner.extras import NOTIFY
from imatrix_runner.files import human_seconds
from imatrix_runner.safe_text import shown, shown_text

_LAST_SECONDS = 30.0
"""How long the end of the command waits for notifications."""
_TITLE, _TEXT = 200, 2000


class Notifier:
    """Sends notifications to addresses, one after the other, in a thread of its own."""

    def __init__(self, urls: Sequence[str], sink: Sink) -> None:
        """Raises :class:`UsageError` for an address that no service is known for, :class:`ToolchainError` without Apprise."""
        self._sink, self._urls = sink, tuple(urls)
        self._queue: queue.SimpleQueue[tuple[str, str, bool] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if not urls:
            return
        NOTIFY.require("Sending notifications")
        import apprise

        logging.getLogger("apprise").setLevel(logging.CRITICAL)  # its messages may hold the whole address
        self._services = []
        for url in urls:
            service = apprise.Apprise()
            if not service.add(url):
                raise UsageError(
                    f"Invalid --notify {_scheme(url)}",
                    "no service is known for this address, or a part of it is missing",
                    "See the forms of addresses in Apprise's documentation, for example ntfy://TOPIC",
                )
            self._services.append((_scheme(url), service))
        self._thread = threading.Thread(target=self._deliver, daemon=True, name="notify")
        self._thread.start()

    def send(self, title: str, text: str, failed: bool) -> None:
        """Queue a notification."""
        if self._thread is not None:
            self._queue.put((shown(title, _TITLE), shown_text(text, _TEXT), failed))

    def end(self, view: BatchView) -> None:
        """Notify of the end of the whole batch, and wait a while until everything is delivered."""
        if self._thread is None:
            return
        failed = [model.model for model in view.models if model.failed or model.state != "done"]
        took = human_seconds(sum(model.seconds for model in view.models))
        text = f"{view.count('done')} of {len(view.models)} models are done, after {took} of work."
        self.send("Batch finished", text + (f" Failed: {', '.join(failed)}." if failed else ""), bool(failed))
        self._queue.put(None)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self._sink(warning("Some notifications could not be delivered in time."))

    def _deliver(self) -> None:
        while (message := self._queue.get()) is not None:
            title, text, failed = message
            for scheme, service in self._services:
                try:
                    sent = bool(service.notify(title=title, body=text, notify_type="failure" if failed else "success"))
                except Exception:  # noqa: BLE001 - a plugin for a service must not end the work, whatever it raises
                    sent = False
                if not sent:
                    self._sink(warning(f"The notification to {scheme} could not be sent: {title}"))


def _scheme(url: str) -> str:
    """The part of an address that holds no secret."""
    scheme, mark, _ = url.partition("://")
    return f"{shown(scheme, 20)}://…" if mark and scheme.isascii() else "of an unknown form"
