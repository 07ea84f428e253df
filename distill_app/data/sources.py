"""Loading a slice of a dataset from the Hub or from local files, and what both readers share."""

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_app.core.errors import EmptyDataError
from distill_app.core.files import Record

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}  # else the text "NA" is read as null
SLICE_HELP = "expected rows of a split, such as train[:1000], train[10%:20%] or train[:5]+train[-5:]"


@dataclass(frozen=True)
class Selection:
    """The records taken from a source, and the count of what was not taken, by reason."""

    records: list[Record]
    rows_in: int
    dropped: dict[str, int]
    traces_in: int | None = None  # System 2 only: a row holds several traces


def load_rows(dataset: str, slice_str: str, revision: str | None = None) -> "Dataset":
    """Return the rows of a slice; slices mean what they mean in `datasets`.

    Args:
        dataset: a Hub id, or a local folder or file of Parquet, JSON, JSON lines or CSV.
        slice_str: the `split` of `datasets.load_dataset`, such as `train[:1000]`.
        revision: commit, tag or branch of a Hub dataset.

    Raises:
        EmptyDataError: the slice has no rows.
        FileNotFoundError: there is no such local path, or the Hub shows no such dataset.
        OSError: the Hub cannot be reached.
        ValueError: the slice is none, or a file cannot be read (it is named).
    """
    if _is_local(dataset):
        return _load_local(dataset, slice_str, revision)
    return _load_from_hub(dataset, slice_str, revision)


def iter_rows(dataset: str, slice_str: str, revision: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of `load_rows`; one that cannot be decoded raises ValueError by its number."""
    rows = iter(load_rows(dataset, slice_str, revision))
    for number in itertools.count():
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as err:  # bytes that are not UTF-8, a codec that is not installed
            raise ValueError(
                f"{dataset}, {slice_str}: row {number} cannot be read ({_told(_root(err))});"
                " mend the row or take another slice"
            ) from err
        yield row


def writable_text(value: Any) -> str:
    """Return a text cell as it is, null as "".

    Raises:
        ValueError: "not text" or "not writable text" (NUL, or a surrogate that UTF-8 cannot hold).
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError("not text")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("not writable text")
    return value


def require_records(selection: Selection, dataset: str, slice_str: str) -> None:
    """Raise EmptyDataError, with what each filter took, if the selection holds no record."""
    if selection.records:
        return
    found = f"{selection.rows_in} rows"
    if selection.traces_in is not None:
        found += f" with {selection.traces_in} traces"
    took = ", ".join(f"{count} {reason}" for reason, count in selection.dropped.items())
    raise EmptyDataError(
        f"{dataset}, {slice_str}: none of {found} is left (dropped: {took or 'nothing'});"
        " loosen the filter that took most, or take another slice"
    )


def _is_local(dataset: str) -> bool:
    if os.path.exists(dataset) or dataset.startswith((".", "/", "~", "data/")):
        return True
    path = Path(dataset)
    if path.suffix in READERS or len(path.parts) > 2:  # a Hub id is `name` or `owner/name`
        return True
    return len(path.parts) == 2 and path.parent.is_dir()


def _load_local(dataset: str, slice_str: str, revision: str | None) -> "Dataset":
    if revision is not None:
        raise ValueError(f"{dataset}: a local path has no revision, found {revision}; set it to null")
    path = Path(dataset).expanduser().absolute()
    files = _data_files(dataset, path)
    # `datasets` knows a local file by path and mtime alone. A file replaced within one tick of the
    # clock, or with its time kept (cp -p, tar), would be served from the cache of the old one.
    options: dict[str, Any] = {"description": f"content {_content_hash(files)}"}
    if path.is_file():
        options["data_files"] = {"train": str(path)}
    if files[0].suffix == ".csv":
        options |= CSV_OPTIONS
    source = READERS[path.suffix] if path.is_file() else str(path)
    with _quiet_datasets() as notes:
        try:
            rows = _load(dataset, source, slice_str, options)
        except (EmptyDataError, _SliceError):
            raise
        except Exception as err:  # each reader has its own: Arrow, pandas, ujson, Unicode, casts
            told = " ".join([*notes, str(err)])
            named = next((file for file in files if str(file) in told), None)
            where = dataset if named is None or path.is_file() else str(named)
            root = _root(err)
            if isinstance(root, OSError) and root.errno is not None:  # the disk, not the content
                raise OSError(f"{where}: {_told(root)}; check the disk and HF_HOME") from err
            if "BatchSize must be greater than 0" in told:  # so it speaks of a file without rows
                raise EmptyDataError(f"{where}: the file has no rows; fill or remove it") from err
            raise ValueError(
                f"{where}: cannot be read ({_told(root)}); mend the file or fetch it again"
            ) from err
    if files[0].suffix == ".csv" and any(name.startswith("__index") for name in rows.column_names):
        raise ValueError(
            f"{dataset}: rows have more cells than the header; quote the cells that hold a comma"
        )
    return rows


def _load_from_hub(dataset: str, slice_str: str, revision: str | None) -> "Dataset":
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    options = {} if revision is None else {"revision": revision}
    with _quiet_datasets() as notes:
        try:
            rows = _load(dataset, dataset, slice_str, options)
        except (EmptyDataError, _SliceError):
            raise
        except HFValidationError as err:
            raise ValueError(
                f"{dataset}: neither a local path nor a Hub id (owner/name); mend the name"
            ) from err
        except RevisionNotFoundError as err:
            raise FileNotFoundError(
                f"{dataset}: the Hub has no revision {revision} of it; mend revision"
            ) from err
        except (DatasetNotFoundError, RepositoryNotFoundError) as err:
            raise FileNotFoundError(
                f"{dataset}: the Hub shows no such dataset, or it is gated or private;"
                " check the id, or ask for access and set HF_TOKEN"
            ) from err
        except Exception as err:  # requests, httpx and their timeouts; readers as for local files
            raise OSError(
                f"{dataset}: cannot be loaded from the Hugging Face Hub ({_one_line(err)}); check"
                " the network (HF_HUB_OFFLINE, proxy), HF_TOKEN and the id, or give a local folder"
            ) from err
    for note in notes:  # above all: that an older cached copy stood in for the Hub's
        logging.getLogger(__name__).warning("%s: %s", dataset, note)
    return rows


def _load(dataset: str, source: str, slice_str: str, options: dict[str, Any]) -> "Dataset":
    import datasets

    try:
        datasets.ReadInstruction.from_spec(slice_str)
    except (ValueError, AssertionError) as err:
        raise _SliceError(
            f"slice {slice_str!r} of {dataset}: {_one_line(err).rstrip('.')}; {SLICE_HELP}"
        ) from err
    empty = f"slice {slice_str!r} of {dataset}: it has no rows; widen the slice"
    try:
        rows = datasets.load_dataset(source, split=slice_str, **options)
    except ValueError as err:
        if "corresponds to no data" in str(err):
            raise EmptyDataError(empty) from err
        if str(err).startswith(("Unknown split", "Percent slice", "Requested slice")):
            raise _SliceError(
                f"slice {slice_str!r} of {dataset}: {_one_line(err).rstrip('.')}; {SLICE_HELP}"
            ) from err
        raise
    if len(rows) == 0:
        raise EmptyDataError(empty)
    return rows


class _SliceError(ValueError):
    """The slice is at fault, not the files."""


def _data_files(dataset: str, path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(
            f"{dataset}: no such file or folder; mend the path, or name a Hub dataset (owner/name)"
        )
    kinds = ", ".join(READERS)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{dataset}: found {path.suffix or 'no suffix'}, expected {kinds}")
        files = [path]
    else:
        files = sorted(f for f in path.rglob("*") if f.suffix in READERS and f.is_file())
    if not files:
        raise FileNotFoundError(f"{dataset}: the folder holds no data file ({kinds}); fetch it first")
    for file in files:
        if file.stat().st_size == 0:
            raise EmptyDataError(f"{file}: the file is empty (0 bytes); fetch it again")
    return files


def _content_hash(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[list[str]]:
    """Keep `datasets` from printing; give the list that its log messages go to."""
    import datasets

    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("datasets")
    before = logger.handlers, logger.propagate, datasets.are_progress_bars_disabled()
    logger.handlers, logger.propagate = [handler], False
    datasets.disable_progress_bars()
    try:
        yield notes
    finally:
        logger.handlers, logger.propagate = before[:2]
        if not before[2]:
            datasets.enable_progress_bars()


def _root(err: BaseException) -> BaseException:
    while err.__cause__ is not None:
        err = err.__cause__
    return err


def _told(err: BaseException) -> str:
    return f"{type(err).__name__}: {_one_line(err)}"


def _one_line(err: BaseException) -> str:
    text = " ".join(str(err).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
