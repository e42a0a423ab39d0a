"""What pushing to and pulling from a Hub keeps, shown with the real client against the server of `hub_server.py`."""

import base64
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_client import ClientError, HubClients
from hub_server import INITIAL_FILES, HubServer
from huggingface_hub import constants

REPO = "ann/detr"
WEIGHTS = bytes(range(256)) * 2_000
FILES = {
    "README.md": b"---\ntags:\n- detr\n- test\n---\nA model card.\n",
    "config.json": b'{"d_model": 32}',
    "model.safetensors": WEIGHTS,
    "notes/empty.txt": b"",
    "notes/küche.txt": "Küche\n".encode() * 100,
}
USERS = {"ann": "hf_ann", "bob": "hf_bob"}
IMPORTS = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, errors, hf_hub_download, snapshot_download
"""
CODE = (
    IMPORTS
    + """
api = HfApi()

def pull(repo, **options):
    folder = Path(snapshot_download(repo, **options))
    return {p.relative_to(folder).as_posix(): p.read_bytes().hex() for p in folder.rglob("*") if p.is_file()}

def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]

"""
)


@pytest.fixture(scope="module")
def running_server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def server(running_server: HubServer) -> Iterator[HubServer]:
    running_server.reset(USERS)
    yield running_server
    assert running_server.errors == []


@pytest.fixture(scope="module")
def clients(running_server: HubServer) -> Iterator[HubClients]:
    with HubClients(running_server, IMPORTS) as clients:
        yield clients


@pytest.fixture
def client(clients: HubClients, tmp_path: Path) -> Callable[..., Any]:
    """Run code, as ann unless told otherwise, and return the JSON it prints last."""

    def run(code: str, user: str | None = "ann", home: str = "home", **options: bool) -> Any:
        token = USERS.get(user, user) if user else None
        lines = clients.run(CODE + code, tmp_path / home, token, **options).splitlines()
        return json.loads(lines[-1]) if lines else None

    return run


@pytest.fixture
def push(client: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Write these files to a folder, push all of it with `upload_folder`, and return the commit."""

    def run(files: Mapping[str, bytes], options: str = "", **settings: bool) -> str:
        for path, data in files.items():
            (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / path).write_bytes(data)
        folder = str(tmp_path / "folder")
        return client(
            f"api.create_repo({REPO!r}, exist_ok=True)\n"
            f"print(json.dumps(api.upload_folder(repo_id={REPO!r}, folder_path={folder!r}{options}).oid))",
            **settings,
        )

    return run


def unhexed(files: Mapping[str, str]) -> dict[str, bytes]:
    return {path: bytes.fromhex(data) for path, data in files.items()}


def raw(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    """A request without the client: status, body, headers."""
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
            return reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def uploads(server: HubServer) -> list[int]:
    """Bytes of the large files that came, one number an upload."""
    return [request.received for request in server.requests if request.method == "PUT"]


def commits(server: HubServer) -> list[int]:
    """Status of each commit that was asked for."""
    return [request.status for request in server.requests if "/commit/" in request.path]


class TestPush:
    def test_a_pushed_folder_comes_back_whole_by_branch_and_by_commit(self, server, client, push):
        commit = push(FILES)
        by_branch, by_commit, info = client(f"""
info = api.model_info({REPO!r}, files_metadata=True)
sizes = {{file.rfilename: [file.size, file.lfs and file.lfs.sha256] for file in info.siblings}}
print(json.dumps([pull({REPO!r}), pull({REPO!r}, revision={commit!r}), [info.sha, info.private, info.tags, sizes]]))
""")
        assert unhexed(by_branch) == unhexed(by_commit) == FILES | INITIAL_FILES == server.blobs_of(REPO)
        assert server.commits_of(REPO)[0] == commit
        assert info[:3] == [commit, False, ["detr", "test"]]
        assert info[3]["config.json"] == [len(FILES["config.json"]), None]
        assert info[3]["model.safetensors"] == [len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()]
        assert not [request for request in server.requests if request.status >= 400]

    def test_a_second_push_sends_only_the_changed_file(self, server, push):
        extra = {"preprocessor.bin": WEIGHTS[::-1]}
        first = push(FILES | extra)
        assert sorted(uploads(server)) == [len(WEIGHTS)] * 2

        server.requests.clear()
        changed = {"model.safetensors": WEIGHTS + b"one step more"}
        second = push(changed)
        assert uploads(server) == [len(WEIGHTS) + 13]
        assert sum(request.received for request in server.requests) < len(WEIGHTS) + 13 + 5_000
        assert server.blobs_of(REPO) == FILES | extra | changed | INITIAL_FILES
        assert server.blobs_of(REPO, first) == FILES | extra | INITIAL_FILES
        assert server.commits_of(REPO)[:2] == [second, first]

        server.requests.clear()
        push({"config.json": b"{}"})
        assert uploads(server) == []
        assert server.blobs_of(REPO) == FILES | extra | changed | INITIAL_FILES | {"config.json": b"{}"}

    def test_a_push_without_changes_makes_no_commit(self, server, push):
        first = push(FILES)
        server.requests.clear()
        assert push({}) == first
        assert commits(server) == []
        assert uploads(server) == []
        assert server.commits_of(REPO)[0] == first

    def test_weights_that_the_hub_has_are_not_sent_again_under_another_name(self, server, push):
        push(FILES)
        server.requests.clear()
        push({"best.safetensors": WEIGHTS})
        assert uploads(server) == []
        assert server.blobs_of(REPO)["best.safetensors"] == WEIGHTS

    def test_what_is_pushed_to_a_pull_request_leaves_main_as_it_is(self, server, client):
        server.add_repo(REPO, FILES)
        main = server.commits_of(REPO)
        pr, pulled = client(
            f"""
change = CommitOperationAdd("model.safetensors", b"better")
info = api.create_commit({REPO!r}, [change], commit_message="Better", create_pr=True)
print(json.dumps([info.pr_revision, pull({REPO!r}, revision=info.pr_revision)]))
""",
            user="bob",
        )
        assert pr == "refs/pr/1"
        assert server.commits_of(REPO) == main
        assert server.blobs_of(REPO) == FILES | INITIAL_FILES
        assert unhexed(pulled) == server.blobs_of(REPO, pr) == FILES | INITIAL_FILES | {"model.safetensors": b"better"}

    def test_files_can_be_deleted_and_repositories_too(self, server, client):
        server.add_repo(REPO, FILES)
        missing = client(f"""
api.delete_file("config.json", {REPO!r})
api.delete_folder("notes", {REPO!r})
print(json.dumps(error_of(api.delete_file, "no-such.json", {REPO!r})))
""")
        assert missing[0] == "RemoteEntryNotFoundError"
        assert "no-such.json" in missing[1]
        assert sorted(server.blobs_of(REPO)) == sorted({"README.md", "model.safetensors"} | INITIAL_FILES.keys())
        client(f"api.delete_repo({REPO!r})")
        assert server.repos == {}


class TestRevisions:
    def test_tags_branches_and_commits_keep_their_files_after_a_later_push(self, server, client, push):
        first = push(FILES)
        client(f"api.create_tag({REPO!r}, tag='v1'); api.create_branch({REPO!r}, branch='try/this')")
        second = push({"config.json": b"second"})
        third = push({"config.json": b"third"}, options=", revision='try/this'")
        pulled, listed, titles = client(f"""
read = lambda revision: Path(hf_hub_download({REPO!r}, "config.json", revision=revision)).read_text()
refs = api.list_repo_refs({REPO!r})
print(json.dumps([
    {{revision: read(revision) for revision in ("main", "v1", "try/this", {first!r})}},
    {{ref.name: ref.target_commit for ref in refs.branches + refs.tags}},
    [commit.title for commit in api.list_repo_commits({REPO!r})],
]))
""")
        old = FILES["config.json"].decode()
        assert pulled == {"main": "second", "v1": old, "try/this": "third", first: old}
        assert listed == {"main": second, "v1": first, "try/this": third}
        assert titles == ["Upload folder using huggingface_hub"] * 2 + ["initial commit"]

    def test_folders_and_single_files_can_be_listed(self, server, client):
        server.add_repo(REPO, FILES)
        root, everything, inside, found = client(f"""
paths = lambda **options: sorted(entry.path for entry in api.list_repo_tree({REPO!r}, **options))
found = api.get_paths_info({REPO!r}, ["model.safetensors", "notes", "no-such.json"])
print(json.dumps([
    paths(), paths(recursive=True), paths(path_in_repo="notes"),
    [[entry.path, getattr(entry, "size", None)] for entry in found],
]))
""")
        assert root == sorted({".gitattributes", "README.md", "config.json", "model.safetensors", "notes"})
        assert everything == sorted(FILES.keys() | INITIAL_FILES.keys() | {"notes"})
        assert inside == sorted(path for path in FILES if path.startswith("notes/"))
        assert found == [["model.safetensors", len(WEIGHTS)], ["notes", None]]


class TestAccess:
    def test_a_private_repository_is_there_for_its_owner_alone(self, server, client):
        client(f"""
api.create_repo({REPO!r}, private=True)
api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.bin", repo_id={REPO!r})
""")
        assert server.repos[REPO].private
        probe = f"print(json.dumps([error_of(pull, {REPO!r}), error_of(hf_hub_download, {REPO!r}, 'a.bin')]))"
        for user, status in ((None, "401"), ("bob", "404")):
            for name, message in client(probe, user=user, home=f"home of {user}"):
                assert name == "RepositoryNotFoundError"
                assert message.startswith(status)
                assert f"/{REPO}" in message
                assert "private or gated repo, make sure you are authenticated" in message
        assert unhexed(client(f"print(json.dumps(pull({REPO!r})))"))["a.bin"] == b"secret"

    def test_only_the_owner_with_a_token_that_writes_can_push(self, server, client):
        server.add_repo(REPO, FILES)
        server.add_user("ann", "hf_ann_reads", can_write=False)
        attempt = (
            f"print(json.dumps(error_of(api.upload_file, path_or_fileobj=b'x', path_in_repo='x', repo_id={REPO!r})))"
        )
        name, message = client(attempt, user="bob")
        assert name == "HfHubHTTPError"
        assert "403 Forbidden: You don't have the rights to write under the namespace ann" in message
        name, message = client(attempt, user="hf_ann_reads")
        assert name == "HfHubHTTPError"
        assert "you must use a write token" in message
        name, message = client(attempt, user=None)
        assert name == "RepositoryNotFoundError"
        assert "Invalid username or password" in message
        name, message = client(attempt, user="hf_of_nobody")
        assert name == "HfHubHTTPError"
        assert "Invalid credentials" in message
        assert server.blobs_of(REPO) == FILES | INITIAL_FILES

    def test_a_gated_repository_shows_its_files_to_its_owner_alone(self, server, client):
        server.add_repo(REPO, FILES)
        client(f"api.update_repo_settings({REPO!r}, gated='manual')")
        read = f"print(json.dumps(error_of(hf_hub_download, {REPO!r}, 'config.json')))"
        name, message = client(read, user="bob", home="bob")
        assert name == "GatedRepoError"
        assert f"Access to model {REPO} is restricted" in message
        assert client(read) == ["nothing", ""]

    def test_the_token_stays_with_the_api(self, server, client):
        server.add_repo(REPO, FILES, private=True)
        link = server.signed_link("GET", server.repos[REPO], hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
        assert raw(link)[:2] == (200, WEIGHTS)
        assert raw(link[:-1] + "x")[0] == 403
        # Like the real one the storage refuses a token next to a signed link, so the client has dropped it.
        assert raw(link, Authorization="Bearer hf_ann")[0] == 400
        assert unhexed(client(f"print(json.dumps(pull({REPO!r})))")) == FILES | INITIAL_FILES


class TestBrokenPushes:
    def test_weights_that_change_while_they_are_pushed_are_refused(self, server, client, tmp_path):
        server.add_repo(REPO, FILES)
        before = server.commits_of(REPO)
        name, message = client(f"""
path = Path({str(tmp_path)!r}, "model.safetensors")
path.write_bytes(b"the weights as they were hashed")
add = CommitOperationAdd("model.safetensors", path)
add.upload_info.sha256
path.write_bytes(b"the weights as they were sent..")
def push():
    try:
        api.create_commit({REPO!r}, [add], commit_message="Broken")
    except RuntimeError as error:
        raise error.__cause__
print(json.dumps(error_of(push)))
""")
        assert name == "BadRequestError"
        assert "Content does not match" in message
        assert server.commits_of(REPO) == before
        assert server.blobs_of(REPO) == FILES | INITIAL_FILES
        assert list(server.repos[REPO].lfs) == [hashlib.sha256(WEIGHTS).hexdigest()]

    def test_an_upload_that_breaks_once_is_sent_again_by_the_client_itself(self, server, push):
        server.break_upload(after_bytes=100_000)
        commit = push(FILES, waits=False)
        assert uploads(server) == [100_000, len(WEIGHTS)]
        assert server.commits_of(REPO)[0] == commit
        assert server.blobs_of(REPO) == FILES | INITIAL_FILES

    def test_an_upload_that_stays_broken_leaves_the_old_revision_and_a_new_try_succeeds(self, server, client, push):
        old = push(FILES)
        changed = {"model.safetensors": WEIGHTS[::-1], "config.json": b"new"}
        server.break_upload(after_bytes=100_000, times=100)  # more than the client ever tries
        server.requests.clear()
        with pytest.raises(ClientError, match=r"Error while uploading 'model\.safetensors' to the Hub"):
            push(changed, waits=False)
        assert set(uploads(server)) == {100_000}
        assert len(uploads(server)) > 1
        assert commits(server) == []
        assert server.commits_of(REPO)[0] == old
        assert unhexed(client(f"print(json.dumps(pull({REPO!r})))")) == FILES | INITIAL_FILES

        server.mend()
        new = push({})
        assert server.commits_of(REPO)[:2] == [new, old]
        assert server.blobs_of(REPO) == FILES | INITIAL_FILES | changed

    @pytest.mark.parametrize("status", [500, 0], ids=["internal error", "connection closed"])
    def test_a_commit_that_breaks_leaves_the_old_revision_and_the_next_try_sends_no_weights(self, server, push, status):
        old = push(FILES)
        server.break_commit(status=status)
        server.requests.clear()
        error = "500 Server Error|Internal Server Error" if status else "RemoteProtocolError"
        with pytest.raises(ClientError, match=error):
            push({"model.safetensors": WEIGHTS[::-1]})
        assert commits(server) == [status]
        assert uploads(server) == [len(WEIGHTS)]
        assert server.commits_of(REPO)[0] == old
        assert server.blobs_of(REPO) == FILES | INITIAL_FILES

        new = push({})
        assert uploads(server) == [len(WEIGHTS)]
        assert server.commits_of(REPO)[:2] == [new, old]
        assert server.blobs_of(REPO)["model.safetensors"] == WEIGHTS[::-1]

    def test_a_commit_on_an_outdated_parent_is_refused(self, server, client):
        server.add_repo(REPO, FILES)
        head, parent = server.commits_of(REPO)
        push_on = "api.upload_file, path_or_fileobj=b'x', path_in_repo='x', repo_id={!r}, parent_commit={!r}"
        name, message = client(f"print(json.dumps(error_of({push_on.format(REPO, parent)})))")
        assert name == "HfHubHTTPError"
        assert "412" in message
        assert "A commit has happened since" in message
        assert server.commits_of(REPO) == [head, parent]
        assert client(f"print(json.dumps(error_of({push_on.format(REPO, head)})))") == ["nothing", ""]
        assert server.blobs_of(REPO)["x"] == b"x"

    def test_a_commit_that_names_weights_which_never_came_changes_nothing(self, server):
        server.add_repo(REPO, FILES)
        before = server.commits_of(REPO)
        lines = [
            {"key": "header", "value": {"summary": "Half", "description": ""}},
            {"key": "file", "value": {"path": "config.json", "content": base64.b64encode(b"new").decode()}},
            {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}},
        ]
        body = "\n".join(map(json.dumps, lines)).encode()
        status, reply, _ = raw(f"{server.endpoint}/api/models/{REPO}/commit/main", body, Authorization="Bearer hf_ann")
        assert status == 400
        assert "a.bin" in json.loads(reply)["error"]
        assert server.commits_of(REPO) == before
        assert server.blobs_of(REPO) == FILES | INITIAL_FILES


class TestBrokenPulls:
    def test_a_download_that_breaks_goes_on_where_it_stopped(self, server, client):
        piece = constants.DOWNLOAD_CHUNK_SIZE  # 10 MiB; less than one such piece is lost, and fetched again
        weights = hashlib.shake_128(b"weights").digest(piece + 1_000_000)
        server.add_repo(REPO, {"model.safetensors": weights})
        server.break_download(after_bytes=piece + 500_000)
        digest = client(
            f"""
import hashlib
path = hf_hub_download({REPO!r}, "model.safetensors")
print(json.dumps(hashlib.sha256(Path(path).read_bytes()).hexdigest()))
""",
            waits=False,
        )
        assert digest == hashlib.sha256(weights).hexdigest()
        first, second = [request for request in server.requests if request.path.startswith("/lfs/")]
        assert (first.status, first.range, first.sent) == (200, None, piece + 500_000)
        assert (second.status, second.range, second.sent) == (206, f"bytes={piece}-", 1_000_000)

    def test_a_download_that_stays_broken_leaves_no_file_and_a_new_try_succeeds(self, server, client, tmp_path):
        server.add_repo(REPO, FILES)
        server.break_download(after_bytes=100_000, times=100)
        get = f"print(json.dumps(Path(hf_hub_download({REPO!r}, 'model.safetensors')).read_bytes().hex()))"
        with pytest.raises(ClientError, match="peer closed connection"):
            client(get, waits=False)
        left = [path for path in (tmp_path / "home" / "hub").rglob("*") if path.is_file() and "blobs" in path.parts]
        assert left == []
        server.mend()
        assert bytes.fromhex(client(get)) == WEIGHTS

    def test_parts_of_a_file_are_served_by_range(self, server):
        server.add_repo(REPO, {"a.txt": b"0123456789"})
        url = f"{server.endpoint}/{REPO}/resolve/main/a.txt"
        for asked, part, span in (("2-4", b"234", "2-4"), ("7-", b"789", "7-9"), ("-2", b"89", "8-9")):
            status, body, headers = raw(url, Range=f"bytes={asked}")
            assert (status, body, headers["Content-Range"]) == (206, part, f"bytes {span}/10")
        status, _, headers = raw(url, Range="bytes=10-")
        assert (status, headers["Content-Range"]) == (416, "bytes */10")

    def test_a_warm_cache_serves_without_a_hub_and_a_cold_one_says_what_to_do(self, client, server):
        server.add_repo(REPO, FILES)
        get = f"print(json.dumps(pull({REPO!r})))"
        online = client(get)
        server.requests.clear()
        assert unhexed(online) == FILES | INITIAL_FILES
        assert client(get, user=None, offline=True) == online
        name, message = client(f"print(json.dumps(error_of(pull, {REPO!r})))", home="cold", offline=True)
        assert name == "LocalEntryNotFoundError"
        assert "Cannot find an appropriate cached snapshot" in message
        assert "HF_HUB_OFFLINE" in message
        assert server.requests == []

    def test_a_pull_of_what_the_cache_has_moves_no_file(self, client, server):
        server.add_repo(REPO, FILES)
        get = f"print(json.dumps(pull({REPO!r})))"
        first = client(get)
        server.requests.clear()
        assert client(get) == first
        assert [request for request in server.requests if "/resolve/" in request.path] == []
        assert [request for request in server.requests if request.path.startswith("/lfs/")] == []

    def test_what_does_not_exist_is_called_by_its_name(self, server, client):
        server.add_repo(REPO, FILES)
        repo, revision, file, dataset = client(f"""
print(json.dumps([
    error_of(hf_hub_download, "ann/no-such-repo", "config.json"),
    error_of(hf_hub_download, {REPO!r}, "config.json", revision="no-such-branch"),
    error_of(hf_hub_download, {REPO!r}, "no-such.json"),
    error_of(api.create_repo, "ann/data", repo_type="dataset"),
]))
""")
        assert repo[0] == "RepositoryNotFoundError"
        assert "no-such-repo" in repo[1]
        assert revision[0] == "RevisionNotFoundError"
        assert "Invalid rev id: no-such-branch" in revision[1]
        assert file[0] == "RemoteEntryNotFoundError"
        assert "Entry not found: no-such.json" in file[1]
        assert "Only models and Spaces exist here" in dataset[1]


class TestTheServerItself:
    def test_an_unknown_route_is_named(self, server):
        status, body, _ = raw(f"{server.endpoint}/api/papers/1")
        assert status == 404
        assert json.loads(body)["error"] == "No route in hub_server.py for GET /api/papers/1"
        assert [(request.path, request.status) for request in server.requests] == [("/api/papers/1", 404)]

    def test_a_route_that_fails_answers_with_its_traceback_and_keeps_it(self, server):
        status, body, _ = raw(f"{server.endpoint}/api/repos/create", b"no JSON", Authorization="Bearer hf_ann")
        assert status == 500
        assert b"JSONDecodeError" in body
        assert [error.encode() for error in server.errors] == [body]
        server.errors.clear()

    def test_a_failing_client_says_why(self, clients, tmp_path):
        with pytest.raises(ClientError, match="ValueError: the reason"):
            clients.run("raise ValueError('the reason')", tmp_path)
