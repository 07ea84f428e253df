"""The shape of a model, read from its config alone: parameters and what a token costs."""

from dataclasses import dataclass
from typing import Any

from distill_app.base.pruning import drop_layers
from distill_app.core.models import Quantization
from distill_app.training.memory import HALF

WEIGHT_BYTES = {"none": 2.0, "8bit": 1.0, "4bit": 0.5}  # of a weight of the body


@dataclass(frozen=True)
class Shape:
    """A model without weights.

    Attributes:
        skeleton: the model on torch's meta device, which takes no memory.
        embedded: parameters of embeddings and output layer, once where they share them.
        head: parameters of the output layer.
    """

    skeleton: Any
    parameters: int
    embedded: int
    head: int

    @property
    def config(self) -> Any:
        return self.skeleton.config

    @property
    def body(self) -> int:
        """Return the parameters that every token goes through: all but embeddings and output layer."""
        return self.parameters - self.embedded

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    def token_flops(self, length: float) -> float:
        """Return the operations of a token of the body, forward, amid a causal text of that length.

        Source of the count: PaLM, arXiv:2204.02311, appendix B.
        """
        return 2.0 * self.body + 2.0 * self.layers * self.config.hidden_size * length

    def kv_bytes(self, dtype_bytes: int = HALF) -> int:
        """Return the bytes of a token's keys and values."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * self.layers * int(heads) * int(size) * dtype_bytes

    def weight_bytes(self, quantization: Quantization = "none") -> int:
        """Return the bytes of the loaded weights."""
        return int(self.body * WEIGHT_BYTES[quantization] + self.embedded * HALF)


def shape_of(config: Any, layers: int | None = None) -> Shape:
    """Return the shape that a transformers config describes, cut to so many layers if that is given."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if layers is not None:
        drop_layers(model, range(layers, config.num_hidden_layers))
    inner, outer = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedded = outer.numel() if inner is outer else inner.numel() + outer.numel()
    return Shape(model, sum(p.numel() for p in model.parameters()), embedded, outer.numel())
