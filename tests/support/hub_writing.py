"""Answers requests that change a loopback hub; a part of its handler (:mod:`support.hub_server`)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from support.hub_repository import Repository, git_id
from support.hub_uploads import Refused

if TYPE_CHECKING:
    from support.hub_server import HubServer

_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_LFS = r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs"


class WritingRequests:
    """What a handler does with requests that write. It is mixed into one of :mod:`http.server`."""

    server_hub: HubServer
    command: str
    path: str
    headers: Any
    rfile: Any
    close_connection: bool
    body: bytes

    if TYPE_CHECKING:

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None: ...
        def _refuse(self, status: int, code: str, message: str = "") -> None: ...
        def _send_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None: ...

    def read_body(self) -> bool:
        """Read what was sent, as slowly as asked for; False if the connection is to be cut instead."""
        trouble, left = self.server_hub.trouble, int(self.headers.get("Content-Length", 0))
        is_file = self.path.startswith("/storage/") and self.command == "PUT"
        cut = is_file and trouble.cut_uploads > 0 and self.server_hub.spend("cut_uploads")
        left = left // 2 if cut else left
        step = max(1, int(trouble.upload_bytes_per_second / 50)) if is_file and trouble.upload_bytes_per_second else 1 << 16
        pieces = []
        while left > 0 and (piece := self.rfile.read(min(step, left))):
            pieces.append(piece)
            left -= len(piece)
            if is_file and trouble.upload_bytes_per_second:
                time.sleep(1 / 50)
        self.body = b"".join(pieces)
        self.close_connection = self.close_connection or cut
        return not cut

    def write(self, path: str) -> bool:
        """Answer a request that changes something; False if it is none."""
        for method, pattern, answer in self._routes():
            if self.command == method and (match := re.fullmatch(pattern, path)):
                try:
                    self._authorised(path)
                    found = answer(**match.groupdict())
                except Refused as refused:
                    self._refuse(refused.status, refused.code, refused.message)
                    return True
                if found is not None:
                    self._finish(path, found)
                return True
        return False

    def _finish(self, path: str, found: Any) -> None:
        hub = self.server_hub
        lost = hub.trouble.lose_answers_of
        if lost and lost in path and hub.spend("lose_answers"):
            self.close_connection = True  # it was done, and nobody hears of it
            return
        self._send_json(found)

    def _routes(self) -> tuple[tuple[str, str, Callable[..., Any]], ...]:
        return (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("GET", _MODEL + r"/auth-check/write", self._check_access),
            ("GET", _MODEL + r"/commits/(?P<revision>.+)", self._commits),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", _MODEL + r"/preupload/main", self._preupload),
            ("POST", _MODEL + r"/paths-info/(?P<revision>.+)", self._paths_info),
            ("POST", _MODEL + r"/commit/main", self._commit),
            ("PUT", _MODEL + r"/settings", self._settings),
            ("POST", _LFS + r"/objects/batch", self._batch),
            ("POST", _LFS + r"/verify", self._verify),
            ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", self._store),
            ("POST", r"/storage/(?P<oid>[0-9a-f]{64})/complete", self._complete),
            ("POST", r"/api/collections", self._make_collection),
            ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", self._collect),
            ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", self._collection),
        )

    def _authorised(self, path: str) -> None:
        if path.startswith("/storage/"):
            return  # signed addresses
        hub = self.server_hub
        if hub.token is None or self.headers.get("Authorization") != f"Bearer {hub.token}":
            raise Refused(401, message="Invalid credentials in Authorization header")

    def _writable(self, repo: str) -> Repository:
        hub = self.server_hub
        if (found := hub.find(repo)) is None:
            raise Refused(404, "RepoNotFound")
        if not hub.uploads.account.may_write(repo):
            raise Refused(403, message="You don't have the rights to change this repository")
        return found

    def _json(self) -> Any:
        return json.loads(self.body)

    def _whoami(self) -> Any:
        return self.server_hub.uploads.account.document()

    def _check_access(self, repo: str) -> Any:
        self._writable(repo)
        return {}

    def _commits(self, repo: str, revision: str) -> Any:
        found = self.server_hub.find(repo)
        if found is None:
            raise Refused(404, "RepoNotFound")
        return [each.document() for each in reversed(found.commits)]

    def _create(self) -> Any:
        hub, asked = self.server_hub, self._json()
        owner = asked["organization"] or hub.uploads.account.name
        repo = f"{owner}/{asked['name']}"
        if not hub.uploads.account.may_write(repo):
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        with hub.uploads.lock:
            if hub.find(repo) is not None:
                raise Refused(409, message="You already created this model repo")
            hub.add(repo, {".gitattributes": b"*.gguf filter=lfs\n"}, private=asked.get("visibility") == "private")
        return {"url": f"{hub.endpoint}/{repo}", "name": repo}

    def _validate(self) -> Any:
        if b"licence: bad" in self.body:
            raise Refused(400, message="license must be one of")
        return {"errors": [], "warnings": []}

    def _preupload(self, repo: str) -> Any:
        return self.server_hub.uploads.preupload(self._writable(repo), self._json())

    def _paths_info(self, repo: str, revision: str) -> Any:
        found = self.server_hub.find(repo)
        held = found.at(revision) if found is not None else None
        if found is None or held is None:
            raise Refused(404, "RepoNotFound" if found is None else "RevisionNotFound")
        asked = parse_qs(self.body.decode())
        entries = [entry(held, name) for name in asked["paths"] if name in held.files]
        if asked.get("expand") == ["true"]:
            for each in entries:
                last = found.last_commit(each["path"])
                each["lastCommit"] = {"id": last.commit, "title": last.title, "date": "2026-01-01T00:00:00.000Z"}
                each["securityFileStatus"] = None
        return entries

    def _commit(self, repo: str) -> Any:
        hub = self.server_hub
        made = hub.uploads.commit(self._writable(repo), self.body)
        return {"commitUrl": f"{hub.endpoint}/{repo}/commit/{made.commit}", "commitOid": made.commit, "success": True}

    def _settings(self, repo: str) -> Any:
        asked, found = self._json(), self._writable(repo)
        found.gated = asked.get("gated", found.gated)
        if "visibility" in asked:
            found.private = asked["visibility"] == "private"
        return {}

    def _batch(self, repo: str) -> Any:
        self._writable(repo)
        return self.server_hub.uploads.batch(self.server_hub.storage_endpoint, self.server_hub.endpoint, repo, self._json())

    def _verify(self, repo: str) -> Any:
        self.server_hub.uploads.verify(self._json())
        return {}

    def _store(self, oid: str) -> None:
        part = parse_qs(urlsplit(self.path).query).get("part")
        etag = self.server_hub.uploads.store(oid, int(part[0]) if part else None, self.body)
        self._send(200, b"", {"ETag": f'"{etag}"'})

    def _complete(self, oid: str) -> Any:
        self.server_hub.uploads.complete(oid, self._json())
        return {"success": True}

    def _make_collection(self) -> Any:
        asked, uploads = self._json(), self.server_hub.uploads
        if not uploads.account.may_write(f"{asked['namespace']}/-"):
            raise Refused(403, message="You don't have the rights to create a collection there")
        made, there = uploads.collect(asked["namespace"], asked["title"])
        if there:
            self._send(409, json.dumps({"slug": made.slug}).encode(), {"Content-Type": "application/json"})
            return None
        return made.document()

    def _collect(self, slug: str) -> Any:
        found, item = self._found_collection(slug), self._json()["item"]["id"]
        with self.server_hub.uploads.lock:
            if item in found.items:
                raise Refused(409, message="already in the collection")
            found.items.append(item)
        return found.document()

    def _collection(self, slug: str) -> Any:
        return self._found_collection(slug).document()

    def _found_collection(self, slug: str) -> Any:
        if (found := self.server_hub.uploads.collections.get(slug)) is None:
            raise Refused(404, message="no such collection")
        return found


def entry(held: Repository, name: str, corrupt: bool = False) -> dict[str, Any]:
    """A file as trees list it. A large one has git's id of its pointer, and its own hash; ``corrupt``: another one."""
    content = held.content(name)
    if not held.is_large(name):
        return {"type": "file", "path": name, "size": held.size(name), "oid": git_id(content)}
    sha256 = "f" * 64 if corrupt else held.oid(name)
    lfs = {"oid": sha256, "size": held.size(name), "pointerSize": 134}
    return {"type": "file", "path": name, "size": held.size(name), "oid": git_id(sha256.encode()), "lfs": lfs}
