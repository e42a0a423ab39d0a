"""A Hub on the loopback: what the unmodified `huggingface_hub` client uses of the Hub's HTTP API, kept in memory.

    with HubServer(users={"ann": "hf_ann"}) as server, HubClients(server) as clients:
        clients.run("from huggingface_hub import create_repo; create_repo('ann/detr')", home, token="hf_ann")
        assert server.blobs_of("ann/detr") == INITIAL_FILES

`HubClients` is in `hub_client.py`.

Models, Spaces and data sets (ids of the latter begin with "spaces/" or "datasets/" here), and no Xet: large files
travel over git LFS ("basic"). As on the real Hub they live at another origin than the API, which knows signed links
only; by the origin the client decides whether it follows a redirect and whether the token goes along. What a reply must
hold is written in the client's `hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py` and `utils/_http.py`.
One more route is one more method with `@route`.
"""

import base64
import codecs
import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pth", ".parquet", ".tar")
LFS_SIZE = 10_000_000
INITIAL_FILES = {
    ".gitattributes": "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES).encode()
}


# What a repository is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file of a repository, stored in git or, if `lfs`, in the large file storage with a pointer in git."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        content = f"pointer to {self.sha256}".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        """The file's identity for the client, which leaves a file out of a commit if preupload names this value."""
        return self.sha256 if self.lfs else self.git_oid

    def info(self, git_name: str, lfs_name: str) -> dict[str, Any]:
        """Size and identities; the Hub's replies differ in what they call these."""
        lfs = {lfs_name: self.sha256, "size": len(self.data), "pointerSize": 130}
        return {git_name: self.git_oid, "size": len(self.data)} | ({"lfs": lfs} if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, File]
    title: str
    message: str
    author: str
    parent: "Commit | None"
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def oid(self) -> str:
        files = sorted((path, file.etag) for path, file in self.files.items())
        parent = self.parent and self.parent.oid
        return hashlib.sha1(json.dumps([parent, self.title, self.author, files]).encode()).hexdigest()

    def history(self) -> "Iterator[Commit]":
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    id: str
    private: bool
    gated: str | bool = False
    refs: dict[str, Commit] = field(default_factory=dict)  # by full name: refs/heads/main, refs/tags/v1, refs/pr/1
    lfs: dict[str, File] = field(default_factory=dict)  # all that was uploaded, whether a commit names it or not

    @property
    def owner(self) -> str:
        return re.sub("^(spaces|datasets)/", "", self.id).split("/")[0]

    def ref(self, revision: str) -> str:
        """Full name of a branch, tag or pull request, or nothing."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), "")

    def at(self, revision: str) -> Commit:
        if name := self.ref(revision):
            return self.refs[name]
        for commit in (commit for head in self.refs.values() for commit in head.history()):
            if len(revision) >= 7 and commit.oid.startswith(revision):  # short names as in git
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_ref(self, name: str, revision: str) -> None:
        commit = self.at(revision)
        if name in self.refs:
            raise HubError(409, f"Reference {name} already exists")
        self.refs[name] = commit

    def apply(self, files: dict[str, File], kind: str, value: dict[str, Any]) -> None:
        """Carry out one operation of a commit on the files of its parent."""
        path = value["path"]
        if kind == "file":
            files[path] = File(base64.b64decode(value["content"], validate=True), lfs=False)
        elif kind == "lfsFile":
            if value["oid"] not in self.lfs:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}, {value['oid']}")
            files[path] = self.lfs[value["oid"]]
        elif kind in ("deletedFile", "deletedFolder"):
            start = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if kind == "deletedFile" else name.startswith(start))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {kind} in a commit")


def listed(files: Mapping[str, File], path: str) -> dict[str, Any]:
    """A file or folder as `tree` and `paths-info` list it."""
    if file := files.get(path):
        return {"type": "file", "path": path} | file.info("oid", "oid")
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


# Requests and replies ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request as it was served. `path` is unquoted, without the query; sizes are bytes of the bodies."""

    method: str
    path: str
    status: int  # 0: the connection was closed without an answer
    received: int
    sent: int
    range: str | None = None


@dataclass(frozen=True)
class User:
    name: str
    can_write: bool


@dataclass
class Call:
    method: str
    path: str  # quoted, as it came: a branch a/b is the one segment a%2Fb
    query: Mapping[str, str]
    headers: Any
    body: bytes
    user: User | None = None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_file: bool = False  # `break_download` cuts these only


class HubError(Exception):
    """Answered with this status. The client picks its exception by the code and shows the message."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        # In a header as well, which is all that a HEAD request gets to see.
        about = {"X-Error-Message": message.encode("ascii", "backslashreplace").decode()}
        about |= ({"X-Error-Code": code} if code else {}) | dict(headers or {})
        self.reply = Reply(status, json.dumps({"error": message}).encode(), about)


def file_reply(call: Call, file: File, headers: Mapping[str, str]) -> Reply:
    """The file, or the part of it that the Range header asks for."""
    size, about = len(file.data), {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=-(\d+)", call.headers.get("Range") or "")
    if not asked:
        return Reply(200, file.data, about, is_file=True)
    first, last, tail = asked.groups()
    start = int(first) if first else max(size - int(tail), 0)
    stop = min(int(last) + 1, size) if last else size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    about["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Reply(206, file.data[start:stop], about, is_file=True)


def is_text(sample: bytes) -> bool:
    try:  # the end of the sample may cut a character, which an incremental decoder forgives
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False


ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., Any]]] = []


def route(method: str, path: str, write: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Serve this path by a method, which gets the call, the repository and what the other groups matched, unquoted.

    Who may not read the repository, or write it if `write`, is refused first. What the method returns is sent as JSON.
    """
    for name, pattern in {
        "{repo}": "(?P<repo>(?:spaces|datasets)/[^/]+/[^/]+|[^/]+(?:/[^/]+)?)",
        "{rev}": "([^/]+)",
        "{path}": "(.+)",
    }.items():
        path = path.replace(name, pattern)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(path), write, function))
        return function

    return register


# The server ----------------------------------------------------------------------------------------------------------


class HubServer:
    """Listens on two free ports of 127.0.0.1, for the API and for large files, while the context is open.

    `requests` holds every request served so far, `errors` the tracebacks of routes that failed (answered with 500).
    """

    def __init__(self, users: Mapping[str, str] | None = None) -> None:
        self._secret = os.urandom(16).hex()
        self._lock = threading.RLock()
        self.reset(users or {})
        self._listeners = [_Listener(self, at_storage) for at_storage in (False, True)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)

    def __enter__(self) -> "HubServer":
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    def reset(self, users: Mapping[str, str]) -> None:
        """Start afresh with these users (name to token), without repositories."""
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self._users: dict[str, User] = {}
        self._faults: dict[str, list[int]] = {"upload": [], "download": [], "commit": []}
        for name, token in users.items():
            self.add_user(name, token)

    def add_user(self, name: str, token: str, can_write: bool = True) -> None:
        """A user, who owns the repositories `name/...`. Without `can_write` the token only reads."""
        self._users[token] = User(name, can_write)

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """A repository with the first commit the Hub makes itself and, if there are files, a second with these."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        first = Commit(
            {p: File(d, lfs=False) for p, d in INITIAL_FILES.items()}, "initial commit", "", repo.owner, None
        )
        new = {path: File(data, lfs=path.endswith(LFS_SUFFIXES)) for path, data in (files or {}).items()}
        repo.lfs |= {file.sha256: file for file in new.values() if file.lfs}
        head = Commit({**first.files, **new}, "Add files", "", repo.owner, first) if files else first
        repo.refs["refs/heads/main"] = head
        return repo

    def blobs_of(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of a revision by path. Every repository starts with `INITIAL_FILES`."""
        return {path: file.data for path, file in self.repos[repo_id].at(revision).files.items()}

    def commits_of(self, repo_id: str, revision: str = "main") -> list[str]:
        """Ids of the commits of a revision, the newest first."""
        return [commit.oid for commit in self.repos[repo_id].at(revision).history()]

    def break_upload(self, after_bytes: int, times: int = 1) -> None:
        """Close the connection in the next `times` uploads of more bytes than this, once so many have come."""
        self._faults["upload"] += [after_bytes] * times

    def break_download(self, after_bytes: int, times: int = 1) -> None:
        """Close the connection in the next `times` downloads of more bytes than this, once so many are sent."""
        self._faults["download"] += [after_bytes] * times

    def break_commit(self, times: int = 1, status: int = 500) -> None:
        """Commit nothing and answer this status, or close the connection if it is 0, the next `times`."""
        self._faults["commit"] += [status] * times

    def mend(self) -> None:
        """From now on nothing breaks."""
        for faults in self._faults.values():
            faults.clear()

    def take_fault(self, kind: str, size: int) -> int | None:
        with self._lock:
            faults = self._faults[kind]
            return faults.pop(0) if faults and size > faults[0] else None

    # Who may do what. The answers do not tell a private repository from none.

    def check_write(self, user: User | None, owner: str) -> None:
        if user is None:
            # The real Hub sends no code here: the client concludes as much from an https address, which ours is not.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if not user.can_write:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository")
        if user.name != owner:
            raise HubError(403, f"You don't have the rights to write under the namespace {owner}")

    def repo_for(self, user: User | None, repo_id: str, write: bool = False) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or user.name != repo.owner)):
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        if write:
            self.check_write(user, repo.owner)
        return repo

    def signed_link(self, method: str, repo: Repo, oid: str, size: int) -> str:
        path = f"/lfs/{repo.id}/{oid}/{size}"
        return f"{self.storage}{path}/{hashlib.sha256(f'{self._secret} {method} {path}'.encode()).hexdigest()}"

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Any:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if call.user.can_write else "read"}
        return {"type": "user", "name": call.user.name, "orgs": [], "auth": {"accessToken": token}}

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Any:
        plain = not call.json()["content"].startswith("---\n")
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] if plain else []}

    @route("POST|DELETE", "/api/repos/(create|delete)")
    def _create_or_delete(self, call: Call, action: str) -> Any:
        wanted = call.json()
        if wanted.get("type") not in (None, "model", "space"):
            raise HubError(404, f"Only models and Spaces exist here, not a {wanted['type']}")
        if wanted.get("type") == "space" and action == "create" and not wanted.get("sdk"):
            raise HubError(400, "A Space needs an sdk")
        owner = wanted.get("organization") or (call.user.name if call.user else "")
        repo_id = f"{'spaces/' if wanted.get('type') == 'space' else ''}{owner}/{wanted['name']}"
        if action == "delete":
            return {"deleted": self.repos.pop(self.repo_for(call.user, repo_id, write=True).id).id}
        self.check_write(call.user, owner)
        reply = {"name": repo_id, "id": repo_id, "url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.repos:
            return Reply(409, json.dumps(reply | {"error": f"You already created this model repo: {repo_id}"}).encode())
        # Older clients send `private`, newer ones `visibility`.
        self.add_repo(repo_id, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return reply

    @route("PUT", "/api/models/{repo}/settings", write=True)
    def _settings(self, call: Call, repo: Repo) -> Any:
        wanted = call.json()
        repo.gated = wanted.get("gated", repo.gated)
        repo.private = wanted["visibility"] == "private" if "visibility" in wanted else repo.private
        return {"private": repo.private, "gated": repo.gated}

    @route("GET", "/api/models/{repo}/auth-check/write", write=True)
    def _may_write(self, call: Call, repo: Repo) -> Any:
        return {}

    # What a repository holds

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?")
    def _tree(self, call: Call, repo: Repo, revision: str, folder: str) -> Any:
        files = repo.at(revision).files
        start = folder.rstrip("/") + "/" if folder else ""
        inside = [path.removeprefix(start).split("/") for path in files if path.startswith(start)]
        if not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = call.query.get("recursive", "").lower() == "true"
        names = {"/".join(parts[: n + 1]) for parts in inside for n in range(len(parts) if recursive else 1)}
        return [listed(files, start + name) for name in sorted(names)]

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def _paths_info(self, call: Call, repo: Repo, revision: str) -> Any:
        files = repo.at(revision).files
        paths = parse_qs(call.body.decode()).get("paths", [])
        return [listed(files, path) for path in paths if any(f"{name}/".startswith(f"{path}/") for name in files)]

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, call: Call, repo: Repo) -> Any:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
        kinds |= {"pullRequests": "refs/pr/"} if call.query.get("include_prs") else {}
        return {
            kind: [
                {"name": ref.removeprefix(start), "ref": ref, "targetCommit": commit.oid}
                for ref, commit in repo.refs.items()
                if ref.startswith(start)
            ]
            for kind, start in kinds.items()
        }

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def _commits(self, call: Call, repo: Repo, revision: str) -> Any:
        return [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repo.at(revision).history()
        ]

    @route("POST", "/api/models/{repo}/branch/{rev}", write=True)
    def _create_branch(self, call: Call, repo: Repo, branch: str) -> Any:
        return repo.add_ref(f"refs/heads/{branch}", call.json().get("startingPoint", "main"))

    @route("POST", "/api/models/{repo}/tag/{rev}", write=True)
    def _create_tag(self, call: Call, repo: Repo, revision: str) -> Any:
        return repo.add_ref(f"refs/tags/{call.json()['tag']}", revision)

    @route("DELETE", "/api/models/{repo}/(branch|tag)/{rev}", write=True)
    def _delete_ref(self, call: Call, repo: Repo, kind: str, name: str) -> Any:
        if repo.refs.pop(f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}", None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def _resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Any:
        if repo.gated and (call.user is None or call.user.name != repo.owner):
            raise HubError(403 if call.user else 401, f"Access to model {repo.id} is restricted", "GatedRepo")
        commit = repo.at(revision)
        about = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:  # with the commit: the client notes that this file does not exist there
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound", about)
        file = commit.files[path]
        if not file.lfs:
            return file_reply(call, file, about)
        about |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        about["Location"] = self.signed_link("GET", repo, file.sha256, len(file.data))
        return Reply(302, b"Found. Redirecting", about)

    # Pushing: preupload says how each file travels, LFS files go first, the commit then names them

    @route("POST", "/api/models/{repo}/preupload/{rev}", write=True)
    def _preupload(self, call: Call, repo: Repo, revision: str) -> Any:
        files = repo.at(revision).files

        def answer(path: str, size: int, sample: str) -> dict[str, Any]:
            large = path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or not is_text(base64.b64decode(sample))
            old = {"oid": files[path].etag} if path in files else {}
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | old

        return {"files": [answer(**file) for file in call.json()["files"]]}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, call: Call, repo: Repo) -> Any:
        if "ref" in call.json():  # left out for a pull request, which those can open who may only read
            self.check_write(call.user, repo.owner)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in call.json()["objects"]]
        for wanted in objects:
            if wanted["oid"] not in repo.lfs:
                upload = self.signed_link("PUT", repo, wanted["oid"], wanted["size"])
                verify = f"{self.endpoint}/{repo.id}.git/info/lfs/objects/verify"
                wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    @route("POST", "/{repo}.git/info/lfs/objects/verify")
    def _lfs_verify(self, call: Call, repo: Repo) -> Any:
        file = repo.lfs.get(call.json()["oid"])
        if file is None or len(file.data) != call.json()["size"]:
            raise HubError(404, f"LFS object {call.json()['oid']} was not uploaded")

    @route("GET|PUT", "/lfs/((?:(?:spaces|datasets)/)?[^/]+/[^/]+)/([^/]+)/([0-9]+)/[^/]+")
    def _lfs_storage(self, call: Call, repo_id: str, oid: str, size: str) -> Any:
        repo = self.repos[repo_id]
        method = "PUT" if call.method == "PUT" else "GET"
        if self.signed_link(method, repo, oid, int(size)) != self.storage + call.path:
            raise HubError(403, "This link to the file storage is not signed for this request")
        if method == "GET":
            return file_reply(call, repo.lfs[oid], {})
        file = File(call.body, lfs=True)
        if (file.sha256, len(file.data)) != (oid, int(size)):
            came = f"{len(file.data)} bytes with SHA-256 {file.sha256}"
            raise HubError(400, f"Content does not match: {size} bytes with SHA-256 {oid} announced, {came} came")
        repo.lfs[oid] = file
        return Reply(200)

    @route("POST", "/api/models/{repo}/commit/{rev}", write=True)
    def _commit(self, call: Call, repo: Repo, revision: str) -> Any:
        as_pr = "create_pr" in call.query
        self.check_write(call.user, call.user.name if as_pr and call.user else repo.owner)
        target = repo.ref(revision)
        if not target.startswith(("refs/heads/", "refs/pr/")):
            raise HubError(404, f"Invalid rev id: {revision} is not a branch", "RevisionNotFound")
        if (status := self.take_fault("commit", sys.maxsize)) == 0:
            return Reply(0)
        if status:
            raise HubError(status, "Internal Error - We're working hard to fix this as soon as possible!")
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        about, parent = header["value"], repo.refs[target]
        if wanted := about.get("parentCommit"):
            if not as_pr and not parent.oid.startswith(wanted):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            parent = repo.at(wanted)
        files = dict(parent.files)
        for operation in operations:  # on a copy: all of them or none
            repo.apply(files, operation["key"], operation["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        target = f"refs/pr/{number}" if as_pr else target
        author = call.user.name if call.user else ""
        repo.refs[target] = new = Commit(files, about["summary"], about.get("description", ""), author, parent)
        reply = {"success": True, "commitOid": new.oid, "commitUrl": f"{self.endpoint}/{repo.id}/commit/{new.oid}"}
        return reply | ({"pullRequestUrl": f"{self.endpoint}/{repo.id}/discussions/{number}"} if as_pr else {})

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")  # last: this pattern fits some of the paths above
    def _model_info(self, call: Call, repo: Repo, revision: str) -> Any:
        commit = repo.at(revision or "main")
        card = commit.files["README.md"].data.decode() if "README.md" in commit.files else ""
        tags = re.match(r"---\n(?:(?!---).*\n)*?tags:\n((?: *- .*\n)*)", card)
        about: dict[str, Any] = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.oid}
        about |= {"lastModified": commit.date, "private": repo.private, "gated": repo.gated, "disabled": False}
        about |= {"downloads": 0, "likes": 0, "tags": re.findall(r"- (.*)", tags[1]) if tags else []}
        about["siblings"] = [
            {"rfilename": path} | (file.info("blobId", "sha256") if "blobs" in call.query else {})
            for path, file in sorted(commit.files.items())
        ]
        return about

    def answer(self, call: Call, at_storage: bool) -> Reply:
        """The reply to a call. They are answered one after the other."""
        try:
            with self._lock:
                if token := call.headers.get("Authorization"):
                    if at_storage:
                        raise HubError(400, "Only one auth mechanism allowed: this link is signed, a token came along")
                    if (user := self._users.get(token.removeprefix("Bearer "))) is None:
                        raise HubError(401, "Invalid credentials in Authorization header")
                    call.user = user
                found = self._dispatch(call, at_storage)
                return found if isinstance(found, Reply) else Reply(200, json.dumps(found).encode())
        except HubError as error:
            return error.reply
        except Exception:
            self.errors.append(traceback.format_exc())
            return Reply(500, self.errors[-1].encode(), {"Content-Type": "text/plain"})

    def _dispatch(self, call: Call, at_storage: bool) -> Any:
        method = "GET" if call.method == "HEAD" else call.method
        path = re.sub("^/api/(spaces|datasets)/", r"/api/models/\1/", call.path)
        for methods, pattern, write, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and method in methods.split("|") and at_storage == call.path.startswith("/lfs/"):
                groups = [unquote(group or "") for group in match.groups()]
                if "repo" not in pattern.groupindex:
                    return function(self, call, *groups)
                must_own = write and "create_pr" not in call.query  # a reader may open a pull request
                return function(self, call, self.repo_for(call.user, groups[0], must_own), *groups[1:])
        raise HubError(404, f"No route in hub_server.py for {call.method} {call.path}")


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, at_storage: bool) -> None:
        self.hub, self.at_storage = hub, at_storage
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up whenever it likes
            self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """HTTP itself: bodies in and out, connections kept or cut."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for the client to confirm the headers
    server: _Listener

    def do_GET(self) -> None:
        hub, url, body = self.server.hub, urlsplit(self.path), bytearray()
        for piece in self._pieces():
            body += piece
            if self.command == "PUT" and (limit := hub.take_fault("upload", len(body))) is not None:
                return self._hang_up(limit)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        reply = hub.answer(Call(self.command, url.path, query, self.headers, bytes(body)), self.server.at_storage)
        if reply.status == 0:
            return self._hang_up(len(body))
        content = b"" if self.command == "HEAD" else reply.body
        if reply.is_file and (limit := hub.take_fault("download", len(content))) is not None:
            content, self.close_connection = content[:limit], True
        # Before it is sent, so that a test that has its answer finds the request as well.
        self._record(reply.status, len(body), len(content))
        self.send_response(reply.status)
        headers = {"Content-Length": str(len(reply.body)), "Content-Type": "application/json"} | dict(reply.headers)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _pieces(self) -> Iterator[bytes]:
        if "Transfer-Encoding" in self.headers:
            raise NotImplementedError("a chunked body: the client has always sent a length so far")
        left = int(self.headers.get("Content-Length", 0))
        while left:
            if not (piece := self.rfile.read(min(left, 65_536))):
                raise ConnectionError("the client hung up")
            left -= len(piece)
            yield piece

    def _record(self, status: int, received: int, sent: int) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(Request(self.command, path, status, received, sent, self.headers["Range"]))

    def _hang_up(self, received: int) -> None:
        self._record(0, received, 0)
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass
