"""Write the sample data: small files with the schemas of the two published datasets, and problems to verify by.

    python data/sample/generate.py [--out DIR]

Reads instructions.yaml beside it; the word problems come from word_problems.py. The same code and
the same pyarrow give the same bytes.
"""

import argparse
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from long_traces import add_long_traces
from stories import told_story
from word_problems import KINDS, word_problem_rows

HERE = Path(__file__).resolve().parent
SHARD = Path("data", "train-00000-of-00001.parquet")
SEED = 17
PER_KIND = 19
STORIES = 256
LONG_TRACES = 24
MORE_SEED, MORE_PER_KIND, MORE_STORIES = 18, 25, 600  # of the problems without traces

LEVEL = pa.struct([("judge", pa.string()), ("level", pa.int64())])
TRACE = pa.struct(
    [
        ("thought", pa.string()),
        ("solution", pa.string()),
        ("full_response", pa.string()),
        ("teacher", pa.string()),
        ("thought_correctness_verify", pa.bool_()),
        ("Reasoning_Verbosity", LEVEL),
        ("Cognitive_Difficulty", LEVEL),
    ]
)
OMNITHOUGHT = pa.schema([("question", pa.string()), ("reasoning", pa.list_(TRACE))])
PROBLEMS = pa.schema([("instruction", pa.string()), ("input", pa.string()), ("output", pa.string())])
DISTILQWEN = pa.schema([("instruction", pa.string()), ("output", pa.string())])


def instruction_rows(path: Path) -> list[dict]:
    """Return DistilQwen rows (`instruction`, `output`) in the order of the YAML list."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def problem_records(known: list[dict]) -> list[dict]:
    """Return further problems as records whose output is the right answer alone; none is among the known rows."""
    questions = {row["question"] for row in known}
    rows = word_problem_rows(MORE_SEED, {**dict.fromkeys(KINDS, MORE_PER_KIND), told_story: MORE_STORIES})
    return [
        {"instruction": row["question"], "input": "", "output": right_answer(row)}
        for row in rows
        if row["question"] not in questions
    ]


def right_answer(row: dict) -> str:
    return next(trace["solution"] for trace in row["reasoning"] if trace["thought_correctness_verify"])


def write_shard(rows: list[dict], schema: pa.Schema, path: Path) -> None:
    """Write one zstd parquet file; a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), partial_path, compression="zstd", compression_level=9
    )
    os.replace(partial_path, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for the two datasets (default: this one)"
    )
    out_dir = parser.parse_args().out

    problems = word_problem_rows(SEED, {**dict.fromkeys(KINDS, PER_KIND), told_story: STORIES})
    add_long_traces(problems, LONG_TRACES, SEED)
    write_shard(problems, OMNITHOUGHT, out_dir / "OmniThought" / SHARD)
    more = problem_records(problems)
    write_shard(more, PROBLEMS, out_dir / "problems" / "problems.parquet")
    instructions = instruction_rows(HERE / "instructions.yaml")
    random.Random(SEED).shuffle(instructions)  # the list is grouped by topic
    write_shard(instructions, DISTILQWEN, out_dir / "DistilQwen_100k" / SHARD)
    traces = sum(len(row["reasoning"]) for row in problems)
    print(
        f"{out_dir}: {len(instructions)} instructions; {len(problems)} word problems with {traces} traces,"
        f" {len(more)} without"
    )


if __name__ == "__main__":
    main()
