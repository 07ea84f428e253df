import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fakes
import pytest
from fakes import Echo, label_folder, write_instructions

from distill_app.core.errors import EngineGone
from distill_app.generation.answers import Sampling
from distill_app.labeling import progress as progress_module
from distill_app.labeling.ask import READ_AHEAD, TAKEN_AT_ONCE, fill_store, read_answers
from distill_app.labeling.store import AnswerStore, Recipe

SAMPLING = Sampling(max_new_tokens=8)


def numbered(count: int) -> list[str]:
    """Different prompts whose answers have 1 to 10 tokens."""
    return [f"prompt {n} {n % 10 + 1}" for n in range(count)]


def asked_for(prompts: list[str], store: AnswerStore, sampling: Sampling = SAMPLING, **options) -> list[str]:
    engine = Echo()
    count = fill_store(engine, lambda: prompts, sampling, store, **options)
    assert count == len(engine.asked)
    return engine.asked


def read(prompts: list[str], store: AnswerStore, sampling: Sampling = SAMPLING, **options) -> list[str]:
    return [a.text for a in read_answers(Echo(), prompts, sampling, store, **options)]


def test_answers_come_in_the_order_of_the_prompts(tmp_path):
    prompts = numbered(700)
    with AnswerStore(tmp_path / "s") as store:
        assert asked_for(prompts, store) == prompts
        assert read(prompts, store) == [Echo().answer(p, SAMPLING).text for p in prompts]
        assert read(prompts[::-1], store) == read(prompts, store)[::-1]


def test_growing_from_1000_to_2000_asks_1000(tmp_path):
    prompts = numbered(2000)
    with AnswerStore(tmp_path / "s") as store:
        assert len(asked_for(prompts[:1000], store)) == 1000
        assert asked_for(prompts, store) == prompts[1000:]


def test_another_temperature_asks_all_and_going_back_asks_nothing(tmp_path):
    prompts = numbered(50)
    with AnswerStore(tmp_path / "s") as store:
        asked_for(prompts, store)
        before = read(prompts, store)
        assert asked_for(prompts, store, Sampling(8, temperature=0.7)) == prompts
        assert asked_for(prompts, store, Sampling(8, temperature=0.0, seed=5)) == []
        assert read(prompts, store) == before


def test_raising_the_limit_asks_only_what_was_cut_and_going_back_asks_nothing(tmp_path):
    prompts = numbered(50)
    with AnswerStore(tmp_path / "s") as store:
        asked_for(prompts, store)
        before = read(prompts, store)
        again = asked_for(prompts, store, Sampling(9))
        assert again == [p for p in prompts if p.endswith((" 9", " 10"))]
        assert asked_for(prompts, store, Sampling(99)) == [p for p in prompts if p.endswith(" 10")]
        assert asked_for(prompts, store) == [] and read(prompts, store) == before


def test_identical_prompts_are_asked_once(tmp_path):
    prompts = ["a 1", "b 2", "a 1", *numbered(2 * READ_AHEAD), "b 2", "a 1"]
    with AnswerStore(tmp_path / "s") as store:
        assert Counter(asked_for(prompts, store)) == Counter(set(prompts))
        assert len(read(prompts, store)) == len(prompts)


def test_an_engine_is_not_asked_at_all_where_the_store_has_everything(tmp_path):
    class Unloaded(Echo):
        def generate(self, prompts, sampling):
            raise AssertionError("the model would be loaded")

    prompts = numbered(300)
    with AnswerStore(tmp_path / "s") as store:
        asked_for(prompts, store)
        assert fill_store(Unloaded(), lambda: prompts, SAMPLING, store) == 0
        assert fill_store(Unloaded(), list, SAMPLING, store) == 0


def test_cut_answers_are_retried_with_doubled_limits_up_to_the_bound(tmp_path):
    prompts = [f"p {n}" for n in (3, 9, 16, 17, 33, 41)]
    limits = []

    class Noted(Echo):
        def answer(self, prompt, sampling):
            limits.append((prompt, sampling.max_new_tokens))
            return super().answer(prompt, sampling)

    with AnswerStore(tmp_path / "s") as store:
        fill_store(Noted(ahead=1), lambda: prompts, SAMPLING, store, retry_to=40)
        asked = {limit: [p for p, made in limits if made == limit] for limit in (8, 16, 32, 40)}
        assert len(limits) == sum(map(len, asked.values()))
        assert asked == {8: prompts, 16: prompts[1:], 32: prompts[3:], 40: prompts[4:]}
        answers = list(read_answers(Echo(), prompts, SAMPLING, store, retry_to=40))
        assert [a.tokens for a in answers] == [3, 9, 16, 17, 33, 40]
        assert [a.finish_reason for a in answers] == ["stop"] * 5 + ["length"]
        assert asked_for(prompts, store, retry_to=40) == []
        assert asked_for(prompts, store, retry_to=80) == prompts[5:]  # what was cut under 40, under 64


@pytest.mark.slow
def test_memory_stays_bounded_however_many_prompts_there_are(tmp_path):
    """What the engine has not answered yet, and what was read for it, stays a few hundred prompts."""
    read_so_far = answered = ahead_most = 0

    def prompts():
        nonlocal read_so_far
        read_so_far = 0
        for n in range(6000):
            read_so_far += 1
            yield f"prompt {n} 1"

    with AnswerStore(tmp_path / "s") as store:

        def note(prompt):
            nonlocal answered, ahead_most
            answered += 1
            ahead_most = max(ahead_most, read_so_far - answered)

        engine = Echo(ahead=1)
        engine.before_answer = note
        assert fill_store(engine, prompts, SAMPLING, store) == 6000
        assert ahead_most <= READ_AHEAD + 1 and len(store._asking) <= TAKEN_AT_ONCE + 1
        assert sum(1 for _ in read_answers(engine, prompts(), SAMPLING, store)) == 6000


def ends_at_the_eighth(error):
    engine = Echo(ahead=1)

    def end(prompt):
        if len(engine.asked) == 8:
            raise error

    engine.before_answer = end
    return engine


@pytest.mark.parametrize("error", [EngineGone("server:\n gone"), EngineGone])
def test_an_engine_that_is_gone_leaves_its_answers_and_says_how_many(tmp_path, error):
    engine, prompts = ends_at_the_eighth(error), numbered(20)
    with AnswerStore(tmp_path / "s") as store:
        with pytest.raises(
            EngineGone, match=r"7 new answers are safe in .*/s, run again to go on$"
        ) as caught:
            fill_store(engine, lambda: prompts, SAMPLING, store)
        assert "\n" not in str(caught.value)
    with AnswerStore(tmp_path / "s") as store:
        assert asked_for(prompts, store) == prompts[7:]


def test_ctrl_c_leaves_the_answers_and_says_how_many(tmp_path, capsys):
    engine = ends_at_the_eighth(KeyboardInterrupt)
    with AnswerStore(tmp_path / "s") as store:
        with pytest.raises(KeyboardInterrupt):
            fill_store(engine, lambda: numbered(20), SAMPLING, store, label="label")
        assert asked_for(numbered(20), store) == numbered(20)[7:]  # the same run can ask again
    assert "label: stopped; 7 new answers are safe" in capsys.readouterr().err


def test_an_engine_that_forgets_a_prompt_is_told(tmp_path):
    class Forgetful(Echo):
        def generate(self, prompts, sampling):
            yield from list(super().generate(prompts, sampling))[1:]

    with AnswerStore(tmp_path / "s") as store:
        with pytest.raises(
            EngineGone, match="the engine gave no answer to 1 prompts; 9 new answers are safe"
        ):
            fill_store(Forgetful(), lambda: numbered(10), SAMPLING, store)
        assert len(asked_for(numbered(10), store)) == 1


class Threaded(Echo):
    """Pulls its prompts in a thread of its own, and wraps what goes wrong there."""

    def generate(self, prompts, sampling):
        pulled: list[str] = []
        errors: list[Exception] = []

        def pull():
            try:
                pulled.extend(prompts)
            except Exception as err:
                errors.append(err)

        thread = threading.Thread(target=pull)
        thread.start()
        thread.join()
        if errors:
            raise RuntimeError("a thread died") from errors[0]
        yield from super().generate(pulled, sampling)


def test_an_engine_may_pull_prompts_in_a_thread_of_its_own(tmp_path):
    with AnswerStore(tmp_path / "s") as store:
        assert fill_store(Threaded(), lambda: numbered(100), SAMPLING, store) == 100


def test_a_fault_in_the_prompts_is_told_as_it_is_and_not_as_the_engines(tmp_path):
    def prompts():
        yield from numbered(5)
        raise ValueError("record 5: no text")

    with AnswerStore(tmp_path / "s") as store, pytest.raises(ValueError, match="^record 5: no text$"):
        fill_store(Threaded(), prompts, SAMPLING, store)


def test_a_full_disk_ends_the_run_and_the_next_goes_on(tmp_path, monkeypatch):
    prompts, write, room = numbered(3000), os.write, [20_000]

    def write_while_there_is_room(file, content):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(content)
        return write(file, content)

    with monkeypatch.context() as context, AnswerStore(tmp_path / "s") as store:
        context.setattr(os, "write", write_while_there_is_room)
        with pytest.raises(OSError, match="the disk is full; free some space and run again"):
            fill_store(Echo(), lambda: prompts, SAMPLING, store)
    with AnswerStore(tmp_path / "s") as store:
        held = store.summaries()[0].answers
        assert 0 < held < 3000
        assert len(asked_for(prompts, store)) == 3000 - held


def test_a_pruned_answer_is_told_when_it_is_read(tmp_path):
    with AnswerStore(tmp_path / "s") as store:
        asked_for(numbered(3), store)
        store.prune(recipe_id=store.summaries()[0].id)
        with pytest.raises(ValueError, match="3 answers are gone, expected one a prompt; was it pruned"):
            read(numbered(3), store)


def test_progress_in_a_log_is_a_line_every_so_often(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "REPORT_EVERY_SEC", 0.0)
    log = tmp_path / "new" / "label.log"
    with AnswerStore(tmp_path / "s") as store:
        asked_for(numbered(3), store)
        asked_for(numbered(10), store, total=10, label="label", log_path=log)
    lines = capsys.readouterr().err.splitlines()
    assert any(
        ", about " in line and "label: 5 of 10" in line and "3 from the store" in line for line in lines
    )
    assert lines[-1].startswith("label: 10 answers, 7 asked (") and lines[-1].endswith(", 3 from the store")
    assert [line.split(" ", 2)[2] for line in log.read_text().splitlines()] == lines


def test_progress_on_a_terminal_is_one_live_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress_module, "REPORT_EVERY_SEC", 0.0)
    log = tmp_path / "label.log"
    with AnswerStore(tmp_path / "s") as store:
        asked_for(numbered(10), store, total=10, label="label", log_path=log)
    shown = capsys.readouterr().err
    assert "label: 10 answers, 10 asked" in shown and "label: 5 of 10" not in shown
    assert "label: 5 of 10" in log.read_text()


def run_beside(folder: Path, store: Path, asked: Path, ahead: int = 4, pause_sec: float = 0.0):
    """Start a labelling run as a process of its own."""
    command = [sys.executable, fakes.__file__, folder, store, asked, ahead, pause_sec]
    return subprocess.Popen(list(map(str, command)), cwd=fakes.ROOT, stderr=subprocess.DEVNULL)


def asked_by_run(asked: Path) -> dict[str, list[str]]:
    runs: dict[str, list[str]] = {}
    for line in asked.read_text().splitlines() if asked.exists() else []:
        pid, prompt = line.split("\t")
        runs.setdefault(pid, []).append(prompt)
    return runs


def wait_for_asks(asked: Path, pid: int, count: int) -> None:
    until = time.monotonic() + 60
    while len(asked_by_run(asked).get(str(pid), [])) < count:
        assert time.monotonic() < until
        time.sleep(0.005)


def outputs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.json")}


def prompts_in(folder: Path) -> set[str]:
    from distill_app.core.files import read_records

    return {
        f"{r['instruction']} {r['input']}" for s in fakes.SPLITS for r in read_records(folder / f"{s}.json")
    }


def stored_prompts(folder: Path, path: Path) -> set[str]:
    recipe = Recipe.of(Echo(), SAMPLING)
    keys = {recipe.key(prompt): prompt for prompt in prompts_in(folder)}
    with AnswerStore(path) as store:
        return {keys[key] for key in store.answers(keys, 8)}


def test_a_run_killed_at_ten_random_moments_ends_as_an_uninterrupted_one_and_asks_nothing_twice(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_instructions(folder, 300, 40)
    metrics = label_folder(whole, tmp_path / "whole_store", Echo())
    store, asked, moments = tmp_path / "killed_store", tmp_path / "asked", random.Random(17)
    safe: dict[str, set[str]] = {}
    for _ in range(10):
        before = stored_prompts(killed, store)
        run = run_beside(killed, store, asked, pause_sec=0.005)
        safe[str(run.pid)] = before
        wait_for_asks(asked, run.pid, 1)
        time.sleep(moments.uniform(0, 0.12))
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert not (killed / "train_labeled.json").exists()
    runs = asked_by_run(asked)
    assert len(runs) == 10
    for pid, prompts in runs.items():
        assert not safe[pid] & set(prompts)
    last = Echo()
    before = stored_prompts(killed, store)
    assert label_folder(killed, store, last) == metrics
    assert set(last.asked) == prompts_in(killed) - before and len(last.asked) == len(set(last.asked))
    assert outputs(killed) == outputs(whole)
    lost = sum(map(len, runs.values())) + len(last.asked) - len(prompts_in(killed))
    assert lost <= 10 * 4  # the engine has four at a time in flight


@pytest.mark.slow
def test_two_runs_at_once_on_one_store_share_the_work_and_write_the_same(tmp_path):
    """Without a lock both may ask what neither has noted yet, or what the other has under way at the end."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_instructions(folder, 700, 40)
    asked = tmp_path / "asked"
    runs = [run_beside(folder, tmp_path / "s", asked, pause_sec=0.01) for folder in folders]
    assert [run.wait() for run in runs] == [0, 0]
    by_run = asked_by_run(asked)
    wasted = sum(map(len, by_run.values())) - len(prompts_in(folders[0]))
    assert len(by_run) == 2 and min(map(len, by_run.values())) > 200
    assert 0 <= wasted <= 2 * TAKEN_AT_ONCE + 2 * 4  # a race at the start, four in flight at the end
    assert outputs(folders[0]) == outputs(folders[1])


def test_what_a_killed_run_set_out_to_ask_is_asked_last(tmp_path):
    folder, store, asked = tmp_path / "data", tmp_path / "s", tmp_path / "asked"
    write_instructions(folder, 100, 20)
    other = run_beside(folder, store, asked, ahead=20, pause_sec=600)
    wait_for_asks(asked, other.pid, 20)
    other.kill()
    other.wait()
    engine = Echo()
    label_folder(folder, store, engine)
    assert sorted(engine.asked) == sorted(prompts_in(folder))
    assert set(asked_by_run(asked)[str(other.pid)]) <= set(engine.asked[-32:])


def test_a_run_does_not_wait_for_another_that_is_stuck(tmp_path):
    folder, store, asked = tmp_path / "data", tmp_path / "s", tmp_path / "asked"
    write_instructions(folder, 100, 20)
    other = run_beside(folder, store, asked, ahead=20, pause_sec=600)
    wait_for_asks(asked, other.pid, 20)
    engine = Echo()
    label_folder(folder, store, engine)
    other.kill()
    other.wait()
    assert sorted(engine.asked) == sorted(prompts_in(folder))
