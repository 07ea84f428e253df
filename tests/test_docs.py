"""What the pages say must be there: links, commands, parameters, files. Sharing's commands run in `test_sharing`."""

import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT

from distill_app import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
IN_GIT = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()


def fenced(language: str) -> list[str]:
    """Return all blocks of a language, those indented under a list item too."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    return [found[2] for page in PAGES for found in pattern.finditer(page.read_text())]


def prose() -> str:
    """Return the pages without their blocks."""
    texts = (page.read_text() for page in PAGES)
    return "\n".join(re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE) for text in texts)


def spans() -> set[str]:
    """Return what stands in backticks in running text."""
    return {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose())}


def commands(program: str) -> list[str]:
    """Return each command of a program, from blocks and from running text."""
    lines = [line for block in fenced("sh") for line in block.splitlines()]
    lines += spans()
    found = [re.split(r"\s+#", line)[0].strip().split(" | ")[-1] for line in lines]
    return sorted({line for line in found if line.startswith(f"{program} ")})


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


def test_every_page_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"{page.relative_to(ROOT)})" not in text] == []


@pytest.mark.parametrize("command", commands("distill"))
def test_every_distill_command_is_one(command, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run", seen.append)
    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and seen, command


def test_a_command_that_is_none_would_be_found(monkeypatch):
    monkeypatch.setattr("sys.argv", ["distill", "ask", "--no-such-option", "m"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


def test_every_make_target_exists():
    text = "\n".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "benchmarks").glob("*.mk")])
    targets = {
        name for line in re.findall(r"^([\w./-][^:=\n]*):(?!=)", text, re.MULTILINE) for name in line.split()
    }
    named = {re.sub(r"^.*=true ", "", command).split()[1] for command in commands("make")}
    assert {"repro", "test", "check"} <= named and named - targets - {"bench-*"} == set()


@pytest.mark.parametrize("text", fenced("yaml"))
def test_every_parameter_of_a_block_is_one(text):
    for section, values in yaml.safe_load(text).items():
        assert section in PARAMS
        assert set(values) <= set(PARAMS[section]), section


def test_every_parameter_named_in_a_sentence_is_one():
    sections = "|".join(PARAMS)
    named = [m for span in spans() if (m := re.match(rf"({sections})\.(\w+)(?![\w/*-])", span))]
    wrong = {m[0] for m in named if m[2] not in PARAMS[m[1]] and m[2] not in ("py", "json", "csv")}
    assert len(named) > 20 and wrong == set()


def test_every_file_of_the_project_that_is_named_is_there():
    ours = re.compile(
        r"(?:docs|tests|benchmarks|distill_app|stages|profiles|data/tasks|data/sample)/[\w./-]+"
    )
    found = {path.rstrip(".") for path in ours.findall(prose())}
    made = ("stages/NAME", "tests/test_generation_NAME", "benchmarks/NAME")
    missing = [
        path
        for path in found
        if not any(name == path or name.startswith(path.rstrip("/") + "/") for name in IN_GIT)
        and not path.startswith(made)
    ]
    assert missing == []
