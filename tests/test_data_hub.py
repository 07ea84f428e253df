"""A dataset on the Hub: only what a slice needs is asked for, against a server that speaks its protocol."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARDS, ROWS = 12, 1000
COMMIT = "c" * 40
TOKEN = "hf_right"


def shard(number: int) -> bytes:
    """Return 1,000 rows that do not compress, about 500 KB."""
    texts = [
        f"{number * ROWS + at} " + hashlib.sha512(f"{number} {at}".encode()).hexdigest() * 4
        for at in range(ROWS)
    ]
    file = io.BytesIO()
    pq.write_table(pa.table({"instruction": texts}), file, compression="none", use_dictionary=False)
    return file.getvalue()


class Hub:
    """Serves one gated dataset, `owner/set`, and keeps what was asked."""

    def __init__(self) -> None:
        self.files = {f"data/train-{n:05d}-of-{SHARDS:05d}.parquet": shard(n) for n in range(SHARDS)}
        self.files["README.md"] = b"# A set\n"
        self.sent = 0
        self.downloaded: list[str] = []
        self.lock = threading.Lock()

    def answer(self, method: str, path: str, headers: dict) -> tuple[int, dict, bytes]:
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"
        path = unquote(urlsplit(path).path)
        if path.startswith("/api/datasets/owner/set"):
            return self.api(path.removeprefix("/api/datasets/owner/set").strip("/"))
        prefix = "/datasets/owner/set/resolve/"
        revision, _, name = path.removeprefix(prefix).partition("/")
        if not path.startswith(prefix) or name not in self.files or revision not in (COMMIT, "main", "v1"):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return self.file(method, name, headers)

    def api(self, path: str) -> tuple[int, dict, bytes]:
        kind, _, rest = path.partition("/")
        revision, _, folder = rest.partition("/")
        if kind in ("revision", "tree", "paths-info") and revision not in (COMMIT, "main", "v1"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind == "tree":
            return 200, {}, json.dumps([e for e in self.entries() if e["path"].startswith(folder)]).encode()
        if kind == "paths-info":
            return 200, {}, json.dumps(self.entries()).encode()
        siblings = [{"rfilename": name} for name in self.files]
        info = {"id": "owner/set", "sha": COMMIT, "siblings": siblings, "private": False, "gated": "auto"}
        return 200, {}, json.dumps({**info, "tags": [], "downloads": 0, "disabled": False}).encode()

    def entries(self) -> list[dict]:
        folder = [{"type": "directory", "path": "data", "oid": "d" * 40, "size": 0}]
        return folder + [
            {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for name, content in self.files.items()
        ]

    def file(self, method: str, name: str, headers: dict) -> tuple[int, dict, bytes]:
        content = self.files[name]
        head = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if method == "HEAD":
            return 200, {**head, "Content-Length": str(len(content))}, b""
        if "range" in headers:
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            with self.lock:
                self.sent += len(part)
            span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            return 206, {**head, "Content-Range": span}, part
        with self.lock:
            self.sent += len(content)
            self.downloaded += [name] * name.endswith(".parquet")
        return 200, head, content


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            headers = {name.lower(): value for name, value in self.headers.items()}
            code, head, body = served.answer(self.command, self.path, headers)
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **head}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield served
    server.shutdown()
    server.server_close()


def load(hub: Hub, home: Path, slice_str: str, revision: str | None = None, **environment: str) -> list | str:
    """Return the numbers of the rows, or the error, of loading in a process of its own."""
    code = (
        "import sys, json; from distill_app.data.sources import load_rows\n"
        "name, revision = sys.argv[1], json.loads(sys.argv[2])\n"
        "try: print(json.dumps([int(r['instruction'].split()[0]) for r in load_rows('owner/set', name, revision)]))\n"
        "except Exception as err: print(json.dumps(f'{type(err).__name__} {err}'))"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.address,  # type: ignore[attr-defined]
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, slice_str, json.dumps(revision)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_slice_downloads_the_shards_that_it_touches_and_no_other(hub: Hub, tmp_path: Path) -> None:
    assert load(hub, tmp_path, "train[:1500]") == list(range(1500))
    assert sorted(hub.downloaded) == [f"data/train-{n:05d}-of-00012.parquet" for n in range(2)]
    size = len(hub.files["data/train-00000-of-00012.parquet"])
    assert hub.sent < 2 * size + 400_000  # two shards, and footers of no more than needed
    hub.downloaded.clear()
    assert load(hub, tmp_path, "train[990:1010]") == list(range(990, 1010))
    assert hub.downloaded == []  # both lie in the cache


def test_a_slice_from_the_end_reads_all_footers_and_one_shard(hub: Hub, tmp_path: Path) -> None:
    assert load(hub, tmp_path, "train[-3:]", "v1") == [11997, 11998, 11999]
    assert hub.downloaded == ["data/train-00011-of-00012.parquet"]
    assert load(hub, tmp_path, "train[:1%]+train[50%:51%]") == [*range(120), *range(6000, 6120)]
    assert len(hub.downloaded) == 3


def test_a_gated_set_without_a_token_asks_for_one(hub: Hub, tmp_path: Path) -> None:
    told = load(hub, tmp_path, "train[:5]", HF_TOKEN="hf_wrong")
    assert isinstance(told, str) and told.count("\n") == 0
    assert told.startswith(("FileNotFoundError owner/set: ", "OSError owner/set: ")) and "HF_TOKEN" in told


def test_a_revision_that_is_none_is_named(hub: Hub, tmp_path: Path) -> None:
    told = load(hub, tmp_path, "train[:5]", "nonsense")
    assert told == "FileNotFoundError owner/set: the Hub has no revision nonsense of it; mend revision"


def test_a_shard_that_goes_from_the_hub_is_an_error_that_names_the_set(hub: Hub, tmp_path: Path) -> None:
    name = "data/train-00000-of-00012.parquet"
    answer = hub.file

    def gone(method: str, asked: str, headers: dict) -> tuple[int, dict, bytes]:
        return (
            (404, {"X-Error-Code": "EntryNotFound"}, b"") if asked == name else answer(method, asked, headers)
        )

    hub.file = gone  # type: ignore[method-assign]
    told = load(hub, tmp_path, "train[:5]")
    assert isinstance(told, str) and told.startswith(
        "OSError owner/set: cannot be loaded from the Hugging Face Hub"
    )
