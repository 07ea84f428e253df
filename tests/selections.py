"""Runs a selection over rows written as a file, and gives what came of it; the split in plain Python."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_app.core.files import Record, iter_records
from distill_app.core.texts import normalise
from distill_app.data.instructions import InstructionRules, prepare_instructions
from distill_app.data.reasoning import TraceRules, prepare_traces
from distill_app.data.selection import Outputs
from distill_app.data.sources import Dataset


@dataclass
class Selected:
    train: list[Record]
    heldout: list[Record]
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, int]:
        return self.metrics["dropped"]

    @property
    def outputs(self) -> list[str]:
        return [record["output"] for record in self.train]


def write_rows(path: Path, rows: list) -> Path:
    """Write rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read_if_any(path: Path) -> list[Record]:
    return [] if path.read_bytes() == b"[]\n" else list(iter_records(path))


def prepared(prepare: Any, dataset: object, slice_str: str, rules: Any, **options: Any) -> Selected:
    folder = Path(options.pop("folder"))
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = folder / "train.json", folder / "heldout.json"
    options = {"heldout_fraction": 0.0, "seed": 0, **options}
    outputs = Outputs(str(train), str(heldout), str(folder / "rejects.json"), str(folder / "tokens.csv"))
    source = Dataset(str(dataset), slice_str, **options.pop("source", {}))
    metrics = prepare(source, rules, outputs=outputs, **options)
    return Selected(read_if_any(train), read_if_any(heldout), metrics)


def split_heldout(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (train, heldout) as `Selection.split` puts them, both in the order of `records`."""
    keys = [normalise(f"{record['instruction']} {record['input']}") for record in records]
    places = {key: place_of(key, seed) for key in keys}
    held = {key for key, place in places.items() if place < fraction}
    if fraction > 0 and len(places) > 1:
        order = sorted(places, key=lambda key: (places[key], key))
        held = (held or {order[0]}) - ({order[-1]} if len(held) == len(order) else set())
    train = [record for key, record in zip(keys, records, strict=True) if key not in held]
    heldout = [record for key, record in zip(keys, records, strict=True) if key in held]
    return train, heldout


def place_of(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits are exact in a float


def select_traces(folder: Path, rows: list, kind: str = ".jsonl", **rules: Any) -> Selected:
    path = write_rows(folder / f"rows{kind}", rows)
    return prepared(prepare_traces, path, "train", TraceRules(**rules), folder=folder / "out")


def select_instructions(folder: Path, rows: list, kind: str = ".jsonl", **rules: Any) -> Selected:
    path = write_rows(folder / f"rows{kind}", rows)
    return prepared(prepare_instructions, path, "train", InstructionRules(**rules), folder=folder / "out")
