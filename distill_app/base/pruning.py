"""A smaller model out of a larger one: drop the layers that change their input least.

Source: block influence, ShortGPT, arXiv:2403.03853, section 3.
"""

from collections.abc import Sequence

from distill_app.core.models import Model, Tokenizer


def block_influence(model: Model, tokenizer: Tokenizer, texts: Sequence[str]) -> list[float]:
    """Return for each layer one minus the mean cosine between its input and output, over all tokens."""
    import torch
    from torch.nn.functional import cosine_similarity

    layers = model.config.num_hidden_layers
    total, tokens = torch.zeros(layers, dtype=torch.float64), 0
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            hidden = model.model(ids.to(model.device), output_hidden_states=True).hidden_states
            tokens += ids.shape[1]
            for layer in range(layers):
                similar = cosine_similarity(hidden[layer].double(), hidden[layer + 1].double(), dim=-1)
                total[layer] += (1 - similar).sum().cpu()
    return [float(x) for x in total / tokens]


def least_important(influence: Sequence[float], count: int) -> list[int]:
    """Return the `count` layers of least influence, in order; the first and last always stay."""
    inner = range(1, len(influence) - 1)
    if count > len(inner):
        raise ValueError(
            f"cannot drop {count} of {len(influence)} layers, the first and last stay; keep more layers"
        )
    return sorted(sorted(inner, key=lambda layer: influence[layer])[:count])


def drop_layers(model: Model, layers: Sequence[int]) -> None:
    """Take the given decoder layers out of the model, in place."""
    from torch.nn import ModuleList

    kept = [block for i, block in enumerate(model.model.layers) if i not in set(layers)]
    for place, block in enumerate(kept):
        block.self_attn.layer_idx = place  # the key/value cache is addressed by it
    model.model.layers = ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        types = model.config.layer_types
        model.config.layer_types = [t for i, t in enumerate(types) if i not in set(layers)]
