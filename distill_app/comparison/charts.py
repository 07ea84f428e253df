"""Charts of the report, as SVG text that takes the page's colours and needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import altair as alt

# Between 3:1 and 6:1 against the page's white and its near-black, so one set serves both schemes;
# blue and orange stay apart for every common colour blindness, grey by its lack of colour.
COLOURS = {"Teacher": "#7b8490", "Before": "#c77700", "Student": "#2f7fd0"}
INK = "currentColor"
BAR_WIDTH = 190  # pixels of a bar chart's plot, its figures included
FIGURE_GAP = 6  # pixels between a bar and its figure
CHARACTER_WIDTH = 8  # pixels at font size 13: generous, for the reader's font is not known here


class Bar(NamedTuple):
    """One bar: who, how much, and the figure as text; a value of None draws the text alone."""

    who: str
    value: float | None
    text: str
    interval: tuple[float, float] | None = None


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
            axis=alt.Axis(ticks=False, domain=False, labelPadding=8, minExtent=62, maxExtent=62),
        )
    )
    scale = alt.Scale(domain=[0, end * BAR_WIDTH / (BAR_WIDTH - room)], nice=False)
    colour = alt.Color(
        "who:N", legend=None, scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
    )
    body = base.mark_bar(height=16).encode(x=alt.X("value:Q", scale=scale, axis=None), color=colour)
    spread = base.mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
    figures = base.mark_text(color=INK, align="left", dx=FIGURE_GAP, fontSize=13)
    figures = figures.encode(x="end:Q", text="text:N")
    return _svg((body + spread + figures).properties(width=BAR_WIDTH, height=alt.Step(26)))


def loss_chart(points: Sequence[Mapping[str, float]]) -> str:
    """Return an SVG of the training loss over the optimizer steps; steps without a loss are left out."""
    import altair as alt

    rows = [dict(point) for point in points if is_number(point.get("loss"))]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(
            color=COLOURS["Student"],
            strokeWidth=2,
            # A curve of a few points is read at its points, one of many by its line.
            point={"color": COLOURS["Student"], "size": 30} if len(rows) <= 30 else False,
        )
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=5, grid=False, format="d")),
            y=alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5)),
        )
    )
    return _svg(chart.properties(width=380, height=190))


def is_number(value: object) -> bool:
    """Tell whether the value is a number that can be drawn: not None, not NaN, not infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def _row(bar: Bar) -> dict[str, Any]:
    value = float(bar.value) if bar.value is not None and is_number(bar.value) else 0.0
    low, high = bar.interval or (None, None)
    end = max(value, high or 0.0)
    return {"who": bar.who, "value": value, "low": low, "high": high, "end": end, "text": bar.text}


def _svg(chart: alt.LayerChart | alt.Chart) -> str:
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
