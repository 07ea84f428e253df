"""Slices of Hub and local datasets load as `datasets` loads them, and every fault has a name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selections import prepared

from distill_app.core.errors import EmptyDataError
from distill_app.data.instructions import InstructionRules, prepare_instructions
from distill_app.data.reasoning import TraceRules, prepare_traces
from distill_app.data.sources import Dataset, load_rows

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [f"question {number}" for number in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache_dir)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    (path / "data").mkdir(parents=True)
    write_parquet(path / "data" / "train-00000-of-00001.parquet", TEXTS)
    return path


def write_parquet(path: Path, texts: list) -> None:
    pq.write_table(pa.table({"instruction": texts}), path)


def texts_of(path: Path, slice_str: str = "train") -> list:
    return [row["instruction"] for row in load_rows(Dataset(str(path), slice_str))]


def load(dataset: str, slice_str: str, revision: str | None = None) -> list:
    return list(load_rows(Dataset(dataset, slice_str, revision)))


def files_under(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("slice_str", "expected"),
    [
        ("train", TEXTS),
        ("train[:7]", TEXTS[:7]),
        ("train[7:9]", TEXTS[7:9]),
        ("train[-3:]", TEXTS[-3:]),
        ("train[:100000]", TEXTS),
        ("train[10%:20%]", TEXTS[4:8]),
        ("train[:5%]+train[-5%:]", TEXTS[:2] + TEXTS[-2:]),
    ],
)
def test_a_slice_takes_the_rows_that_a_list_slice_takes(
    folder: Path, slice_str: str, expected: list[str]
) -> None:
    assert texts_of(folder, slice_str) == expected


@pytest.mark.parametrize("slice_str", ["train[:0]", "train[5:2]", "train[40:]"])
def test_a_slice_without_rows_is_empty_data(folder: Path, slice_str: str) -> None:
    with pytest.raises(EmptyDataError, match=r"slice 'train\[.*it has no rows; widen the slice$"):
        load(str(folder), slice_str)


@pytest.mark.parametrize(
    "slice_str", ["banana", "train[:x", "test[:5]", "", "train[3]", "train[:200%]", " train"]
)
def test_a_slice_that_makes_no_sense_is_named(folder: Path, slice_str: str) -> None:
    with pytest.raises(ValueError, match="expected rows of a split, such as train") as caught:
        load(str(folder), slice_str)
    assert repr(slice_str) in str(caught.value)
    assert not isinstance(caught.value, EmptyDataError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps([{"instruction": "é, b"}, {"instruction": "NA"}])),
        ("rows.jsonl", '{"instruction": "é, b"}\n{"instruction": "NA"}\n'),
        ("rows.csv", 'instruction,output\n"é, b",x\nNA,y\n'),
    ],
)
def test_a_lone_file_loads_as_the_split_train(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert texts_of(tmp_path / name) == ["é, b", "NA"]


def test_an_empty_csv_cell_is_null_and_a_cell_with_the_text_na_is_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\nNA,\nnull,x\n", encoding="utf-8")
    rows = list(load(str(path), "train"))
    assert [row["instruction"] for row in rows] == ["NA", "null"]
    assert [row["output"] for row in rows] == [None, "x"]


def test_csv_rows_with_more_cells_than_the_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\na,b,c\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rows.csv: cannot be read .line 2: expected 2 cells, found 3"):
        load(str(path), "train")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_changed_file_of_the_same_name_size_and_time_is_read_anew(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for text in ("old", "new"):
        if path.suffix == ".parquet":
            write_parquet(path, [text])
        else:
            path.write_text(json.dumps({"instruction": text}), encoding="utf-8")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert texts_of(path) == [text]


def test_a_changed_file_in_a_folder_with_its_old_time_is_read_anew(folder: Path) -> None:
    path = folder / "data" / "train-00000-of-00001.parquet"
    for text in ("old", "new"):
        write_parquet(path, [text])
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert texts_of(folder) == [text]


def test_loading_writes_nothing_beside_the_files(folder: Path) -> None:
    before = files_under(folder.parent)
    texts_of(folder)
    texts_of(folder / "data" / "train-00000-of-00001.parquet")
    assert files_under(folder.parent) == before


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts_of(folder)
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="cannot be read"):
        load(str(folder), "train")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "dataset",
    ["./none", "/none/at/all", "data/none", "none.parquet", "a/b/c", "tests/none", "~/none"],
)
def test_a_missing_local_path_is_not_taken_for_a_hub_id(
    dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match=f"^{dataset}: no such file or folder; fix the path"):
        load(dataset, "train")


def test_a_folder_without_data_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match="holds no data file .*parquet"):
        load(str(tmp_path), "train")


def test_a_file_of_another_kind_says_which_kinds_are_known(tmp_path: Path) -> None:
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"rows.xml: found .xml, expected .parquet, .json"):
        load(str(tmp_path / "rows.xml"), "train")


def test_a_local_path_with_a_revision_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="a local path has no revision, found v1; set it to null"):
        load(str(folder), "train", "v1")


@pytest.mark.parametrize("kept_bytes", [4, 300, -8])
def test_a_truncated_parquet_in_a_folder_is_named(folder: Path, kept_bytes: int) -> None:
    whole = (folder / "data" / "train-00000-of-00001.parquet").read_bytes()
    broken = folder / "data" / "train-00001-of-00002.parquet"
    broken.write_bytes(whole[:kept_bytes])
    with pytest.raises(ValueError, match=f"^{broken}: cannot be read .*; fix the file") as caught:
        load(str(folder), "train")
    assert "\n" not in str(caught.value)


def test_shards_with_different_columns_name_the_odd_one(folder: Path) -> None:
    odd = folder / "data" / "train-00001-of-00002.parquet"
    pq.write_table(pa.table({"other": [1]}), odd)
    with pytest.raises(ValueError, match=f"^{odd}: cannot be read .*other"):
        load(str(folder), "train")


def write_shards(tmp_path: Path, *shards: pa.Table) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, table in enumerate(shards):
        pq.write_table(table, folder / f"train-{number:05d}-of-{len(shards):05d}.parquet")
    return folder


@pytest.mark.parametrize(
    ("one", "other", "kinds"),
    [(["a"], [5], "string vs int64"), ([5], ["a"], "int64 vs string"), ([True], [1], "bool vs int64")],
)
def test_shards_whose_columns_hold_other_kinds_of_values_name_the_odd_one_and_both_kinds(
    tmp_path: Path, one: list, other: list, kinds: str
) -> None:
    folder = write_shards(tmp_path, pa.table({"output": one}), pa.table({"output": other}))
    odd = folder / "train-00001-of-00002.parquet"
    with pytest.raises(ValueError, match=f"^{odd}: cannot be read .*Field output .*{kinds}.*; fix") as caught:
        load(str(folder), "train")
    assert "\n" not in str(caught.value)
    assert len(load(str(folder), "train[:1]")) == 1


@pytest.mark.parametrize("turn", [1, -1])
def test_shards_of_other_number_types_keep_their_values(tmp_path: Path, turn: int) -> None:
    tables = [
        pa.table({"question": [f"{name}{n}" for n in range(4)], "cot": ["x"] * 4, "rv_score": levels})
        for name, levels in (("a", [1, 3, 4, 3]), ("b", [3.4, 3.0, 2.5, 9.0]), ("c", pa.nulls(4)))
    ]
    folder = write_shards(tmp_path, *tables[::turn])
    for slice_str, kept in (("train", 5), ("train[1:-1]", 4)):
        found = prepared(prepare_traces, folder, slice_str, TraceRules(rv_max=3), folder=tmp_path / "out")
        questions = sorted(record["instruction"] for record in found.train)
        assert not {"a2", "b0", "b3"} & set(questions) and len(questions) == kept


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("others", [pa.array(["a", "b"]), pa.array(["a", "b"], pa.large_string())])
def test_a_column_of_nulls_alone_in_one_shard_is_no_fault(
    tmp_path: Path, turn: int, others: pa.Array
) -> None:
    asked = [pa.array([f"{name}{n}" for n in range(2)]) for name in "xyz"]
    given = [pa.nulls(2), others, others.dictionary_encode()]
    tables = [
        pa.table({"instruction": i, "input": g, "unused": pa.array([["x"], []], pa.list_(kind))})
        for i, g, kind in zip(asked, given, (pa.string(), pa.string_view(), pa.large_string()), strict=True)
    ]
    folder = write_shards(tmp_path, *tables[::turn])
    found = prepared(prepare_instructions, folder, "train", InstructionRules(), folder=tmp_path / "out")
    inputs = [["", ""], ["a", "b"], ["a", "b"]][::turn]
    assert [record["input"] for record in found.train] == [text for shard in inputs for text in shard]
    assert found.dropped == {}


def test_a_name_that_two_columns_have_is_no_fault_of_a_lone_file(tmp_path: Path) -> None:
    table = pa.table([["a"], ["x"], [1]], names=["instruction", "other", "other"])
    folder = write_shards(tmp_path, table)
    found = prepared(prepare_instructions, folder, "train", InstructionRules(), folder=tmp_path / "out")
    assert [record["instruction"] for record in found.train] == ["a"]


@pytest.mark.parametrize("turn", [1, -1])
def test_what_the_traces_of_one_shard_lack_is_read_from_the_others(tmp_path: Path, turn: int) -> None:
    bare = {"full_response": "bare", "thought_correctness_verify": None, "Reasoning_Verbosity": None}
    level = {"judge": "j", "level": 3}
    marked = bare | {"full_response": "ok", "thought_correctness_verify": True, "Reasoning_Verbosity": level}
    wrong = marked | {"full_response": "wrong", "thought_correctness_verify": False}
    tables = [
        pa.Table.from_pylist([{"question": name, "reasoning": traces}])
        for name, traces in (
            ("a", [bare]),
            ("b", [marked, wrong]),
            ("c", []),
            ("d", [{"full_response": "x"}]),
        )
    ]
    folder = write_shards(tmp_path, *tables[::turn])
    found = prepared(prepare_traces, folder, "train", TraceRules(rv_max=3), folder=tmp_path / "out")
    assert found.outputs == ["ok"] and found.dropped == {"no trace": 1, "not verified": 3}


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("rows.json", b'[{"instruction": "a"}, {"instr', "line 1, item 1: Unterminated string"),
        ("rows.json", b'[{"instruction": "a"}', "unexpected"),
        ("rows.json", b'[{"instruction": "a"}] [1]', "unexpected"),
        ("rows.json", b'[{"instruction": "a\\ud800"}]', "item 0: a lone surrogate"),
        ("rows.jsonl", b'{"instruction": "a"}\n{"instr', "line 2, column 2: Unterminated"),
        ("rows.jsonl", b'{"instruction": "a"}\n{"instruction": "a\\ud800"}\n', "line 2: a lone surrogate"),
        ("rows.jsonl", b'{"instruction": "a"}\n{"instruction": "\xff"}\n', "line 2: byte 17 is not UTF-8"),
        ("rows.jsonl", b'{"instruction": "a"}{"instruction": "b"}\n', "line 1, column 21: Extra data"),
        ("rows.json", b"3", "begins with neither"),
        ("rows.csv", b"instruction\n\xe9\n", "byte 12 is not UTF-8"),
        ("rows.csv", b'instruction,output\n"a,b\n', "line 2: unexpected end of data"),
        ("rows.csv", b"instruction,instruction\na,b\n", "one name a column"),
        ("rows.csv", b"instruction,output\na\n", "line 2: expected 2 cells, found 1"),
    ],
)
def test_a_malformed_text_file_is_named_with_its_fault(
    tmp_path: Path, name: str, content: bytes, fault: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: cannot be read .*{fault}") as caught:
        load(str(path), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_of_no_bytes_is_empty_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(EmptyDataError, match=f"{name}: the file is empty"):
        load(str(tmp_path / name), "train")


def test_a_parquet_file_without_rows_is_empty_data(tmp_path: Path) -> None:
    pq.write_table(pa.table({"instruction": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(EmptyDataError, match=r"slice 'train' of .*rows.parquet: it has no rows"):
        load(str(tmp_path / "rows.parquet"), "train")


def test_a_text_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    buffers = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    texts = pa.Array.from_buffers(pa.string(), 2, buffers)
    pq.write_table(pa.table({"instruction": texts}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: cannot be read .*UTF8"):
        prepared(
            prepare_instructions,
            tmp_path / "rows.parquet",
            "train",
            InstructionRules(),
            folder=tmp_path / "out",
        )


def load_in_a_new_process(dataset: str, **environment: str) -> str:
    code = (
        "import sys; from distill_app.data.sources import Dataset, load_rows\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules\n"
        "try: list(load_rows(Dataset(sys.argv[1], 'train[:5]')))\n"
        "except Exception as err: print(type(err).__name__, err)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, dataset],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_offline_a_hub_id_fails_in_one_line_that_says_what_to_check(tmp_path: Path) -> None:
    told = load_in_a_new_process("owner/name", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert told.startswith(
        "OSError owner/name: offline (HF_HUB_OFFLINE), and revision main of it was never read"
    )
    assert "HF_TOKEN" in told and "local folder" in told
    assert told.count("\n") == 1


def test_a_lost_connection_to_the_hub_is_an_os_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lose(*_: object, **__: object) -> None:
        raise TimeoutError("read\ntimed out")

    monkeypatch.setattr("distill_app.data.hub._is_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lose)
    with pytest.raises(OSError, match="^owner/name: .*read timed out.*check the network"):
        load("owner/name", "train")
