"""Run by EasyDistill's own Python, for `real.py`: prints what is installed there as one line of JSON.

folder         of the package; absent where there is none
version        of the package
gpus           that its torch sees; this and what follows is absent where it has no trainer
training_keys  fields of its TRL's SFTConfig
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Return what the line says."""
    spec = importlib.util.find_spec("easydistill")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent
    found: dict[str, Any] = {"folder": str(folder), "version": _version()}
    if (folder / "kd" / "train.py").is_file():
        import torch
        from trl import SFTConfig

        found["gpus"] = torch.cuda.device_count()
        found["deepspeed"] = importlib.util.find_spec("deepspeed") is not None
        found["training_keys"] = [field.name for field in dataclasses.fields(SFTConfig)]
    return found


def _version() -> str:
    try:
        return importlib.metadata.version("easydistill")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    print(json.dumps(describe()))
