"""Hub ids: what is downloaded, what is taken from the cache, and what is said when neither works.

The hub itself is never asked: the cache is written by the test, or filled from a server that
speaks the hub's HTTP interface on this machine.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from checkpoint.samples import (
    BLOB,
    COMMIT,
    CONFIG,
    HUB_FILES,
    INDEX,
    SHARDS,
    A,
    B,
    contents,
    hub_cache,
    packed,
    refused,
    sharded,
    tensor,
)
from vitrail.checkpoint.files import open_checkpoint
from vitrail.errors import InputError

# -- the cache -------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache for one test; conftest keeps the hub client offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize("local_files_only", [True, False], ids=["local only", "offline"])
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_id_is_opened_from_the_cache(
    revision: str | None, local_files_only: bool, cache: Path
) -> None:
    snapshot = hub_cache(cache, HUB_FILES)
    checkpoint = open_checkpoint("org/name", revision=revision, local_files_only=local_files_only)
    assert (checkpoint.source, checkpoint.revision) == ("org/name", COMMIT)
    assert checkpoint.folder == snapshot
    assert checkpoint.config == CONFIG
    assert checkpoint.preprocessor == {"size": 224}
    assert contents(checkpoint.tensors) == {"w": b"\1\2\3\4"}


def test_a_hub_id_is_opened_in_a_folder_that_was_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache(cache, HUB_FILES)
    (tmp_path / "removed").mkdir()
    monkeypatch.chdir(tmp_path / "removed")
    (tmp_path / "removed").rmdir()
    assert open_checkpoint("org/name").folder == snapshot


def test_shards_are_opened_from_the_cache(cache: Path, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "folder", SHARDS)
    hub_cache(cache, {path.name: path.read_bytes() for path in folder.iterdir()})
    for local_files_only in (True, False):
        checkpoint = open_checkpoint("org/name", local_files_only=local_files_only)
        assert contents(checkpoint.tensors) == contents(open_checkpoint(folder).tensors)


@pytest.mark.parametrize(
    ("typed", "revision"),
    [("org/absent", None), ("org/name", "v2"), ("org/name", "d" * 40)],
    ids=["repository", "revision", "commit"],
)
@pytest.mark.parametrize("local_files_only", [True, False], ids=["local only", "offline"])
def test_what_the_cache_lacks_is_said_with_what_to_do(
    typed: str, revision: str | None, local_files_only: bool, cache: Path
) -> None:
    hub_cache(cache, HUB_FILES)
    refused(
        lambda: open_checkpoint(typed, revision=revision, local_files_only=local_files_only),
        f"{typed}: no such local folder, not complete in the hub's cache, and the hub is out of",
        "download it once while online, or give a local folder",
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_cached_file_that_is_missing_is_named(name: str, cache: Path) -> None:
    (hub_cache(cache, HUB_FILES) / name).unlink()
    wanted = "no config.json" if name == "config.json" else "no weights"
    refused(lambda: open_checkpoint("org/name", local_files_only=True), f"got {wanted}")


def test_a_cache_without_tokenizer_is_enough_and_without_weights_is_not(cache: Path) -> None:
    snapshot = hub_cache(cache, HUB_FILES)
    listing = [*HUB_FILES, "tokenizer.json", "vocab.json", "pytorch_model.bin"]
    known_to_the_client(cache, listing)
    for local_files_only in (True, False):
        checkpoint = open_checkpoint("org/name", local_files_only=local_files_only)
        assert checkpoint.tensors.keys() == {"w"}
        assert checkpoint.file("tokenizer.json") is None
    (snapshot / "model.safetensors").rename(snapshot / "model.fp16.safetensors")
    refused(
        lambda: open_checkpoint("org/name", local_files_only=True),
        "org/name: no such local folder, not complete in the hub's cache",
    )


def known_to_the_client(cache: Path, names: Sequence[str]) -> None:
    """The listing that the hub client keeps, to tell whether a snapshot is complete."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    entry = TreeCacheEntry(size=4, blob_id=BLOB, lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(cache / "models--org--name"), COMMIT, dict.fromkeys(names, entry))


@pytest.mark.parametrize("revision", ["../../secret", "a b", "/etc/passwd", "", "-x", "a\n"])
def test_a_revision_that_cannot_be_one_is_an_input_error(revision: str, cache: Path) -> None:
    hub_cache(cache, HUB_FILES)
    with pytest.raises(InputError, match=r"revision: got .+, wanted a branch, a tag or a commit"):
        open_checkpoint("org/name", revision=revision, local_files_only=True)


def test_all_files_are_of_the_commit_that_the_first_came_from(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    folder = sharded(tmp_path / "folder", SHARDS)
    snapshot = hub_cache(cache, {path.name: path.read_bytes() for path in folder.iterdir()})
    asked: list[tuple[str | None, list[str]]] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        asked.append((revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    open_checkpoint("org/name", revision="main")
    assert [revision for revision, _ in asked] == ["main", COMMIT]
    assert asked[1][1] == [A, B]


# -- a hub -----------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """What downloading a repository asks of the hub: its facts, its listing, its files."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories = repositories
        self.gated = gated
        self.downloads: list[str] = []


class HubRequest(http.server.BaseHTTPRequestHandler):
    server: Hub
    paths = re.compile(
        r"(?:/api/models)?/(?P<repo>[^/]+/[^/]+)"
        r"(?:/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<name>.*))?)?"
    )

    def log_message(self, *_: object) -> None:
        """Nothing: the output of a test is not an access log."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        found = self.paths.fullmatch(urllib.parse.unquote(self.path.partition("?")[0]))
        if found is None or found["repo"] not in self.server.repositories:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        files = self.server.repositories[found["repo"]]
        if found["revision"] not in (None, "main", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if found["what"] == "resolve":
            return self.resolve(found["repo"], files, found["name"])
        if found["what"] == "tree":
            return self.answer_json([listed(name, files[name]) for name in files])
        return self.answer_json({"id": found["repo"], "sha": COMMIT, "siblings": [], "tags": []})

    def resolve(self, repo: str, files: dict[str, bytes], name: str) -> None:
        if repo in self.server.gated:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if name not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.downloads.append(f"{repo}/{name}")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob_id(files[name])}"'}
        return self.answer(200, headers, files[name])

    def answer_json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listed(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}


TINY = {"config.json": HUB_FILES["config.json"]}
W = HUB_FILES["model.safetensors"]
LARGE = packed({"w": tensor(shape=[200_000], offsets=[0, 200_000])}, bytes(200_000))
CLIMBING = json.dumps({"weight_map": {"w": "../../../x.safetensors"}}).encode()
VARIANTS = ("model.fp16.safetensors", "onnx/model.safetensors", "pytorch_model.bin", "tf_model.h5")
REPOSITORIES = {
    "org/variants": HUB_FILES
    | {"vocab.json": b"{}", "merges.txt": b"#", "README.md": b""}
    | dict.fromkeys(VARIANTS, W),
    "org/other": TINY | {"open_clip_model.safetensors": W, "open_clip_pytorch_model.bin": b""},
    "org/several": TINY | {"a.safetensors": W, "b.safetensors": W, "sub/model.safetensors": W},
    "org/pickled": TINY | {"pytorch_model.bin": b""},
    "org/gated": HUB_FILES,
    "org/large": TINY | {"model.safetensors": LARGE},
    "org/climbs": TINY | {INDEX: CLIMBING, "x.safetensors": W},
}

# (what is typed, options, the largest file that may be written: a disk that fills up)
QUESTIONS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "org/variants": ("org/variants", {}, None),
    "commit": ("org/variants", {"revision": COMMIT}, None),
    "revision": ("org/variants", {"revision": "v9"}, None),
    "org/other": ("org/other", {}, None),
    "org/sharded": ("org/sharded", {}, None),
    "org/several": ("org/several", {}, None),
    "org/pickled": ("org/pickled", {}, None),
    "org/gated": ("org/gated", {}, None),
    "org/climbs": ("org/climbs", {}, None),
    "org/absent": ("org/absent", {}, None),
    "full disk": ("org/large", {}, 100_000),
    "after it": ("org/large", {"local_files_only": True}, None),
    "room again": ("org/large", {}, None),
}
ASK = """
import json, os, resource, sys
from vitrail.errors import CheckpointError
from vitrail.checkpoint.files import open_checkpoint
for typed, options, most in json.loads(sys.argv[1]):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if most is None else most, hard))
    try:
        found = open_checkpoint(typed, **options)
        answer = [found.revision, sorted(found.tensors), sorted(os.listdir(found.folder))]
    except CheckpointError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


class Asked:
    """The hub after one process has asked it all the questions, in their order."""

    def __init__(self, home: Path, hub: Hub) -> None:
        environment = {key: os.environ[key] for key in os.environ if "proxy" not in key.lower()}
        environment.pop("HF_HUB_CACHE", None)
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", ASK, json.dumps(list(QUESTIONS.values()))]
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        self.answers: dict[str, Any] = dict(zip(QUESTIONS, lines, strict=True))
        self.downloads = hub.downloads
        self.cache = home / "hub"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder = sharded(tmp_path_factory.mktemp("shards"), SHARDS | {"c[1].safetensors": {"d": 1}})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["model.fp16-00001-of-00001.safetensors"] = W
    files["c1.safetensors"] = W  # what the shard's name would match as a pattern
    with Hub(REPOSITORIES | {"org/sharded": files}, gated={"org/gated"}) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield Asked(tmp_path_factory.mktemp("home"), hub)
        hub.shutdown()


@pytest.mark.parametrize(
    ("repo", "tensors", "files"),
    [
        ("org/variants", ["w"], [*HUB_FILES, "vocab.json", "merges.txt"]),
        ("org/other", ["w"], ["config.json", "open_clip_model.safetensors"]),
        ("org/sharded", ["a", "b", "c", "d"], ["config.json", INDEX, A, B, "c[1].safetensors"]),
    ],
)
def test_of_a_repository_only_what_is_used_is_downloaded_and_once(
    repo: str, tensors: list[str], files: list[str], asked: Asked
) -> None:
    assert asked.answers[repo] == [COMMIT, tensors, sorted(files)]
    downloaded = [name for name in asked.downloads if name.startswith(f"{repo}/")]
    assert sorted(downloaded) == sorted(f"{repo}/{name}" for name in files)


@pytest.mark.parametrize(
    ("question", "fragments"),
    [
        ("org/absent", ["org/absent: no such local folder and no such hub repository", "HF_TOKEN"]),
        ("org/gated", ["org/gated: the repository is gated: accept its terms", "hf auth login"]),
        ("revision", ["org/variants: got revision 'v9', wanted a branch, tag or commit of the"]),
        ("org/several", ["got a.safetensors, b.safetensors and no model.safetensors, wanted"]),
        ("org/pickled", ["org/pickled: got pytorch_model.bin only", "pickles and the like are"]),
        ("org/climbs", ["weight_map: 'w': got '../../../x.safetensors', wanted the plain name"]),
        ("full disk", ["org/large: the download cannot be stored: ", "make room, or set HF_HOME"]),
        ("after it", ["org/large: no such local folder, not complete in the hub's cache"]),
    ],
)
def test_what_goes_wrong_with_the_hub_is_said_with_what_to_do(
    question: str, fragments: list[str], asked: Asked
) -> None:
    message = asked.answers[question]
    assert isinstance(message, str)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_after_a_full_disk_there_is_nothing_that_passes_for_weights(asked: Asked) -> None:
    assert asked.answers["room again"] == [COMMIT, ["w"], ["config.json", "model.safetensors"]]
    snapshot = asked.cache / "models--org--large" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == LARGE


def test_a_commit_opens_what_its_branch_opens(asked: Asked) -> None:
    assert asked.answers["commit"] == asked.answers["org/variants"]


def test_nothing_pickled_is_downloaded(asked: Asked) -> None:
    read = (".json", ".txt", ".safetensors")
    assert [name for name in asked.downloads if not name.endswith(read)] == []
    assert asked.downloads
