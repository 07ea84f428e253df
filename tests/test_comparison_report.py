"""The page and its pictures as text; tests/test_comparison_page.py opens it in a browser."""

import base64
import hashlib
import re
from typing import Any

import comparisons
import pytest

from distill_app.comparison.console import print_comparison
from distill_app.comparison.markdown import render_markdown
from distill_app.comparison.report import render_report


def page_of(comparison: dict[str, Any] | None = None, **parts: Any) -> str:
    return render_report(
        comparison or comparisons.comparison(),
        parts.get("answers", comparisons.answers()),
        parts.get("curves", comparisons.curves()),
        parts.get("origin", comparisons.ORIGIN),
    )


def test_control_characters_are_seen_and_the_page_can_be_saved():
    answers = comparisons.answers()
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
    comparison["models"]["teacher"]["cost"]["peak_memory_bytes"]["value"] = None
    for name in comparisons.MODELS[1:]:
        comparison["models"][name]["instructions"]["win_rate"] = comparisons.figure(0.25, 0.1)
    html = page_of(comparison)
    assert "<span>–</span>" in html and "Wins" in html and "15–35%" in html


def test_a_run_without_benchmarks_and_losses_says_so_or_nothing():
    comparison = {**comparisons.comparison(), "benchmarks": {}}
    html = page_of(
        comparison, curves={name: {"train": [], "validation": []} for name in ("system1", "system2")}
    )
    assert "Benchmarks" not in html and html.count("No loss was recorded.") == 2
    assert page_of(comparison, curves={}) == html
    assert "everyday" in page_of() and "chance 0.25" in page_of()


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
        known = text.replace("None of its", "")
        assert not re.search(r"\b(nan|inf|None|null)\b", known, re.IGNORECASE)
    assert html.count("<td>–</td>") == 5  # what the five thresholds found


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
