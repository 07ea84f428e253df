"""The comparison as Markdown, read as GitHub reads it."""

import copy
import re

import comparisons
from markdown_it import MarkdownIt

from distill_app.report.markdown import render_markdown

HOSTILE = (
    "a|b<img src=x onerror=alert(1)>_c_ `d` [e](f) ![g](h) ~~i~~ @me #12 https://j.example\n\n# k\x1b\u202e"
)


def html_of(comparison):
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return parser.render(render_markdown(comparison))


def tags(html):
    return re.findall(r"<(\w+)", html)


def test_the_verdict_and_what_decides_come_first_and_all_else_is_folded():
    html = html_of(comparisons.comparison())
    open_part, folded = html.split("<details>", 1)
    assert open_part.index("❌ System 1 does not replace its teacher.") < open_part.index("<table>")
    assert open_part.count("<table>") == 2 and "59% (57–62%)" in open_part
    assert folded.count("<table>") == 4 and html.count("<details>") == html.count("</details>") == 4
    for title in ("Following instructions", "Reasoning", "Memory and size", "Benchmarks"):
        assert f"<summary>{title}" in folded


def test_every_table_parses_into_whole_rows():
    html = html_of(comparisons.comparison())
    for table in re.findall("<table>.*?</table>", html, re.DOTALL):
        rows = re.findall("<tr>.*?</tr>", table, re.DOTALL)
        assert len(rows) > 1 and len({len(re.findall("<t[hd]", row)) for row in rows}) == 1
    assert "|" not in html


def test_nothing_that_others_named_becomes_markup():
    calm, attacked = comparisons.comparison(), comparisons.comparison()
    benchmark = attacked["benchmarks"].pop("everyday")
    attacked["benchmarks"][HOSTILE] = {**benchmark, "metric": HOSTILE}
    for verdict in attacked["students"].values():
        verdict["headline"] = HOSTILE
        for check in verdict["checks"]:
            check["sentence"] = HOSTILE
        verdict["notes"] = [HOSTILE for _ in verdict["notes"]]
    html = html_of(attacked)
    assert tags(html) == tags(html_of(calm))
    assert "&lt;img src=x onerror=alert(1)&gt;_c_ `d` [e](f) ![g](h) ~~i~~" in html
    assert "␛" in html and "\u202e" not in html
    assert "https://" not in render_markdown(attacked)  # nothing that GitHub would make a link of


def test_it_shows_no_picture_and_asks_for_no_service():
    text = render_markdown(comparisons.comparison())
    assert "![" not in text and "](" not in text and "<img" not in text and "http" not in text


def test_a_run_without_benchmarks_and_costs_leaves_them_out():
    comparison = {**comparisons.comparison(), "benchmarks": {}}
    for model in comparison["models"].values():
        del model["size"]
    html = html_of(comparison)
    assert "Benchmarks" not in html and "Memory" not in html


def test_an_unknown_figure_is_a_dash():
    comparison = comparisons.comparison()
    comparison["models"]["system1"]["instructions"]["agreement"] = comparisons.figure(None)
    assert "<strong>–</strong>" in html_of(comparison)


def test_rendering_changes_nothing():
    comparison = comparisons.comparison()
    before = copy.deepcopy(comparison)
    assert render_markdown(comparison) == render_markdown(comparison) and comparison == before
