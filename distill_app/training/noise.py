"""NEFTune: uniform noise on the embeddings in training (Jain et al., arXiv:2310.05914, section 2).

The paper's noise is within alpha / sqrt(length * width). transformers' own takes the length of the whole row,
which here holds many examples; this one takes each example's.
"""

from typing import Any

import torch
from torch import Tensor


def add_noise(model: Any, alpha: float) -> None:
    """Have a model add noise to its embeddings while it trains on packed rows.

    Args:
        model: whose decoder is called with `position_ids` `(1, tokens)` that begin at 0 in each example.
    """
    lengths: dict[str, Tensor] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths["row"] = _length_of_each(kwargs["position_ids"])

    def noisy(module: Any, args: Any, embeddings: Tensor) -> Tensor:
        if not module.training:
            return embeddings
        most = alpha / (lengths["row"] * embeddings.shape[-1]).sqrt()  # (1, tokens)
        return embeddings + torch.empty_like(embeddings).uniform_(-1, 1) * most[..., None].to(
            embeddings.dtype
        )

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(noisy)


def _length_of_each(positions: Tensor) -> Tensor:
    """Return for each token `(1, tokens)` how many its example has."""
    example = (positions == 0).cumsum(1) - 1
    counts = torch.zeros_like(positions).scatter_add_(1, example, torch.ones_like(positions))
    return counts.gather(1, example).float()
