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
COMMIT, NEXT_COMMIT = "c" * 40, "d" * 40
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
        self.next_files: dict[str, bytes] = {}  # of NEXT_COMMIT
        self.main = COMMIT
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
        commit = self.commit_of(revision)
        if not path.startswith(prefix) or commit is None or name not in self.files_at(commit):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return self.file(method, name, headers, commit)

    def commit_of(self, revision: str) -> str | None:
        return {"main": self.main, "v1": COMMIT, COMMIT: COMMIT, NEXT_COMMIT: NEXT_COMMIT}.get(revision)

    def files_at(self, commit: str) -> dict[str, bytes]:
        return self.files if commit == COMMIT else self.next_files

    def api(self, path: str) -> tuple[int, dict, bytes]:
        kind, _, rest = path.partition("/")
        revision, _, folder = rest.partition("/")
        commit = self.commit_of(revision or "main")
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        entries = self.entries(commit)
        if kind == "tree":
            return 200, {}, json.dumps([e for e in entries if e["path"].startswith(folder)]).encode()
        if kind == "paths-info":
            return 200, {}, json.dumps(entries).encode()
        siblings = [{"rfilename": name} for name in self.files_at(commit)]
        info = {"id": "owner/set", "sha": commit, "siblings": siblings, "private": False, "gated": "auto"}
        return 200, {}, json.dumps({**info, "tags": [], "downloads": 0, "disabled": False}).encode()

    def entries(self, commit: str) -> list[dict]:
        folder = [{"type": "directory", "path": "data", "oid": "d" * 40, "size": 0}]
        return folder + [
            {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for name, content in self.files_at(commit).items()
        ]

    def file(self, method: str, name: str, headers: dict, commit: str) -> tuple[int, dict, bytes]:
        content = self.files_at(commit)[name]
        head = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
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


def load(
    hub: Hub,
    home: Path,
    slice_str: str,
    revision: str | None = None,
    config: str | None = None,
    **environment: str,
) -> list | str:
    """Return the numbers of the rows, or the error, of loading in a process of its own."""
    code = (
        "import json; from distill_app.data.sources import Dataset, load_rows\n"
        f"found = load_rows(Dataset('owner/set', {slice_str!r}, {revision!r}, {config!r}))\n"
        "try: print(json.dumps([int(row['instruction'].split()[0]) for row in found]))\n"
        "except Exception as err: print(json.dumps(f'{type(err).__name__} {err}'))"
    )
    done = run(hub, home, code, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(hub: Hub, home: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
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
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_slice_downloads_the_shards_that_it_touches_and_no_other(hub: Hub, tmp_path: Path) -> None:
    assert load(hub, tmp_path, "train[:1500]") == list(range(1500))
    assert sorted(hub.downloaded) == [f"data/train-{n:05d}-of-00012.parquet" for n in range(2)]
    size = len(hub.files["data/train-00000-of-00012.parquet"])
    assert hub.sent < 2 * size + 400_000  # two shards, and footers of no more than needed
    hub.downloaded.clear()
    assert load(hub, tmp_path, "train[990:1010]") == list(range(990, 1010))
    assert hub.downloaded == []  # both lie in the cache


@pytest.mark.slow
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
    assert told == "FileNotFoundError owner/set: the Hub has no revision nonsense of it; fix revision"


def test_a_shard_that_goes_from_the_hub_is_an_error_that_names_the_set(hub: Hub, tmp_path: Path) -> None:
    name = "data/train-00000-of-00012.parquet"
    answer = hub.file

    def gone(method: str, asked: str, *rest: object) -> tuple[int, dict, bytes]:
        return (
            (404, {"X-Error-Code": "EntryNotFound"}, b"") if asked == name else answer(method, asked, *rest)
        )

    hub.file = gone  # type: ignore[method-assign]
    told = load(hub, tmp_path, "train[:5]")
    assert isinstance(told, str) and told.startswith(
        "OSError owner/set: cannot be loaded from the Hugging Face Hub"
    )


def offline(hub: Hub, home: Path, slice_str: str, revision: str | None = None) -> list | str:
    """Load without a network: where the Hub was, nobody answers."""
    return load(hub, home, slice_str, revision, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.slow
@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_slice_that_was_read_once_is_read_offline_from_the_same_cache(
    hub: Hub, tmp_path: Path, revision: str | None
) -> None:
    assert offline(hub, tmp_path, "train[:5]", revision) == (
        f"OSError owner/set: offline (HF_HUB_OFFLINE), and revision {revision or 'main'} of it was never read"
        f" with the cache in {tmp_path}/hub; read it once with a network (HF_TOKEN for a gated one), or give a"
        " local folder"
    )
    assert load(hub, tmp_path, "train[990:1010]", revision) == list(range(990, 1010))
    assert offline(hub, tmp_path, "train[990:1010]", revision) == list(range(990, 1010))
    assert offline(hub, tmp_path, "train[:5]", revision) == list(range(5))
    assert offline(hub, tmp_path, "train[990:1010]", COMMIT) == list(range(990, 1010))
    told = offline(hub, tmp_path, "train[5000:5001]", revision)
    assert (
        isinstance(told, str) and told.startswith("OSError owner/set: cannot be loaded") and "\n" not in told
    )


@pytest.mark.slow
def test_a_cache_half_written_is_an_error_that_names_the_file(hub: Hub, tmp_path: Path) -> None:
    assert load(hub, tmp_path, "train[:5]") == list(range(5))
    (file,) = tmp_path.rglob("train-00000-of-00012.parquet")
    content = file.resolve().read_bytes()
    file.resolve().write_bytes(content[: len(content) // 2])
    told = offline(hub, tmp_path, "train[:5]")
    assert (
        isinstance(told, str) and told.startswith(f"ValueError {file}: cannot be read") and "\n" not in told
    )
    (found,) = tmp_path.rglob("distill.json")
    found.write_text("{")
    assert "was never read" in str(offline(hub, tmp_path, "train[:5]"))
    file.resolve().write_bytes(content)
    assert load(hub, tmp_path, "train[:5]") == list(range(5)) == offline(hub, tmp_path, "train[:5]")


def moved(hub: Hub) -> None:
    """Let main mean another commit, with other rows."""
    hub.next_files = {f"data/train-{n:05d}-of-{SHARDS:05d}.parquet": shard(n + 50) for n in range(SHARDS)}
    hub.main = NEXT_COMMIT


@pytest.mark.slow
def test_a_branch_that_moves_while_it_is_read_is_read_as_it_was(hub: Hub, tmp_path: Path) -> None:
    answer = hub.file

    def and_move(*asked: object) -> tuple[int, dict, bytes]:
        if hub.main == COMMIT:
            moved(hub)
        return answer(*asked)  # type: ignore[arg-type]

    hub.file = and_move  # type: ignore[method-assign]
    assert load(hub, tmp_path, "train[990:1010]") == list(range(990, 1010))
    assert load(hub, tmp_path, "train[:2]") == [50 * ROWS, 50 * ROWS + 1]
    assert load(hub, tmp_path, "train[:2]", COMMIT) == [0, 1]


@pytest.mark.slow
def test_the_commit_that_was_read_stands_in_the_counts_and_a_moved_branch_is_told(
    hub: Hub, tmp_path: Path
) -> None:
    code = (
        "from distill_app.data.instructions import *\n"
        f"outputs = Outputs({str(tmp_path / 'train.json')!r})\n"
        "found = prepare_instructions(Dataset('owner/set', 'train[:5]'), InstructionRules(), 0.0, 0, outputs)\n"
        "print(found['commits'])"
    )
    done = run(hub, tmp_path, code)
    assert (done.stdout, done.stderr) == (f"{{'owner/set': '{COMMIT}'}}\n", "")
    moved(hub)
    done = run(hub, tmp_path, code)
    assert done.stdout == f"{{'owner/set': '{NEXT_COMMIT}'}}\n"
    assert done.stderr == (
        "owner/set: main is now dddddddddddd, the last run here read cccccccccccc;"
        " `distill pin` writes a commit into params.yaml\n"
    )


@pytest.mark.slow
def test_a_config_is_read_by_its_name_and_without_one_those_that_there_are_are_named(
    hub: Hub, tmp_path: Path
) -> None:
    configs = "".join(
        f"- config_name: {name}\n  data_files: data/train-{n:05d}-*\n"
        for n, name in enumerate(("main", "socratic"))
    )
    hub.files["README.md"] = f"---\nconfigs:\n{configs}---\n# A set\n".encode()
    assert load(hub, tmp_path, "train[:2]", config="socratic") == [ROWS, ROWS + 1]
    assert offline(hub, tmp_path, "train[:2]", COMMIT) != [ROWS, ROWS + 1]
    told = load(hub, tmp_path, "train[:2]")
    assert isinstance(told, str) and told.startswith("ValueError owner/set: Config name is missing.")
    assert "main" in told and "socratic" in told and told.endswith("set config to one that the dataset has")
