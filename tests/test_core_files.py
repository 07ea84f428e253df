import json

import pytest

from distill_app import read_json, save_json
from distill_app.core.errors import EmptyDataError
from distill_app.core.files import new_folder, read_records, require_free_space

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
