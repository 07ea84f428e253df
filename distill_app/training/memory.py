"""How much memory a training takes, and how many tokens at a time a device holds.

The formula is checked against what is measured: the tensors kept for the gradient, and the peak of a training
of Qwen2.5-0.5B's shape.
"""

from typing import Any

from distill_app.easydistill.job import Job
from distill_app.training.config import is_sharded, max_length, token_budget
from distill_app.training.losses import CHUNK_TOKENS, GROUP_TOKENS

SHARE = 0.85  # of a GPU's memory to plan with; the rest is for CUDA itself and what lies scattered
HALF, FULL = 2, 4  # bytes of a number in bfloat16 and float32
SPLIT_BYTES = 12  # a trained parameter: weight 2, rest 2, moments 2 and 4, gradient 2
FULL_BYTES = 18  # in float32 under autocast: weight, gradient and moments of 4 each, and a copy in 16 bits


def layer_bytes(config: Any) -> int:
    """Return the bytes a token that a layer of a Llama or Qwen keeps for the gradient, in 16 bits.

    Two norms keep their input in float32 and their result twice; the attention its queries, its result twice
    and keys and values, and a float32 number a head; the gated product its two factors, before and after the
    activation, and itself.
    """
    hidden = config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries = config.num_attention_heads * size
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    norms = 2 * hidden * (FULL + 2 * HALF)
    attention = 3 * HALF * queries + 2 * HALF * keys + FULL * config.num_attention_heads
    return norms + attention + 4 * HALF * inner


def token_bytes(config: Any, checkpointed: bool) -> int:
    """Return the bytes that a token takes at most, of all layers.

    With gradient checkpointing a layer keeps its input alone, and one layer at a time is computed again.
    Beside what is kept there is the gradient of what one layer computes.
    """
    layers, one = config.num_hidden_layers, layer_bytes(config)
    ends = config.hidden_size * (FULL + HALF)  # the last norm
    kept = layers * HALF * config.hidden_size + one if checkpointed else layers * one
    return kept + ends + one // 2


def fixed_bytes(model: Any, split: bool, shards: int = 1) -> int:
    """Return the bytes that do not depend on tokens: weights, gradients, moments, chunks of logits.

    Args:
        shards: devices over which weights, gradients and moments are spread.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    output = model.get_output_embeddings().weight
    vocabulary, hidden = output.shape[0], model.config.hidden_size
    # The output layer's gradient: a product, the sum in float32, the sum rounded and scaled
    summed = vocabulary * hidden * (3 * HALF + FULL) if output.requires_grad else 0
    chunks = vocabulary * (GROUP_TOKENS * HALF + CHUNK_TOKENS * (HALF + 2 * FULL))
    return (trained * (SPLIT_BYTES if split else FULL_BYTES) + frozen) // shards + summed + chunks


def tokens_that_fit(model: Any, memory: int, split: bool, checkpointed: bool, shards: int = 1) -> int:
    """Return how many tokens at a time a device of so many bytes holds; 0 where the model does not fit."""
    free = int(SHARE * memory) - fixed_bytes(model, split, shards)
    return max(0, free // token_bytes(model.config, checkpointed))


def tokens_at_a_time(job: Job, model: Any, arguments: Any, split: bool) -> int:
    """Return how many tokens go through the model at a time: what the config says, else what fits.

    On a CPU, where one part is as fast as many and memory is shared, that is what the config's batches have;
    and on a GPU no fewer than one example of the longest.
    """
    if job.batching.tokens_at_a_time:
        return job.batching.tokens_at_a_time
    if arguments.device.type != "cuda":
        return token_budget(job)
    import torch

    memory = torch.cuda.get_device_properties(arguments.device).total_memory
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shards = arguments.world_size if is_sharded(arguments) else 1
    fitting = tokens_that_fit(base, memory, split, bool(arguments.gradient_checkpointing), shards)
    return max(fitting, max_length(job) or 1)
