import json

import pytest

from distill_app import read_json, save_json
from distill_app.core.errors import EmptyDataError
from distill_app.core.files import (
    iter_records,
    new_folder,
    new_json_list,
    read_records,
    require_free_space,
    save_records,
)

RECORD = {"instruction": "a", "input": "", "output": "b"}


def test_text_beyond_ascii_is_written_as_it_is(tmp_path):
    path = tmp_path / "new" / "x.json"
    save_json(path, [{"a": "漢字 ü"}])
    assert "漢字 ü" in path.read_text(encoding="utf-8")
    assert read_json(path) == [{"a": "漢字 ü"}]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    save_json(path, [1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_json(path, [object()])
    with pytest.raises(ValueError, match="lone surrogate"):
        save_json(path, ["\ud800"])
    assert read_json(path) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_malformed_json_names_file_and_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[\n{"a": 1},\n{"b" 2}\n]')
    with pytest.raises(ValueError, match=r"x\.json: line 3, column 6: not JSON"):
        read_json(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; run the stage"):
        read_json(tmp_path / "x.json")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="byte 2 is not UTF-8"):
        read_json(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([RECORD, {"instruction": "a", "input": ""}], r'record 1 has no "output" \(keys: instr'),
        ([{**RECORD, "input": None}], 'record 0: "input" is NoneType, expected text'),
        (["text"], "record 0 is str, expected an object"),
        ({"a": 1}, "found dict, expected a list"),
    ],
)
def test_a_record_without_its_fields_is_named(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"item": [{"a": 1}]}', "found dict, expected a list of records"),
        (b'[{"instruction": "a", "input": "", "output": "b"}, {"b" 2}]', "line 1, column 57: not JSON"),
        (b'[{"instruction": "a", "input": "", "output": "b"}] more', "line 1, column 52: not JSON"),
        (b'[{"instruction": "a", "input": "", "output": "\xff"}]', "byte 46 is not UTF-8"),
        (b"", "line 1, column 1: not JSON"),
        (b"[1e999]", r"not JSON \(.*overflow"),
    ],
)
def test_a_stream_of_records_tells_a_broken_file_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.json: {message}") as caught:
        list(iter_records(path))
    assert "\n" not in str(caught.value)


def test_records_are_read_as_a_stream(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{**RECORD, "more": [1.5, {}]}] * 5000 + [1]))
    records = iter_records(path)
    assert [next(records) for _ in range(5000)] == [RECORD] * 5000
    with pytest.raises(ValueError, match="record 5000 is int"):
        next(records)


@pytest.mark.parametrize("items", [[], [1], [{"a": "x\ny\u2028漢", "b": [[], {}, {"c": None}]}, {}, "z"]])
def test_a_list_written_item_by_item_has_the_bytes_of_save_json(tmp_path, items):
    save_json(tmp_path / "whole.json", items)
    with new_json_list(tmp_path / "new" / "parts.json") as add:
        for item in items:
            add(item)
    assert (tmp_path / "new" / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_list_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    save_json(path, [1])
    with pytest.raises(ValueError, match="item 1 has text with a lone surrogate"), new_json_list(path) as add:
        add("a")
        add("\ud800")
    assert read_json(path) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_list_is_told_apart(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(EmptyDataError, match="the list is empty"):
        read_records(tmp_path / "x.json")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as part:
        (part / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as part:
        (part / "whole").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_told_before_the_work(tmp_path):
    with pytest.raises(OSError, match="of disk free, about .* GB needed"):
        require_free_space(tmp_path / "a" / "b", 10**18)


FORMATS = pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
TEXTS = ["", '漢字\u2028\n\t"\\', "\x00\x1f\x7f", "\u202e\u200b", "👩‍🔬", "x" * 100_000]


@FORMATS
def test_records_come_back_from_every_format_as_they_were(tmp_path, suffix):
    records = [{"instruction": text, "input": text[::-1], "output": str(n)} for n, text in enumerate(TEXTS)]
    path = tmp_path / "new" / f"x{suffix}"
    assert save_records(path, iter(records)) == len(records)
    assert read_records(path) == records


@FORMATS
def test_records_are_written_and_read_as_a_stream(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert save_records(path, ({**RECORD, "output": str(n)} for n in range(10_000))) == 10_000
    records = iter_records(path)
    assert [next(records)["output"] for _ in range(9000)] == [str(n) for n in range(9000)]
    assert len(list(records)) == 1000


def test_a_json_list_of_records_has_the_bytes_of_save_json(tmp_path):
    save_records(tmp_path / "a.json", [RECORD, RECORD])
    save_json(tmp_path / "b.json", [RECORD, RECORD])
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@FORMATS
def test_records_that_fail_half_way_leave_the_old_file_and_no_other(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save_records(path, [RECORD])
    with pytest.raises(ValueError, match=r"x\.\w+: (record|item) 1 has text with a lone surrogate"):
        save_records(path, [RECORD, {**RECORD, "input": "\ud800"}])
    with pytest.raises(KeyError, match="output"):
        save_records(path, [{"instruction": "a", "input": ""}])
    assert read_records(path) == [RECORD]
    assert list(tmp_path.iterdir()) == [path]


@FORMATS
def test_no_records_are_told_apart_in_every_format(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert save_records(path, []) == 0
    with pytest.raises(EmptyDataError, match="the list is empty"):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"instruction": "a", "input": "", "output": "b"}\n\n{"b" 2}', "line 3, column 6: not JSON"),
        (b'{"instruction": "a", "input": "", "output": "\xff"}', "line 1, byte 45 is not UTF-8"),
        (b'{"instruction": "a", "input": ""}', 'record 0 has no "output"'),
        (b"[]\n", "record 0 is list, expected an object"),
    ],
)
def test_broken_json_lines_are_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.jsonl: {message}"):
        read_records(path)


def test_parquet_that_is_none_or_lacks_a_field_is_told_in_one_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(
        ValueError, match=r"x\.parquet: cannot be read as Parquet .*; write it again"
    ) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"instruction": ["a"], "other": [1]}), path)
    with pytest.raises(ValueError, match=r'x\.parquet: record 0 has no "input"'):
        read_records(path)
    pq.write_table(pa.table({"instruction": ["a"], "input": [None], "output": [1]}), path)
    with pytest.raises(ValueError, match='record 0: "input" is NoneType, expected text'):
        read_records(path)
