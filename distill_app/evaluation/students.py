"""Where a student's last checkpoint lies."""

from pathlib import Path


def student_folder(models_dir: str | Path, name: str) -> Path:
    """Return where a student refined on its own answers lies; where there is none, the trained one."""
    refined = Path(models_dir) / "refined" / name
    return refined if (refined / "config.json").is_file() else Path(models_dir) / name
