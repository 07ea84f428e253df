import errno
import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import ROOT, Echo

from distill_app.generation.answers import Answer, Sampling
from distill_app.labeling import segments as segments_module
from distill_app.labeling.segments import Index, as_line
from distill_app.labeling.store import AnswerStore, Recipe

STOP, CUT, REFUSED = Answer("a", 5, "stop", 2), Answer("b", 8, "length", 2), Answer("", 0, "refused", 9)


def recipe(**sampling) -> Recipe:
    return Recipe.of(Echo(), Sampling(**sampling))


KEY = recipe().key("x")


def filled(path, *answers, limit=8) -> AnswerStore:
    store = AnswerStore(path)
    for n, answer in enumerate(answers):
        store.put(recipe(), recipe().key(str(n)), limit, answer)
    return store


def test_what_determines_an_answer_is_in_its_key_and_the_limit_is_not():
    keys = {
        recipe(**sampling).key(prompt)
        for prompt in ("x", "y")
        for sampling in ({}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {"stop_at_eos": False})
    }
    assert len(keys) == 8
    assert recipe(max_new_tokens=9).key("x") == KEY


def test_at_temperature_0_top_p_and_seed_have_no_effect_on_the_key():
    assert recipe(temperature=0, top_p=0.5, seed=3).key("x") == KEY
    assert recipe(temperature=1.0, seed=3).key("x") != recipe(temperature=1.0).key("x")


@pytest.mark.parametrize(
    ("sampling", "key"),
    [
        (Sampling(5), "418743bb41c3e352a2dacdad2101d5d3081dfff940fd1c5b09b30397d2f36ac6"),
        (Sampling(5, 0.7, 0.9, 3), "003389ec137e267d95e0209d4ce97ad7cd88cabe7954cd8586d7ecd6aea74fa4"),
        (Sampling(9, 0, 0.9, 3, False), "39019f921a51346079771712ac9ef952298d47205f5a18b7b26e4352f6e1fc3c"),
    ],
)
def test_keys_of_earlier_versions_hold_where_later_settings_are_off(sampling, key):
    """So nothing is asked again of a store that a team has paid for."""
    assert Recipe.of(Echo(), sampling).key("Hello").hex() == key


@pytest.mark.parametrize(
    ("changes", "greedy_too"),
    [
        ({"top_k": 5}, False),
        ({"min_p": 0.1}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"stop": ("x",)}, True),
    ],
)
def test_each_way_of_choosing_tokens_is_in_the_key_where_it_has_an_effect(changes, greedy_too):
    assert recipe(temperature=1.0, **changes).key("x") != recipe(temperature=1.0).key("x")
    assert (recipe(**changes).key("x") != KEY) == greedy_too


def test_an_answer_of_this_machine_alone_serves_this_run_and_is_not_stored(tmp_path):
    """A small GPU's refusal must not be a large one's answer."""
    refusal = Answer("", 0, "refused", 9, lasting=False)
    with filled(tmp_path / "s", STOP) as store, AnswerStore(tmp_path / "s") as other:
        store.put(recipe(), KEY, 8, refusal)
        assert store.answers([KEY], 8) == {KEY: refusal}
        assert store.answers([KEY], 9) == {}
        assert other.answers([KEY], 8) == {}


def test_the_engines_identity_is_in_the_key_and_its_name_for_people_is_not():
    other = Echo()
    other.teacher = "moved"
    assert Recipe.of(other, Sampling()).key("x") == KEY
    other.identity = {**other.identity, "version": "2"}
    assert Recipe.of(other, Sampling()).key("x") != KEY


@pytest.mark.parametrize(
    ("answer", "made_under", "serves"),
    [
        (STOP, 8, [5, 7, 8, 9, 99]),
        (CUT, 8, [8]),
        (REFUSED, 8, [8, 9, 99]),
        (Answer("c", 5, "length"), 8, [5, 7, 8, 9, 99]),  # cut by the model's context, not by the limit
        (Answer("d", 0, "stop"), 8, [8, 9, 99]),  # a server that counts no tokens
        (Answer("e", 0, "length"), 8, [8]),
    ],
)
def test_an_answer_serves_the_limits_under_which_it_would_be_the_same(tmp_path, answer, made_under, serves):
    with AnswerStore(tmp_path / "s") as store:
        store.put(recipe(), KEY, made_under, answer)
        assert [n for n in (4, 5, 7, 8, 9, 99) if store.answers([KEY], n)] == serves
        assert store.answers([KEY], serves[0]) == {KEY: answer}


def test_of_several_answers_that_serve_the_oldest_stays_the_answer(tmp_path):
    with AnswerStore(tmp_path / "s") as store:
        for limit, text in ((16, "first"), (8, "second"), (32, "third"), (16, "again")):
            store.put(recipe(), KEY, limit, Answer(text, 5, "stop"))
        assert store.answers([KEY], 32)[KEY].text == "first"
        assert store.answers([KEY], 8)[KEY].text == "first"


def segments(path):
    return sorted(path.glob("*.answers"))


def lines(path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line]


def named(count: int) -> list[bytes]:
    return [recipe().key(str(n)) for n in range(count)]


def test_text_that_utf8_cannot_hold_is_stored_with_a_mark(tmp_path):
    with filled(tmp_path / "s", Answer("a\ud800b 漢\n", 3, "stop")) as store:
        assert store.answers(named(1), 8)[named(1)[0]].text == "a\ufffdb 漢\n"


def test_a_run_takes_what_no_other_run_has_taken_and_is_told_of_the_rest(tmp_path):
    keys = named(4)
    with AnswerStore(tmp_path / "s") as one, AnswerStore(tmp_path / "s") as two:
        assert one.take(keys[:3], 8) == (set(keys[:3]), set())
        one.put(recipe(), keys[0], 8, STOP)
        assert two.take(keys, 8) == ({keys[3]}, set(keys[1:3]))
        assert one.take(keys, 8) == (set(keys[1:3]), {keys[3]})
    with AnswerStore(tmp_path / "s") as three:  # nobody asks any more
        assert three.take(keys, 8) == (set(keys[1:]), set())


def test_an_answer_is_read_by_other_runs_at_once(tmp_path):
    with AnswerStore(tmp_path / "s") as one, AnswerStore(tmp_path / "s") as two:
        for n, key in enumerate(named(50)):
            one.put(recipe(), key, 8, Answer(str(n), 5, "stop"))
            assert two.answers([key], 8)[key].text == str(n)


def test_of_two_answers_to_one_question_all_see_the_same_one_before_and_after_compacting(tmp_path):
    """The second run has seen the first one's answer, so its own comes later, whatever the machines' clocks say."""
    with AnswerStore(tmp_path / "s") as one, AnswerStore(tmp_path / "s") as two:
        two.take([recipe().key("other")], 8)  # the second run's segment is the older one
        one.put(recipe(), KEY, 8, Answer("first", 5, "stop"))
        two.answers([KEY], 8)
        two.put(recipe(), KEY, 8, Answer("second", 5, "stop"))
        assert {s.answers([KEY], 8)[KEY].text for s in (one, two)} == {"first"}
        assert len(segments(tmp_path / "s")) == 2
    with AnswerStore(tmp_path / "s") as store:
        assert store.answers([KEY], 8)[KEY].text == "first"
        assert store.summaries()[0].answers == 1
        store.compact()
        assert store.answers([KEY], 8)[KEY].text == "first"
        assert sum(b" a " in line[:12] for line in lines(segments(tmp_path / "s")[0])) == 1


def test_in_a_race_the_winner_is_the_same_for_all_wherever_the_answers_lie(tmp_path):
    """Neither run has seen the other's answer: both carry the same count."""
    with AnswerStore(tmp_path / "s") as one, AnswerStore(tmp_path / "s") as two:
        one.put(recipe(), KEY, 8, Answer("one", 5, "stop"))
        two.put(recipe(), KEY, 8, Answer("two", 5, "stop"))
        (won,) = {s.answers([KEY], 8)[KEY].text for s in (one, two)}
        for ended in (one, two):
            ended._end()
            with AnswerStore(tmp_path / "s") as store:
                store.compact()  # the first time, one of the two segments is in use
                assert store.answers([KEY], 8)[KEY].text == won


def test_a_store_in_memory_works_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (None, ":memory:"):
        with AnswerStore(path) as store:
            assert store.take([KEY], 8) == ({KEY}, set())
            store.put(recipe(), KEY, 8, STOP)
            assert store.answers([KEY], 8) == {KEY: STOP}
            assert store.size_bytes() == 0 and store.in_use() == []
    assert list(tmp_path.iterdir()) == []


def test_threads_share_one_store(tmp_path):
    with AnswerStore(tmp_path / "s") as store, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.put(recipe(), key, 8, STOP), named(200)))
        assert len(store.answers(named(200), 8)) == 200


def in_process(code: str, *arguments, wait: bool = True) -> subprocess.Popen:
    """Run code beside this process, which knows `store`, a store at the first argument, and these modules."""
    head = (
        "import os, sys, time; sys.path[:0] = ['tests']\n"
        "from test_labeling_store import *\nstore = AnswerStore(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert not wait or run.wait() == 0
    return run


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    code = "for key in named(2000)[int(sys.argv[2])::3]: store.put(recipe(), key, 8, Answer(sys.argv[2], 5, 'stop'))"
    runs = [in_process(code, tmp_path / "new" / "s", n, wait=False) for n in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    with AnswerStore(tmp_path / "new" / "s") as store:
        found = store.answers(named(2000), 8)
        assert [found[key].text for key in named(2000)] == [str(n % 3) for n in range(2000)]


def test_what_a_killed_writer_has_put_is_there_to_the_last_answer(tmp_path):
    code = "for key in named(10**6): store.put(recipe(), key, 8, STOP); print(flush=True)"
    run = in_process(code, tmp_path / "s", wait=False)
    for _ in range(300):
        run.stdout.readline()
    run.kill()
    put = 300 + len(run.stdout.read().splitlines())
    with AnswerStore(tmp_path / "s") as store:
        assert len(store.answers(named(put), 8)) == put
        assert len(store.answers(named(put + 9), 8)) <= put + 1
        assert [path.parent for path in store.in_use()] == [tmp_path / "s"]


def test_a_torn_tail_costs_that_answer_alone_and_is_told(tmp_path, capsys):
    for end in range(1, 120, 16):
        filled(tmp_path / f"s{end}", STOP, STOP, CUT)._own = None  # the run is killed: its segment has no end
        (file,) = segments(tmp_path / f"s{end}")
        os.truncate(file, file.stat().st_size - end)
        with AnswerStore(tmp_path / f"s{end}") as store:
            assert set(store.answers(named(3), 8)) == set(named(2))
            store.put(recipe(), named(3)[2], 8, CUT)
            assert len(store.answers(named(3), 8)) == 3
        told = capsys.readouterr().err.splitlines()
        assert told == [f"{file}: left out a last line that is not whole; what it answered is asked again"]


def test_a_run_goes_on_behind_its_own_half_written_line(tmp_path, monkeypatch):
    """As after a full disk on which somebody makes room."""
    write, room = os.write, [100]

    def write_some(file, content):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(content[: room[0]])
        return write(file, content[:50])

    with filled(tmp_path / "s", STOP) as store:
        with monkeypatch.context() as context:
            context.setattr(os, "write", write_some)
            with pytest.raises(
                OSError, match=r"/s: the disk is full; free some space and run again"
            ) as caught:
                store.put(recipe(), KEY, 8, Answer("long " * 50, 50, "stop"))
            assert "\n" not in str(caught.value)
        assert store.answers([KEY], 8) == {}
        store.put(recipe(), KEY, 8, STOP)
        assert store.answers([KEY, *named(1)], 8) == {KEY: STOP, named(1)[0]: STOP}


@pytest.mark.parametrize("bits", [1, 128])
def test_a_flipped_byte_costs_one_answer_at_most_and_is_told(tmp_path, capsys, bits):
    filled(tmp_path / "whole", *[Answer(f"text {n}", 5, "stop") for n in range(4)]).close()
    (file,) = segments(tmp_path / "whole")
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= bits
        folder = tmp_path / f"s{place}"
        folder.mkdir()
        (folder / file.name).write_bytes(damaged)
        with AnswerStore(folder) as store:
            found = store.answers(named(4), 8)
            assert len(found) >= 3, place
            assert all(found[key].text == f"text {n}" for n, key in enumerate(named(4)) if key in found)
            store.compact()
            assert store.answers(named(4), 8) == found
        told = capsys.readouterr().err.splitlines()
        assert len(found) == 4 or (
            len(told) == 1 and told[0].startswith(f"{folder / file.name}: left out 1 damaged")
        )


def test_an_answer_damaged_while_a_run_is_on_is_asked_again(tmp_path):
    with filled(tmp_path / "s", STOP, CUT) as store:
        (file,) = segments(tmp_path / "s")
        store.answers(named(2), 8)
        file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"'))
        assert set(store.answers(named(2), 8)) == {named(2)[1]}


def test_the_whole_group_can_write_whatever_a_users_umask_is(tmp_path):
    code = "os.umask(0o077)\nstore = AnswerStore(sys.argv[1] + '/new')\nstore.put(recipe(), KEY, 8, STOP)\nstore.compact()\nstore.put(recipe(), KEY, 9, CUT)"
    in_process(code, tmp_path)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o2775
    assert {stat.S_IMODE(file.stat().st_mode) for file in segments(tmp_path / "new")} == {0o664}
    assert len(segments(tmp_path / "new")) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_two_users_of_a_group_write_read_and_compact_one_store(tmp_path):
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)  # pytest's own
    as_user = "os.setegid(4242); os.seteuid(int(sys.argv[2]))\n"
    code = "store = AnswerStore(sys.argv[1] + '/s')\nstore.put(recipe(), recipe().key(sys.argv[2]), 8, STOP)\nstore.close()\n"
    in_process(as_user + "os.umask(0o077)\n" + code, tmp_path, 1001)
    in_process(as_user + code + "with AnswerStore(sys.argv[1] + '/s') as s: s.compact()", tmp_path, 1002)
    with AnswerStore(tmp_path / "s") as store:
        assert len(store.answers([recipe().key("1001"), recipe().key("1002")], 8)) == 2
        assert len(segments(tmp_path / "s")) == 1


def test_compacting_leaves_what_a_run_writes_and_its_reader_looks_again(tmp_path):
    keys = named(9)
    filled(tmp_path / "s", *[STOP] * 3).close()
    with AnswerStore(tmp_path / "s") as run, AnswerStore(tmp_path / "s") as other:
        run.put(recipe(), keys[3], 8, CUT)
        assert len(run.answers(keys, 8)) == 4
        assert other.compact() == 0
        assert len(segments(tmp_path / "s")) == 2  # the run's, and the new one
        assert len(run.answers(keys, 8)) == 4
        run.put(recipe(), keys[4], 8, STOP)
        assert len(other.answers(keys, 8)) == 5
    with AnswerStore(tmp_path / "s") as store:
        store.compact()
        assert len(segments(tmp_path / "s")) == 1
        assert len(store.answers(keys, 8)) == 5 and store.summaries()[0].answers == 5


def test_compacting_all_the_time_costs_readers_and_writers_nothing(tmp_path):
    code = "while not os.path.exists(sys.argv[2]):\n    with AnswerStore(sys.argv[1]) as s: s.compact(); time.sleep(0.05)"
    compacting = [in_process(code, tmp_path / "s", tmp_path / "end", wait=False) for _ in range(2)]
    keys = named(100)
    with AnswerStore(tmp_path / "s") as reader:
        for n in range(0, 100, 10):
            with AnswerStore(tmp_path / "s") as writer:
                for key in keys[n : n + 10]:
                    writer.put(recipe(), key, 8, STOP)
            assert len(reader.answers(keys, 8)) == n + 10
    (tmp_path / "end").touch()
    assert [run.wait() for run in compacting] == [0, 0]
    with AnswerStore(tmp_path / "s") as store:
        assert len(store.answers(keys, 8)) == 100 == store.summaries()[0].answers


@pytest.mark.parametrize("at", ["replace", "unlink"])
def test_a_killed_compaction_loses_nothing(tmp_path, at):
    for _ in range(3):
        filled(tmp_path / "s", *[STOP] * 5).close()
    code = f"os.{at} = lambda *_: os.kill(os.getpid(), 9)\nstore.compact()"
    assert in_process(code, tmp_path / "s", wait=False).wait() == -9
    with AnswerStore(tmp_path / "s") as store:
        assert len(store.answers(named(5), 8)) == 5 == store.summaries()[0].answers
        store.compact()
        assert len(segments(tmp_path / "s")) == 1 and len(store.answers(named(5), 8)) == 5


def test_a_killed_runs_segment_is_compacted_after_a_day(tmp_path):
    filled(tmp_path / "s", STOP)._own = None
    with AnswerStore(tmp_path / "s") as store:
        (killed,) = segments(tmp_path / "s")
        store.compact()
        assert killed.exists() and store.in_use() == [killed]
        yesterday = time.time() - 86401
        os.utime(killed, (yesterday, yesterday))
        store.compact()
        assert not killed.exists() and len(store.answers(named(1), 8)) == 1 and store.in_use() == []


def test_a_run_whose_segment_is_gone_goes_on_in_another(tmp_path):
    with filled(tmp_path / "s", STOP) as store:
        segments(tmp_path / "s")[0].unlink()
        store.put(recipe(), KEY, 8, STOP)
        assert store.answers([KEY], 8) and [s.answers for s in store.summaries()] == [1]


def test_the_summary_tells_recipes_answers_and_tokens(tmp_path):
    with filled(tmp_path / "s", STOP, CUT) as store:
        store.put(recipe(temperature=1.0), KEY, 8, STOP)
        second, first = store.summaries()
        assert (first.teacher, first.answers, first.tokens) == ("echo", 2, 13)
        assert first.sampling == {"temperature": 0.0, "top_p": 1.0, "seed": 0, "stop_at_eos": True}
        assert first.identity["engine"] == "fake" and second.sampling["temperature"] == 1.0
        assert store.size_bytes() == sum(file.stat().st_size for file in segments(tmp_path / "s"))


def age(path, days: float) -> None:
    """Let what is in a store be so old."""
    for file in segments(path):
        changed = []
        for line in lines(file):
            if line[9:10] == b"r":
                used_at, *rest = json.loads(line[93:])
                key = bytes.fromhex(line[28:92].decode())
                line = as_line("recipe", 0, key, [used_at - days * 86400, *rest]).strip()
            changed.append(line)
        file.write_bytes(b"\n" + b"\n\n".join(changed) + b"\n")


def test_a_run_that_only_reads_says_that_it_uses_a_recipe_once_a_day(tmp_path):
    filled(tmp_path / "s", STOP).close()
    for _ in range(3):
        with AnswerStore(tmp_path / "s") as store:
            store.use(recipe())
    assert len(segments(tmp_path / "s")) == 1
    age(tmp_path / "s", 2)
    with AnswerStore(tmp_path / "s") as store:
        store.use(recipe())
        assert time.time() - store.summaries()[0].used_at < 60
        assert store.prune(older_than_days=1) == []


def test_pruning_removes_the_chosen_recipes_and_gives_the_space_back(tmp_path):
    filled(tmp_path / "s", *[Answer("long " * 100, 100, "stop")] * 300).close()
    age(tmp_path / "s", 3)
    with AnswerStore(tmp_path / "s") as store:
        store.put(recipe(temperature=1.0), KEY, 8, STOP)
        old, size = store.summaries()[-1], store.size_bytes()
        assert store.prune(older_than_days=4) == []
        assert store.prune(recipe_id=store.summaries()[0].id, older_than_days=1) == []
        assert [s.id for s in store.prune(older_than_days=2)] == [old.id]
        assert store.size_bytes() < size / 2
        assert [s.answers for s in store.summaries()] == [1]
        store.put(recipe(), KEY, 8, STOP)  # a pruned recipe can come again
        assert [s.id for s in store.prune(recipe_id=old.id[:8])] == [old.id]


def test_pruning_wants_a_choice_and_an_id_that_fits_one(tmp_path):
    with filled(tmp_path / "s", STOP) as store:
        with pytest.raises(ValueError, match="found no choice, expected a recipe, an age in days, or both"):
            store.prune()
        with pytest.raises(
            ValueError, match="recipe 'zz': fits 0 recipes, expected one; there are: [0-9a-f]{12}"
        ):
            store.prune(recipe_id="zz")


def test_pruning_during_a_run_leaves_its_recipe_and_disturbs_it_in_nothing(tmp_path):
    refused = recipe(temperature=1.0)
    with AnswerStore(tmp_path / "s") as other:
        other.put(refused, KEY, 8, REFUSED)
    with filled(tmp_path / "s", STOP, REFUSED) as run, AnswerStore(tmp_path / "s") as store:
        with pytest.raises(ValueError, match=r"\.answers: a run is labelling with that recipe; prune when"):
            store.prune(recipe_id=recipe().digest.hex()[:12])
        assert store.prune_refused() == 1
        assert len(run.answers(named(2), 8)) == 2 and run.answers([KEY], 8) == {}
        run.put(recipe(), KEY, 8, STOP)
        assert len(store.answers([*named(2), KEY], 8)) == 3


def test_refused_answers_are_pruned_and_asked_again(tmp_path):
    with filled(tmp_path / "s", STOP, REFUSED, CUT) as store:
        assert store.prune_refused() == 1
        assert set(store.answers(named(3), 8)) == {named(3)[0], named(3)[2]}


OLD_SCHEMA = """
CREATE TABLE recipes (id INTEGER PRIMARY KEY, digest BLOB, teacher TEXT, identity TEXT, sampling TEXT, used_at REAL);
CREATE TABLE answers (id INTEGER PRIMARY KEY, key BLOB, max_new_tokens INTEGER, recipe INTEGER, text TEXT,
    tokens INTEGER, finish_reason TEXT, prompt_tokens INTEGER);
PRAGMA application_id = 1684632436; PRAGMA user_version = 1; PRAGMA journal_mode = WAL;
"""


def earlier_store(path, *answers, limit: int = 8) -> None:
    """Write a file as earlier versions did."""
    db, made = sqlite3.connect(path), recipe()
    db.executescript(OLD_SCHEMA)
    row = (made.digest, made.teacher, made.identity, made.sampling, 1000.0)
    db.execute("INSERT INTO recipes VALUES (1, ?, ?, ?, ?, ?)", row)
    for key, a in zip(named(len(answers)), answers, strict=True):
        row = (key, limit, a.text, a.tokens, a.finish_reason, a.prompt_tokens)
        db.execute("INSERT INTO answers VALUES (NULL, ?, ?, 1, ?, ?, ?, ?)", row)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("file", "path"),
    [("answers.sqlite", "answers"), ("answers.sqlite", "answers.sqlite"), ("a.db", "a.db"), ("team", "team")],
)
def test_the_file_of_an_earlier_version_is_taken_over_once_and_told(tmp_path, capsys, file, path):
    earlier_store(tmp_path / file, STOP, CUT, REFUSED)
    before = (tmp_path / file).read_bytes()
    with AnswerStore(tmp_path / path, must_exist=True) as store:
        assert store.answers(named(3), 8) == dict(zip(named(3), (STOP, CUT, REFUSED), strict=True))
        (summary,) = store.summaries()
        assert (summary.id, summary.answers, summary.used_at) == (recipe().digest.hex()[:12], 3, 1000.0)
        assert store.path.name in ("answers", "a", "team.d")
        told = f"{tmp_path / file}: its answers are now in {store.path}, the file is no longer needed\n"
        store.put(recipe(), KEY, 8, STOP)
        store.put(recipe(), named(1)[0], 8, CUT)
        assert store.answers(named(1), 8)[named(1)[0]] == STOP
        store.compact()
    assert capsys.readouterr().err == told
    with AnswerStore(tmp_path / path) as store:
        assert len(store.answers([*named(3), KEY], 8)) == 4
        assert len(segments(store.path)) == 1
    assert capsys.readouterr().err == "" and (tmp_path / file).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"not a database, but long enough to be taken for one" * 40,
            "no readable store of answers .*not a data",
        ),
        (b"SQLite format 3\0" + b"\7" * 4000, "no readable store of answers"),
    ],
)
def test_a_file_that_is_no_store_is_told_and_kept(tmp_path, content, message):
    path = tmp_path / "s"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        AnswerStore(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_another_programs_database_is_left_alone(tmp_path):
    db = sqlite3.connect(tmp_path / "s")
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(ValueError, match="another program's file, expected a store of answers"):
        AnswerStore(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


@pytest.mark.parametrize("path", ["/proc/s", "/proc/new/s", "/dev/null/s"])
def test_a_place_that_cannot_be_written_is_told(path):
    with pytest.raises(
        OSError, match=r"^/(proc|dev).*: cannot be read or written .*; set label.store to"
    ) as caught:
        AnswerStore(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["s3://b/x", "s3:b", "gs://b/x", "file:///x", "~nobody-at-all/x"])
def test_a_url_is_no_store(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="^label.store: found .*, expected a folder; mount it and name that, or"
    ):
        AnswerStore(path)
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with AnswerStore("~/answers") as store:
        assert store.path == tmp_path / "answers" and store.path.is_dir()


def test_a_store_that_must_exist_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such store; label something, or fix the path"):
        AnswerStore(tmp_path / "s", must_exist=True)
    assert list(tmp_path.iterdir()) == []


def test_the_index_finds_all_records_of_a_head_through_its_arrays(monkeypatch):
    monkeypatch.setattr(segments_module, "RECENT", 100)
    index, draw, places = Index(), random.Random(5), {}
    for place in range(5000):
        head = draw.randrange(20_000) << 49
        index.add(head, place)
        places.setdefault(head, set()).add(place)
    assert all(set(index.find(head)) == found for head, found in places.items())
    assert index.find(7) == [] and 1 <= len(index._arrays) <= 6


def test_a_segment_that_grew_while_it_was_compacted_stays(tmp_path, monkeypatch):
    """As of a run that slept for a day between opening its file and writing."""
    filled(tmp_path / "s", STOP)._own = None
    (file,) = segments(tmp_path / "s")
    monkeypatch.setattr(segments_module, "ABANDONED_SEC", 0.0)
    late = as_line("answer", 9, KEY, [8, "r", "late", 5, "stop", 2])

    def write_and_keep(record) -> bool:
        if record.answer.text != "late":
            with file.open("ab") as again:
                again.write(late)
        return True

    with AnswerStore(tmp_path / "s") as store:
        store.compact(write_and_keep)
        assert file.exists() and store.answers([KEY], 8)[KEY].text == "late"
