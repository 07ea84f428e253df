"""The report in a real browser, as a person meets it."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comparisons
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from programs import need

from distill_app.report.page import render_page

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "</div></details></section><h1>mine</h1>",
    "\u202eright to left\u0000 and NUL",
    "{{ 7 * 7 }}{% raw %}",
    "' onmouseover=alert(1) <svg onload=alert(2)><style>*{display:none}</style>",
    "]]><!-- <a href=javascript:alert(3)>x</a> &lt;b&gt; &#0;",
    "w" * 10_000,
)
CONTRAST = """
() => {
  const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = parse(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const faults = [];
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest("svg") ? style.fill : style.color);
    const pair = [light(ink), light(ground(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5 || ink[3] < 1) faults.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return faults;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = need("chromium", "chromium", "google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Give a function that opens a report; when the test ends, nothing must have been loaded or complained of."""
    complaints: list[str] = []
    contexts = []

    def open_page(answers: dict[str, Any] | None = None, width: int = 1280, **options: Any) -> Page:
        path = tmp_path / "comparison.html"
        page = render_page(
            comparisons.comparison(),
            answers or comparisons.scored(),
            comparisons.curves(),
            comparisons.ORIGIN,
        )
        path.write_text(page, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        opened = contexts[-1].new_page()
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("dialog", lambda dialog: complaints.append(dialog.message))
        opened.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url))
        opened.goto(path.as_uri())
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page: Page, section: str) -> list[str]:
    return page.locator(f"#{section} details.prompt:visible h3").all_inner_texts()


def test_the_page_opens_with_the_verdict_and_asks_for_nothing(open_page):
    page = open_page()
    assert page.title() == "Distillation report"
    verdict = page.locator("#verdict").inner_text()
    assert "System 1 does not replace its teacher." in verdict and "✗ missed" in verdict
    assert "target 90 %: missed" in verdict and "floor 48%" in verdict
    assert page.locator("main > section").first.get_attribute("id") == "verdict"


@pytest.mark.slow
def test_the_first_screen_holds_verdicts_what_decides_cost_and_two_answers_of_each_student(open_page):
    page = open_page(comparisons.scored(60))
    for part in (".head", ".checks", ".cost", ".examples"):
        boxes = [found.bounding_box() for found in page.locator(f"#verdict {part}").all()]
        assert len(boxes) == 2 and all(box and box["y"] < 700 for box in boxes), part
    assert [page.get_by_text(f"One of its {kind}").count() for kind in ("best", "worst")] == [2, 2]
    on_a_phone = open_page(width=360)
    box = on_a_phone.locator("#verdict .cost").first.bounding_box()
    assert box and box["y"] + box["height"] < 800


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_names_in_the_pictures_do_not_run_into_each_other_nor_out_of_the_card(open_page, width):
    page = open_page(width=width)
    faults = page.evaluate("""() => [...document.querySelectorAll("svg.scale")].flatMap((svg) => {
      const boxes = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
      const card = svg.closest(".card").getBoundingClientRect();
      const out = boxes.filter((box) => box.left < card.left || box.right > card.right);
      const over = boxes.filter((one, at) => boxes.slice(at + 1).some((other) =>
        Math.abs(one.top - other.top) < 9 && one.left < other.right && other.left < one.right));
      return [...out, ...over].map((box) => `${svg.textContent}: ${box.left} to ${box.right}`);
    })""")
    assert faults == []


@pytest.mark.slow
def test_what_a_model_says_is_text_and_never_markup(open_page):
    calm = open_page(comparisons.scored(len(HOSTILE)))
    answers = comparisons.scored(len(HOSTILE))
    for task, rows in answers.items():
        for row, text in zip(rows, HOSTILE, strict=True):
            row["prompt"] = row["reference"] = text
            for name in comparisons.ASKED[task]:
                row[name]["text"] = text
    page = open_page(answers)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    page.mouse.move(300, 300)
    assert page.title() == "Distillation report"
    for tag in ("h1", "h3", "script", "style", "img", "svg", "a", "section", "details"):
        assert page.locator(tag).count() == calm.locator(tag).count(), tag
    for task, student in (("instructions", "system1"), ("reasoning", "system2")):
        texts = page.locator(f"#{task} .{student} .text").all_text_contents()
        assert sorted(text for text in texts if "NUL" not in text) == sorted(
            text for text in HOSTILE if "NUL" not in text
        )
        assert "⟨U+202E⟩right to left␀ and NUL" in texts


def test_prompts_are_found_by_what_is_asked_and_by_what_is_answered(open_page):
    answers = comparisons.scored()
    answers["instructions"][3]["system1"]["text"] = "An unheard-of okapi."
    page = open_page(answers)
    page.get_by_label("Search").first.fill("Instruction 2")
    assert len(shown(page, "instructions")) == 1
    assert page.locator("#instructions output").inner_text() == "1 of 6 shown"
    page.get_by_label("Search").first.fill("OKAPI")
    assert shown(page, "instructions")[0].startswith("Instruction 3")
    assert len(shown(page, "reasoning")) == 6  # each task has a search of its own
    for word in ("teacher", "tokens", "nowhere"):  # the page's own words are none of the answers'
        page.get_by_label("Search").first.fill(word)
        assert shown(page, "instructions") == []
    page.get_by_label("Search").first.fill("")
    assert len(shown(page, "instructions")) == 6


def test_search_and_filter_narrow_each_other(open_page):
    page = open_page()
    page.locator("#reasoning-kind").select_option("right")
    page.locator("#reasoning-search").fill("Problem 1")
    assert shown(page, "reasoning") == []
    page.locator("#reasoning-search").fill("Problem 2")
    assert len(shown(page, "reasoning")) == 1


def test_instructions_are_filtered_by_what_the_student_says(open_page):
    answers = comparisons.scored()
    for place, row in enumerate(answers["instructions"]):
        row["system1"]["text"] = f"Answer {place}."
    answers["instructions"][2]["system1"]["text"] = answers["instructions"][2]["teacher"]["text"] + "\n"
    answers["instructions"][4]["system1_before"]["text"] = "Answer 4."
    page = open_page(answers)
    for kind, numbers in (("same", [2]), ("other", [0, 1, 3, 4, 5]), ("unchanged", [4]), ("cut", [1])):
        page.locator("#instructions-kind").select_option(kind)
        assert [int(text.split()[1].rstrip(":")) for text in shown(page, "instructions")] == numbers
        label = page.locator(f"#instructions-kind option[value={kind}]").inner_text()
        assert label.startswith("System 1") and label.endswith(f"({len(numbers)})")


def test_a_prompt_too_long_for_the_student_is_no_answer_of_its(open_page):
    answers = comparisons.scored()
    answers["instructions"][3]["system1"] |= {"text": "", "tokens": 0, "refused": True}
    page = open_page(answers)
    page.locator("#instructions-kind").select_option("refused")
    assert len(shown(page, "instructions")) == 1 and shown(page, "instructions")[0].startswith(
        "Instruction 3"
    )
    assert page.locator("#instructions .system1").get_by_text("prompt too long for it").count() == 1


def test_a_problem_without_an_answer_to_read_is_neither_right_nor_wrong(open_page):
    answers = comparisons.scored()
    for name in comparisons.ASKED["reasoning"]:
        answers["reasoning"][0][name]["right"] = None
    answers["reasoning"][0]["score"] = None
    page = open_page(answers)
    assert "not scored" in page.locator("#reasoning details.prompt").first.inner_text()
    for kind in ("right", "wrong"):
        page.locator("#reasoning-kind").select_option(kind)
        assert not any(text.startswith("Problem 0") for text in shown(page, "reasoning"))


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("right", [0, 2, 4]),
        ("wrong", [1, 3, 5]),
        ("gained", [0, 2, 4]),
        ("lost", [1]),
        ("ahead", [0, 2, 4]),
        ("behind", [5]),
        ("unchanged", []),
        ("known", [0, 3]),
        ("new", [1, 2, 4, 5]),
    ],
)
def test_problems_are_filtered_by_how_the_student_did(open_page, kind, numbers):
    answers = comparisons.scored()
    answers["reasoning"][1]["system2_before"]["right"] = True
    answers["reasoning"][5]["teacher"]["right"] = True
    page = open_page(answers)
    page.locator("#reasoning-kind").select_option(kind)
    found = [int(text.split()[1].rstrip(":")) for text in shown(page, "reasoning")]
    assert sorted(found) == numbers


def test_differences_are_marked_and_the_marks_can_be_taken_away(open_page):
    answers = comparisons.scored()
    answers["instructions"][0]["teacher"]["text"] = "Take two red apples and a pear."
    answers["instructions"][0]["system1"]["text"] = "Take two green apples and a pear."
    page = open_page(answers)
    marked = page.locator("#instructions details[open] .system1 mark")
    assert [text.strip() for text in marked.all_inner_texts()] == ["green"]
    line = "e => getComputedStyle(e).textDecorationLine"
    assert marked.first.evaluate(line) == "underline"  # not by colour alone
    page.get_by_label("Mark words that differ from the teacher").uncheck()
    assert marked.first.evaluate(line) == "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground_in_both_schemes(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_fits_its_window(open_page, width):
    answers = comparisons.scored()
    answers["instructions"][0]["system1"]["text"] = "w" * 10_000
    page = open_page(answers, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def spoken(page: Page) -> Iterator[dict[str, Any]]:
    """Yield the nodes of the browser's accessibility tree in the order in which they are read out."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    by_id = {node["nodeId"]: node for node in nodes}

    def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not node["ignored"]:
            yield node
        for child in node.get("childIds", []):
            yield from walk(by_id[child])

    return walk(nodes[0])


def test_a_reader_by_ear_finds_headings_in_order_and_a_name_for_all_there_is(open_page):
    page = open_page()
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    names: dict[str, list[str]] = {}
    levels = []
    for node in spoken(page):
        role = node["role"]["value"]
        names.setdefault(role, []).append(node.get("name", {}).get("value", ""))
        if role == "heading":
            levels += [p["value"]["value"] for p in node["properties"] if p["name"] == "level"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(len(names[role]) == 1 for role in ("banner", "main", "navigation", "contentinfo"))
    for role in ("image", "region", "searchbox", "combobox", "checkbox", "button", "link", "table"):
        assert names[role] and all(names[role]), role
    assert len(names["image"]) == (4 + 5) + 2  # checks of both students, losses
    assert any(name.startswith("Problem 1: ") for name in names["DisclosureTriangle"])  # no sign read out
    assert any(
        name.startswith("Agreement with the teacher of System 1: System 1, asked") for name in names["image"]
    )


def test_the_page_works_from_the_keyboard(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    summary = page.locator("#reasoning details.prompt summary").nth(1)
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("#reasoning details.prompt").nth(1).get_attribute("open") is not None


@pytest.mark.slow
def test_hundreds_of_prompts_are_searched_opened_and_closed(open_page):
    page = open_page(comparisons.scored(400))
    opened = page.locator("#instructions details.prompt[open]")
    assert opened.count() == 1  # hundreds of open ones would be slow to lay out
    page.get_by_label("Search").first.fill("Instruction 39")
    assert len(shown(page, "instructions")) == 11
    button = page.locator("#instructions button")
    button.click()
    assert opened.count() == 12 and button.inner_text() == "Close all"
    button.click()
    assert opened.count() == 1 and button.inner_text() == "Open all"


def test_on_paper_the_page_is_dark_on_light_and_without_tools(open_page):
    page = open_page(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
    assert page.evaluate(CONTRAST) == []
    assert page.locator(".tools:visible, nav:visible").count() == 0
    assert page.locator("#verdict .checks:visible").count() == 2
    assert page.pdf().startswith(b"%PDF")


def test_a_run_that_asked_and_recorded_nothing_says_so(open_page):
    page = open_page({"instructions": [], "reasoning": []})
    assert page.get_by_text("No prompts were asked.").count() == 2


def test_without_a_script_every_answer_is_there(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("#instructions .tools").is_hidden()
    assert page.locator("#instructions details.prompt").count() == 6
