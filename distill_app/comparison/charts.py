"""Charts of the report, as SVG text that takes the page's colours and needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distill_app.comparison.metrics import is_known

if TYPE_CHECKING:
    import altair as alt

# A hue a system, between 3:1 and 6:1 against the page's white and its near-black, so that one set serves both
# schemes; blue and orange stay apart for every common colour blindness. What a student was before is hollow:
# paler would be too faint to see.
COLOURS = {
    "Teacher": "#7b8490",
    "System 1 before": "#2f7fd0",
    "System 1": "#2f7fd0",
    "System 2 before": "#c77700",
    "System 2": "#c77700",
}
HOLLOW = 0.15  # opacity of the ground within an outline
INK = "currentColor"
BAR_WIDTH = 190  # pixels of a bar chart's plot, its figures included
NAME_WIDTH = 112  # pixels left of it, for the names
FIGURE_GAP = 6  # pixels between a bar and its figure
CHARACTER_WIDTH = 8  # pixels at font size 13: generous, for the reader's font is not known here
GOAL_WIDTH = 320  # pixels of the picture of a threshold


class Bar(NamedTuple):
    """One bar: who, how much, and the figure as text; a value of None draws the text alone."""

    who: str
    value: float | None
    text: str
    interval: tuple[float | None, float | None] = (None, None)


def bar_chart(bars: Sequence[Bar]) -> str:
    """Return an SVG of horizontal bars from zero, in the order given, each with its figure.

    An interval is drawn as a thin line across the bar's end.
    """
    import altair as alt

    rows = [_row(bar) for bar in bars]
    end = max((row["end"] for row in rows), default=0.0) or 1.0
    # The figures stand right of the bars, where the plot must leave them room.
    room = FIGURE_GAP + CHARACTER_WIDTH * max((len(bar.text) for bar in bars), default=0)
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y(
            "who:N",
            sort=None,
            title=None,
            # One extent for all, so that the bars of neighbouring charts start alike.
            axis=alt.Axis(
                ticks=False, domain=False, labelPadding=8, minExtent=NAME_WIDTH, maxExtent=NAME_WIDTH
            ),
        )
    )
    scale = alt.Scale(domain=[0, end * BAR_WIDTH / (BAR_WIDTH - room)], nice=False)
    colour = alt.Color(
        "who:N", legend=None, scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    )
    hollow = alt.condition("test(/before$/, datum.who)", alt.value(HOLLOW), alt.value(1))
    body = base.mark_bar(height=15, strokeWidth=1.5).encode(
        x=alt.X("value:Q", scale=scale, axis=None), color=colour, stroke=colour, fillOpacity=hollow
    )
    spread = base.mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
    figures = base.mark_text(color=INK, align="left", dx=FIGURE_GAP, fontSize=13)
    figures = figures.encode(x="end:Q", text="text:N")
    return _svg((body + spread + figures).properties(width=BAR_WIDTH, height=alt.Step(26)))


def goal_chart(found: Mapping[str, float | None], wanted: float, text: str, colour: str) -> str:
    """Return an SVG of a figure and its interval on a line from zero, with a stroke where it should be.

    Args:
        found: value, low and high; without a bound above the interval goes on to the line's end.
        wanted: the threshold, which `text` names.
    """
    import altair as alt

    value, low, high = (found[key] if is_known(found[key]) else None for key in ("value", "low", "high"))
    end = 1.08 * max(filter(None, (value, low, high, wanted)), default=1.0)
    scale = alt.Scale(domain=[0, end], nice=False)
    row = {"zero": 0, "end": end, "value": value, "low": low, "high": end if high is None else high}
    base = alt.Chart(alt.Data(values=[{**row, "wanted": wanted, "text": text}])).encode(y=alt.value(26))
    x = alt.X("zero:Q", scale=scale, axis=None)
    line = base.mark_rule(color=INK, opacity=0.3, strokeWidth=2).encode(x=x, x2="end:Q")
    layers = [line]
    if low is not None:
        spread = base.mark_rule(color=colour, strokeWidth=9, opacity=0.45)
        layers.append(spread.encode(x=alt.X("low:Q", scale=scale, axis=None), x2="high:Q"))
    if value is not None:
        point = base.mark_point(color=colour, filled=True, size=110, opacity=1)
        layers.append(point.encode(x=alt.X("value:Q", scale=scale, axis=None)))
    goal = alt.Chart(alt.Data(values=[{"wanted": wanted, "text": text}])).encode(
        x=alt.X("wanted:Q", scale=scale, axis=None)
    )
    layers.append(goal.mark_rule(color=INK, strokeWidth=2).encode(y=alt.value(16), y2=alt.value(36)))
    # The text stays inside the picture: left of a stroke in its right half, right of one in its left half.
    side: Literal["left", "right"] = "right" if wanted > end / 2 else "left"
    words = goal.mark_text(color=INK, align=side, dx=1 if side == "right" else -1, fontSize=12)
    layers.append(words.encode(y=alt.value(7), text="text:N"))
    return _svg(alt.layer(*layers).properties(width=GOAL_WIDTH, height=38))


def loss_chart(curves: Mapping[str, Sequence[Mapping[str, float]]], colour: str) -> str:
    """Return an SVG of the loss over the optimizer steps: training as a line, held-out as marked points.

    Args:
        curves: points of step and loss, under "train" and "validation"; those without a loss are left out.
    """
    import altair as alt

    rows = [
        {"step": point["step"], "loss": point["loss"], "of": name}
        for name, points in curves.items()
        for point in known_points(points)
    ]
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5, grid=False, format="d"))
    y = alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    training = base.transform_filter("datum.of == 'train'").mark_line(color=colour, strokeWidth=2)
    held_out = base.transform_filter("datum.of == 'validation'").mark_line(
        color=INK, strokeWidth=1.5, strokeDash=[4, 3], point={"color": INK, "size": 40}
    )
    return _svg((training + held_out).properties(width=380, height=190))


def known_points(points: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return the points that have a loss which can be drawn."""
    return [point for point in points if is_known(point.get("loss"))]


def _row(bar: Bar) -> dict[str, Any]:
    value = float(bar.value) if bar.value is not None and is_known(bar.value) else 0.0
    low, high = bar.interval
    end = max(value, high) if high is not None and is_known(high) else value
    return {"who": bar.who, "value": value, "low": low, "high": high, "end": end, "text": bar.text}


def _svg(chart: alt.LayerChart | alt.FacetChart) -> str:
    import altair as alt
    import vl_convert

    # Vega's own labels for each mark are switched off: the page names the chart as a whole.
    styled = (
        chart.configure(background="transparent", aria=False, font="system-ui, sans-serif", padding=2)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK,
            titleColor=INK,
            titleFontWeight="normal",
            labelFontSize=13,
            titleFontSize=13,
            gridColor=INK,
            gridOpacity=0.15,
            domainColor=INK,
            domainOpacity=0.4,
            tickColor=INK,
            tickOpacity=0.4,
        )
    )
    # "v6.4.1" of the schema is "6.4" to the converter, which holds the renderer itself.
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return str(vl_convert.vegalite_to_svg(styled.to_dict(), vl_version=version))
