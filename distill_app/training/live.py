"""A running training's figures where `dvc exp show` and `dvc plots show` find them: files of DVCLive.

transformers' own DVCLive callback writes into the project's dvc.yaml, counts logs for steps and saves an
experiment at the end; the stage that trains is DVC's already. So the files have a dvc.yaml of their own, in a
folder that goes when the training ends: then its metrics and curves are the stage's.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

ROOT = Path("live")  # not under work/, which DVC does not look into


class LiveFigures(TrainerCallback):
    """Writes the newest loss, learning rate and held-out loss, and their curves, to `live/NAME`.

    Args:
        name: the student's, its folder's.
    """

    def __init__(self, name: str) -> None:
        self.folder = ROOT / name
        self.live: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the folder anew; a resumed training brings its log along."""
        if not state.is_world_process_zero:
            return
        from dvclive import Live

        self.live = Live(str(self.folder), dvcyaml=str(self.folder / "dvc.yaml"), save_dvc_exp=False)
        for entry in state.log_history:
            self._add(entry, entry["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the figures of a step."""
        if self.live is not None and logs:
            self._add(logs, state.global_step)
            self.live.make_summary()
            self.live.make_dvcyaml()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the folder."""
        if self.live is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, figures: dict[str, Any], step: int) -> None:
        self.live.step = step
        for name, value in figures.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                self.live.log_metric(name, value)
