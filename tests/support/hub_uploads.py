"""What a hub does with files that are sent to it: repositories made, large files stored, commits, collections.

As huggingface_hub 2.x asks for it: ``POST /api/repos/create``, ``GET /api/whoami-v2``, ``GET …/auth-check/write``,
``POST …/preupload/main``, the LFS batch (one part, or several), its verification, ``POST …/commit/main`` with lines of JSON,
``…/paths-info``, ``…/commits``, ``PUT …/settings``, ``POST /api/collections``. :class:`Uploads` is the state, free of HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.hub_repository import Commit, Repository

COLLECTION_ID = "0123456789abcdef01234567"
_SMALL = 1 << 16
"""Above this size a file is stored as a large one; on the real hub it is 10 MB. Those of known endings always are."""


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Account:
    """Whom the token belongs to. ``role``: of the token; ``organisations``: their names, with the role in them."""

    name: str = "me"
    role: str = "write"
    organisations: dict[str, str] = field(default_factory=dict)
    writes: set[str] | None = None
    """Repositories that it may write to; None: all of its own."""

    def may_write(self, repo: str) -> bool:
        owner = repo.partition("/")[0]
        if self.role == "read" or (self.writes is not None and repo not in self.writes):
            return False
        return owner == self.name or self.organisations.get(owner, "read") in ("admin", "write", "contributor")

    def document(self) -> dict[str, Any]:
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.organisations.items()]
        token = {"displayName": "tests", "role": self.role}
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


@dataclass
class Collection:
    slug: str
    title: str
    items: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        items = [
            {"_id": f"{number:024x}", "id": item.removeprefix("datasets/"), "position": number}
            | {"type": "dataset" if item.startswith("datasets/") else "model", "lastModified": "2026-01-01T00:00:00.000Z"}
            for number, item in enumerate(self.items)
        ]
        return {
            "slug": self.slug,
            "title": self.title,
            "owner": {"name": self.slug.partition("/")[0]},
            "items": items,
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": False,
            "theme": "blue",
            "upvotes": 0,
        }


class Uploads:
    """Everything that was sent to a hub. Changes are made under one lock, as a hub's database does."""

    def __init__(self) -> None:
        self.account = Account()
        self.blobs: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.parts: dict[str, dict[int, bytes]] = {}
        self.collections: dict[str, Collection] = {}
        self.part_bytes: int | None = None
        """Size of the parts in which large files are to be sent; None: in one."""
        self.corrupt: set[str] = set()
        """Names of files whose stored content is announced with another hash than it was sent with."""
        self.stored: list[str] = []
        """Hashes in the order in which their files arrived, once for each time."""
        self.lock = threading.RLock()

    # -- large files -----------------------------------------------------------------------------------------------------

    def batch(self, storage: str, endpoint: str, repo: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Where to send which large files. Like the real hub, nowhere for those that it has."""
        objects = []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.blobs:
                verify = {"href": f"{endpoint}/{repo}.git/info/lfs/verify", "header": {}}
                found["actions"] = {"upload": self._upload(storage, oid, size), "verify": verify}
            objects.append(found)
        return {"transfer": "multipart" if self.part_bytes else "basic", "objects": objects}

    def _upload(self, storage: str, oid: str, size: int) -> dict[str, Any]:
        if self.part_bytes is None or size <= self.part_bytes:
            return {"href": f"{storage}/storage/{oid}?signature=s3cr3t", "header": {}}
        count = -(-size // self.part_bytes)
        parts = {f"{number:05d}": f"{storage}/storage/{oid}?part={number}&signature=s3cr3t" for number in range(1, count + 1)}
        return {"href": f"{storage}/storage/{oid}/complete", "header": {"chunk_size": str(self.part_bytes), **parts}}

    def store(self, oid: str, part: int | None, body: bytes) -> str:
        """Keep what was sent; return its etag. A whole file must have the hash that it was announced with."""
        with self.lock:
            if part is not None:
                self.parts.setdefault(oid, {})[part] = body
            elif hashlib.sha256(body).hexdigest() != oid:
                raise Refused(400, message="the content has another checksum")
            else:
                self.blobs[oid] = body
                self.stored.append(oid)
        return hashlib.md5(body, usedforsecurity=False).hexdigest()

    def complete(self, oid: str, asked: Mapping[str, Any]) -> None:
        with self.lock:
            parts = self.parts.pop(oid, {})
            numbers = [each["partNumber"] for each in asked["parts"]]
            self.store(oid, None, b"".join(parts[number] for number in numbers))

    def verify(self, asked: Mapping[str, Any]) -> None:
        blob = self.blobs.get(asked["oid"])
        if blob is None or len(blob) != asked["size"]:
            raise Refused(422, message="the file did not arrive whole")

    # -- repositories ----------------------------------------------------------------------------------------------------

    def preupload(self, repository: Repository, asked: Mapping[str, Any]) -> dict[str, Any]:
        files = []
        for each in asked["files"]:
            large = each["size"] > _SMALL or each["path"].endswith((".gguf", ".png", ".dat"))
            oid = repository.oid(each["path"]) if each["path"] in repository.files else None
            mode = "lfs" if large else "regular"
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def commit(self, repository: Repository, body: bytes) -> Commit:
        """Make a commit of lines of JSON. Refused: an empty one, one whose parent is not the head, large files that are not
        there."""
        lines = [json.loads(line) for line in body.splitlines()]
        header, rest = lines[0]["value"], lines[1:]
        with self.lock:
            parent = header.get("parentCommit")
            if parent is not None and parent != repository.commit:
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            files: dict[str, bytes | Path] = {}
            for line in rest:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.blobs:
                        raise Refused(400, message=f"{value['path']}: its content was not uploaded")
                    files[value["path"]] = self.blobs[value["oid"]]
                    repository.large.add(value["path"])
                else:
                    raise Refused(400, message=f"unknown operation {line['key']}")
            return repository.add_commit(header["summary"], header.get("description", ""), files)

    def collect(self, namespace: str, title: str) -> tuple[Collection, bool]:
        """A collection by its title, and whether it was there."""
        slug = f"{namespace}/{title.lower().replace(' ', '-')}-{COLLECTION_ID}"
        with self.lock:
            there = slug in self.collections
            return self.collections.setdefault(slug, Collection(slug, title)), there
