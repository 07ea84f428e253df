"""Data as it really comes: odd folders and columns, other names, conversations, mixtures, long texts."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selections import Selected, prepared, select_instructions, select_traces, write_rows

from distill_app.core.errors import SchemaError
from distill_app.core.files import read_records
from distill_app.data.instructions import InstructionRules, explain_instructions, prepare_instructions
from distill_app.data.reasoning import TraceRules, prepare_traces
from distill_app.data.selection import Outputs
from distill_app.data.sources import Dataset, load_rows

ROOT = Path(__file__).resolve().parents[1]
KINDS = pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])


def instructions(path: Path, folder: Path, **source: object) -> Selected:
    return prepared(prepare_instructions, path, "train", InstructionRules(), folder=folder, source=source)


def texts(selected: Selected) -> list[tuple[str, str]]:
    return [(record["instruction"], record["output"]) for record in selected.train]


@pytest.mark.parametrize(
    "name", ["output=v2", "instruction=short", "a=b c", "data '\"", "ü\u202e", "-x", "%20"]
)
def test_the_name_of_a_folder_is_no_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "train").mkdir(parents=True)
    rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(4)]
    path = write_rows(tmp_path / name / "train" / "rows.parquet", rows)
    expected = [(f"q{n}", f"a{n}") for n in range(4)]
    for dataset in (path, tmp_path / name):
        assert texts(instructions(dataset, tmp_path / "out")) == expected


@KINDS
def test_columns_that_differ_in_case_are_two(tmp_path: Path, kind: str) -> None:
    rows = [{"Instruction": "wrong", "instruction": "right", "Output": "no", "output": "yes"}]
    assert texts(select_instructions(tmp_path, rows, kind)) == [("right", "yes")]


@KINDS
@pytest.mark.parametrize("name", ["file_index", "file_row_number", "filename", "row", "n", "fault", "chars"])
def test_a_column_may_have_any_name(tmp_path: Path, kind: str, name: str) -> None:
    path = write_rows(tmp_path / f"rows{kind}", [{"instruction": f"q{n}", name: 7} for n in range(3)])
    assert [asked for asked, _ in texts(instructions(path, tmp_path / "out"))] == ["q0", "q1", "q2"]
    (line,) = explain_instructions(Dataset(str(path)), InstructionRules(), 0.0, 0, 1)
    assert line.startswith("row 1: kept for training (chars 2, instruction 'q1'")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".csv"])
def test_columns_are_read_under_the_names_that_the_params_give(tmp_path: Path, kind: str) -> None:
    rows = [{"problem": "q", "solution": "a", "output": "not this one"}]
    path = tmp_path / f"rows{kind}"
    if kind == ".csv":
        path.write_text("problem,solution,output\nq,a,not this one\n")
    else:
        write_rows(path, rows)
    names = {"instruction": "problem", "output": "solution"}
    assert texts(instructions(path, tmp_path / "out", columns=names)) == [("q", "a")]
    flat = prepared(
        prepare_traces,
        path,
        "train",
        TraceRules(),
        folder=tmp_path / "out",
        source={"columns": {"cot": "solution"}},
    )
    assert texts(flat) == [("q", "a")]


@KINDS
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, kind: str) -> None:
    path = write_rows(tmp_path / f"rows{kind}", [{"problem": "q", "solution": "a"}])
    with pytest.raises(
        ValueError, match=r"columns.output: found no column answer \(columns: problem, solution"
    ):
        instructions(path, tmp_path / "out", columns={"instruction": "problem", "output": "answer"})
    with pytest.raises(ValueError, match="columns: found instruktion, expected some of instruction, input"):
        instructions(path, tmp_path / "out", columns={"instruktion": "problem"})


def turns(*said: tuple[str, object], names: tuple[str, str] = ("role", "content")) -> list[dict]:
    return [dict(zip(names, turn, strict=True)) for turn in said]


@KINDS
def test_conversations_of_one_turn_are_records_and_the_others_are_counted(tmp_path: Path, kind: str) -> None:
    rows = [
        {"messages": turns(("user", "q1"), ("assistant", "a1"))},
        {"messages": turns(("system", "Be brief."), ("user", "q2"), ("assistant", "a2"))},
        {"messages": turns(("user", "q3"))},
        {"messages": turns(("user", "q"), ("assistant", "a"), ("user", "more"), ("assistant", "b"))},
        {"messages": turns(("tool", "q"))},
        {"messages": turns(("assistant", "a"), ("user", "q"))},
        {"messages": turns(("user", None))},
        {"messages": []},
        {"messages": None},
        {"messages": turns(("assistant", "a"))},
    ]
    selected = select_instructions(tmp_path, rows, kind)
    assert texts(selected) == [("q1", "a1"), ("Be brief.\n\nq2", "a2"), ("q3", "")]
    assert selected.dropped == {"more than one turn": 1, "no instruction": 1, "not a conversation": 5}


@KINDS
def test_sharegpt_is_read_by_both_systems(tmp_path: Path, kind: str) -> None:
    names = ("from", "value")
    rows = [{"conversations": turns(("human", "q"), ("gpt", "a"), names=names)}, {"conversations": None}]
    assert texts(select_instructions(tmp_path, rows, kind)) == [("q", "a")]
    selected = select_traces(tmp_path, rows, kind)
    assert texts(selected) == [("q", "a")] and selected.dropped == {"not a conversation": 1}


def test_a_folder_with_configs_is_read_by_their_names(tmp_path: Path) -> None:
    for name in ("main", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write_rows(tmp_path / "set" / name / "train.parquet", [{"instruction": name, "output": "a"}])
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("main", "other"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("main", "other"):
        assert texts(instructions(tmp_path / "set", tmp_path / "out", config=name)) == [(name, "a")]
    for config in (None, "none"):
        with pytest.raises(ValueError, match=r"main.*other.*set config to one that the dataset has"):
            instructions(tmp_path / "set", tmp_path / "out", config=config)


def mixture(tmp_path: Path, weights: tuple, counts: tuple[int, ...] = (60, 40)) -> list[str]:
    datasets = []
    for name, weight, count in zip("ab", weights, counts, strict=True):
        rows = [{"problem": f"{name}{n}", "output": "x"} for n in range(count)]
        path = write_rows(tmp_path / f"{name}.{'jsonl' if name == 'a' else 'parquet'}", rows)
        datasets.append(Dataset(str(path), columns={"instruction": "problem"}, weight=weight))
    outputs = Outputs(str(tmp_path / "out.json"))
    metrics = prepare_instructions(datasets, InstructionRules(), 0.0, 0, outputs)
    found = [record["instruction"] for record in read_records(tmp_path / "out.json")]
    assert metrics["rows_in"] == len(found)
    return found


def test_a_mixture_takes_rows_in_the_proportion_of_the_weights(tmp_path: Path) -> None:
    a, b = ([f"{name}{n}" for n in range(60)] for name in "ab")
    assert mixture(tmp_path, (None, None)) == a + b[:40]
    assert mixture(tmp_path, (1.0, 1.0)) == a[:40] + b[:40]
    assert mixture(tmp_path, (0.75, 0.25)) == a + b[:20]
    with pytest.raises(ValueError, match=r"weight: found \[1.0, None\], expected a number over 0 for every"):
        mixture(tmp_path, (1.0, None))


def test_texts_of_a_benchmark_are_dropped_from_both_systems_by_runs_and_by_names_and_numbers(
    tmp_path: Path,
) -> None:
    problem = "Mia has 3 bags of 4 pens and gives 2 of them to Tom, so how many are left?"
    other = "Eva has 17 bags of 9 pens and gives 5 of them to Ben, so how many are left?"
    write_rows(tmp_path / "test.jsonl", [{"q": problem}])
    rows = [{"question": text, "output": "x"} for text in (problem + " Say why.", other, "What is 2 + 2?")]
    for select in (select_traces, select_instructions):
        named = rows if select is select_traces else [{"instruction": r["question"]} for r in rows]
        rules = {"overlap_words": 13, "overlap_masked": True, "benchmarks": (str(tmp_path / "test.jsonl"),)}
        selected = select(tmp_path, named, **rules)
        assert [record["instruction"] for record in selected.train] == ["What is 2 + 2?"]
        assert selected.dropped == {"masked overlap with test.jsonl": 1, "overlap with test.jsonl": 1}


def peak_of(tmp_path: Path, path: Path, **rules: object) -> tuple[dict, int]:
    """Prepare traces in a process of its own; return the counts and its peak memory in MB."""
    outputs = tuple(str(tmp_path / name) for name in ("train.json", "heldout.json"))
    code = (
        "import json, re\n"
        "from distill_app.data.reasoning import *\nfrom distill_app.data.selection import Outputs\n"
        f"found = prepare_traces(Dataset({str(path)!r}), TraceRules(**{rules!r}), 0.1, 0, Outputs(*{outputs!r}),"
        " Reading(threads=4))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(json.dumps([found, int(peak) // 1024]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found, peak = json.loads(done.stdout)
    return found, peak


def long_rows(rows: int, traces: int, size: int) -> pa.Table:
    """Rows whose traces do not compress into a dictionary: size letters each."""
    import random

    drawn = random.Random(0)
    some = "".join(drawn.choices("abcdefgh \n", k=size + 4096))

    def trace() -> dict:
        at = drawn.randrange(4096)
        return {"full_response": some[at : at + size], "thought": some[at : at + size], "solution": "s"}

    return pa.Table.from_pylist(
        [{"question": f"q{n}", "reasoning": [trace() for _ in range(traces)]} for n in range(rows)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "traces", "size"), [(1500, 3, 34_000), (30, 2, 1_000_000), (2, 2000, 10_000)]
)
def test_long_traces_stay_within_the_memory_in_one_row_group(
    tmp_path: Path, rows: int, traces: int, size: int
) -> None:
    pq.write_table(long_rows(rows, traces, size), tmp_path / "rows.parquet", row_group_size=rows)
    found, peak = peak_of(tmp_path, tmp_path / "rows.parquet", max_traces=1)
    assert found["kept"] == rows and found["traces_in"] == rows * traces
    assert peak < 1000


@pytest.mark.slow
def test_a_text_that_a_dictionary_repeats_stays_within_the_memory(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    rows = [{"question": f"q{n}", "reasoning": [{"full_response": long}]} for n in range(600)]
    with pq.ParquetWriter(
        tmp_path / "rows.parquet", pa.Table.from_pylist(rows[:1]).schema, data_page_size=1 << 14
    ) as writer:
        table = pa.Table.from_pylist(rows[:1] * 600)
        writer.write_table(table.set_column(0, "question", pa.array([r["question"] for r in rows])))
    found, peak = peak_of(tmp_path, tmp_path / "rows.parquet")
    assert found["kept"] == 600 and peak < 1000


@pytest.mark.parametrize("group", [40, 150, 1000])
def test_row_groups_of_all_sizes_and_encodings_give_the_same_records(tmp_path: Path, group: int) -> None:
    rows = [
        {
            "question": f"q{n}",
            "reasoning": [{"full_response": ("again " if n % 2 else f"{n} ") * 200, "teacher": "r"}]
            * (n % 3),
        }
        for n in range(2000)
    ]
    table = pa.Table.from_pylist(rows)
    for name, options in (("coded", {}), ("plain", {"use_dictionary": False})):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, row_group_size=group, **options)
        selected = prepared(prepare_traces, path, "train[7:-7]", TraceRules(), folder=tmp_path / "out")
        expected = [
            (row["question"], row["reasoning"][0]["full_response"]) for row in rows[7:-7] if row["reasoning"]
        ]
        assert texts(selected) == expected


def test_ten_thousand_columns_are_no_fault(tmp_path: Path) -> None:
    columns = {f"c{n}": [n, n] for n in range(10_000)} | {"instruction": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert texts(instructions(tmp_path / "rows.parquet", tmp_path / "out")) == [("a", ""), ("b", "")]
    columns.pop("instruction")
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(SchemaError, match="found columns c0, c1") as caught:
        instructions(tmp_path / "rows.parquet", tmp_path / "out")
    assert len(str(caught.value)) < 1000


@pytest.mark.slow
def test_rows_larger_than_the_memory_are_an_error_that_says_which(tmp_path: Path) -> None:
    pq.write_table(long_rows(2, 40, 2_000_000), tmp_path / "rows.parquet")
    from distill_app.data.sources import Reading

    with pytest.raises(
        ValueError, match=r"rows.parquet: rows 0 to 2 have about \d+ MB each.*raise memory_gb"
    ):
        prepare_traces(
            Dataset(str(tmp_path / "rows.parquet")),
            TraceRules(),
            0.0,
            0,
            Outputs(str(tmp_path / "train.json")),
            Reading(memory_gb=0.51),
        )
    assert not (tmp_path / "train.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        '[{"instruction": "a"}, ' * 3,
        "[" * 100_000,
        '{"instruction": ' + "[" * 100_000 + "}",
        '[{"instruction": ' + "9" * 5000 + "}]",
    ],
)
def test_json_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path}: cannot be read") as caught:
        list(load_rows(Dataset(str(path))))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_json_list_is_read_as_a_stream_however_it_is_laid_out(tmp_path: Path) -> None:
    rows = [{"instruction": "é\n" * n, "more": [n, {"a": None}], "n": 1.5} for n in range(0, 400_000, 50_000)]
    path = tmp_path / "rows.json"
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=3, ensure_ascii=False),
        f" \n{json.dumps(rows)}\n ",
    ):
        path.write_text(text, encoding="utf-8")
        assert list(load_rows(Dataset(str(path)))) == rows
    path.write_text("[]")
    with pytest.raises(ValueError, match="it has no rows"):
        list(load_rows(Dataset(str(path))))
