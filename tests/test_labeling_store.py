import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import Echo

from distill_app.generation.answers import Answer, Sampling
from distill_app.labeling import store as store_module
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
        assert store.claim([KEY], 8).mine == {KEY}
        store.put(recipe(), KEY, 8, refusal)
        assert store.answers([KEY], 8) == {KEY: refusal} and store.answered([KEY], 8) == {KEY}
        assert store.answers([KEY], 9) == {}
        assert other.answered([KEY], 8) == set()
        assert other.claim([KEY], 8).mine == {KEY}


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


def test_text_that_utf8_cannot_hold_is_stored_with_a_mark(tmp_path):
    with filled(tmp_path / "s", Answer("a\ud800b 漢", 3, "stop")) as store:
        assert store.answers([recipe().key("0")], 8)[recipe().key("0")].text == "a\ufffdb 漢"


def test_more_keys_than_a_query_takes_are_looked_up(tmp_path):
    keys = [recipe().key(str(n)) for n in range(1300)]
    with AnswerStore(tmp_path / "s") as store:
        assert len(store.claim(keys, 8).mine) == 1300
        for key in keys:
            store.put(recipe(), key, 8, STOP)
        assert set(store.answers(keys, 8)) == store.answered(keys, 8) == set(keys)


def test_a_claim_belongs_to_one_run_until_its_answer_or_its_end(tmp_path):
    keys = [recipe().key(str(n)) for n in range(4)]
    with AnswerStore(tmp_path / "s") as one, AnswerStore(tmp_path / "s") as two:
        assert one.claim(keys[:3], 8).mine == set(keys[:3])
        assert one.claim(keys[:3], 8).mine == set()
        one.put(recipe(), keys[0], 8, STOP)
        found = two.claim(keys, 8)
        assert (found.mine, found.answered, found.theirs) == ({keys[3]}, {keys[0]}, {keys[1], keys[2]})
        assert two.holders() == [f"process {os.getpid()} on {store_module._host().split('/')[0]}"]
        assert two.claim(keys[1:2], 16).mine == {keys[1]}  # under another limit it is another question
        one.release_claims()
        assert two.look(keys[1:3], 8) == (set(), set())
        assert two.claim(keys[1:3], 8).mine == set(keys[1:3])
        one_again = one.claim(keys[1:2], 8)
        assert one_again.theirs == {keys[1]}
    with AnswerStore(tmp_path / "s") as three:
        assert three.claim(keys[1:], 8).mine == set(keys[1:])


def pretend_run(path, host: str, pid: int, heartbeat: float, process_start: float = 0.0) -> None:
    db = sqlite3.connect(path)
    db.execute("INSERT INTO runs VALUES ('other', ?, ?, ?, ?)", (host, pid, process_start, heartbeat))
    db.execute("INSERT INTO claims VALUES (?, 8, 'other')", (KEY,))
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("host", "pid", "age_sec", "lives"),
    [
        ("elsewhere/", 1, 30, True),
        ("elsewhere/", 1, 90, False),
        (store_module._host(), 2**22 + 1, 0, False),  # no such process, whatever its last heartbeat
        (store_module._host(), os.getpid(), 90, False),  # the number was given to another process
    ],
    ids=["elsewhere", "elsewhere, silent", "here, ended", "here, number of another"],
)
def test_a_claim_dies_with_its_process_here_or_its_heartbeat_elsewhere(tmp_path, host, pid, age_sec, lives):
    with AnswerStore(tmp_path / "s") as store:
        pretend_run(tmp_path / "s", host, pid, time.time() - age_sec)
        assert bool(store.claim([KEY], 8).theirs) == lives
        assert bool(store.holders()) == lives


def test_a_heartbeat_keeps_a_run_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "HEARTBEAT_SEC", 0.01)
    with AnswerStore(tmp_path / "s") as store:
        store.claim([KEY], 8)
        db = sqlite3.connect(tmp_path / "s")
        db.execute("DELETE FROM runs")  # as another run does that took it for dead
        db.commit()
        until = time.monotonic() + 30
        while not db.execute("SELECT * FROM runs").fetchall() and time.monotonic() < until:
            time.sleep(0.01)
        assert db.execute("SELECT pid FROM runs").fetchall() == [(os.getpid(),)]
        db.close()


def test_a_store_in_memory_works_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (None, ":memory:"):
        with AnswerStore(path) as store:
            assert store.claim([KEY], 8).mine == {KEY}
            store.put(recipe(), KEY, 8, STOP)
            assert store.answers([KEY], 8) == {KEY: STOP}
            assert store.size_bytes() == 0 and store.holders() == []
    assert list(tmp_path.iterdir()) == []


def test_threads_share_one_store(tmp_path):
    with AnswerStore(tmp_path / "s") as store, ThreadPoolExecutor(4) as pool:
        keys = [recipe().key(str(n)) for n in range(200)]
        list(pool.map(lambda key: store.put(recipe(), key, 8, STOP), keys))
        assert len(store.answers(keys, 8)) == 200


def test_processes_that_make_one_store_at_once_all_succeed(tmp_path):
    code = "import sys; from distill_app.labeling.store import AnswerStore as A; s=A(sys.argv[1]); s.claim([sys.argv[2].encode()], 8); s.close()"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "new" / "s"), str(n)], cwd=tmp_path)
        for n in range(4)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0, 0]


def test_on_a_network_file_system_the_log_is_not_shared_memory(tmp_path, monkeypatch):
    with filled(tmp_path / "local", STOP) as store:
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    monkeypatch.setattr(store_module, "_is_on_network", lambda path: True)
    with filled(tmp_path / "shared", STOP) as store:
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("truncate",)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("shared-wal")] == []


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


def test_a_store_damaged_inside_is_told(tmp_path):
    path = tmp_path / "s"
    with filled(path, *[STOP] * 2000):
        pass
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = b"\7" * (len(content) - 4096 * 2)
    path.write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"found no readable store of answers \(.*malformed"),
        AnswerStore(path) as store,
    ):
        store.answers([recipe().key(str(n)) for n in range(2000)], 8)


def test_another_programs_database_is_left_alone(tmp_path):
    db = sqlite3.connect(tmp_path / "s")
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(ValueError, match="another program's database, expected a store of answers"):
        AnswerStore(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


def test_a_store_of_a_newer_version_is_told(tmp_path):
    filled(tmp_path / "s", STOP).close()
    db = sqlite3.connect(tmp_path / "s")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(
        ValueError, match="found version 9 of the store, expected 1; use the project's version"
    ):
        AnswerStore(tmp_path / "s")


@pytest.mark.parametrize("path", ["/proc/s.sqlite", "/proc/new/s.sqlite", "/dev/null/s.sqlite"])
def test_a_place_that_cannot_be_written_is_told(path):
    with pytest.raises(OSError, match=f"^{path}: cannot be written .*; set label.store to a place") as caught:
        AnswerStore(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a store's file"):
        AnswerStore(tmp_path)


def test_a_store_that_must_exist_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such store; label something, or mend the path"):
        AnswerStore(tmp_path / "s", must_exist=True)
    assert list(tmp_path.iterdir()) == []


def test_a_store_opened_for_reading_only_is_told(tmp_path):
    with filled(tmp_path / "s", STOP) as store:
        store._db.execute("PRAGMA query_only = 1")
        with pytest.raises(OSError, match="cannot be written .*readonly"):
            store.put(recipe(), KEY, 8, STOP)


def test_a_full_disk_is_told_and_what_was_stored_stays(tmp_path):
    with filled(tmp_path / "s", STOP) as store:
        store._db.execute("PRAGMA max_page_count = 20")
        with pytest.raises(OSError, match="s: the disk is full; free some space and run again") as caught:
            for n in range(500):
                store.put(recipe(), recipe().key(f"more {n}"), 8, Answer("long " * 50, 50, "stop"))
        assert "\n" not in str(caught.value)
    with AnswerStore(tmp_path / "s") as store:
        assert store.answers([recipe().key("0")], 8) and store.summaries()[0].answers > 1


def test_a_store_blocked_by_another_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BUSY_SEC", 0.05)
    with filled(tmp_path / "s", STOP) as store:
        other = sqlite3.connect(tmp_path / "s", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="another process blocks it"):
            store.put(recipe(), KEY, 8, STOP)
        other.close()
        store.put(recipe(), KEY, 8, STOP)


def test_the_summary_tells_recipes_answers_and_tokens(tmp_path):
    with filled(tmp_path / "s", STOP, CUT) as store:
        store.put(recipe(temperature=1.0), KEY, 8, STOP)
        store.use(recipe())
        first, second = store.summaries()
        assert (first.teacher, first.answers, first.tokens) == ("echo", 2, 13)
        assert first.sampling == {"temperature": 0.0, "top_p": 1.0, "seed": 0, "stop_at_eos": True}
        assert first.identity["engine"] == "fake" and second.sampling["temperature"] == 1.0
        assert store.size_bytes() > 4096


def test_pruning_removes_the_chosen_recipes_and_gives_the_space_back(tmp_path):
    with filled(tmp_path / "s", *[Answer("long " * 100, 100, "stop")] * 300) as store:
        store.put(recipe(temperature=1.0), KEY, 8, STOP)
        old, size = store.summaries()[-1], store.size_bytes()
        assert store.prune(older_than_days=1) == []
        store._db.execute("UPDATE recipes SET used_at = used_at - 3 * 86400 WHERE id = 1")
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


def test_pruning_waits_for_no_run_and_disturbs_none(tmp_path):
    with filled(tmp_path / "s", STOP) as store, AnswerStore(tmp_path / "s") as run:
        run.claim([KEY], 8)
        with pytest.raises(
            ValueError, match=rf"process {os.getpid()} on .* is labelling with it; prune when"
        ):
            store.prune(older_than_days=0)
        assert store.summaries()[0].answers == 1
