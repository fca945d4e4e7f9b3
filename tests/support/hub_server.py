"""A hub on the loopback interface: the part of the Hugging Face protocol that a download needs, with switches for trouble.

``with HubServer() as hub: hub.add("org/name", {"config.json": b"{}"})`` serves that repository at ``hub.endpoint``. It
answers the listing (``/api/models/...``, at any branch), the tree, the search by ``filter``, the listing of an owner's models
and of those that trend (in pages), and ``HEAD`` / ``GET``
on ``/{repo}/resolve/{revision}/{file}`` with the headers huggingface_hub wants: commit, etag, length, ranges. Data sets are
repositories whose name begins with ``datasets/``. Every request is kept in ``hub.requests``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from support.hub_repository import Repository
from support.hub_trouble import Trouble
from support.hub_uploads import Uploads
from support.hub_writing import WritingRequests, entry

if TYPE_CHECKING:
    import pytest
    from typing_extensions import Self

_API = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|auth-check)(?:/(?P<revision>.+))?)?"
)
_RESOLVE = re.compile(r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_PAGE = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]


class HubServer:
    """A context manager; the server lives in threads of this process and dies with the ``with`` block."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.trouble = Trouble()
        self.requests: list[Request] = []
        self.page_size = 100
        self.uploads = Uploads()
        self.renamed: dict[str, str] = {}
        """New names of repositories by their old ones, which redirect."""
        self.on_request: Callable[[Request, bool], object] = lambda _request, _done: None
        """Called with each request when it comes (False: it is dropped), and again when it was done, before the answer."""
        self._repositories: dict[str, Repository] = {}
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self._servers:
            server.daemon_threads = True
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            for server in self._servers
        ]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage_endpoint(self) -> str:
        """Where large files are sent to: another origin, as on the real hub."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def add(self, repo: str, files: Mapping[str, bytes | Path], **details: Any) -> Repository:
        """Publish a repository; its commit follows from its content. ``details``: fields of :class:`Repository`."""
        names = {name: held if isinstance(held, bytes) else str(held).encode() for name, held in sorted(files.items())}
        digest = hashlib.sha1(repr((repo, names)).encode(), usedforsecurity=False).hexdigest()
        repository = Repository(dict(files), **{"commit": digest, **details})
        self._repositories[repo] = repository
        return repository

    def add_branch(self, repo: str, revision: str, files: Mapping[str, bytes | Path]) -> Repository:
        """Give a repository that was added a branch with other files, as hubs keep their conversions of data sets."""
        beside = f"{repo}@{revision}"
        branch = self._repositories[repo].branches[revision] = self.add(beside, files)
        del self._repositories[beside]
        return branch

    def add_directory(self, repo: str, directory: Path, **details: Any) -> Repository:
        """Publish all files below a directory."""
        found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
        return self.add(repo, found, **details)

    def find(self, repo: str) -> Repository | None:
        return self._repositories.get(repo)

    def search(self, tag: str) -> list[tuple[str, Repository]]:
        """The repositories that carry a tag, in the order in which they were added."""
        return [(repo, held) for repo, held in self._repositories.items() if tag in held.tags and not held.private]

    def listed(self, query: Mapping[str, list[str]]) -> list[tuple[str, Repository]]:
        """The models of an owner, if one is named, sorted as asked: the newest first, or those that trend."""
        owner = query.get("author", [""])[0].lower()
        found = [
            (repo, held)
            for repo, held in self._repositories.items()
            if not repo.startswith("datasets/") and not held.private and owner in ("", repo.partition("/")[0].lower())
        ]
        by_trend = query["sort"] == ["trendingScore"]
        return sorted(
            found, key=lambda each: (each[1].trending, each[1].created) if by_trend else each[1].created, reverse=True
        )

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def spend(self, counter: str) -> bool:
        """Use up one of a counter of :class:`Trouble`; False when none is left."""
        with self._lock:
            left = getattr(self.trouble, counter)
            if left > 0:
                setattr(self.trouble, counter, left - 1)
            return bool(left)

    def downloads(self) -> list[str]:
        """The names of the files that were fetched with GET, in order."""
        return [
            match["file"]
            for request in self.requests
            if request.method == "GET" and (match := _RESOLVE.fullmatch(request.path))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(WritingRequests, BaseHTTPRequestHandler):
    server_hub: HubServer
    request_seen: Request
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; each answer would wait 40 ms for an acknowledgement

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Tests read ``hub.requests`` instead."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, trouble = self.server_hub, self.server_hub.trouble
        path = unquote(urlsplit(self.path).path)
        self.request_seen = Request(self.command, path, {name.lower(): value for name, value in self.headers.items()})
        hub.record(self.request_seen)
        if hub.on_request(self.request_seen, False) is False:
            self.close_connection = True
            return
        if not self.read_body():
            return
        time.sleep(trouble.silence)
        if trouble.status and trouble.status_for in f"{self.command} {path}" and hub.spend("status_times"):
            extra = {"Retry-After": str(trouble.retry_after)} if trouble.retry_after is not None else {}
            self._send(trouble.status, b"trouble", extra)
        elif trouble.packed_listing is not None and path.startswith("/api/"):
            self._send(200, trouble.packed_listing, {"Content-Type": "application/json", "Content-Encoding": "gzip"})
        elif trouble.html:
            self._send(200, _PAGE, {"Content-Type": "text/html"})
        elif trouble.answer is not None and path.startswith("/api/"):
            self._send(200, trouble.answer, {"Content-Type": "application/json"})
        elif self._redirect(path) or self.write(path):
            pass
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["repo"], match["revision"], match["file"])
        elif match := _API.fullmatch(unquote(path)):
            prefix = "datasets/" if match["kind"] == "dataset" else ""
            self._api(prefix + match["repo"], match["what"], match["revision"])
        elif path == "/api/models":
            self._search()
        else:
            self._refuse(404, "")

    def _redirect(self, path: str) -> bool:
        for old, new in self.server_hub.renamed.items():
            if f"/{old}" in path:
                self._send(307, b"", {"Location": self.server_hub.endpoint + self.path.replace(f"/{old}", f"/{new}")})
                return True
        return False

    def _allowed(self, repo: str, revision: str | None) -> Repository | None:
        """The repository, unless an error was sent instead."""
        hub = self.server_hub
        repository = hub.find(repo)
        sent = self.headers.get("Authorization")
        valid = hub.token is not None and sent == f"Bearer {hub.token}"
        if sent is not None and hub.token is not None and not valid:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not valid):
            # Like the real hub: visitors cannot tell a private repository from a missing one.
            self._refuse(404 if valid else 401, "RepoNotFound")
        elif (
            repository.gated
            and ("/resolve/" in self.path or self.path.endswith("/auth-check"))
            and not (valid and repository.accepted)
        ):
            self._refuse(401 if sent is None else 403, "GatedRepo")
        elif (found := repository.at(revision)) is None:
            self._refuse(404, "RevisionNotFound")
        else:
            return found
        return None

    def _search(self) -> None:
        """What the real search gives: the names of the files only, and without ``expand`` nothing but what it always gives."""
        hub = self.server_hub
        query = parse_qs(urlsplit(self.path).query)
        first = int(query.get("cursor", ["0"])[0])
        found = hub.listed(query) if "sort" in query else hub.search(query.get("filter", [""])[0])
        following = hub.trouble.next_page
        size = min(hub.page_size, int(query.get("limit", ["1000"])[0]))
        if first + size < len(found):
            again = [(name, value) for name, values in query.items() for value in values if name != "cursor"]
            following = f"{hub.endpoint}/api/models?{urlencode([*again, ('cursor', first + size)])}"
        fields = {*query.get("expand", [])}
        page = [_listed(repo, held, fields) for repo, held in found[first : first + size]]
        self._send_json(page, {"Link": f'<{following}>; rel="next"'} if following else {})

    def _api(self, repo: str, what: str | None, revision: str | None) -> None:
        repository = self._allowed(repo, revision)
        if repository is None:
            return
        if what == "auth-check":
            self._send_json({})
            return
        if what == "tree":
            corrupt = self.server_hub.uploads.corrupt
            self._send_json([entry(repository, name, name in corrupt) for name in sorted(repository.files)])
            return
        entries = [(name, repository.size(name), _etag(repository.content(name))) for name in sorted(repository.files)]
        siblings: list[dict[str, Any]] = [{"rfilename": name, "size": size, "blobId": etag} for name, size, etag in entries]
        for sibling in siblings:
            if sibling["rfilename"].endswith((".gguf", ".safetensors")):
                held = len(repository.content(sibling["rfilename"]))
                sibling["lfs"] = {"sha256": sibling["blobId"], "size": held, "pointerSize": 134}
        shown = {"id": repo.removeprefix("datasets/"), "sha": repository.commit, "private": repository.private}
        shown |= {"gated": repository.gated, "siblings": siblings, "tags": list(repository.tags), "downloads": 0, "likes": 0}
        if "config.json" in repository.files:
            config = json.loads(repository.content("config.json"))
            shown["config"] = {"architectures": config.get("architectures"), "model_type": config.get("model_type")}
        fields = {*parse_qs(urlsplit(self.path).query).get("expand", [])}
        whole = shown | {"cardData": repository.card, "lastModified": repository.date}
        self._send_json(_listed(repo, repository, fields) if fields else whole)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        trouble = self.server_hub.trouble
        repository = self._allowed(repo, revision)
        if repository is None:
            return
        if name not in repository.files or name in trouble.gone:
            self._refuse(404, "EntryNotFound")
            return
        data = repository.content(name)
        etag = trouble.etag or _etag(data)
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if trouble.redirect:
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
            self._send(302, b"", headers | linked | {"Location": trouble.redirect + self.path})
            return
        if self.command == "HEAD":
            length = trouble.head_length if trouble.head_length is not None else repository.size(name)
            self._send(200, data, headers | {"Content-Length": str(length)})
            return
        if trouble.get_length is not None:
            headers["Content-Length"] = str(trouble.get_length)
        if trouble.altered:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if trouble.html_files:
            self._send(200, _PAGE, headers | {"Content-Type": "text/html"})
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and trouble.ranges:
            start, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            part = {"Content-Range": f"bytes {start}-{last}/{len(data)}"}
            self._send(206, data[start : last + 1], headers | part)
        else:
            self._send(200, data, headers)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code} if code and not self.server_hub.trouble.bare_404 else {}
        self._send(status, b"{}", headers | ({"X-Error-Message": message} if message else {}))

    def _send_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.server_hub.on_request(self.request_seen, True)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        trouble = self.server_hub.trouble
        is_file = "X-Repo-Commit" in headers
        cut = trouble.cut_after if is_file and trouble.cut_after is not None and self.server_hub.spend("cut_times") else None
        try:
            self._write(
                body if cut is None else body[:cut], trouble.bytes_per_second if is_file else trouble.listing_bytes_per_second
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away: some tests want just that
        if cut is not None:
            self.close_connection = True

    def _write(self, body: bytes, rate: float) -> None:
        if not rate:
            self.wfile.write(body)
            return
        step = max(1, int(rate / 50))
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            time.sleep(1 / 50)


def _listed(repo: str, held: Repository, fields: set[str]) -> dict[str, Any]:
    """A model as listings have it, with the fields that were asked for. Licence and base models are among its tags."""
    bases = held.card.get("base_model", [])
    config = json.loads(held.content("config.json")) if "config.json" in held.files else None
    every: dict[str, Any] = {
        "sha": held.commit,
        "lastModified": held.date,
        "createdAt": held.created,
        "gated": held.gated,
        "disabled": False,
        "tags": [
            *held.tags,
            *([f"license:{held.card['license']}"] if "license" in held.card else []),
            *(f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases)),
        ],
        "siblings": [{"rfilename": name} for name in sorted(held.files)],
        "config": config,
        **held.described,
    }
    return {"id": repo, **{name: value for name, value in every.items() if name in fields}}


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def be_quick_and_anonymous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token of this machine is used, and pauses between retries (ours and the library's) take no time."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # this hub stores large files as LFS does
    # The library keeps of a broken transfer only whole pieces of this size.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    impatient = SimpleNamespace(
        **{name: getattr(time, name) for name in dir(time) if name != "sleep"}, sleep=lambda _seconds: None
    )
    monkeypatch.setattr(file_download, "time", impatient)
    monkeypatch.setattr(_http, "time", impatient)
    monkeypatch.setattr("tenacity.nap.time", impatient)
