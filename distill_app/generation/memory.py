"""How many answers a device can hold, and what it says when it holds no more."""

import gc
from pathlib import Path

from distill_app.core.models import Model

SHARE = 0.5  # of the free memory that keys and values may take; the rest is for the pass itself


def tokens_that_fit(model: Model) -> int:
    """Return how many tokens' keys and values find room on the model's device."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize  # keys and values
    return int(SHARE * _free_bytes(model) / token)


def _free_bytes(model: Model) -> int:
    import psutil
    import torch

    if model.device.type == "cuda":
        cuda = torch.cuda  # what torch keeps for later use is free too
        return sum(
            cuda.mem_get_info(i)[0] + cuda.memory_reserved(i) - cuda.memory_allocated(i)
            for i in range(cuda.device_count())
        )
    return min(psutil.virtual_memory().available, _container_bytes())


def _container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what a container's limit leaves (Linux, cgroup 2), a very large number where there is none."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        return 2**62 if limit == "max" else int(limit) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62


def is_out_of_memory(err: Exception) -> bool:
    """Tell a full device from other failures; a CPU's allocator says so in words only."""
    import torch

    words = str(err).lower()
    said = any(say in words for say in ("can't allocate memory", "not enough memory", "alloc_failed"))
    return isinstance(err, (MemoryError, torch.OutOfMemoryError)) or (isinstance(err, RuntimeError) and said)


def release_memory() -> None:
    """Give back what tensors no longer in use hold."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
