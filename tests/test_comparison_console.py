import comparisons
import pytest

from distill_app.comparison.console import print_comparison

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
def test_every_model_has_a_line_of_its_own(capsys, monkeypatch, columns):
    lines = printed(capsys, monkeypatch, columns).splitlines()
    rows = {name: [line for line in lines if line.startswith(f"{name}  ")] for name in NAMES}
    assert all(len(found) == 1 for found in rows.values())
    assert "134.5M" in rows["Teacher"][0] and "40%" in rows["System 2"][0]
    assert ("40% (28–52%)" in rows["System 2"][0]) == (columns != 80)
    assert ("in brackets 95% intervals" in lines[0]) == (columns != 80)


def test_piped_text_has_no_colours(capsys, monkeypatch):
    assert "\x1b" not in printed(capsys, monkeypatch, None)


def test_what_is_not_known_is_a_dash_in_the_table_too(capsys, monkeypatch):
    comparison = comparisons.comparison()
    comparison["models"]["teacher"]["cost"]["tokens_per_sec"] = comparisons.figure(None)
    comparison["models"]["teacher"]["instructions"] = {}
    out = printed(capsys, monkeypatch, 100, comparison)
    (teacher,) = [line for line in out.splitlines() if line.startswith("Teacher")]
    assert teacher.split().count("–") == 3  # loss, chrF and speed


def test_the_verdict_stands_under_the_table_and_the_path_on_a_line_of_its_own(capsys):
    path = "a [very] long/" + "folder/" * 20 + "comparison.html"
    print_comparison(comparisons.comparison(), path)
    out = capsys.readouterr().out
    assert out.index("Teacher") < out.index("System 1 does not replace its teacher.") < out.index("Report:")
    assert f"Report: {path}\n" in out


def test_every_sentence_of_the_verdict_is_printed(capsys, monkeypatch):
    out = " ".join(printed(capsys, monkeypatch, 100).split())
    for verdict in comparisons.comparison()["verdicts"].values():
        assert all(sentence in out for sentence in verdict["sentences"])


def test_a_judges_verdict_has_a_column_only_where_a_judge_was_asked(capsys):
    comparison = comparisons.comparison()
    print_comparison(comparison, "r")
    assert "wins" not in capsys.readouterr().out
    for name in comparisons.MODELS[1:]:
        comparison["models"][name]["instructions"]["win_rate"] = comparisons.figure(0.25, 0.1)
    print_comparison(comparison, "r")
    out = capsys.readouterr().out
    assert "wins" in out and "25%" in out
