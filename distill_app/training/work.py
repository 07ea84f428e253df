"""Where a training keeps its checkpoints while it runs, so that a killed one goes on."""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from distill_app.core.files import save_text

ROOT = Path("work/training")
WHOLE = "whole"  # the file that says that a checkpoint was written to its end


@contextlib.contextmanager
def work_folder(output_dir: str, origin: dict[str, Any], is_first: bool = True) -> Iterator[Path]:
    """Give the folder of checkpoints that belong to this output and this origin; it goes when all ends well.

    An interrupted training leaves it. Folders of the same output with another origin (other params, data,
    student or code) are removed: nothing will go on from them.

    Args:
        is_first: of several processes, the one that owns the folder.

    Raises:
        ValueError: another process is training for the same output.
    """
    place = ROOT / str(Path(output_dir)).strip("/").replace("/", "-")
    key = hashlib.sha256(json.dumps([output_dir, origin], sort_keys=True).encode()).hexdigest()[:16]
    folder = place / key
    folder.mkdir(parents=True, exist_ok=True)
    if not is_first:
        yield folder
        return
    with _locked(place / "lock", output_dir):
        for other in place.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other, ignore_errors=True)
        yield folder
        shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(path: Path, output_dir: str) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ValueError(
                f"{output_dir}: another process is training for it; wait for that one, or stop it"
            ) from err
        yield


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None."""
    whole = whole_checkpoints(folder)
    return whole[-1] if whole else None


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that were written to their end, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class Checkpoints(TrainerCallback):
    """Marks each checkpoint that is whole, then removes older ones but the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Spare the checkpoint after the last step, which nothing would go on from."""
        if state.global_step == state.max_steps:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the Trainer has written this process's last file of a checkpoint."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # each process writes its random state
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        newest = folder / f"checkpoint-{state.global_step}"
        save_text(newest / WHOLE, "")
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
        for path in folder.glob("checkpoint-*"):
            if path.name not in (newest.name, best):
                shutil.rmtree(path, ignore_errors=True)
