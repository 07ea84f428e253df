"""The report's pictures: what they draw, in colours that are seen on both grounds."""

import itertools
import re
from pathlib import Path

import pytest

from distill_app.report import charts
from distill_app.report.charts import COLOURS, Point, loss_chart, scale_chart

PAGE = Path(charts.__file__).with_name("page.html.jinja")
BLUE = COLOURS["system1"]
POINTS = [
    Point("floor", "floor", 0.2, "20%"),
    Point("before", "before", 0.3, "30%"),
    Point("student", "System 1", 0.5, "50%", (0.4, 0.6)),
    Point("ceiling", "ceiling", 0.8, "80%"),
    Point("target", "target", 0.7, "70%"),
]


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    "svg",
    [
        loss_chart(
            {"train": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1}]},
            "#2f7fd0",
        ),
        scale_chart(POINTS, BLUE),
        scale_chart([Point("student", "System 1", 2.0, "2×", (1.5, float("nan")))], BLUE, from_zero=True),
        scale_chart([], BLUE),
    ],
    ids=["loss", "scale", "scale, no bound above", "scale, nothing known"],
)
def test_a_chart_takes_the_pages_colour_and_has_no_ground(svg):
    texts = re.findall(r"<text[^>]*>", svg)
    assert all('fill="currentColor"' in text for text in texts)
    # A ground would be a filled shape of the whole picture: only the marks are filled.
    filled = re.findall(r'fill="(?!none|currentColor|transparent)([^"]+)"', svg)
    assert set(filled) <= {BLUE}
    assert "nan" not in svg.lower()


def places(svg: str) -> dict[str, float]:
    """Return where the marks of a scale stand, in percent of its width."""
    patterns = {
        "student": r'<circle cx="([\d.]+)%"[^>]*fill="#',
        "before": r'<circle cx="([\d.]+)%"[^>]*fill="none"',
        "target": r'<line x1="([\d.]+)%"[^>]*stroke-dasharray',
        "low": r'<line x1="([\d.]+)%"[^>]*stroke-width="9"',
        "high": r'x2="([\d.]+)%"[^>]*stroke-width="9"',
    }
    found = {name: re.search(pattern, svg) for name, pattern in patterns.items()}
    return {name: float(match[1]) for name, match in found.items() if match}


def test_a_scale_puts_every_mark_where_its_value_is():
    at = places(scale_chart(POINTS, BLUE))
    whole = at["target"] - at["before"]
    for name, value in (("student", 0.5), ("low", 0.4), ("high", 0.6)):
        assert (at[name] - at["before"]) / whole == pytest.approx((value - 0.3) / (0.7 - 0.3), abs=1e-3)


def test_every_point_of_a_scale_is_named_with_its_figure():
    texts = re.findall(r"<text[^>]*>(.*?)</text>", scale_chart(POINTS, BLUE))
    assert sorted(re.sub("<[^>]+>", "", text) for text in texts) == [
        "System 1 50%",
        "before 30%",
        "ceiling 80%",
        "floor 20%",
        "target 70%",
    ]
    assert "&lt;b&gt;" in scale_chart([Point("student", "<b>", 0.5, "50%")], BLUE)


@pytest.mark.parametrize("falls", [False, True])
def test_an_interval_without_a_bound_above_goes_on_to_the_end_of_the_line(falls):
    points = [Point("student", "System 1", 10.0, "10×", (4.0, None)), Point("target", "target", 12.0, "12×")]
    at = places(scale_chart(points, BLUE, falls=falls))
    assert at["high"] == at["target"] and at["low"] != at["high"]


def test_where_less_is_better_the_better_end_is_right():
    points = [Point("before", "before", 2.0, "2"), Point("student", "System 1", 1.3, "1.3")]
    rising, falling = (places(scale_chart(points, BLUE, falls=falls)) for falls in (False, True))
    assert rising["student"] < rising["before"] and falling["before"] < falling["student"]


def test_a_scale_of_one_value_has_a_middle_and_no_fault():
    assert places(scale_chart([Point("student", "System 1", 0.0, "0%", (0.0, 0.0))], BLUE))["student"] < 100


@pytest.mark.parametrize("colour", sorted(set(COLOURS.values())))
def test_every_colour_stands_out_from_every_ground_of_the_page(colour):
    grounds = re.findall("--(?:page|card): (#[0-9a-f]{6})", PAGE.read_text(encoding="utf-8"))
    assert len(grounds) == 4
    for ground in grounds:
        light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11


def test_the_systems_differ_in_more_than_red_and_green():
    # What red-green blindness leaves of a colour is, roughly, its blue beside its yellow.
    hues = {tuple(int(c[place : place + 2], 16) for place in (1, 3, 5)) for c in COLOURS.values()}
    yellowness = [(red + green) / 2 - blue for red, green, blue in hues]
    assert all(abs(one - other) > 60 for one, other in itertools.combinations(yellowness, 2))
