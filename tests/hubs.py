"""A stand-in for the Hub on loopback: repositories with branches that a test can move."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]


def commit(letter: str) -> str:
    """Return a commit's SHA-1 of one letter."""
    return letter * 40


@dataclass
class Repo:
    """Branches and tags with their commits, and each commit's files."""

    refs: dict[str, str]
    files: dict[str, Mapping[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision) or (
            revision if revision in {*self.refs.values(), *self.files} else None
        )


class Hub(ThreadingHTTPServer):
    """Serves `repos`, whose keys are as in the API's addresses: models/owner/name, datasets/owner/name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []

    def reply(self, method: str, address: str) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(address).path).strip("/")
        self.asked.append(f"{method} {path}")
        for key, repo in self.repos.items():
            place = key.removeprefix("models/")  # a model's files have no such prefix
            if path == f"api/{key}" or path.startswith(f"api/{key}/"):
                return _api(key.partition("/")[2], repo, path.removeprefix(f"api/{key}").strip("/"))
            if path.startswith(f"{place}/resolve/"):
                return _file(repo, method, *path.removeprefix(f"{place}/resolve/").split("/", 1))
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables with which a process takes this for the Hub."""
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **hub, **quiet, "PYTHONPATH": str(ROOT)}


def _api(name: str, repo: Repo, path: str) -> tuple[int, dict[str, str], bytes]:
    verb, _, rest = path.partition("/")
    revision, _, folder = rest.partition("/")
    found = repo.at(revision or "main")
    if found is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    files = repo.files.get(found, {})
    if verb in ("tree", "paths-info"):
        folders = {str(Path(file).parent) for file in files if "/" in file}
        entries = [{"type": "directory", "path": name, "oid": "d" * 40, "size": 0} for name in folders] + [
            {"type": "file", "path": file, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for file, content in files.items()
            if file.startswith(folder)
        ]
        return 200, {}, json.dumps(entries).encode()
    siblings = [{"rfilename": file} for file in files]
    return 200, {}, json.dumps({"id": name, "sha": found, "siblings": siblings, "tags": []}).encode()


def _file(repo: Repo, method: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
    found = repo.at(revision)
    content = repo.files.get(found or "", {}).get(name)
    if content is None:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    head = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": str(found)}
    return 200, {**head, "Content-Length": str(len(content))}, b"" if method == "HEAD" else content


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code, head, body = self.server.reply(self.command, self.path)
        if code == 200 and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, end = int(asked[1]), int(asked[2] or len(body) - 1) + 1
            code, size, body = 206, len(body), body[start:end]
            there = f"bytes {start}-{start + len(body) - 1}/{size}"
            head = {**head, "Content-Length": str(len(body)), "Content-Range": there}
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **head}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def a_hub() -> Iterator[Hub]:
    """Run a Hub on loopback."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def run(hub: Hub, folder: Path, *module: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module (`distill_app`, `stages.label`) in a folder against the Hub, with a cache beside it."""
    return subprocess.run(
        [sys.executable, "-m", *module],
        cwd=folder,
        env={**hub.environment(folder / ".hf"), **environment},
        capture_output=True,
        text=True,
    )
