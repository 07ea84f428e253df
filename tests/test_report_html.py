"""The page and its pictures as text; tests/test_report_page.py opens it in a browser."""

import base64
import hashlib
import re
from typing import Any

import comparisons
import pytest

from distill_app.report.console import print_comparison
from distill_app.report.markdown import render_markdown
from distill_app.report.page import render_page


def page_of(comparison: dict[str, Any] | None = None, **parts: Any) -> str:
    return render_page(
        comparison or comparisons.comparison(),
        parts.get("answers", comparisons.scored()),
        parts.get("curves", comparisons.curves()),
        parts.get("origin", comparisons.ORIGIN),
    )


def test_control_characters_are_seen_and_the_page_can_be_saved():
    answers = comparisons.scored()
    answers["reasoning"][0]["system2"]["text"] = "\x00\x1b[31m\r\nsecond line \ud800 \x9b"
    html = page_of(answers=answers)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    assert "␀␛[31m\nsecond line \ufffd \ufffd" in html
    html.encode("utf-8")


def test_the_policy_lets_only_the_pages_own_script_and_style_in():
    html = page_of()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_what_is_not_known_is_a_dash_and_what_nobody_measured_is_left_out():
    comparison = comparisons.comparison()
    assert "Wins" not in page_of(comparison)
    comparison["models"]["teacher"]["size"]["memory"]["value"] = None
    comparison["models"]["system1"]["instructions"]["wins"] = comparisons.figure(0.25, 0.1)
    html = page_of(comparison)
    assert "<span>–</span>" in html and "Wins" in html and "15–35%" in html


def test_a_hosted_teacher_is_shown_without_what_only_weights_can_tell():
    comparison = comparisons.comparison()
    teacher = comparison["models"]["teacher"]
    del teacher["size"], teacher["instructions"]["agreement"]
    del comparison["benchmarks"]["everyday"]["models"]["teacher"]
    comparison["anchors"] = {}
    student = comparison["students"]["system1"]
    student["checks"] = [check for check in student["checks"] if check["key"] == "speedup"]
    html = page_of(comparison)
    assert "<dt>Memory</dt><dd>242.4 MB <small>teacher –</small></dd>" in html
    assert "The floor is" not in html and "asked something else" not in html


def test_a_run_of_which_nothing_was_timed_or_judged_is_shown():
    comparison = comparisons.comparison()
    for model in comparison["models"].values():
        model.pop("size")
        for task in ("instructions", "reasoning"):
            for key in ("seconds", "seconds_load"):
                model.get(task, {}).pop(key, None)
    nothing = {"gain": None, "closed": None, "best": None, "worst": None, "checks": [], "notes": []}
    for student in comparison["students"].values():
        student |= nothing
    html = page_of(comparison)
    assert "Memory" not in html and "Seconds an answer" not in html and "One of its" not in html
    assert "System 1 does not replace its teacher." in html


@pytest.mark.parametrize("rises", [True, False])
def test_a_benchmark_that_is_no_share_is_not_written_in_percent(rises):
    comparison = comparisons.comparison()
    perplexity = {"metric": "word_perplexity", "questions": 60, "higher_is_better": rises}
    perplexity["models"] = {name: comparisons.figure(31.5, 2.0) for name in comparisons.MODELS}
    comparison["benchmarks"]["wikitext"] = perplexity
    for text in (page_of(comparison), render_markdown(comparison)):
        assert "31.5" in text and "3150%" not in text


def test_the_target_of_a_benchmark_lies_below_the_teacher_and_above_it_where_less_is_better():
    comparison = comparisons.comparison()
    everyday = comparison["benchmarks"]["everyday"]
    everyday["models"]["teacher"] = comparisons.figure(0.7)
    assert "Teacher 70%, target 60%, met" in page_of(comparison)
    everyday["higher_is_better"] = False
    assert "Teacher 0.7, target 0.8, met" in page_of(comparison)


def test_floor_and_ceiling_of_what_does_not_decide_are_in_the_table_of_their_task_alone():
    html = page_of()
    instructions, reasoning = (
        html[html.index(f"<caption>{title}") :].split("</table>")[0]
        for title in ("Following instructions", "Reasoning")
    )
    assert "Teacher, drawn with another seed" in instructions and "asked something else" in instructions
    assert "another seed" not in reasoning and "asked something else" not in reasoning


def test_a_verdict_of_a_judge_and_a_measure_without_points_of_its_own_have_a_picture():
    comparison = comparisons.comparison()
    win = {"key": "win_rate", "name": "Wins", "found": comparisons.figure(0.4, 0.1), "target": 0.45}
    win |= {
        "style": "percent",
        "outcome": "unclear",
        "needed": 300,
        "sentence": "It wins 40%.",
        "scale": None,
    }
    comparison["students"]["system1"]["checks"].append(win)
    assert "Wins of System 1: System 1 40%, target 45%, cannot tell" in page_of(comparison)


def test_what_the_judge_said_stands_beside_the_answer_it_read():
    answers = comparisons.scored()
    assert "judge, against" not in page_of(answers=answers)
    answers["instructions"][0]["system1"]["judged"] = {"teacher": ["won", "unread"]}
    assert page_of(answers=answers).count("judge, against teacher: won, unread</span>") == 1


def test_a_run_without_benchmarks_and_losses_says_so_or_nothing():
    comparison = {**comparisons.comparison(), "benchmarks": {}}
    for student in comparison["students"].values():
        student["checks"] = [check for check in student["checks"] if "benchmark" not in check["key"]]
    html = page_of(
        comparison, curves={name: {"train": [], "validation": []} for name in ("system1", "system2")}
    )
    assert "benchmark" not in html.lower() and html.count("No loss was recorded.") == 2
    assert page_of(comparison, curves={}) == html
    assert "everyday" in page_of() and "chance 25%" in page_of()


@pytest.mark.parametrize("unknown", [None, float("nan"), float("inf")])
def test_a_comparison_of_which_nothing_is_known_is_shown_by_all_three(unknown, capsys):
    comparison = comparisons.comparison()
    forget(comparison, unknown)
    html, markdown = page_of(comparison), render_markdown(comparison)
    print_comparison(comparison, "report.html")
    terminal = capsys.readouterr().out
    body = html[html.index("<body>") : html.index("<script>")].replace('"none"', "")
    for text in (body, markdown, terminal):
        assert "System 1 does not replace its teacher." in text
        known = text.replace("None of its", "").replace("wikipedia", "")
        assert not re.search(r"\b(nan|inf|None|null)\b", known, re.IGNORECASE)


def test_a_student_of_which_nothing_that_decides_was_taken_has_no_empty_table(capsys):
    comparison = comparisons.comparison()
    for who in (*comparison["models"].values(), *comparison["anchors"].values()):
        who.pop("instructions", None)
    print_comparison(comparison, "report.html")
    terminal = capsys.readouterr().out
    assert terminal.startswith("✗ System 1 does not replace its teacher.") and "System 2 before" in terminal
    assert "|  |\n|---|\n" not in render_markdown(comparison)


def forget(value: Any, unknown: float | None) -> None:
    """Put `unknown` in place of every figure, at any depth."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, dict) and "low" in item:
            item.update(dict.fromkeys(item, unknown))
        else:
            forget(item, unknown)


def test_provenance_is_named_by_its_path():
    assert re.search(r'<th scope="row">params\.seed</th><td>17</td>', page_of())


def test_the_same_input_gives_the_same_page():
    assert page_of() == page_of()
