"""What a person sees of the comparison: the page, its charts, the verdict and the terminal."""

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from distill_app.comparison.charts import Bar, bar_chart, loss_chart
from distill_app.comparison.console import print_scores
from distill_app.comparison.report import render_report, verdict, wilson_interval

HOSTILE = (
    "<script>alert(1)</script></textarea></div>{{ 7*7 }}{% raw %}"
    '" onload="alert(2) \u202eabc\x00\x1b[31m\r\nsecond line \ud800 שלום'
)
LOADING = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"}


class Page(HTMLParser):
    """The tags, attributes and texts of a page, as a browser would tell them apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def costs(rate: float = 60.0) -> dict[str, float]:
    return {"tokens_per_sec": rate, "latency_sec": 1.31, "parameters": 134515008, "bytes": 269060552}


def following(loss: float | None, chrf: float | None) -> dict[str, Any]:
    return {"loss": loss, "chrf": chrf, **costs()}


def reasoning(accuracy: float, cut: float = 0.0) -> dict[str, Any]:
    return {"accuracy": accuracy, "multi_step": 0.55, "cut": cut, **costs()}


@pytest.fixture
def scores() -> dict[str, Any]:
    return {
        "system1": {
            "prompts": 40,
            "teacher": following(0.82, None),
            "before": following(2.26, 21.0),
            "student": following(1.61, 38.5),
        },
        "system2": {
            "prompts": 80,
            "teacher": reasoning(0.03),
            "before": reasoning(0.02),
            "student": reasoning(0.52),
        },
    }


def judged(text: str, right: bool, cut: bool) -> dict[str, Any]:
    return {"text": text, "right": right, "steps": 1, "cut": cut}


def page_of(scores: dict[str, Any], text: str = "plain", provenance: dict[str, Any] | None = None) -> str:
    plain = {role: {"text": text} for role in ("teacher", "before", "student")}
    problem = {
        "teacher": judged(text, False, True),
        "before": judged(text, False, False),
        "student": judged(text, True, False),
    }
    shared = {"prompt": text, "reference": text}
    return render_report(
        scores,
        {"system1": [{**shared, **plain}], "system2": [{**shared, **problem}]},
        {"system1": [{"step": 5, "loss": 2.1}, {"step": 10, "loss": 1.4}], "system2": []},
        provenance or {"teacher": text, "params": {"train": {"seed": 42}}, "overlap": {"system1": 0}},
    )


def test_hostile_text_stays_text(scores: dict[str, Any]) -> None:
    calm, attacked = Page(page_of(scores)), Page(page_of(scores, HOSTILE))
    assert [tag for tag, _ in attacked.tags] == [tag for tag, _ in calm.tags]
    assert not any("onload" in attrs for _, attrs in attacked.tags)
    shown = [text for text in attacked.texts if "<script>alert(1)</script></textarea>" in text]
    assert len(shown) == 11  # five texts a system, and the name of the teacher
    assert all("{{ 7*7 }}{% raw %}" in text for text in shown)


def test_control_characters_are_seen_and_the_page_can_be_saved(scores: dict[str, Any]) -> None:
    html = page_of(scores, HOSTILE)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    assert "␀␛[31m\nsecond line \ufffd" in html
    html.encode("utf-8")


def test_text_of_either_direction_is_kept_apart_from_the_page(scores: dict[str, Any]) -> None:
    texts = [a for _, a in Page(page_of(scores)).tags if a.get("class") in ("text", "question")]
    assert len(texts) == 10
    assert all(attrs.get("dir") == "auto" for attrs in texts)


def test_the_page_loads_nothing(scores: dict[str, Any]) -> None:
    html = page_of(scores)
    links = [attrs[name] for _, attrs in Page(html).tags for name in LOADING & attrs.keys()]
    assert links and all(str(link).startswith("#") for link in links)
    assert not re.search(r"url\(|@import", html)
    assert not Page(html).all("link")


def test_the_policy_lets_only_the_pages_own_script_run(scores: dict[str, Any]) -> None:
    import base64
    import hashlib

    html = page_of(scores, HOSTILE)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] for m in Page(html).all("meta") if "http-equiv" in m]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_a_reader_of_the_page_by_ear_finds_their_way(scores: dict[str, Any]) -> None:
    page = Page(page_of(scores))
    charts = [attrs for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(charts) == len(page.all("svg")) == 9
    assert all(attrs.get("aria-label") for attrs in charts)
    assert len(page.all("table")) == len(page.all("caption")) == 3
    assert len(page.all("main")) == len(page.all("h1")) == 1
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert all(str(a["href"])[1:] in ids for a in page.all("a"))


def test_right_wrong_and_cut_are_said_in_words(scores: dict[str, Any]) -> None:
    texts = Page(page_of(scores)).texts
    # The student's mark is also beside the prompt.
    assert texts.count("✓ right") == 2
    assert texts.count("✗ wrong") == 2
    assert texts.count("✂ cut at the token limit") == 1


def test_what_is_not_known_is_a_dash(scores: dict[str, Any]) -> None:
    assert "–" in Page(page_of(scores)).texts
    scores["system1"]["teacher"]["chrf"] = 100.0
    assert "–" not in Page(page_of(scores)).texts


def test_provenance_is_named_by_its_path(scores: dict[str, Any]) -> None:
    texts = Page(page_of(scores)).texts
    assert texts[texts.index("params.train.seed") + 1] == "42"


def test_shared_prompts_are_told_before_the_verdict(scores: dict[str, Any]) -> None:
    warning = "3 of System 2's held-out prompts are also in its training data"
    html = page_of(scores, provenance={"overlap": {"system1": 0, "system2": 3}}).replace("&#39;", "'")
    assert warning in html
    assert html.index(warning) < html.index(verdict(scores)[0])
    assert "also in its training data" not in page_of(scores)


def test_the_same_input_gives_the_same_page(scores: dict[str, Any]) -> None:
    assert page_of(scores) == page_of(copy.deepcopy(scores))


@pytest.mark.parametrize(
    ("loss", "chrf", "claim"),
    [
        (1.61, 38.5, "is closer to the teacher after"),
        (2.90, 11.0, "is further from the teacher after"),
        (2.26, 21.0, "is no closer to the teacher after"),
        (1.61, 11.0, "is closer to the teacher by one measure and further by the other"),
        (2.26, 38.5, "is closer to the teacher after"),
        (None, None, "is no closer to the teacher after"),
    ],
)
def test_the_verdict_on_system_1_follows_its_figures(
    scores: dict[str, Any], loss: float | None, chrf: float | None, claim: str
) -> None:
    scores["system1"]["student"] = following(loss, chrf)
    assert verdict(scores)[0].startswith(f"System 1 {claim}")


def test_the_verdict_on_system_1_gives_the_figures(scores: dict[str, Any]) -> None:
    assert "loss per token 1.61, was 2.26 (teacher 0.82); chrF 38.5, was 21.0" in verdict(scores)[0]


@pytest.mark.parametrize(
    ("before", "after", "claim"),
    [
        (0.02, 0.52, "is better after distillation: it answers 52% of 80"),
        (0.52, 0.02, "is worse after distillation: it answers 2% of 80"),
        (0.50, 0.50, "is no better after distillation: it answers 50% of 80"),
        (0.50, 0.55, "may be better after distillation, but 80 problems are too few to tell"),
        (0.55, 0.50, "may be worse after distillation, but 80 problems are too few to tell"),
    ],
)
def test_the_verdict_on_system_2_follows_its_figures(
    scores: dict[str, Any], before: float, after: float, claim: str
) -> None:
    scores["system2"]["before"], scores["system2"]["student"] = reasoning(before), reasoning(after)
    assert verdict(scores)[1].startswith(f"System 2 {claim}")


def test_the_verdict_tells_of_many_cut_answers(scores: dict[str, Any]) -> None:
    assert "cut at the token limit" not in verdict(scores)[1]
    scores["system2"]["student"]["cut"] = 0.43
    assert "43% of System 2's answers were cut at the token limit" in verdict(scores)[1]


def test_the_verdict_tells_a_slower_student_from_a_faster_one(scores: dict[str, Any]) -> None:
    scores["system1"]["student"].update(costs(rate=120.0))
    scores["system2"]["student"].update(costs(rate=30.0))
    text = " ".join(verdict(scores))
    assert "System 1 runs at 2.0× with 100%" in text
    assert "System 2 runs at 0.5× (slower) with 100%" in text


def test_only_a_small_sample_is_called_small(scores: dict[str, Any]) -> None:
    assert "Only 40 (System 1) and 80 (System 2) prompts" in verdict(scores)[-1]
    scores["system1"]["prompts"] = scores["system2"]["prompts"] = 100
    assert len(verdict(scores)) == 3
    assert "Only" not in " ".join(verdict(scores))


def test_the_wilson_interval_agrees_with_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
    published |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, count), bounds in published.items():
        assert wilson_interval(hits / count, count) == pytest.approx(bounds, abs=1e-4)


@pytest.mark.parametrize("columns", [None, "72", "200"])
def test_the_terminal_tables_fit(
    scores: dict[str, Any],
    columns: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    print_scores(scores, "reports/[red]report.html")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= min(100, int(columns or 100))
    assert out.rstrip().endswith("Report: reports/[red]report.html")


def test_the_terminal_speaks_in_human_units(
    scores: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_scores(scores, "report.html")
    out = capsys.readouterr().out
    for figure in ("134.5M", "269 MB", "60 tokens/s", "1.31 s", "52% (41–63%)", "loss ↓", "chrF ↑"):
        assert figure in out
    assert " ".join(out.split()).count(verdict(scores)[1]) == 1
    teacher = next(line for line in out.splitlines() if "Teacher" in line)
    assert "–" in teacher.split()


@pytest.mark.parametrize(
    "svg",
    [
        bar_chart([Bar("Teacher", 0.5, "50%", (0.4, 0.6)), Bar("Student", None, "–")]),
        loss_chart([{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1}]),
    ],
    ids=["bars", "loss"],
)
def test_a_chart_takes_the_pages_colour_and_has_no_ground(svg: str) -> None:
    texts = re.findall(r"<text[^>]*>", svg)
    assert texts and all('fill="currentColor"' in text for text in texts)
    # A ground would be a filled shape of the whole picture: only the marks are filled.
    filled = re.findall(r'fill="(?!none|currentColor|transparent)([^"]+)"', svg)
    assert set(filled) <= {"#7b8490", "#2f7fd0"}
    assert "NaN" not in svg


def test_a_bar_is_as_long_as_its_value_says() -> None:
    svg = bar_chart([Bar("Teacher", 10.0, "10"), Bar("Before", 5.0, "05")])
    lengths = [float(n) for n in re.findall(r'd="M0,[\d.]+h([\d.]+)v[^"]*"[^>]*fill="#', svg)]
    assert len(lengths) == 2
    assert lengths[0] == pytest.approx(2 * lengths[1])
