"""What determines an answer beside prompt and sampling: the weights, and what computes with them."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill_app.core.models import Model, Tokenizer, check_local, compute_dtype, is_local_path
from distill_app.core.stage import one_line
from distill_app.generation.batch import REVISION, stop_tokens
from distill_app.generation.params import EngineParams

# Of a checkpoint, what an answer can depend on; a README or a training log is no part of it.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
# Of a repository on the Hub, those that transformers loads: the first of the two that is there
HUB_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)
SHA256_HEX = re.compile(r"[0-9a-f]{64}")


def engine_identity(params: EngineParams) -> tuple[dict[str, Any], str | None]:
    """Return the identity of an engine that loads weights itself, and the revision to load them at.

    The device is told in process alone, where it is a GPU; which kind of GPU is not, for its rounding moves
    an answer no more than its company in the batch does. vLLM for a CPU is another package.
    """
    weights, revision = resolve_weights(params.teacher, params.revision)
    identity = {
        "weights": weights,
        "quantization": params.quantization,
        "dtype": _dtype(params),
        "engine": params.engine,
        "version": _installed_version(params.engine),
    }
    return identity | (_device() if params.engine == "transformers" else {}), revision


def _device() -> dict[str, str]:
    import torch

    return {"device": "cuda"} if torch.cuda.is_available() else {}


def _dtype(params: EngineParams) -> str:
    is_plain = params.engine == "transformers" and params.quantization == "none"
    return compute_dtype() if is_plain else "bfloat16"


def _installed_version(engine: str) -> str:
    """Return the versions of what computes the answers; in process that is our engine on transformers."""
    if engine == "transformers":
        torch = version("torch").partition("+")[0]  # the same for a CPU and a CUDA build
        return f"transformers {version('transformers')}, torch {torch}, engine {REVISION}"
    from distill_app.generation.vllm_process import vllm_package

    if found := vllm_package():
        return found
    raise ImportError("label.engine: vllm is not installed in its environment; make vllm builds it anew")


def resolve_weights(model_name: str, revision: str | None) -> tuple[str, str | None]:
    """Return what tells weights apart, wherever they lie, and the revision that stays true to it.

    It is a SHA-256 of the files that matter, of a Hub model as of a local copy of it; so another commit
    that changes a README is the same model.

    Raises:
        FileNotFoundError: a local path that is no checkpoint.
        OSError: the Hub model is neither in the local cache nor to be had.
    """
    if is_local_path(model_name):
        check_local(model_name)
        files = {file.name: file for p in (*WEIGHTS, *BESIDE_WEIGHTS) for file in Path(model_name).glob(p)}
        return _digest({name: _sha256(file) for name, file in files.items()}), revision
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(model_name, "config.json", revision=revision)
        commit = Path(config).parent.name  # .../snapshots/COMMIT/config.json
        return _digest(_hub_digests(model_name, commit, Path(config).parent)), commit
    except (OSError, ValueError) as err:
        raise OSError(
            f"{model_name}: not in the local cache and not to be had from the Hub ({one_line(err)});"
            " fix the name or label.revision, log in, or download it first"
        ) from err


def _hub_digests(model_name: str, commit: str, snapshot: Path) -> dict[str, bytes]:
    """Return the SHA-256 of each file that matters; weights that are not in the cache are not downloaded."""
    from huggingface_hub import hf_hub_download

    listed = _listed(model_name, commit)
    cached = {file.name for file in snapshot.iterdir()}
    names = set(listed) or cached
    chosen = next((some for some in (_matching(names, p) for p in HUB_WEIGHTS) if some), set())
    digests = {}
    for name in chosen | _matching(names, BESIDE_WEIGHTS):
        if name not in cached and name in chosen and listed[name]:
            digests[name] = bytes.fromhex(listed[name])
            continue
        path = snapshot / name if name in cached else hf_hub_download(model_name, name, revision=commit)
        digests[name] = _sha256(Path(path))
    return digests


def _listed(model_name: str, commit: str) -> dict[str, str]:
    """Return the repository's files and the SHA-256 of the large ones; nothing without the Hub."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(model_name, revision=commit, files_metadata=True)
    except Exception:  # whatever keeps the Hub away, the files in the cache are enough
        return {}
    return {one.rfilename: one.lfs.sha256 if one.lfs else "" for one in info.siblings or ()}


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    return {name for name in names for pattern in patterns if "/" not in name and fnmatchcase(name, pattern)}


def _sha256(file: Path) -> bytes:
    """Return the digest of a file; the Hub's cache names large ones by it."""
    blob = file.resolve().name if file.is_symlink() else ""
    if SHA256_HEX.fullmatch(blob):
        return bytes.fromhex(blob)
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\n".encode() + files[name])
    return f"sha256:{digest.hexdigest()}"


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
        **({"device": "cuda"} if model.device.type == "cuda" else {}),
    }


def _tensors(model: Model) -> Sequence[tuple[str, Any]]:
    """Return the named tensors of a model; a quantized one keeps its scales among them."""
    import torch

    return [(name, t) for name, t in sorted(model.state_dict().items()) if isinstance(t, torch.Tensor)]
