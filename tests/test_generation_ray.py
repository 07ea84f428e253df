import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from distill_app.core.models import load_student
from distill_app.generation.answers import Answer, Sampling
from distill_app.generation.in_process import InProcess
from distill_app.generation.ray_workers import CALLS, RayWorkers, _share

WORKERS = 2
CHUNK = 4
AHEAD = WORKERS * 2 * CALLS * CHUNK  # prompts under way
HELLO = "system1: Hello"  # what every worker answers before the first prompt


class Noting:
    """Answers with its process's id, one prompt at a time, and notes what it is asked in a file."""

    teacher = "noting"

    def __init__(self, notes, on_prompt="", do=None, delay_sec=0.03):
        self.identity = {"engine": "noting"}
        self.notes, self.on_prompt, self.do, self.delay_sec = notes, on_prompt, do, delay_sec

    def render(self, instruction, input_text, mode):
        return f"{mode}: {instruction}{input_text}"

    def generate(self, prompts, sampling):
        for place, prompt in enumerate(prompts):
            with open(self.notes, "a") as notes:
                notes.write(f"{prompt}\n")
            if prompt == self.on_prompt:
                self.do()
            if prompt == HELLO:
                yield place, Answer("Hello", 1, "stop")
                continue
            time.sleep(self.delay_sec)
            yield place, Answer(f"{prompt} {os.getpid()}", 1, "stop")

    def close(self):
        pass


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise FileNotFoundError("models/base/teacher: no such\nmodel folder")


def die_elsewhere(pid, notes):
    if os.getpid() != pid:
        die()
    return Noting(notes)


class OtherWeights(Noting):
    def __init__(self, notes):
        super().__init__(notes)
        self.identity = {"weights": f"sha256:{os.getpid()}"}


class Hopeless(Noting):
    def generate(self, prompts, sampling):
        for place, answer in super().generate(prompts, sampling):
            if "prompt" in answer.text:
                fail()
            yield place, answer


class Forgetful(Noting):
    def generate(self, prompts, sampling):
        return (item for item in super().generate(prompts, sampling) if item[1].text[:8] != "prompt 3")


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "asked.txt"
    path.touch()
    return path


@pytest.fixture(scope="module")
def cluster():
    """A cluster that this process is connected to, as after a caller's own `ray.init`; its address."""
    with pytest.MonkeyPatch.context() as patch:
        # pytest's own path is not that of its children
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        context = ray.init("local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def spread(cluster):
    engines = []

    def make(*args, **options):
        engines.append(RayWorkers(functools.partial(*args, **options), WORKERS))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def prompts(number):
    return [f"prompt {n}" for n in range(number)]


def pid_of(answer):
    return int(answer.text.split()[-1])


def wait_until_gone(processes):
    gone, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    return gone


def test_without_prompts_no_cluster_is_looked_for(notes):
    nowhere = RayWorkers(functools.partial(Noting, notes), WORKERS, "127.0.0.1:1")
    assert list(nowhere.generate([], Sampling())) == []
    with pytest.raises(RuntimeError, match="^127.0.0.1:1: cannot join the Ray cluster .*check the address"):
        list(nowhere.generate(prompts(1), Sampling()))


def load_exact(path):
    return load_student(path)[0].float()  # no rounding flips a token


@pytest.mark.slow
def test_two_workers_answer_as_one_also_when_they_are_killed(spread, tiny, tiny_model_dir):
    make = (InProcess, "tiny", {}, tiny[1], functools.partial(load_exact, str(tiny_model_dir)), 4)
    questions, sampling = prompts(120), Sampling(12, temperature=0.8, seed=3)
    alone = dict(InProcess(*make[1:]).generate(questions, sampling))
    engine, found = spread(*make), {}
    for place, answer in engine.generate(questions, sampling):
        assert place not in found
        found[place] = answer
        if len(found) == 1:  # the one that answers, and the other one if it has started yet
            for pid in worker_pids():
                os.kill(pid, signal.SIGKILL)
    assert found == alone
    assert engine.asked_again
    assert len({answer.text for answer in alone.values()}) > 20


def worker_pids():
    for process in psutil.Process().children(recursive=True):
        if any("MapWorker" in word for word in process.cmdline()):
            yield process.pid


def test_name_identity_and_prompts_are_those_of_the_engine(spread, notes):
    engine = spread(Noting, notes)
    assert (engine.teacher, engine.identity) == ("noting", {"engine": "noting"})
    assert engine.render("a", "b", "system1") == "system1: ab"


@pytest.mark.slow
def test_a_killed_worker_costs_its_answers_in_flight(spread, notes):
    engine = spread(Noting, notes)
    answers, workers, killed = {}, set(), None

    def until_the_dead_one_is_replaced():
        for n in count():
            if len(workers) > WORKERS:
                return
            yield f"prompt {n}"

    for place, answer in engine.generate(until_the_dead_one_is_replaced(), Sampling()):
        assert place not in answers
        answers[place] = answer
        workers.add(pid_of(answer))
        if len(workers) == WORKERS and not killed:
            killed = pid_of(answer)
            os.kill(killed, signal.SIGKILL)
    total = len(answers)
    assert [answers[n].text.rsplit(" ", 1)[0] for n in range(total)] == prompts(total)
    assert 0 < engine.asked_again <= 2 * CALLS * CHUNK
    asked = Counter(notes.read_text().splitlines())
    del asked[HELLO]
    assert set(asked) == set(prompts(total))
    assert asked.total() - total <= engine.asked_again


@pytest.mark.slow
def test_prompts_are_read_a_little_ahead_and_a_caller_may_stop(spread, notes):
    engine = spread(Noting, notes)
    read = []

    def endless():
        for n in count():
            read.append(n)
            yield f"prompt {n}"

    answers = engine.generate(endless(), Sampling())
    seen = set()
    for answered, (_, answer) in zip(range(60), answers, strict=False):
        assert len(read) - answered <= AHEAD + CHUNK
        seen.add(psutil.Process(pid_of(answer)))
    assert len(seen) == WORKERS
    answers.close()
    wait_until_gone(seen)
    assert len(list(engine.generate(prompts(5), Sampling()))) == 5


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_so_in_its_own_words(spread, notes):
    engine = spread(Noting, notes, HELLO, fail)
    with pytest.raises(RuntimeError, match=r"models/base/teacher: no such model folder$"):
        list(engine.generate(prompts(20), Sampling()))
    assert set(notes.read_text().splitlines()) == {HELLO}


@pytest.mark.slow
@pytest.mark.parametrize("do", [die, fail])
def test_a_prompt_that_kills_its_workers_is_refused_alone_and_again_at_a_restart(spread, notes, do):
    engine = spread(Noting, notes, "prompt 9", do)
    answers = dict(engine.generate(prompts(20), Sampling()))
    assert sorted(answers) == list(range(20))
    poisoned = answers.pop(9)
    assert (poisoned.finish_reason, poisoned.lasting) == ("refused", False)
    assert all(answer.finish_reason == "stop" for answer in answers.values())
    reason = "no such model folder" if do == fail else "ended without a word"
    assert "its worker died 2 times" in poisoned.text and reason in poisoned.text
    assert notes.read_text().splitlines().count("prompt 9") == 4
    [(_, again)] = engine.generate(["prompt 9"], Sampling())
    assert again == poisoned


@pytest.mark.full
def test_an_engine_that_answers_nothing_ends_the_run(spread, notes):
    """Each prompt costs several workers, so refusing them one by one would take days."""
    engine = spread(Hopeless, notes)
    with pytest.raises(RuntimeError, match="4 prompts ended their workers and none was answered"):
        list(engine.generate(prompts(400), Sampling()))


@pytest.mark.slow
def test_workers_that_die_at_their_start_end_the_run(spread, notes):
    engine = spread(die_elsewhere, os.getpid(), notes)
    with pytest.raises(RuntimeError, match="the worker died 3 times at its start"):
        list(engine.generate(prompts(20), Sampling()))


@pytest.mark.slow
def test_a_prompt_left_without_an_answer_is_refused(spread, notes):
    answers = dict(spread(Forgetful, notes).generate(prompts(4), Sampling()))
    assert [answers[n].finish_reason for n in range(4)] == ["stop"] * 3 + ["refused"]
    assert "the engine left 1 prompts without an answer" in answers[3].text


def test_a_worker_with_other_weights_is_refused(spread, notes):
    with pytest.raises(
        RuntimeError,
        match="the worker has weights sha256:.*, expected sha256:.* install the same on every machine",
    ):
        list(spread(OtherWeights, notes).generate(prompts(20), Sampling()))
    assert notes.read_text() == ""


@pytest.mark.slow
def test_a_cluster_without_a_gpu_node_is_waited_for(notes, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", patched_environment()["env"]["PYTHONPATH"])  # of the nodes' workers
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    environment = patched_environment()
    with subprocess.Popen(driver_command(notes, cluster.address, needs_gpu=True), **environment) as driver:
        try:
            assert "no node has a GPU yet" in driver.stderr.readline()
            cluster.add_node(num_cpus=2)
            cluster.add_node(num_cpus=1, num_gpus=1)
            first = int(driver.stdout.readline().split()[-1])
            cluster.add_node(num_cpus=1, num_gpus=1)
            while int(driver.stdout.readline().split()[-1]) == first:
                pass
        finally:
            driver.kill()
            cluster.shutdown()


def test_a_worker_that_cannot_import_the_engine_says_so(spread, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text(
        "from test_generation_ray import Noting\nclass Here(Noting): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # after the cluster's start, so it does not know of it
    import only_here

    engine = spread(only_here.Here, tmp_path / "asked.txt")
    with pytest.raises(RuntimeError, match=r"cannot import what it needs \(No module named 'only_here'\)"):
        list(engine.generate(prompts(20), Sampling()))


def test_more_workers_than_gpus_are_refused(spread, notes, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}])
    with pytest.raises(
        RuntimeError, match="found 2 workers of 1 GPUs, expected no more than the 1 GPUs here"
    ):
        list(spread(Noting, notes).generate(prompts(2), Sampling()))


@pytest.mark.parametrize(
    ("cpus", "workers", "each"), [([2], 2, 1), ([8], 3, 2), ([64, 4], 2, 32), ([8, 8, 8], 3, 8), ([0], 2, 1)]
)
def test_processors_are_shared_out_so_that_every_worker_finds_room(cpus, workers, each):
    assert _share(cpus, workers) == each


def test_what_cannot_work_is_refused_at_once(notes, monkeypatch):
    make = functools.partial(Noting, notes)
    with pytest.raises(ValueError, match="found 0, 1, 4, expected 1 or more"):
        RayWorkers(make, 0)
    with pytest.raises(ValueError, match="ray://head:10001: an address of Ray Client"):
        RayWorkers(make, 2, "ray://head:10001")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "ray==2.60.0"'):
        RayWorkers(make, 2)


def drive(notes, address, needs_gpu):
    """The driver that a test ends: asks without end and prints the answers, each with its worker's pid."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    engine = RayWorkers(functools.partial(Noting, notes), WORKERS, address or None, needs_gpu=needs_gpu)
    try:
        for _, answer in engine.generate((f"prompt {n}" for n in count()), Sampling()):
            print(answer.text, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        engine.close()


def driver_command(notes, address, needs_gpu=False):
    code = f"import test_generation_ray as t; t.drive({str(notes)!r}, {address!r}, {needs_gpu})"
    return [sys.executable, "-c", code]


def patched_environment():
    return {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [Path.cwd(), Path(__file__).parent]))},
        "start_new_session": True,
    }


def run_driver_until_both_workers_answer(notes, address):
    driver = subprocess.Popen(driver_command(notes, address), **{**patched_environment(), "stderr": None})
    workers = set()
    while len(workers) < WORKERS:
        line = driver.stdout.readline()
        assert line, "the driver ended by itself"
        workers.add(psutil.Process(int(line.split()[-1])))
    return driver, workers


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_ends_leaves_no_process(number, notes):
    driver, workers = run_driver_until_both_workers_answer(notes, "")
    with driver:
        started = psutil.Process(driver.pid).children(recursive=True)
        assert workers <= set(started) and any(process.name() == "raylet" for process in started)
        if number == signal.SIGINT:
            os.killpg(driver.pid, signal.SIGINT)  # as a terminal's Ctrl-C
            assert driver.stdout.read().endswith("interrupted\n")
        else:
            driver.kill()
        assert driver.wait(20) == (0 if number == signal.SIGINT else -signal.SIGKILL)
    wait_until_gone(started)


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_on_a_cluster_that_goes_on(cluster, notes):
    driver, workers = run_driver_until_both_workers_answer(notes, cluster)
    with driver:
        assert not workers & set(psutil.Process(driver.pid).children(recursive=True))
        driver.kill()
    wait_until_gone(workers)
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
