"""Tests that need a program: skipped where a person lacks it, failed where CI does."""

import re

import pytest
from conftest import ROOT
from programs import need


def test_an_installed_program_is_found_by_any_of_its_names(tmp_path, monkeypatch):
    program = tmp_path / "google-paint"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for ci in ("", "true"):
        monkeypatch.setenv("CI", ci)
        assert need("paint", "no-such-paint", "google-paint") == str(program)


def test_a_test_without_its_program_is_skipped_and_the_package_is_named(monkeypatch):
    for ci in (None, "", "false"):
        monkeypatch.delenv("CI", raising=False) if ci is None else monkeypatch.setenv("CI", ci)
        with pytest.raises(
            pytest.skip.Exception, match="no-such-paint is not installed: apt-get install paint$"
        ):
            need("paint", "no-such-paint", "paint-that-is-not-there")


def test_in_ci_a_test_without_its_program_fails(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-paint is not installed: apt-get install paint"):
        need("paint", "no-such-paint")


def test_ci_installs_what_tests_need_and_no_test_looks_for_a_program_itself():
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    del sources["programs.py"], sources["test_programs.py"]
    assert not [name for name, text in sources.items() if re.search(r"\bwhich\(", text)]
    needed = set(re.findall(r'\bneed\("([\w.+-]+)"', "".join(sources.values())))
    installed = set(re.findall(r"missing\+=\(([\w.+-]+)\)", (ROOT / ".ci/run").read_text()))
    assert needed == installed and len(needed) > 1
