"""A smaller model out of a larger one: drop the layers that change their input least.

Source: block influence, ShortGPT, arXiv:2403.03853, section 3.
"""

import copy
from collections.abc import Sequence
from typing import Any

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
            hidden = model.get_decoder()(ids.to(model.device), output_hidden_states=True).hidden_states
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
    """Take the given decoder layers out of the model, in place; the config's lists of layers lose theirs.

    Raises:
        ValueError: the config says otherwise than by such lists what is in a layer, so that a model loaded
            with it would have other layers than those that are kept.
    """
    from torch.nn import ModuleList

    decoder, config = model.get_decoder(), model.config
    kept = [place for place in range(config.num_hidden_layers) if place not in set(layers)]
    blocks = [decoder.layers[place] for place in kept]
    for place, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the key/value cache is addressed by it
                module.layer_idx = place
    decoder.layers = ModuleList(blocks)
    for name, value in list(vars(config).items()):  # such as layer_types, or SmolLM3's no_rope_layers
        is_of_layers = isinstance(value, list) and len(value) == config.num_hidden_layers
        if is_of_layers and not name.endswith("_token_id"):
            setattr(config, name, [value[place] for place in kept])
    config.num_hidden_layers = len(blocks)
    _check_layers(model)


def _check_layers(model: Model) -> None:
    """Make sure that a model made from the config has the layers that this one has."""
    import torch

    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config)).get_decoder().layers
    for place, (found, expected) in enumerate(zip(model.get_decoder().layers, made, strict=True)):
        ours, theirs = _settings(found), _settings(expected)
        if ours != theirs:
            fault = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"{type(model).__name__}: found {fault} {ours.get(fault)} in layer {place} after cutting,"
                f" expected {theirs.get(fault)} as its config says; keep all layers, or take another teacher"
            )


def _settings(block: Any) -> dict[str, Any]:
    """Return shapes of the weights in a layer, and what its modules know of themselves."""
    found: dict[str, Any] = {name: tuple(weight.shape) for name, weight in block.named_parameters()}
    for prefix, module in block.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name != "training":
                found[f"{prefix}.{name}".lstrip(".")] = value
    return found
