"""How a model's makers want its tokens chosen: the settings in its generation_config.json."""

import json
from pathlib import Path

from distill_app.core.models import is_local_path

SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def own_settings(model_name: str, revision: str | None) -> dict[str, float]:
    """Return what the file says of `SETTINGS`, names as in `Sampling`; nothing where there is no file.

    `do_sample: false` is temperature 0.

    Raises:
        OSError: the Hub model is neither in the local cache nor to be had.
        ValueError: the file is no JSON object.
    """
    path = Path(model_name, "generation_config.json")
    if not is_local_path(model_name):
        from transformers.utils import cached_file

        found = cached_file(
            model_name,
            "generation_config.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        path = Path(found or "")
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path}: found {type(config).__name__}, expected an object")
    own = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    return own | ({"temperature": 0.0} if config.get("do_sample") is False else {})
