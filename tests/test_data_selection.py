"""What both selections share: files, order, the split, and the same bytes whatever did the work."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from selections import prepared, split_heldout, write_rows

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import iter_records, read_records, save_records
from distill_app.data.reasoning import TraceRules, prepare_traces
from distill_app.data.scratch import scratch_folder
from distill_app.data.selection import Outputs, bin_end
from distill_app.data.sources import Dataset, Reading
from distill_app.data.staged import Staged

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample" / "OmniThought"
RULES = TraceRules(rv_max=6, max_traces=2)


def run(folder: Path, dataset: object = SAMPLE, suffix: str = ".json", **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"train{suffix}", f"heldout{suffix}", "rejects.json", "tokens.csv")
    outputs = Outputs(*(str(folder / name) for name in names))
    rules = options.pop("rules", RULES)
    reading = Reading(threads=options.pop("threads", None))
    prepare_traces(Dataset(str(dataset)), rules, 0.2, 3, outputs, reading, **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample in 7 shards of small row groups, with questions that come again far away."""
    folder = tmp_path_factory.mktemp("shards") / "data"
    folder.mkdir()
    table = pq.read_table(SAMPLE)
    rows = table.to_pylist() + table.slice(0, 50).to_pylist()[::-1]
    for number in range(7):
        part = table.schema.empty_table().from_pylist(rows[number::7], table.schema)
        pq.write_table(part, folder / f"train-{number:05d}-of-00007.parquet", row_group_size=5)
    return folder.parent


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_the_same_bytes_come_of_any_number_of_threads(tmp_path: Path, shards: Path, suffix: str) -> None:
    once = contents(run(tmp_path / "1", shards, suffix, threads=1))
    for threads in (2, 3, 8):
        assert contents(run(tmp_path / str(threads), shards, suffix, threads=threads)) == once
    assert len(once) == 4


def test_shards_and_one_file_of_the_same_rows_give_the_same_bytes(tmp_path: Path, shards: Path) -> None:
    table = pq.read_table(sorted(shards.rglob("*.parquet")))
    pq.write_table(table, tmp_path / "whole.parquet")
    assert contents(run(tmp_path / "a", shards)) == contents(run(tmp_path / "b", tmp_path / "whole.parquet"))


def test_all_formats_hold_the_same_records_and_the_writers_agree_to_the_byte(
    tmp_path: Path, shards: Path
) -> None:
    found = {}
    for suffix in (".json", ".jsonl", ".parquet"):
        path = run(tmp_path / suffix, shards, suffix) / f"train{suffix}"
        found[suffix] = read_records(path)
        copy = tmp_path / f"copy{suffix}"
        assert save_records(copy, found[suffix]) == len(found[suffix])
        assert copy.read_bytes() == path.read_bytes()
    assert found[".json"] == found[".jsonl"] == found[".parquet"] != []


def test_the_split_is_that_of_the_plain_function(tmp_path: Path, shards: Path) -> None:
    every = TraceRules(verified_only=False)
    folder = run(tmp_path / "some", shards, rules=every)
    whole = prepared(prepare_traces, shards, "train", every, folder=tmp_path / "all").train
    train, heldout = split_heldout(whole, 0.2, 3)
    firsts = {record["instruction"]: record for record in reversed(heldout)}
    assert read_records(folder / "train.json") == train
    assert read_records(folder / "heldout.json") == [
        record for record in heldout if firsts[record["instruction"]] is record
    ]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999999])
def test_two_questions_leave_no_side_empty(tmp_path: Path, fraction: float) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": q, "cot": "x"} for q in ("a", "b", "A!")])
    for seed in range(8):
        found = prepared(
            prepare_traces, path, "train", TraceRules(), heldout_fraction=fraction, seed=seed, folder=tmp_path
        )
        plain = [{"instruction": q, "input": "", "output": "x"} for q in ("a", "b", "A!")]
        train, heldout = split_heldout(plain, fraction, seed)
        assert found.train == train and found.heldout == heldout[:1] and train


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"heldout_fraction: found .*, expected 0 or more and less"):
        prepared(
            prepare_traces, SAMPLE, "train[:5]", TraceRules(), heldout_fraction=fraction, folder=tmp_path
        )


def test_a_training_side_without_examples_is_an_error_that_says_what_was_held_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "cot": f"x{n}"} for n in (1, 2, 2)])
    with pytest.raises(
        EmptyDataError, match=r"left to train on \(held out: 2; dropped: 1 duplicate\); loosen"
    ):
        prepared(prepare_traces, path, "train", TraceRules(), heldout_fraction=0.999, folder=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_questions_that_come_again_far_away_stand_together(tmp_path: Path) -> None:
    order = list(range(300)) * 3
    random.Random(1).shuffle(order)
    rows = [{"question": f"q{n}", "cot": f"{n} {at}"} for at, n in enumerate(order)]
    path = write_rows(tmp_path / "rows.parquet", rows)
    found = prepared(prepare_traces, path, "train", TraceRules(), folder=tmp_path / "out").train
    firsts = list(dict.fromkeys(order))
    expected = [f"{n} {at}" for n in firsts for at, m in enumerate(order) if m == n]
    assert [record["output"] for record in found] == expected


def test_the_files_of_one_run_are_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "out")
    before = contents(folder)
    records = Staged.records

    def some(*arguments: object) -> object:
        yield next(records(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(Staged, "records", some)
    with pytest.raises(KeyboardInterrupt):
        run(folder, rules=TraceRules(max_traces=1))
    assert contents(folder) == before


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_disk_that_fills_up_with_the_last_file_leaves_all_the_old_ones(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "out", suffix=suffix)
    before = contents(folder)
    synced: list[int] = []

    def fsync(number: int) -> None:
        synced.append(number)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="(?i)no space left on device"):
        run(folder, suffix=suffix, rules=TraceRules(max_traces=1))
    assert len(synced) == 2 and contents(folder) == before


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from distill_app.core.stage import report_errors\n"
        "from distill_app.data.reasoning import *\n"
        "from distill_app.data.selection import Outputs\n"
        f"report_errors(lambda: prepare_traces(Dataset({str(SAMPLE)!r}), TraceRules(), 0.1, 0,"
        f" Outputs({str(tmp_path / 'train.json')!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_leaves_the_old_files_and_the_next_clears_its_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "out")
    before = contents(folder)
    code = (
        "import time, signal\nfrom distill_app.data.staged import Staged\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "old = Staged.records\n"
        "def slow(*a):\n    for x in old(*a):\n        print('writing', flush=True); time.sleep(30); yield x\n"
        "Staged.records = slow\n"
        "from distill_app.data.reasoning import *\nfrom distill_app.data.selection import Outputs\n"
        f"prepare_traces(Dataset({str(SAMPLE)!r}, 'train[:50]'), TraceRules(), 0.1, 0,"
        f" Outputs({str(folder / 'train.json')!r}, {str(folder / 'heldout.json')!r}))"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for how in (signal.SIGTERM, signal.SIGKILL):
        environment = {**os.environ, "TMPDIR": str(scratch)}
        command = [sys.executable, "-c", code]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"writing\n"
            process.send_signal(how)
            assert process.wait() != 0
        assert len(list(scratch.iterdir())) == (how == signal.SIGKILL)
    left = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == before
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with scratch_folder() as one:
        assert list(scratch.iterdir()) == [one]  # what the killed run left is gone
        with scratch_folder() as other:
            assert sorted(scratch.iterdir()) == sorted([one, other])
    assert list(scratch.iterdir()) == []


def test_a_shard_that_changes_or_goes_while_it_is_read_is_named(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distill_app.data.reasoning as reasoning

    copy = shutil.copytree(shards, tmp_path / "set")
    victim = sorted(copy.rglob("*.parquet"))[3]
    shape = reasoning._shape
    before = contents(run(tmp_path / "out", rules=TraceRules(max_traces=1)))

    def before_reading(act: object) -> None:
        monkeypatch.setattr(reasoning, "_shape", lambda source: (act(), shape(source))[1])  # type: ignore[operator]

    def touch() -> None:
        victim.write_bytes(victim.read_bytes())
        os.utime(victim, ns=(0, time.time_ns()))

    before_reading(touch)
    with pytest.raises(ValueError, match=f"^{victim}: the file has changed while it was read; run again"):
        run(tmp_path / "out", copy)
    assert contents(tmp_path / "out") == before
    before_reading(victim.unlink)
    with pytest.raises(FileNotFoundError, match=f"^{victim}: the file has gone while it was read"):
        run(tmp_path / "out", copy)
    assert contents(tmp_path / "out") == before


def test_a_shard_damaged_in_the_middle_is_named(tmp_path: Path, shards: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "set")
    victim = sorted(copy.rglob("*.parquet"))[2]
    content = bytearray(victim.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{victim}: cannot be read") as caught:
        run(tmp_path / "out", copy)
    assert "\n" not in str(caught.value)


def test_a_file_with_signs_of_a_pattern_in_its_name_is_that_file(tmp_path: Path) -> None:
    for suffix in (".parquet", ".jsonl", ".csv"):
        path = tmp_path / f"odd[1]* 'o'?{suffix}"
        (tmp_path / f"odd1 other 'o'x{suffix}").write_text("not this one")
        if suffix == ".csv":
            path.write_text("question,cot\na,b\n")
        else:
            write_rows(path, [{"question": "a", "cot": "b"}])
        assert len(prepared(prepare_traces, path, "train", TraceRules(), folder=tmp_path / "c").train) == 1


def test_a_folder_that_would_be_taken_for_a_pattern_is_refused(tmp_path: Path, shards: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "set [1]")
    with pytest.raises(ValueError, match="takes .* for a pattern; rename the folder"):
        run(tmp_path / "a", copy)


def test_bins_of_tokens_never_change_and_hold_every_count(tmp_path: Path) -> None:
    ends = [bin_end(tokens) for tokens in range(1, 5000)]
    assert all(tokens <= end for tokens, end in enumerate(ends, start=1))
    assert sorted(set(ends))[:14] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24]
    lines = (run(tmp_path / "out") / "tokens.csv").read_text().splitlines()
    assert lines[0] == "tokens,records"
    records = sum(int(line.split(",")[1]) for line in lines[1:])
    assert records == sum(
        1 for name in ("train", "heldout") for _ in iter_records(tmp_path / "out" / f"{name}.json")
    )
