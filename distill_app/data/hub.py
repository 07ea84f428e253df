"""Datasets of the Hugging Face Hub: which commit a name means, its files, and what is read again offline.

A branch or tag is resolved once, and all is read from that commit. What was found is kept in one JSON file
beside the Hub's own cache of the dataset, so that a slice that was read once can be read without a network.
"""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_app.core.files import read_json, save_json
from distill_app.data.scratch import shortened, told

HUB = "hf://"
FOUND = "distill.json"  # in the dataset's folder of the Hub's cache
DEFAULT_BRANCH = "main"


@dataclass
class HubDataset:
    """A dataset at one commit.

    Args:
        splits: the files of each split, as hf:// addresses.
        rows: rows of each file, as far as they are known.
    """

    dataset: str
    config: str | None
    commit: str
    splits: dict[str, list[str]]
    rows: dict[str, int] = field(default_factory=dict)

    def count(self, file: str) -> int:
        """Return the rows of a Parquet file, from its footer.

        Raises:
            OSError: the Hub cannot be reached.
        """
        if file not in self.rows:
            import pyarrow.parquet as pq
            from huggingface_hub import HfFileSystem

            try:
                if _is_offline():
                    self.rows[file] = pq.read_metadata(self.download(file)).num_rows
                else:
                    with HfFileSystem().open(file, cache_type="none") as remote:
                        self.rows[file] = pq.read_metadata(remote).num_rows
            except Exception as err:  # httpx and its timeouts
                raise hub_error(self.dataset, err) from err
        return self.rows[file]

    def download(self, file: str) -> Path:
        """Return where the file lies in the cache, after fetching it if it is not there."""
        from huggingface_hub import hf_hub_download

        path = file.removeprefix(f"{HUB}datasets/{self.dataset}@{self.commit}/")
        try:
            return Path(hf_hub_download(self.dataset, path, repo_type="dataset", revision=self.commit))
        except Exception as err:  # httpx and its timeouts, a full disk
            raise hub_error(self.dataset, err) from err

    def remember(self) -> None:
        """Keep what was found for a run without a network; without a cache to write to, do without."""
        found = _found(self.dataset)
        splits = found.setdefault("commits", {}).setdefault(self.commit, {}).setdefault("splits", {})
        splits[self.config or ""] = self.splits
        found["commits"][self.commit].setdefault("rows", {}).update(self.rows)
        with contextlib.suppress(OSError):
            save_json(_found_path(self.dataset), found)


def open_hub(dataset: str, revision: str | None, config: str | None) -> HubDataset:
    """Find a dataset on the Hub, or offline in the cache.

    Args:
        revision: commit, tag or branch; None is the default branch.
        config: one of those that it has.

    Raises:
        FileNotFoundError: the Hub shows no such dataset or revision.
        OSError: the Hub cannot be reached, or offline: it was never read here.
        ValueError: the dataset's name is none, or it has no such config.
    """
    if _is_offline():
        return _remembered(dataset, revision, config)
    from datasets.exceptions import DatasetNotFoundError

    commit = _resolved(dataset, revision)
    try:
        splits = splits_of(dataset, config, commit)
    except DatasetNotFoundError as err:
        raise _hidden(dataset) from err
    except ValueError as err:  # of the configs' names
        if "Config" not in str(err):
            raise hub_error(dataset, err) from err
        raise config_error(dataset, err) from err
    except Exception as err:  # httpx and its timeouts, a README that is none
        raise hub_error(dataset, err) from err
    rows = _found(dataset).get("commits", {}).get(commit, {}).get("rows", {})
    return HubDataset(dataset, config, commit, splits, dict(rows))


def _resolved(dataset: str, revision: str | None) -> str:
    """Return the commit that a revision means now; if it meant another one when it was last read, say so."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except HFValidationError as err:
        raise ValueError(f"{dataset}: neither a local path nor a Hub id (owner/name); fix the name") from err
    except RevisionNotFoundError as err:
        raise FileNotFoundError(f"{dataset}: the Hub has no revision {revision} of it; fix revision") from err
    except RepositoryNotFoundError as err:
        raise _hidden(dataset) from err
    except Exception as err:  # httpx and its timeouts
        raise hub_error(dataset, err) from err
    if not commit:
        raise OSError(f"{dataset}: the Hub names no commit of {revision or DEFAULT_BRANCH}; try again")
    found = _found(dataset)
    branch = revision or DEFAULT_BRANCH
    before = found.setdefault("revisions", {}).get(branch, commit)
    if before != commit:
        print(
            f"{dataset}: {branch} is now {commit[:12]}, the last run here read {before[:12]};"
            " `distill pin` writes a commit into params.yaml",
            file=sys.stderr,
        )
    found["revisions"][branch] = found["revisions"][commit] = commit
    with contextlib.suppress(OSError):
        save_json(_found_path(dataset), found)
    return commit


def _hidden(dataset: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{dataset}: the Hub shows no such dataset, or it is gated or private;"
        " check the id, or ask for access and set HF_TOKEN"
    )


def _remembered(dataset: str, revision: str | None, config: str | None) -> HubDataset:
    found = _found(dataset)
    commit = found.get("revisions", {}).get(revision or DEFAULT_BRANCH)
    at = found.get("commits", {}).get(commit, {})
    splits = at.get("splits", {}).get(config or "")
    if splits is None:
        raise OSError(
            f"{dataset}: offline (HF_HUB_OFFLINE), and revision {revision or DEFAULT_BRANCH} of it was never"
            f" read with the cache in {_found_path(dataset).parent.parent}; read it once with a"
            " network (HF_TOKEN for a gated one), or give a local folder"
        )
    return HubDataset(dataset, config, commit, splits, dict(at.get("rows", {})))


def _found_path(dataset: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}" / FOUND


def _found(dataset: str) -> dict[str, Any]:
    """Return what is kept about a dataset; nothing where that is damaged, for it can be found again."""
    try:
        found = read_json(_found_path(dataset))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def splits_of(dataset: str, config: str | None = None, revision: str | None = None) -> dict[str, list[str]]:
    """Return the files of each split as `datasets` finds them: absolute paths, or hf:// addresses."""
    import datasets

    with _quiet_datasets():
        found = datasets.load_dataset_builder(dataset, config, revision=revision).config.data_files
    return {str(split): list(files) for split, files in (found or {}).items()}


@contextlib.contextmanager
def _quiet_datasets() -> Any:
    """Keep `datasets` and the Hub's client from printing."""
    import logging

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def config_error(dataset: str, err: Exception) -> ValueError:
    """Return the error of a config's name that is missing or none; `datasets` lists those that there are."""
    return ValueError(f"{dataset}: {shortened(str(err))}; set config to one that the dataset has")


def hub_error(dataset: str, err: Exception) -> OSError:
    """Return the error of a Hub that cannot be read."""
    return OSError(
        f"{dataset}: cannot be loaded from the Hugging Face Hub ({told(err)}); check the network"
        " (HF_HUB_OFFLINE, proxy), HF_TOKEN and the id, or give a local folder"
    )
