"""The endpoint engine against transformers' own server, through a proxy that breaks what it is told to."""

import copy
import http.client
import json
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fakes import go_straight, servers

from distill_app.core.errors import EngineGone
from distill_app.core.prompts import teacher_prompt
from distill_app.core.stage import die_with_parent
from distill_app.generation import endpoint
from distill_app.generation.answers import Answer, Sampling, seed_of
from distill_app.generation.endpoint import Endpoint

GREEDY = Sampling(max_new_tokens=12)
QUESTIONS = ["Name three", "Step 1:", "The quick brown fox", "x", "Think", "Four pens", "0123", "lazy dog"]
KEY = "sk-test-0123456789"


class Server:
    """`transformers serve` as a child process, on a free port of the loopback."""

    def __init__(self, model_dir: Path, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        command = [Path(sys.executable).with_name("transformers"), "serve", model_dir]
        self.log = log
        self.process = subprocess.Popen(
            [
                *map(str, command),
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--device",
                "cpu",
                "--dtype",
                "float32",
            ],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )

    def wait(self):
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise AssertionError(f"transformers serve did not start in a minute: {self.log.read_text()}")

    def kill(self):
        self.process.kill()
        self.process.wait()


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `script(body, number)` may return a reply to give instead, or a way to fail."""

    daemon_threads = True

    def __init__(self, upstream_port=None, script=lambda body, number: None):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.upstream_port, self.script = upstream_port, script
        self.bodies, self.keys, self.times = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the play


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        proxy = self.server
        raw = self.rfile.read(int(self.headers["content-length"]))
        with proxy.lock:
            proxy.now += 1
            proxy.most = max(proxy.most, proxy.now)
            number = len(proxy.bodies)
            proxy.bodies.append(json.loads(raw))
            proxy.keys.append(self.headers["authorization"])
            proxy.times.append(time.monotonic())
        reply = proxy.script(proxy.bodies[number], number)
        if reply == "hang":
            select.select([self.connection], [], [], 60)  # until the client gives up
        elif reply != "drop":
            reply = reply or self.forward(raw)
        with proxy.lock:
            proxy.now -= 1  # before the client knows, or its next request would be counted beside this one
        if reply == "drop":
            self.answer(200, {"content-type": "application/json"}, b'{"choices": [', length=1000)
        elif reply != "hang":
            self.answer(*reply)
        if isinstance(reply, str):
            self.close_connection = True

    def forward(self, raw):
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)
        try:
            upstream.request("POST", self.path, raw, {"content-type": "application/json"})
            response = upstream.getresponse()
            return response.status, {"content-type": response.headers["content-type"]}, response.read()
        except OSError:
            return 502, {"content-type": "text/html"}, b"<html>bad gateway</html>"
        finally:
            upstream.close()

    def answer(self, status, headers, content, length=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def as_json(status, body):
    return status, {"content-type": "application/json"}, json.dumps(body).encode()


def error(status, message, **more):
    return as_json(status, {"error": {"message": message, **more}})


def completion(content="fine", finish_reason="stop", usage=(7, 3), **message):
    body = {
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"content": content, **message}}]
    }
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return as_json(200, body)


FAULTS = {
    "429 with Retry-After": (429, {"retry-after": "1", "content-type": "application/json"}, b"{}"),
    "500": error(500, "out of luck"),
    "a connection dropped in mid-body": "drop",
    "a hang past the timeout": "hang",
    "an HTML page": (200, {"content-type": "text/html"}, b"<html>log in first</html>"),
    "broken JSON": (200, {"content-type": "application/json"}, b'{"choices": [{"mess'),
    "JSON of another kind": as_json(200, ["no", "object"]),
    "no choices": as_json(200, {"choices": []}),
    "an unknown end": completion(finish_reason="abort"),
}


@pytest.fixture(scope="module")
def running(tiny_model_dir, tmp_path_factory):
    """A function that gives the module's server, and a new one after it was killed."""
    started = []

    def get():
        if not started or started[-1].process.poll() is not None:
            started.append(Server(tiny_model_dir, tmp_path_factory.mktemp("server") / "log"))
            started[-1].wait()
        return started[-1]

    yield get
    for server in started:
        server.kill()


@pytest.fixture
def server(running):
    return running()


@pytest.fixture
def make_proxy():
    yield from servers(Proxy)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE_SEC", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    go_straight(monkeypatch)


@pytest.fixture
def impatient(monkeypatch, hasty):
    """No retries by the client: for tests in which the server never gets well."""
    monkeypatch.setattr(endpoint, "CLIENT_RETRIES", 0)


def prompts_of(engine, questions=QUESTIONS):
    return [engine.render(question, "", "system1") for question in questions]


def answer_one(proxy, sampling=GREEDY):
    engine = Endpoint("m", proxy.url, 1)
    [(place, answer)] = engine.generate(prompts_of(engine, ["Name three"]), sampling)
    assert place == 0
    return answer


def reference_greedy(model, tokenizer, prompt, limit):
    """transformers' own generate, one prompt at a time."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=limit, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(out, skip_special_tokens=True).strip()
    reason = "length" if len(out) == limit else "stop"
    return Answer(text, len(out), reason, prompt_tokens=ids["input_ids"].shape[1])


def test_answers_of_a_real_server_equal_the_model_s_own(server, tiny, tiny_model_dir):
    model, tokenizer = copy.deepcopy(tiny[0]).float(), tiny[1]  # as the server: bfloat16 rounds by company
    engine = Endpoint(str(tiny_model_dir), f"http://127.0.0.1:{server.port}/v1", 3)
    expected = {
        place: reference_greedy(model, tokenizer, teacher_prompt(tokenizer, question, "", "system1"), 12)
        for place, question in enumerate(QUESTIONS)
    }
    assert dict(engine.generate(prompts_of(engine), GREEDY)) == expected
    engine.close()


@pytest.mark.slow
def test_faults_change_no_answer_and_every_prompt_gets_one(server, tiny_model_dir, make_proxy, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT_SEC", 3.0)
    undisturbed = Endpoint(str(tiny_model_dir), f"http://127.0.0.1:{server.port}/v1", 3)
    expected = sorted(undisturbed.generate(prompts_of(undisturbed), GREEDY))
    faults = {q: list(FAULTS.values())[i :: len(QUESTIONS)] for i, q in enumerate(QUESTIONS)}

    def script(body, number):
        left = faults[body["messages"][0]["content"]]
        return left.pop() if left else None

    proxy = make_proxy(server.port, script)
    engine = Endpoint(str(tiny_model_dir), proxy.url, 3)
    pairs = list(engine.generate(prompts_of(engine), GREEDY))
    assert sorted(pairs) == expected
    assert proxy.most <= 3
    assert len(proxy.bodies) == len(QUESTIONS) + len(FAULTS)


def test_as_many_requests_are_under_way_as_allowed_and_no_more(make_proxy):
    together = threading.Barrier(3)

    def script(body, number):
        together.wait(timeout=30)
        return completion()

    proxy = make_proxy(script=script)
    engine = Endpoint("m", proxy.url, 3)
    assert len(list(engine.generate(prompts_of(engine, map(str, range(9))), GREEDY))) == 9
    assert proxy.most == 3


def test_retry_after_is_waited_for(make_proxy):
    proxy = make_proxy(script=lambda body, n: FAULTS["429 with Retry-After"] if n == 0 else completion())
    assert answer_one(proxy) == Answer("fine", 3, "stop", 7)
    assert proxy.times[1] - proxy.times[0] >= 1.0


def test_prompts_are_read_only_as_they_are_asked(make_proxy):
    proxy = make_proxy(script=lambda body, n: completion())
    engine = Endpoint("m", proxy.url, 2)
    read = []

    def endless():
        while True:
            read.append(engine.render(f"question {len(read)}", "", "system1"))
            yield read[-1]

    answers = engine.generate(endless(), GREEDY)
    for count in range(1, 6):
        next(answers)
        assert len(read) <= count + 2
    answers.close()
    assert proxy.most <= 2


@pytest.mark.parametrize("fault", [name for name in FAULTS if "hang" not in name])
def test_a_server_that_never_gets_well_ends_in_one_line(fault, make_proxy, impatient):
    proxy = make_proxy(
        script=lambda body, n: FAULTS[fault] if "Retry" not in fault else error(429, "slow down")
    )
    with pytest.raises(
        EngineGone, match="no usable answer in 4 rounds of tries, the last: .+; see to the server"
    ) as caught:
        answer_one(proxy)
    assert "\n" not in str(caught.value)
    assert len(proxy.bodies) == 4


def test_a_server_that_hangs_ends_after_the_client_s_retries(make_proxy, impatient, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT_SEC", 0.5)
    proxy = make_proxy(script=lambda body, n: "hang")
    with pytest.raises(
        EngineGone, match="no usable answer in 1 rounds of tries, the last: Request timed out"
    ):
        answer_one(proxy)


def test_an_error_leaves_the_answers_before_it(make_proxy, impatient):
    def script(body, number):
        return error(401, "no") if body["messages"][0]["content"] == "4" else completion()

    proxy = make_proxy(script=script)
    engine = Endpoint("m", proxy.url, 2)
    got = []
    with pytest.raises(EngineGone, match="401"):
        for place, _ in engine.generate(prompts_of(engine, map(str, range(9))), GREEDY):
            got.append(place)
    assert set(got) <= {0, 1, 2, 3, 5} and len(set(got)) == len(got) >= 3


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "401, the key in OPENAI_API_KEY was refused; set it to a key that this server takes"),
        (403, "403, the key in OPENAI_API_KEY was refused"),
        (404, 'fix the model\'s name, or the URL, which mostly ends in /v1'),
        (400, r"turned the request down \(.*no such knob.*\); change the setting it names"),
        (500, "no usable answer in 4 rounds of tries"),
    ],
)  # fmt: skip
def test_no_error_holds_the_key(status, says, make_proxy, impatient, caplog, capsys):
    proxy = make_proxy(script=lambda body, n: error(status, f"no such knob, Bearer {KEY}"))
    with caplog.at_level("DEBUG"), pytest.raises(EngineGone, match=says) as caught:
        answer_one(proxy)
    assert proxy.keys[0] == f"Bearer {KEY}"
    assert len(proxy.bodies) == (4 if status == 500 else 1)  # what cannot get better is not tried again
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capsys.readouterr())
    assert KEY not in told
    assert "\n" not in str(caught.value)


def test_a_server_without_keys_needs_none(make_proxy, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert answer_one(make_proxy(script=lambda body, n: completion())).text == "fine"
    with pytest.raises(EngineGone, match="401, OPENAI_API_KEY is not set; set it"):
        answer_one(make_proxy(script=lambda body, n: error(401, "who are you")))


@pytest.mark.parametrize(
    "reply",
    [
        error(400, "This model's maximum context length is 8 tokens", code="context_length_exceeded"),
        error(
            400, "request (90 tokens) exceeds the available context size", type="exceed_context_size_error"
        ),
        error(400, "The input (90 tokens) is longer than the model's context length (8 tokens)."),
        error(400, "flagged", code="content_filter"),
        error(400, "Invalid prompt: it may violate our policy", code="invalid_prompt"),
        error(413, "payload too big"),
        completion("half a sen", finish_reason="content_filter"),
        completion(None, refusal="I cannot help with that"),
    ],
)
def test_a_prompt_that_the_server_turns_down_is_refused(reply, make_proxy):
    proxy = make_proxy(script=lambda body, n: reply)
    answer = answer_one(proxy)
    assert (answer.text, answer.finish_reason) == ("", "refused")
    assert len(proxy.bodies) == 1


def test_llama_cpp_says_500_for_a_full_context(make_proxy, impatient):
    proxy = make_proxy(script=lambda body, n: error(500, "Context size has been exceeded."))
    assert answer_one(proxy).finish_reason == "refused"


def test_a_prompt_that_no_request_can_carry_is_refused(make_proxy):
    proxy = make_proxy(script=lambda body, n: completion())
    engine = Endpoint("m", proxy.url, 1)
    answers = dict(engine.generate(prompts_of(engine, ["\ud800", "fine"]), GREEDY))
    assert [answers[i].finish_reason for i in (0, 1)] == ["refused", "stop"]


def test_missing_counts_and_null_content_are_taken_as_they_are(make_proxy):
    without_usage = completion(" fine\n", finish_reason="length", usage=None)
    assert answer_one(make_proxy(script=lambda body, n: without_usage)) == Answer("fine", 0, "length", 0)
    thinking = completion(None, finish_reason="length", reasoning_content="let me see")
    assert answer_one(make_proxy(script=lambda body, n: thinking)) == Answer("", 3, "length", 7)


def test_requests_hold_what_the_sampling_says(make_proxy):
    proxy = make_proxy(script=lambda body, n: completion())
    answer_one(proxy)
    answer_one(proxy, Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, seed=3))
    prompt = Endpoint("m", proxy.url, 1).render("Name three", "", "system1")
    messages = [{"role": "user", "content": "Name three"}]
    assert proxy.bodies == [
        {"model": "m", "messages": messages, "max_tokens": 12, "temperature": 0.0},
        {
            "model": "m",
            "messages": messages,
            "max_tokens": 5,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": seed_of(prompt, 3),
        },
    ]


def test_settings_that_openai_lacks_are_sent_where_they_are_on(make_proxy):
    proxy = make_proxy(script=lambda body, n: completion())
    more = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    answer_one(proxy, Sampling(5, 0.7, stop=("\n\n", "User:"), **more))
    answer_one(proxy, Sampling(5, **more))
    sampled, greedy = proxy.bodies
    assert {name: sampled[name] for name in more} == more and sampled["stop"] == ["\n\n", "User:"]
    assert greedy["repetition_penalty"] == 1.05 and not {"top_k", "min_p", "stop"} & set(greedy)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("eos_token", Answer("fine", 3, "stop", 7)),
        ("model_length", Answer("fine", 3, "length", 7)),
        ("tool_calls", Answer("", 3, "refused", 7)),
        ("Something New", Answer("", 3, "refused", 7)),
    ],
)
def test_an_end_that_nobody_knows_is_set_aside_and_the_rest_goes_on(reason, expected, make_proxy, capsys):
    def script(body, number):
        odd = body["messages"][0]["content"] == QUESTIONS[1]
        return completion("fine", finish_reason=reason if odd else "stop")

    engine = Endpoint("m", make_proxy(script=script).url, 3)
    answers = dict(engine.generate(prompts_of(engine), GREEDY))
    assert answers.pop(1) == expected
    assert set(answers.values()) == {Answer("fine", 3, "stop", 7)}
    said = f'found finish_reason "{reason}", expected one of stop' in capsys.readouterr().err
    assert said == (expected.finish_reason == "refused")


def test_a_server_that_wants_other_parameters_gets_them(make_proxy, capsys):
    def script(body, number):
        if "max_tokens" in body:
            return error(400, "'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
        if "seed" in body:
            return error(422, "seed: Extra inputs are not permitted")
        return completion()

    proxy = make_proxy(script=script)
    engine = Endpoint("m", proxy.url, 3)
    sampling = Sampling(max_new_tokens=5, temperature=0.7)
    answers = dict(engine.generate(prompts_of(engine), sampling))
    assert [answers[i].text for i in range(len(QUESTIONS))] == ["fine"] * len(QUESTIONS)
    assert len(proxy.bodies) <= len(QUESTIONS) + 2 * 3  # learnt once, by those under way
    assert proxy.bodies[-1]["max_completion_tokens"] == 5
    assert capsys.readouterr().err.count("takes no seed; sampled answers will differ") == 1


def test_rendered_messages_are_one_line_of_canonical_json():
    engine = Endpoint("m", "http://localhost:1/v1", 1)
    assert engine.render("Add é", "2", "system2") == (
        '[{"content":"Add é\\nInput: 2\\nThink step by step.","role":"user"}]'
    )


def test_identity_holds_no_secret_and_nothing_that_varies():
    engine = Endpoint("m", "https://user:pass@Host.example:8000/v1/?api-key=x", 4)
    assert engine.identity == {"engine": "openai", "endpoint": "https://Host.example:8000/v1", "model": "m"}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_two_machines_servers_on_localhost_are_two(host, monkeypatch):
    """Colleagues who share a store each have another model there."""
    here = Endpoint("m", f"http://{host}:8000/v1", 4).identity
    assert here == Endpoint("m", f"http://{host}:8000/v1", 4).identity
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert Endpoint("m", f"http://{host}:8000/v1", 4).identity != here
    node = Endpoint("m", "http://node17:8000/v1", 4).identity
    monkeypatch.setattr("socket.gethostname", lambda: "login")
    assert Endpoint("m", "http://node17:8000/v1", 4).identity == node


def test_weights_that_are_named_are_the_same_wherever_they_are_served(monkeypatch):
    """A batch system gives the server another node every time."""
    first = Endpoint("m", "http://node17:8000/v1", 4, revision="abc").identity
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    for url in ("http://node18:9000/v1", "http://localhost:8000/v1"):
        assert Endpoint("m", url, 4, revision="abc").identity == first
    assert Endpoint("m", "http://node17:8000/v1", 4, revision="abd").identity != first
    assert Endpoint("n", "http://node17:8000/v1", 4, revision="abc").identity != first


@pytest.mark.parametrize("url", ["localhost:8000/v1", "/v1", "ftp://host/v1", "http://"])
def test_a_url_that_is_none_is_named(url):
    with pytest.raises(ValueError, match="expected a URL such as http://localhost:8000/v1"):
        Endpoint("m", url, 1)


def test_settings_that_cannot_work_are_named(monkeypatch):
    with pytest.raises(ValueError, match="concurrency: found 0, expected 1 or more"):
        Endpoint("m", "http://localhost:1/v1", 0)
    with pytest.raises(ValueError, match="stop_at_eos: found False"):
        next(Endpoint("m", "http://localhost:1/v1", 1).generate(["[]"], Sampling(stop_at_eos=False)))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nmore")
    with pytest.raises(ValueError, match="OPENAI_API_KEY: found characters that no header carries") as caught:
        Endpoint("m", "http://localhost:1/v1", 1)
    assert KEY not in str(caught.value)


def test_a_server_killed_in_the_middle_ends_in_one_line_and_leaves_the_answers(
    server, tiny_model_dir, impatient
):
    engine = Endpoint(str(tiny_model_dir), f"http://127.0.0.1:{server.port}/v1", 2)
    prompts = prompts_of(engine)
    whole = dict(engine.generate(prompts, GREEDY))
    got = {}
    with pytest.raises(
        EngineGone, match="no usable answer in 4 rounds of tries, the last: Connection error"
    ) as caught:
        for place, answer in engine.generate(prompts, GREEDY):
            got[place] = answer
            if len(got) == 3:
                server.kill()
    assert "\n" not in str(caught.value)
    assert 3 <= len(got) < len(prompts)
    assert got.items() <= whole.items()
