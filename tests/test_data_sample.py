"""The sample data in git is small, reproducible, and right in what it says."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from distill_app.data.frames import frame

SAMPLE_DIR = Path(__file__).resolve().parents[1] / "data" / "sample"
SHARDS = [
    *(f"{name}/data/train-00000-of-00001.parquet" for name in ("DistilQwen_100k", "OmniThought")),
    "problems/problems.parquet",
]
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
BOXED = re.compile(r"\\boxed\{(\d+)\}")


@pytest.fixture(scope="module")
def regenerated_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("sample")
    subprocess.run([sys.executable, "-B", SAMPLE_DIR / "generate.py", "--out", out_dir], check=True)
    return out_dir


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    return pq.read_table(SAMPLE_DIR / SHARDS[1]).to_pylist()


def all_traces(problems: list[dict]) -> Iterator[dict]:
    for problem in problems:
        yield from problem["reasoning"]


def verified(problem: dict) -> list[dict]:
    return [trace for trace in problem["reasoning"] if trace["thought_correctness_verify"]]


def is_concise(trace: dict) -> bool:
    return trace["Reasoning_Verbosity"]["level"] <= 3 and trace["Cognitive_Difficulty"]["level"] <= 3


def boxed(trace: dict) -> str:
    (answer,) = BOXED.findall(trace["full_response"])
    return answer


def holds(left: str, op: str, right: str, result: str) -> bool:
    a, b, c = int(left), int(right), int(result)
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[op]


@pytest.mark.parametrize("shard", SHARDS)
def test_regenerating_gives_the_rows_in_git(regenerated_dir: Path, shard: str) -> None:
    assert pq.read_table(regenerated_dir / shard).equals(pq.read_table(SAMPLE_DIR / shard))


@pytest.mark.parametrize("shard", SHARDS)
def test_regenerating_gives_the_bytes_in_git(regenerated_dir: Path, shard: str) -> None:
    if (
        pq.read_metadata(regenerated_dir / shard).created_by
        != pq.read_metadata(SAMPLE_DIR / shard).created_by
    ):
        pytest.skip("another pyarrow version wrote the files in git")
    assert (regenerated_dir / shard).read_bytes() == (SAMPLE_DIR / shard).read_bytes()


def test_generating_leaves_only_the_shards(regenerated_dir: Path) -> None:
    written = sorted(
        str(path.relative_to(regenerated_dir)) for path in regenerated_dir.rglob("*") if path.is_file()
    )
    assert written == SHARDS


def test_all_sample_files_together_are_under_one_megabyte() -> None:
    files = [SAMPLE_DIR / shard for shard in SHARDS] + list(SAMPLE_DIR.glob("*.yaml"))
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_every_equation_of_a_verified_trace_is_true(problems: list[dict]) -> None:
    for problem in problems:
        for trace in verified(problem):
            equations = EQUATION.findall(trace["thought"])
            assert equations, trace["thought"]
            for equation in equations:
                assert holds(*equation), f"{equation} in {trace['thought']}"


def test_the_problems_without_traces_name_an_answer_and_are_no_problem_of_the_dataset(
    problems: list[dict],
) -> None:
    more = pq.read_table(SAMPLE_DIR / SHARDS[2]).to_pylist()
    questions = {record["instruction"] for record in more}
    assert len(questions) == len(more) >= 900
    assert all(re.fullmatch(r"The answer is \\boxed\{\d+\}\.", record["output"]) for record in more)
    assert not questions & {problem["question"] for problem in problems}


def test_the_verified_traces_of_a_question_agree_and_the_others_do_not(
    problems: list[dict],
) -> None:
    for problem in problems:
        answers = {boxed(trace) for trace in verified(problem)}
        assert len(answers) == 1, problem["question"]
        wrong = [trace for trace in problem["reasoning"] if not trace["thought_correctness_verify"]]
        assert all(boxed(trace) not in answers for trace in wrong), problem["question"]


def test_every_question_has_two_to_four_different_traces(problems: list[dict]) -> None:
    for problem in problems:
        responses = [trace["full_response"] for trace in problem["reasoning"]]
        assert 2 <= len(responses) <= 4
        assert len(set(responses)) == len(responses), problem["question"]


def test_every_question_has_a_concise_verified_trace_of_20_to_60_words(
    problems: list[dict],
) -> None:
    for problem in problems:
        concise = [trace for trace in verified(problem) if is_concise(trace)]
        assert any(trace["thought"].startswith("Step 1: ") for trace in concise), problem["question"]
        for trace in concise:
            assert 20 <= len(trace["full_response"].split()) <= 60, trace["full_response"]


def test_some_traces_have_thousands_of_tokens(problems: list[dict]) -> None:
    long = [trace for trace in all_traces(problems) if len(trace["full_response"]) > 9000]
    assert len(long) == 24 and all(trace["thought_correctness_verify"] for trace in long)
    for trace in long:
        assert trace["Reasoning_Verbosity"]["level"] == trace["Cognitive_Difficulty"]["level"] == 9
        ends = [int(result) for *_, result in EQUATION.findall(trace["thought"])]
        assert int(boxed(trace)) in ends


def test_a_full_response_is_the_thought_and_the_solution(problems: list[dict]) -> None:
    for trace in all_traces(problems):
        assert trace["full_response"] == f"{trace['thought']}\n{trace['solution']}"


def test_between_15_and_20_percent_of_the_traces_are_wrong(problems: list[dict]) -> None:
    marks = [trace["thought_correctness_verify"] for trace in all_traces(problems)]
    assert 0.15 < marks.count(False) / len(marks) < 0.20


def test_the_levels_of_the_traces_span_the_scale(problems: list[dict]) -> None:
    for field in ("Reasoning_Verbosity", "Cognitive_Difficulty"):
        assert {trace[field]["level"] for trace in all_traces(problems)} == set(range(1, 10))


def test_the_word_problems_are_of_sixteen_kinds_and_each_kind_varies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SAMPLE_DIR)
    import word_problems

    assert len(set(word_problems.KINDS)) == 16
    rows = word_problems.word_problem_rows(1, dict.fromkeys(word_problems.KINDS, 5))
    assert len({row["question"] for row in rows}) == 5 * 16


def test_the_word_problems_are_told_in_hundreds_of_frames(problems: list[dict]) -> None:
    frames = {frame(problem["question"]) for problem in problems}
    assert len(frames) >= 300


def test_stories_are_told_in_whole_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SAMPLE_DIR)
    import stories
    import word_problems

    rows = word_problems.word_problem_rows(3, {stories.told_story: 400})
    names = {person.name for person in word_problems.PEOPLE}
    assert len({frame(row["question"]) for row in rows}) > 250
    for row in rows:
        question = row["question"]
        assert not re.search(r"[{}]|\b1 \w+s\b|  ", question), question
        sentences = re.split(r"(?<=[.?]) ", question)
        assert all(sentence[0].isupper() or sentence[0].isdigit() for sentence in sentences), question
        assert question.endswith(("?", ".")) and len(set(sentences)) == len(sentences)
        named = (n for n, s in enumerate(sentences) if any(name in s for name in names))
        first = next(named, len(sentences))
        pronoun = re.compile(r"\b(she|he|She|He|her|him)\b")
        assert not any(pronoun.search(sentence) for sentence in sentences[:first]), question


def test_no_question_and_no_instruction_appears_twice(problems: list[dict]) -> None:
    instructions = pq.read_table(SAMPLE_DIR / SHARDS[0]).column("instruction").to_pylist()
    for texts in ([problem["question"] for problem in problems], instructions):
        normalized = [" ".join(text.lower().split()) for text in texts]
        assert len(set(normalized)) == len(normalized)


def test_questions_are_short(problems: list[dict]) -> None:
    for problem in problems:
        assert 15 <= len(problem["question"].split()) <= 50, problem["question"]


def test_every_instruction_has_an_answer_of_8_to_50_words() -> None:
    rows = yaml.safe_load((SAMPLE_DIR / "instructions.yaml").read_text(encoding="utf-8"))
    assert len(rows) >= 420
    for row in rows:
        assert set(row) == {"instruction", "output"}
        assert row["instruction"].strip()
        assert 8 <= len(row["output"].split()) <= 50, row
