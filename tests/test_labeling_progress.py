"""What a labelling run says of itself while it runs."""

import pytest

from distill_app.labeling import progress
from distill_app.labeling.progress import Progress


@pytest.fixture
def said(monkeypatch, capsys):
    """Every count a line, ten seconds after the one before."""
    monkeypatch.setattr(progress, "REPORT_EVERY_SEC", 0.0)
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    return lambda: capsys.readouterr().err.splitlines()


def test_the_first_answers_of_a_batch_promise_no_end(said):
    told = Progress("label", 8)
    told.add(1, asked=1, tokens=5)
    told.add(1, asked=1, tokens=5)
    early, later = said()
    assert "left" not in early
    assert "about" in later and later.endswith("left, 0 from the store")


def test_what_the_store_had_is_no_part_of_the_pace(said):
    told = Progress("label", 100)
    told.add(96)
    told.start()
    told.add(1, asked=1, tokens=5)
    assert "left" in said()[-1]


def test_a_run_that_asks_nothing_divides_by_nothing(said):
    told = Progress("label", 4)
    told.add(4)
    told.start()
    told.add(0)
    assert all("left" not in line for line in said()[1:])
