"""The fields of `training`: those of TRL's SFTConfig that the built-in trainer acts on, why not the others.

A field that would have no effect is an error rather than a silence. Names that older transformers knew get
the advice that fits them: training configs live longer than the library.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from distill_app.core.params import number_hint, unknown_key

# Of transformers 4 and TRL 0.17; `sft_arguments` still takes warmup_ratio, EasyDistill's own examples have it
RENAMED = {
    "adafactor": "optim: adafactor",
    "evaluation_strategy": "eval_strategy",
    "fsdp_min_num_params": "fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
}
HALF = "torch's own mixed precision is the only one left, set by bf16 or fp16"
HUB = "a student is published with `hf upload`, when it is finished"
OTHER_DEVICES = "it was for devices and libraries that transformers no longer has a switch for"
TOKENS = "records come from dataset, their tokens from the student's tokenizer"
MEASURED = "of held-out examples the loss is measured, as many tokens at a time as in training"
GONE = {
    "_n_gpu": OTHER_DEVICES,
    "chars_per_token": TOKENS,
    "dataset_batch_size": TOKENS,
    "fp16_backend": HALF,
    "fp16_opt_level": HALF,
    "half_precision_backend": HALF,
    "include_inputs_for_metrics": MEASURED,
    "include_tokens_per_second": "the trainer prints tokens/s by itself",
    "jit_mode_eval": OTHER_DEVICES,
    "logging_dir": "TensorBoard's folder is the environment's TENSORBOARD_LOGGING_DIR",
    "mp_parameters": OTHER_DEVICES,
    "num_of_sequences": TOKENS,
    "overwrite_output_dir": "a finished checkpoint is replaced by a finished one",
    "past_index": OTHER_DEVICES,
    "per_gpu_eval_batch_size": MEASURED,
    "push_to_hub_model_id": HUB,
    "push_to_hub_organization": HUB,
    "push_to_hub_token": HUB,
    "ray_scope": OTHER_DEVICES,
    "save_safetensors": "weights are always saved as safetensors",
    "torchdynamo": "the model is not compiled",
    "tp_size": OTHER_DEVICES,
    "tpu_metrics_debug": OTHER_DEVICES,
    "tpu_num_cores": OTHER_DEVICES,
    "use_ipex": OTHER_DEVICES,
    "use_legacy_prediction_loop": MEASURED,
    "use_liger": "Liger's kernels are chosen where they are installed",
    "use_mps_device": "a device that is there is used",
}
COMPILED = "the model is not compiled: every row has another length"
PACKED = "rows are packed without padding, and a step is so many examples however they are packed"
BEST = "the held-out loss chooses the best checkpoint, where validation.fraction is above 0"
CHECKPOINTS = "the trainer keeps the newest and the best whole checkpoint, and goes on from the newest"
SHARED_OUT = "a long row is not shared out among devices"
IDLE = {  # of today's SFTConfig; a value that is its default asks for nothing and passes
    "activation_offloading": "gradient_checkpointing is what saves memory here",
    "auto_find_batch_size": "it would change what a step learns; make fewer tokens go through at a time",
    "average_tokens_across_devices": "every token of a step weighs the same, on whatever device it is",
    "batch_eval_metrics": MEASURED,
    "bf16_full_eval": MEASURED,
    "chat_template_path": "the prompt is dataset.template's",
    "dataset_kwargs": TOKENS,
    "dataset_num_proc": TOKENS,
    "dataset_text_field": TOKENS,
    "do_eval": BEST,
    "do_predict": MEASURED,
    "do_train": "a training trains",
    "enable_jit_checkpoint": CHECKPOINTS,
    "eos_token": TOKENS,
    "eval_accumulation_steps": MEASURED,
    "eval_do_concat_batches": MEASURED,
    "eval_packing": PACKED,
    "eval_use_gather_object": MEASURED,
    "fp16_full_eval": MEASURED,
    "greater_is_better": BEST,
    "group_by_length": PACKED,
    "hub_always_push": HUB,
    "hub_model_id": HUB,
    "hub_private_repo": HUB,
    "hub_revision": HUB,
    "hub_strategy": HUB,
    "hub_token": HUB,
    "include_for_metrics": MEASURED,
    "include_num_input_tokens_seen": "the trainer prints tokens/s by itself",
    "label_names": MEASURED,
    "length_column_name": PACKED,
    "liger_kernel_config": "the loss is this trainer's own",
    "load_best_model_at_end": BEST,
    "logging_first_step": "the loss of every step is kept",
    "logging_strategy": "the curve has a point every logging_steps steps",
    "metric_for_best_model": BEST,
    "model_init_kwargs": "the student is loaded as models says",
    "packing": PACKED,
    "packing_strategy": PACKED,
    "pad_to_multiple_of": PACKED,
    "pad_token": TOKENS,
    "padding_free": PACKED,
    "parallelism_config": SHARED_OUT,
    "per_device_eval_batch_size": MEASURED,
    "prediction_loss_only": MEASURED,
    "push_to_hub": HUB,
    "remove_unused_columns": TOKENS,
    "restore_callback_states_from_checkpoint": CHECKPOINTS,
    "resume_from_checkpoint": CHECKPOINTS,
    "router_aux_loss_coef": "the loss is this trainer's own",
    "save_on_each_node": CHECKPOINTS,
    "save_only_model": CHECKPOINTS,
    "save_total_limit": CHECKPOINTS,
    "shuffle_dataset": "examples are shuffled in every epoch, by dataset.seed",
    "skip_memory_metrics": MEASURED,
    "torch_compile": COMPILED,
    "torch_compile_backend": COMPILED,
    "torch_compile_mode": COMPILED,
    "torch_empty_cache_steps": "rows are cut to so many tokens that memory holds them",
    "truncation_mode": "dataset.too_long says what becomes of examples over max_length",
    "trust_remote_code": "a student with code of its own is not run",
    "use_cache": "training keeps no keys and values",
    "use_liger_kernel": "the loss is this trainer's own",
    "train_sampling_strategy": "steps are filled by tokens, in an order of dataset.seed's",
}
LOSS_TYPES = ("nll", "dft", "chunked_nll")  # the last is TRL's older name of the first


def check_fields(fields: Mapping[str, Any], where: str) -> None:
    """Make sure that the built-in trainer acts on every field.

    Args:
        where: the section's place, for the error.

    Raises:
        ValueError: a field is unknown, idle or too old, or its value has no meaning; one line that says what
            to do.
    """
    defaults, types = sft_defaults(), _sft_types()
    for key, value in fields.items():
        if key in GONE:
            raise ValueError(f"{where}.{key}: no longer exists ({GONE[key]}); remove it")
        if key in RENAMED:
            raise ValueError(f"{where}.{key}: its name is {RENAMED[key]} now; write that")
        if key in IDLE and (key not in defaults or value != defaults[key]):
            raise ValueError(f"{where}.{key}: has no effect in the built-in trainer ({IDLE[key]}); remove it")
        if key not in defaults and key != "warmup_ratio" and key not in IDLE:
            raise ValueError(f"{where}.{key}: {unknown_key(key, [*defaults, 'warmup_ratio'])}")
        if key in defaults and not _fits(value, types[key]):
            raise ValueError(
                f"{where}.{key}: found {value!r} ({type(value).__name__}), expected {types[key]}"
                f"{number_hint(value)}"
            )
    loss = fields.get("loss_type", "nll")
    if loss not in LOSS_TYPES:
        raise ValueError(f"{where}.loss_type: found {loss!r}; {_nearest_value(loss, LOSS_TYPES)}")


def is_field(key: str) -> bool:
    """Tell whether a training field is known to today's SFTConfig or to the one that EasyDistill 1.0 has."""
    return (
        key in sft_defaults() or key in GONE or key in RENAMED or key in ("warmup_ratio", "group_by_length")
    )


def sft_defaults() -> dict[str, Any]:
    """Return the fields of TRL's SFTConfig with their defaults."""
    from trl import SFTConfig

    fields = dataclasses.fields(SFTConfig)
    factories = {f.name: f.default_factory for f in fields if f.default_factory is not dataclasses.MISSING}
    return {f.name: factories[f.name]() if f.name in factories else f.default for f in fields}


def _sft_types() -> dict[str, str]:
    from trl import SFTConfig

    return {f.name: getattr(f.type, "__name__", str(f.type)) for f in dataclasses.fields(SFTConfig)}


def _fits(value: Any, kind: str) -> bool:
    """Tell whether a value is of a field's type, where that is of numbers and truth values alone.

    SFTConfig takes anything, and a number that is text would fail at the first step, after the labelling.
    """
    named = set(re.findall(r"\w+", kind))
    if value is None or not named <= {"int", "float", "bool", "None", "Optional", "Union", "typing"}:
        return True
    if isinstance(value, bool):
        return "bool" in named
    return isinstance(value, float) and "float" in named or isinstance(value, int) and "bool" not in named


def _nearest_value(found: Any, known: Iterable[str]) -> str:
    near = get_close_matches(str(found), list(known), n=1, cutoff=0)
    return f"did you mean {near[0]}?"
