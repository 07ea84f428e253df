import re

import comparisons
import pytest

from distill_app.report.console import outcome_line, print_comparison

NAMES = ("Teacher", "System 1 before", "System 1", "System 2 before", "System 2")


def printed(capsys, monkeypatch, columns, comparison=None):
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
    print_comparison(comparison or comparisons.comparison(), "report.html")
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [None, 40, 80, 100, 200])
def test_the_table_fits_and_cuts_nothing_off(capsys, monkeypatch, columns):
    lines = printed(capsys, monkeypatch, columns).splitlines()
    assert max(map(len, lines)) <= min(columns or 100, 100)
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("columns", [None, 80, 100, 200])
def test_every_model_has_a_line_in_its_students_table_and_so_have_floor_and_ceiling(
    capsys, monkeypatch, columns
):
    lines = printed(capsys, monkeypatch, columns).splitlines()
    rows = {name: [line for line in lines if line.startswith(f"{name}  ")] for name in NAMES}
    assert {name: len(found) for name, found in rows.items()} == {**dict.fromkeys(NAMES, 1), "Teacher": 2}
    assert "59%" in rows["System 1"][0] and "0.76 s" in rows["System 2"][0]
    for anchor in ("System 1, asked something", "Teacher, asked as"):
        assert any(line.startswith(anchor) for line in lines)


def test_piped_text_has_no_colours(capsys, monkeypatch):
    assert "\x1b" not in printed(capsys, monkeypatch, None)


def test_what_is_not_known_is_a_dash_in_the_table_too(capsys, monkeypatch):
    comparison = comparisons.comparison()
    comparison["models"]["teacher"]["instructions"] = {}
    out = printed(capsys, monkeypatch, 100, comparison)
    teacher = [line for line in out.splitlines() if line.startswith("Teacher ")][0]
    assert teacher.split()[1:] == ["–", "–", "–"]


def test_the_verdict_stands_under_the_table_and_the_path_on_a_line_of_its_own(capsys):
    path = "a [very] long/" + "folder/" * 20 + "comparison.html"
    print_comparison(comparisons.comparison(), path)
    out = capsys.readouterr().out
    assert out.index("Teacher") < out.index("System 1 does not replace its teacher.") < out.index("Report:")
    assert f"Report: {path}\n" in out


def test_every_sentence_of_the_verdict_is_printed(capsys, monkeypatch):
    out = " ".join(printed(capsys, monkeypatch, 100).split())
    for verdict in comparisons.comparison()["students"].values():
        sentences = [
            verdict["headline"],
            *(check["sentence"] for check in verdict["checks"]),
            *verdict["notes"],
        ]
        sentences += [verdict[part]["sentence"] for part in ("gain", "closed") if verdict[part]]
        assert all(sentence in out for sentence in sentences)


def test_a_sentence_goes_on_under_its_first_word(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch, 60).splitlines()
    (at,) = [place for place, line in enumerate(lines) if line.startswith("  ✗ It agrees")]
    assert re.match(r" {4}\S", lines[at + 1])
    assert not any(line.endswith(" ") for line in lines[at : at + 4])


def test_a_judges_verdict_has_a_column_only_where_a_judge_was_asked(capsys):
    comparison = comparisons.comparison()
    print_comparison(comparison, "r")
    assert "wins" not in capsys.readouterr().out
    comparison["models"]["system1"]["instructions"]["wins"] = comparisons.figure(0.25, 0.1)
    print_comparison(comparison, "r")
    out = capsys.readouterr().out
    assert "wins" in out and "25%" in out


def test_one_line_says_how_it_ended():
    line = outcome_line(comparisons.comparison(), "reports/x.html")
    assert line == (
        "System 1 missed, System 2 cannot tell; the report is reports/x.html, `distill report` prints it"
    )
