"""The batch API against a server of OpenAI's format that keeps its batches, and breaks what it is told to."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fakes import SPLITS, go_straight, label_folder, label_params, servers, write_instructions

from distill_app.core.errors import EngineGone
from distill_app.generation import batch_api, endpoint
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.batch_api import BatchEndpoint
from distill_app.generation.endpoint import Endpoint
from distill_app.generation.engines import open_engine
from distill_app.generation.quota import Quota
from distill_app.labeling.store import Recipe

GREEDY = Sampling(max_new_tokens=12)
PROJECT = Path(__file__).parents[1]


class Provider(ThreadingHTTPServer):
    """Uploads, batches and single requests, answered by the question's own words.

    Args:
        script: of (custom id, question, batch number), a line's response, "none", or None for an answer.
        status: of the batch with a number, how it ends.
    """

    daemon_threads = True

    def __init__(self, script=lambda body, number: None, status=lambda number: "completed"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.status = script, status
        self.files, self.batches, self.asked, self.calls = {}, [], [], []
        self.polls_needed = 1
        self.drop_after_create = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass

    def completion(self, body):
        text = body["messages"][-1]["content"]
        return {
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": f"So: {text}"}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3},
        }

    def run(self, batch):
        """Answer a batch's requests into its files."""
        number = self.batches.index(batch)
        out, errors = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            reply = self.script(request["body"], number)
            if reply == "none":
                continue
            if reply is None:
                self.asked.append(request["custom_id"])
                reply = {"status_code": 200, "body": self.completion(request["body"])}
            row = {"custom_id": request["custom_id"], "response": reply, "error": None}
            (out if reply.get("status_code") == 200 else errors).append(json.dumps(row))
        for key, rows in (("output_file_id", out), ("error_file_id", errors)):
            if rows:
                batch[key] = f"file-{len(self.files)}"
                self.files[batch[key]] = "\n".join(rows).encode() + b"\n"
        batch["status"] = self.status(number)
        if batch["status"] == "failed":
            batch["errors"] = {"data": [{"code": "bad_file", "message": "line 1: no such model"}]}
            batch["output_file_id"] = batch["error_file_id"] = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, raw = self.server, self.rfile.read(int(self.headers["content-length"]))
        with server.lock:
            server.calls.append(("POST", self.path))
            if self.path == "/v1/files":
                content = re.search(rb'name="file".*?\r\n\r\n(.*?)\r\n--', raw, re.DOTALL)[1]
                assert b'name="purpose"\r\n\r\nbatch\r\n' in raw
                name = f"file-{len(server.files)}"
                server.files[name] = content
                return self.reply({"id": name, "object": "file", "purpose": "batch"})
            body = json.loads(raw)
            if self.path == "/v1/chat/completions":
                return self.reply(server.completion(body))
            assert (body["endpoint"], body["completion_window"]) == ("/v1/chat/completions", "24h")
            batch = {
                "id": f"batch-{len(server.batches)}",
                "object": "batch",
                "status": "in_progress",
                "polls": 0,
            }
            server.batches.append({**batch, "input_file_id": body["input_file_id"]})
            if server.drop_after_create:
                server.drop_after_create -= 1
                self.close_connection = True
                return None
            return self.reply(server.batches[-1])

    def do_GET(self):
        server = self.server
        with server.lock:
            server.calls.append(("GET", self.path))
            path = self.path.partition("?")[0]
            if path == "/v1/batches":
                return self.reply({"object": "list", "data": server.batches, "has_more": False})
            if found := re.fullmatch(r"/v1/batches/batch-(\d+)", path):
                batch = server.batches[int(found[1])]
                batch["polls"] += 1
                if batch["status"] == "in_progress" and batch["polls"] >= server.polls_needed:
                    server.run(batch)
                return self.reply(batch)
            name = re.fullmatch(r"/v1/files/([\w-]+)/content", path)[1]
            return self.reply(server.files[name])

    def reply(self, content, status=200):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def make_provider():
    yield from servers(Provider)


@pytest.fixture(autouse=True)
def hasty(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch_api, "POLL_SEC", 0.01)
    monkeypatch.setattr(batch_api, "FULL_SEC", 0.01)
    monkeypatch.setattr(endpoint, "PAUSE_SEC", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    go_straight(monkeypatch)


def ask(provider, words=("one", "two", "three"), sampling=GREEDY, quota=None):
    engine = BatchEndpoint("m", provider.url, 4, quota=quota)
    prompts = [engine.render(word, "", "system1") for word in words]
    answers = dict(engine.generate(prompts, sampling))
    assert sorted(answers) == list(range(len(words)))
    return [answers[place] for place in range(len(words))]


def said(word):
    return Answer(f"So: {word}", 3, "stop", 5)


def waiting(tmp_path):
    return sorted(path.name for path in tmp_path.glob("work/batches/*/*"))


def test_answers_and_keys_are_those_of_single_requests(make_provider, tmp_path):
    provider = make_provider()
    sampling = Sampling(12, 0.7, 0.9, seed=3, repetition_penalty=1.1)
    single, batched = (kind("m", provider.url, 4) for kind in (Endpoint, BatchEndpoint))
    words = ["one", "two", "one", "\ud800"]
    prompts = [single.render(word, "", "system1") for word in words]
    found = dict(batched.generate(prompts, sampling))
    assert found == dict(single.generate(prompts, sampling))
    assert found[3] == Answer("", 0, "refused")
    assert len(provider.asked) == 2 and len(provider.batches) == 1  # equal prompts are asked once
    assert Recipe.of(single, sampling) == Recipe.of(batched, sampling)
    line = json.loads(provider.files["file-0"].splitlines()[0])
    assert line["method"] == "POST" and line["url"] == "/v1/chat/completions"
    assert line["body"]["repetition_penalty"] == 1.1 and "extra_body" not in line["body"]
    assert waiting(tmp_path) == []


def test_a_file_ends_at_the_limits_of_requests_and_bytes(make_provider, monkeypatch):
    provider = make_provider()
    words = [f"word {n}" for n in range(23)]
    monkeypatch.setattr(batch_api, "MAX_REQUESTS", 4)
    assert ask(provider, words) == list(map(said, words))
    assert [len(provider.files[b["input_file_id"]].splitlines()) for b in provider.batches] == [4] * 5 + [3]
    monkeypatch.setattr(batch_api, "MAX_REQUESTS", 100)
    monkeypatch.setattr(batch_api, "MAX_BYTES", 700)
    assert ask(provider, words) == list(map(said, words))
    assert all(len(provider.files[b["input_file_id"]]) <= 700 for b in provider.batches[6:])
    assert len(provider.asked) == 46


def test_refused_requests_are_refused_and_failed_ones_asked_again(make_provider, capsys):
    def script(body, number):
        text = body["messages"][-1]["content"]
        if text == "long":
            return {"status_code": 400, "body": {"error": {"code": "context_length_exceeded"}}}
        if text == "busy" and number == 0:
            return {"status_code": 503, "body": {"error": {"message": "overloaded"}}}
        if text == "empty" and number == 0:
            return {"status_code": 200, "body": {"choices": []}}
        return "none" if text == "lost" and number == 0 else None

    provider = make_provider(script)
    words = ["one", "long", "busy", "empty", "lost"]
    expected = [said("one"), Answer("", 0, "refused"), *map(said, words[2:])]
    assert ask(provider, words) == expected
    assert len(provider.batches) == 2 and len(set(provider.asked)) == len(provider.asked)
    told = [line for line in capsys.readouterr().err.splitlines() if "asked again" in line]
    assert len(told) == 1 and "batch-0 completed: 3 of 5 requests unanswered" in told[0]


def test_what_the_server_teaches_is_said_otherwise_in_the_next_batch(make_provider):
    def script(body, number):
        if "max_tokens" in body:
            return {"status_code": 400, "body": {"error": {"message": "use max_completion_tokens"}}}
        return None

    provider = make_provider(script)
    assert ask(provider) == list(map(said, ["one", "two", "three"]))
    assert len(provider.batches) == 2


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_a_batch_that_ends_early_gives_what_it_has_and_the_rest_is_asked_again(make_provider, capsys, status):
    provider = make_provider(
        lambda body, number: "none" if number == 0 and body["messages"][-1]["content"] != "one" else None,
        lambda number: status if number == 0 else "completed",
    )
    assert ask(provider) == list(map(said, ["one", "two", "three"]))
    assert len(provider.asked) == 3
    assert f"batch-0 {status}: 2 of 3 requests unanswered" in capsys.readouterr().err


def test_a_failed_batch_ends_the_run_in_one_line_and_is_forgotten(make_provider, tmp_path):
    provider = make_provider(status=lambda number: "failed")
    with pytest.raises(EngineGone, match=r"batch-0 failed: 3 of 3 .*bad_file line 1: no such model") as err:
        ask(provider)
    assert "\n" not in str(err.value) and waiting(tmp_path) == []
    provider.status = lambda number: "completed"
    assert ask(provider)[0] == said("one")


def test_a_request_that_never_gets_an_answer_ends_the_run_and_the_others_are_kept(make_provider):
    provider = make_provider(
        lambda body, number: "none" if "two" in body["messages"][-1]["content"] else None
    )
    engine = BatchEndpoint("m", provider.url, 4)
    answers = engine.generate([engine.render(word, "", "system1") for word in ("one", "two")], GREEDY)
    assert next(answers) == (0, said("one"))
    with pytest.raises(EngineGone, match=r"1 of 1 requests unanswered.*, 4 times over"):
        next(answers)
    assert len(provider.batches) == endpoint.ROUNDS


def test_a_server_without_batches_and_a_wrong_key_are_told(make_provider, monkeypatch):
    provider = make_provider()
    for status, message in ((404, r"found no batch API.*label\.batch_api: false"), (401, "was refused")):
        monkeypatch.setattr(
            Handler, "do_POST", lambda self, status=status: self.reply({"error": {"message": "no"}}, status)
        )
        with pytest.raises(EngineGone, match=message):
            ask(provider)


def test_a_lost_connection_after_the_start_does_not_start_it_twice(make_provider):
    provider = make_provider()
    provider.drop_after_create = 1
    assert ask(provider) == list(map(said, ["one", "two", "three"]))
    assert len(provider.batches) == 1


def test_the_cost_ceiling_holds_before_a_batch_is_sent(make_provider):
    """The most a request may cost is refused; what it did cost makes room for the next batch."""
    provider = make_provider()
    prompt = len(BatchEndpoint("m", provider.url, 4).render("one", "", "system1"))
    most = prompt + 12  # at a million for a million tokens
    words = ["one", "two", "six"]
    assert ask(provider, words, quota=Quota(max_cost=2.2 * most, price_in=1e6, price_out=1e6))[2] == said(
        "six"
    )
    assert [len(provider.files[b["input_file_id"]].splitlines()) for b in provider.batches] == [2, 1]
    with pytest.raises(EngineGone, match=r"label\.max_cost: found 0\.00 spent"):
        ask(provider, words, quota=Quota(max_cost=most - 1, price_in=1e6, price_out=1e6))
    assert len(provider.batches) == 2


def test_the_params_open_it_for_servers_alone():
    params = label_params(engine="openai", base_url="http://localhost:1/v1", batch_api=True)
    assert type(open_engine(params)) is BatchEndpoint
    assert type(open_engine(params.model_copy(update={"batch_api": False}))) is Endpoint
    with pytest.raises(ValueError, match=r"label\.batch_api: found true with label\.engine: vllm"):
        open_engine(label_params(engine="vllm", batch_api=True))


def test_what_a_killed_run_had_not_uploaded_is_cleared_after_a_day(make_provider, tmp_path):
    provider = make_provider()
    ask(provider)
    [folder] = tmp_path.glob("work/batches/*")
    for name, age in (("old", 2 * batch_api.REST_SEC), ("new", 0)):
        (folder / f"{name}.jsonl").write_text("")
        os.utime(folder / f"{name}.jsonl", (time.time() - age,) * 2)
    ask(provider)
    assert waiting(tmp_path) == ["new.jsonl"]


KILLED = """
import os, signal, sys
from pathlib import Path
from distill_app.generation import batch_api, endpoint
from distill_app.generation.batch_api import BatchEndpoint
from fakes import label_folder

batch_api.POLL_SEC = 0.01
folder, url, where = sys.argv[1:]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "created":

    save = batch_api._Batch.save
    batch_api._Batch.save = lambda self: die() if self.batch_id else save(self)
if where == "waiting":
    batch_api._Run._wait = die
if where == "reading":
    settle, count = batch_api._Run._settle, []
    batch_api._Run._settle = lambda *a: die() if len(count) > 6 else (count.append(1), settle(*a))
label_folder(Path(folder), Path(folder) / "store", BatchEndpoint("m", url, 4))
"""


@pytest.mark.parametrize("where", ["created", "waiting", "reading"])
def test_a_killed_run_reads_on_and_pays_for_nothing_twice(make_provider, tmp_path, where):
    provider = make_provider()
    for name in ("whole", "killed"):
        write_instructions(tmp_path / name, 20, 6)
    metrics = label_folder(tmp_path / "whole", tmp_path / "whole/store", Endpoint("m", provider.url, 4))
    env = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), provider.url, where]
    died = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert len(provider.batches) == 1
    again = label_folder(tmp_path / "killed", tmp_path / "killed/store", BatchEndpoint("m", provider.url, 4))
    assert again == metrics and len(provider.batches) == 1
    assert len(provider.asked) == len(set(provider.asked))
    for split in SPLITS:
        file = f"{split}_labeled.json"
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert waiting(tmp_path) == []
