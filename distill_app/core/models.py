"""Loading models and saving checkpoints that both transformers 5 and 4.51 load."""

import json
import os
from pathlib import Path
from typing import Any, Literal

from distill_app.core.files import require_free_space, save_json

Model = Any  # transformers.PreTrainedModel; not imported here, so that this module stays light
Tokenizer = Any  # transformers.PreTrainedTokenizerBase
Quantization = Literal["8bit", "4bit", "none"]


def load_teacher(
    model_name: str, quantization: Quantization = "8bit", revision: str | None = None
) -> tuple[Model, Tokenizer]:
    """Load a teacher from the Hub or a local folder; `pad_token` becomes `eos_token` if unset.

    Args:
        quantization: bitsandbytes' 8 or 4 bit, or "none" for `compute_dtype`. 8 bit runs on a CPU too,
            slowly.

    Raises:
        FileNotFoundError: a local path that is no checkpoint.
        OSError, ValueError: from transformers' `from_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    check_local(model_name)
    dtype = getattr(torch, compute_dtype()) if quantization == "none" else torch.bfloat16
    options = {"revision": revision, "dtype": dtype, **_quantization_options(quantization)}
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    tokenizer = load_tokenizer(model_name, revision)
    model = AutoModelForCausalLM.from_pretrained(model_name, **options)
    return model.eval(), tokenizer


def load_student(model_path: str) -> tuple[Model, Tokenizer]:
    """Load a student from its checkpoint folder (a Hub id works too), on the GPU if there is one.

    Its weights are in `compute_dtype`.

    Raises:
        FileNotFoundError: a local path that is no checkpoint.
        OSError, ValueError: from transformers' `from_pretrained`.
    """
    return load_teacher(model_path, quantization="none")


def compute_dtype() -> Literal["bfloat16", "float32"]:
    """Return the type in which this machine computes: bfloat16, float32 on a CPU that has no such products.

    Torch does them there one by one: measured on a Zen 3, 10 GFLOP/s in place of float32's 80. Weights lose
    nothing by it, answers round otherwise.
    """
    import torch

    return "bfloat16" if torch.cuda.is_available() or cpu_multiplies_bf16() else "float32"


def cpu_multiplies_bf16() -> bool:
    """Tell whether the CPU has instructions for bfloat16 matrix products."""
    import torch

    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx_tile"))


def load_trainable(
    model_name: str,
    in_bfloat16: bool = False,
    quantization: Quantization = "none",
    revision: str | None = None,
) -> tuple[Model, Tokenizer]:
    """Load a student to train, on the CPU or, if quantized, on this process's GPU.

    Args:
        in_bfloat16: instead of float32; for an optimizer that keeps the rest, or under adapters.
        quantization: of weights that stay as they are, under adapters.

    Raises:
        FileNotFoundError: a local path that is no checkpoint.
        OSError, ValueError: from transformers' `from_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    check_local(model_name)
    tokenizer = load_tokenizer(model_name, revision)
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    options: dict[str, Any] = {"revision": revision, "dtype": dtype}
    options |= _quantization_options(quantization)
    if quantization != "none" and torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    return AutoModelForCausalLM.from_pretrained(model_name, **options), tokenizer


def _quantization_options(quantization: Quantization) -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return {}
    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if quantization == "4bit":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        return {"quantization_config": config}
    raise ValueError(f'quantization: found "{quantization}", expected "8bit", "4bit" or "none"')


def save_checkpoint(model: Model, tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Write bfloat16 safetensors, config and tokenizer so that transformers 4.51 loads them as well.

    transformers 5 names a tokenizer class that 4.51 lacks, moves `rope_theta` and the dtype where 4.51
    does not look (it would take 10000 and garble the model in silence) and keeps the chat template in a
    file of its own. The old keys are written beside the new ones.
    """
    import torch

    quiet_transformers()
    folder = Path(folder)
    model = model.to(torch.bfloat16)
    require_free_space(folder, 2 * sum(p.numel() * p.element_size() for p in model.parameters()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_old_config_keys(folder / "config.json")
    _add_old_tokenizer_keys(folder, tokenizer)


def _add_old_config_keys(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    config.setdefault("torch_dtype", config.get("dtype", "bfloat16"))
    save_json(path, config)


def _add_old_tokenizer_keys(folder: Path, tokenizer: Tokenizer) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Else 4.51 adds token_type_ids, which its generate refuses
        config["model_input_names"] = tokenizer.model_input_names
    for key in ("is_local", "local_files_only", "backend", "name_or_path"):  # of this run, not the model
        config.pop(key, None)
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    save_json(path, config)


def set_chat_template(folder: str | os.PathLike[str], template: str) -> None:
    """Give a checkpoint its chat template, in the one place that old and new transformers read."""
    path = Path(folder) / "tokenizer_config.json"
    save_json(path, {**json.loads(path.read_text(encoding="utf-8")), "chat_template": template})
    (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Make sure that a folder holds whole weights and a tokenizer, by reading their headers and loading it.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is there but cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    check_local(str(folder))
    weights = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        lost = sorted(shards - {path.name for path in weights})
        if lost:
            raise FileNotFoundError(f"{folder}: {lost[0]} is missing, {index.name} names it")
    for needed, found in (
        ("*.safetensors", weights),
        ("tokenizer", list(folder.glob("tokenizer*"))),
    ):
        if not found:
            raise FileNotFoundError(f"{folder}: no {needed} file; the checkpoint is not whole")
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as err:
            raise ValueError(f"{path}: unreadable weights ({err}); train or pull it again") from err
        if not names:
            raise ValueError(f"{path}: no tensor in the file; train or pull it again")
    load_tokenizer(str(folder), None)


def is_local_path(model_name: str) -> bool:
    """Tell a local path from a Hub id: it exists, has a path's shape, or its parent folder exists."""
    path = Path(model_name)
    has_parent = path.parent != Path(".") and path.parent.is_dir()
    return path.exists() or path.is_absolute() or model_name.startswith(".") or has_parent


def check_local(model_name: str) -> None:
    """Make sure that a local path is a checkpoint folder; a Hub id passes.

    Raises:
        FileNotFoundError: it is not.
    """
    if not is_local_path(model_name):
        return
    if not Path(model_name).is_dir():
        raise FileNotFoundError(f"{model_name}: no such model folder; train it, pull it or mend the path")
    if not (Path(model_name) / "config.json").is_file():
        raise FileNotFoundError(
            f"{model_name}: no config.json in it, so it is no checkpoint; train it, pull it (dvc pull)"
            " or mend the path"
        )


def hub_commit(model_name: str, revision: str | None = None) -> str | None:
    """Return the commit that a Hub model's branch, tag or commit is; None for a local path.

    Offline it is what the local cache knows.

    Raises:
        OSError: the model or revision is neither in the cache nor to be had from the Hub.
    """
    from huggingface_hub import hf_hub_download

    if is_local_path(model_name):
        return None
    try:
        config = hf_hub_download(model_name, "config.json", revision=revision)
    except (OSError, ValueError) as err:
        said = " ".join(str(err).split())
        raise OSError(
            f"{model_name}: {revision or 'main'} is not in the local cache and not to be had from the Hub"
            f" ({said}); fix the name or the revision, log in, or download it first"
        ) from err
    return Path(config).parent.name  # .../snapshots/COMMIT/config.json


def load_tokenizer(model_name: str, revision: str | None = None) -> Tokenizer:
    """Load a model's tokenizer from the Hub or a local folder; `pad_token` becomes `eos_token` if unset.

    Raises:
        FileNotFoundError: a local path that is no checkpoint.
        OSError, ValueError: from transformers' `from_pretrained`.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    check_local(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and bitsandbytes' hints, which drown a stage's own lines."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """As `quiet_transformers`, before anything imports bitsandbytes or builds a Trainer's arguments.

    The first hints at a kernel while it is imported, by PEFT among others; the second warns of names that
    transformers and TRL themselves still use.
    """
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet_transformers()
