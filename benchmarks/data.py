"""Times System 2's selection beside DuckDB's and Polars' own on the same files; one command, one table.

make bench-data [ROWS=1000000] [TRACE_KB=1] [THREADS=2] [SHARDS=135]

The rows are generated once, with the schema of OmniThought: 2 to 4 traces each, about TRACE_KB a trace, in
Parquet shards of about 22 MB uncompressed under work/bench-data. The selection: verified traces, RV and CD at
most 6, the shortest one a question, written as {instruction, input, output}. The engines get it as one query
that looks at one row at a time; ours also drops repeated questions and outputs, checks every text, holds a
tenth of the questions out, counts every reject by its reason and keeps a sample. Each runs in a process of
its own; a figure is of the whole process, and the memory is the most that it had. Every round runs all, one
after the other; the last line is how many times as long as the faster engine ours takes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

KIB = 1024  # Linux's unit of ru_maxrss
SHARD_BYTES = 22_000_000  # as OmniThought's are
GROUP_ROWS = 1000  # as `datasets` writes them
OURS = "this selection"
TEACHERS = np.array(["DeepSeek-R1", "DeepSeek-R1-0528", "QwQ-32B"])
LEVEL_MAX = 6


def main() -> None:
    """Generate what is missing, run all and print the table."""
    args = arguments()
    if args.generate:
        generate(args.folder, args.rows, args.trace_kb, args.shards)
        return
    if args.contender:
        CONTENDERS[args.contender](args.folder / "rows", args.folder / "out", args.threads)
        return
    # Not here: a process that was big once counts as big in each that it starts
    subprocess.run([sys.executable, __file__, "--generate", *sys.argv[1:]], check=True)
    shards = list((args.folder / "rows").glob("*.parquet"))
    size = sum(file.stat().st_size for file in shards)
    print(
        f"{args.rows:,} rows, {args.trace_kb} KB a trace, {len(shards)} shards, {size / 1e9:.2f} GB of"
        f" Parquet, {args.threads} threads, {os.cpu_count()} cores"
    )
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    peaks: dict[str, int] = dict.fromkeys(CONTENDERS, 0)
    for number in range(args.rounds):
        for name in CONTENDERS:
            taken, peak = run(name, args.folder, args.threads)
            seconds[name].append(taken)
            peaks[name] = max(peak, peaks[name])
            print(f"round {number + 1}, {name}: {taken:.1f} s, {peak / 1e6:.0f} MB", flush=True)
    show(args.rows, seconds, peaks)
    if args.remove:
        shutil.rmtree(args.folder)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--trace-kb", type=int, default=1, help="mean size of a trace, all fields")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shards", type=int, help="files; by default of 22 MB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("work/bench-data"))
    parser.add_argument("--remove", action="store_true", help="remove the folder at the end")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--generate", action="store_true", help="write the rows and no more")
    return parser.parse_args()


def generate(folder: Path, count: int, trace_kb: int, shards: int | None) -> None:
    """Write the rows, unless they are there already."""
    shards = shards or max(1, min(count, count * 3000 * trace_kb // SHARD_BYTES))
    rows, mark = folder / "rows", folder / "rows.json"
    wanted = [count, trace_kb, shards]
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    rows.mkdir(parents=True)
    words = np.random.default_rng(0)
    vocabulary = ["".join(map(chr, words.integers(97, 123, words.integers(2, 9)))) for _ in range(5000)]
    pool = np.frombuffer(" ".join(words.choice(vocabulary, 4_000_000)).encode(), np.uint8)
    for shard in range(shards):
        here = count * (shard + 1) // shards - count * shard // shards
        write_shard(rows / f"train-{shard:05d}-of-{shards:05d}.parquet", here, pool, [17, shard], trace_kb)
    mark.write_text(json.dumps(wanted))


def write_shard(path: Path, count: int, pool: np.ndarray, seed: list[int], trace_kb: int) -> None:
    """Write one shard of random texts, a row group at a time; the same seed gives the same rows."""
    import pyarrow.parquet as pq

    random, writer = np.random.default_rng(seed), None
    for first in range(0, count, GROUP_ROWS):
        table = some_rows(random, min(GROUP_ROWS, count - first), pool, trace_kb)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def some_rows(random: np.random.Generator, count: int, pool: np.ndarray, trace_kb: int) -> Any:
    """Return rows with the schema of OmniThought, as an Arrow table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    traces = random.integers(2, 5, count)
    total = int(traces.sum())

    def texts(number: int, low: int, high: int) -> Any:
        lengths = random.integers(low, high, number)
        starts = random.integers(0, len(pool) - high, number)
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        letters = pool[np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])]
        return pa.StringArray.from_buffers(number, pa.py_buffer(ends), pa.py_buffer(letters))

    def level() -> Any:
        fields = [texts(total, 8, 20), pa.array(random.integers(0, 10, total))]
        return pa.StructArray.from_arrays(fields, ["judge", "level"])

    thought = texts(total, 150 * trace_kb, 750 * trace_kb)
    solution = texts(total, 30 * trace_kb, 90 * trace_kb)
    columns = {
        "thought": thought,
        "solution": solution,
        "full_response": pc.binary_join_element_wise("<think>\n", thought, "\n</think>\n", solution, ""),
        "teacher": pa.array(random.choice(TEACHERS, total)),
        "thought_correctness_verify": pa.array(random.random(total) < 0.85),
        "Reasoning_Verbosity": level(),
        "Cognitive_Difficulty": level(),
    }
    offsets = pa.array(np.concatenate([[0], np.cumsum(traces)]).astype(np.int32))
    listed = pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays(list(columns.values()), list(columns))
    )
    return pa.table({"question": texts(count, 60, 300), "reasoning": listed})


def ours(rows: Path, out: Path, threads: int) -> None:
    """Select as the stage does."""
    from distill_app.data.reasoning import TraceRules, prepare_traces
    from distill_app.data.selection import Outputs
    from distill_app.data.sources import Dataset, Reading

    outputs = Outputs(*(str(out / name) for name in ("train.json", "heldout.json", "rejects.json", "t.csv")))
    rules = TraceRules(rv_max=LEVEL_MAX, cd_max=LEVEL_MAX, max_traces=1)
    prepare_traces(Dataset(str(rows)), rules, 0.1, 17, outputs, Reading(threads=threads))


def duckdb_query(rows: Path, out: Path, threads: int) -> None:
    """Select in one query of DuckDB, and let it write the JSON list."""
    import duckdb

    connection = duckdb.connect(
        config={"threads": threads, "memory_limit": "4GiB", "temp_directory": str(out / "overflow")}
    )
    fits = (
        f"t.thought_correctness_verify AND t.Reasoning_Verbosity.level <= {LEVEL_MAX}"
        f" AND t.Cognitive_Difficulty.level <= {LEVEL_MAX}"
    )
    fitting = f"list_filter(reasoning, lambda t: {fits})"
    ranked = f"list_transform({fitting}, lambda t: {{'n': length(t.full_response), 'o': t.full_response}})"
    connection.execute(
        f"COPY (SELECT question AS instruction, '' AS input, list_sort({ranked})[1].o AS output"
        f" FROM read_parquet('{rows}/*.parquet') WHERE output IS NOT NULL)"
        f" TO '{out}/train.json' (FORMAT json, ARRAY true)"
    )


def polars_query(rows: Path, out: Path, threads: int) -> None:
    """Select in one streaming query of Polars, and let it write JSON lines, which it can stream."""
    os.environ["POLARS_MAX_THREADS"] = str(threads)
    import polars as pl

    trace = pl.element().struct
    fits = (
        trace.field("thought_correctness_verify")
        & (trace.field("Reasoning_Verbosity").struct.field("level") <= LEVEL_MAX)
        & (trace.field("Cognitive_Difficulty").struct.field("level") <= LEVEL_MAX)
    )
    response = trace.field("full_response")
    shortest = response.filter(fits).sort_by(response.filter(fits).str.len_chars()).first()
    pl.scan_parquet(rows / "*.parquet").select(
        pl.col("question").alias("instruction"),
        pl.lit("").alias("input"),
        pl.col("reasoning").list.eval(shortest).list.first().alias("output"),
    ).filter(pl.col("output").is_not_null()).sink_ndjson(out / "train.jsonl")


CONTENDERS: dict[str, Callable[[Path, Path, int], None]] = {
    OURS: ours,
    "DuckDB, one query": duckdb_query,
    "Polars, one query": polars_query,
}


def run(name: str, folder: Path, threads: int) -> tuple[float, int]:
    """Run one in a process of its own; return its seconds and the most memory that it had, in bytes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    command = [sys.executable, __file__, "--contender", name, "--threads", str(threads)]
    command += ["--folder", str(folder.absolute())]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{name}: exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * KIB


def show(rows: int, seconds: dict[str, list[float]], peaks: dict[str, int]) -> None:
    """Print medians, and of each round how many times as long as the faster engine ours took."""
    print(f"\n{'':<22}{'rows/s':>10}{'seconds (all rounds)':>26}{'peak memory':>14}")
    for name, values in seconds.items():
        rate = rows / statistics.median(values)
        rounds = " ".join(f"{value:.1f}" for value in values)
        print(f"{name:<22}{rate:>10,.0f}{rounds:>26}{peaks[name] / 1e6:>11.0f} MB")
    faster = [min(values) for values in zip(*(v for k, v in seconds.items() if k != OURS), strict=True)]
    ratios = [mine / theirs for mine, theirs in zip(seconds[OURS], faster, strict=True)]
    rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{OURS}: {statistics.median(ratios):.2f} times as long as the faster engine (rounds: {rounds})")


if __name__ == "__main__":
    main()
