"""The engine that runs vLLM offline; it needs an environment of its own, see docs/labelling.md."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from distill_app.core.errors import EngineGone
from distill_app.core.models import Quantization, Tokenizer, load_teacher
from distill_app.core.prompts import Mode, teacher_prompt
from distill_app.generation.answers import Answer, FinishReason, Sampling, cut_at, seed_of

CPU_CACHE_BYTES = 4 << 30  # vLLM's own choice, 92% of the memory, leaves a workstation nothing
FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class OfflineVllm:
    """A model in vLLM, loaded when the first answer is asked for.

    Greedy answers equal those of the engine in this process but for rounding; sampled ones draw from
    generators of vLLM's own, one a prompt, seeded by the prompt and the seed.

    Args:
        quantization: "none" is bfloat16. "4bit" is bitsandbytes' NF4. "8bit" is bitsandbytes' LLM.int8, which
            vLLM reads but does not make: the model is quantized into a temporary folder first.
        max_num_seqs: answers generated at a time.
        tensor_parallel_size: GPUs over which the model is spread.
        engine_options: fields of vLLM's EngineArgs that replace or add to ours.
        system_prompt: what the model is told before each prompt; None leaves it to its chat template.

    Raises:
        ImportError: vLLM is not installed, or its bitsandbytes plugin where that is needed.
    """

    def __init__(
        self,
        teacher: str,
        identity: dict[str, Any],
        tokenizer: Tokenizer,
        model_name: str,
        revision: str | None,
        quantization: Quantization,
        max_num_seqs: int,
        tensor_parallel_size: int = 1,
        engine_options: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
    ) -> None:
        _require("vllm", "vLLM")
        if quantization != "none":
            _require("vllm_bnb_plugin", "vLLM's bitsandbytes plugin")
        self.teacher, self.identity = teacher, identity
        self._tokenizer, self._model_name, self._revision = tokenizer, model_name, revision
        self._quantization, self._max_num_seqs = quantization, max_num_seqs
        self._tensor_parallel_size = tensor_parallel_size
        self._engine_options = dict(engine_options or {})
        self._system_prompt = system_prompt
        self._engine: Any = None

    def render(self, instruction: str, input_text: str, mode: Mode) -> str:
        return teacher_prompt(self._tokenizer, instruction, input_text, mode, self._system_prompt)

    def generate(self, prompts: Iterable[str], sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's place and answer as it ends; twice `max_num_seqs` prompts are read ahead.

        A prompt that leaves no room for a single token is answered with "refused".

        Raises:
            EngineGone: vLLM cannot load the model, or failed on the way.
        """
        if self._engine is None:
            self._engine = self._load()
        numbered = enumerate(prompts)
        waiting: dict[str, int] = {}  # the places of requests that vLLM has
        try:
            while True:
                # Always more than fit at a time: a slot that falls free is filled in the next step
                while len(waiting) < 2 * self._max_num_seqs and (following := next(numbered, None)):
                    place, prompt = following
                    ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
                    if 0 < len(ids) < self._engine.model_config.max_model_len:
                        waiting[str(place)] = place
                        self._engine.add_request(str(place), *_request(prompt, ids, sampling))
                    else:
                        yield place, Answer("", 0, "refused", len(ids), lasting=not self._narrowed)
                if not waiting:
                    return
                try:
                    outputs = self._engine.step()
                except Exception as err:  # whatever breaks in vLLM, its state is lost
                    waiting.clear()
                    reason = " ".join(str(err).split()) or type(err).__name__
                    raise EngineGone(f"{self.teacher}: vLLM failed ({reason}); run again") from err
                for output in outputs:
                    yield waiting.pop(output.request_id), self._as_answer(output, sampling)
        finally:
            if waiting:
                self._engine.abort_request(list(waiting))

    def close(self) -> None:
        """End vLLM's processes."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None

    def _load(self) -> Any:
        # Read when vLLM is imported: its lines would drown a stage's own, and it reports usage by default.
        # With its scheduler in this process batches are repeatable, and nothing outlives this process.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_num_seqs": self._max_num_seqs,
            "tensor_parallel_size": self._tensor_parallel_size,
            "max_model_len": -1,  # as much of the model's context as the memory holds
            "generation_config": "vllm",  # not the checkpoint's: sampling says everything
            "disable_log_stats": True,
            **self._engine_options,
        }
        if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        try:
            if self._quantization == "8bit":
                with tempfile.TemporaryDirectory() as folder:
                    self._save_8bit(folder)
                    return LLMEngine.from_engine_args(EngineArgs(model=folder, **options))
            if self._quantization == "4bit":
                options["quantization"] = "bitsandbytes"
            return LLMEngine.from_engine_args(
                EngineArgs(model=self._model_name, revision=self._revision, **options)
            )
        except (RuntimeError, ValueError) as err:
            reason = " ".join(str(err).split())
            raise EngineGone(
                f"{self._model_name}: vLLM cannot load it ({reason}); see its lines above"
            ) from err

    def _save_8bit(self, folder: str) -> None:
        import torch

        model, tokenizer = load_teacher(self._model_name, "8bit", self._revision)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM takes what it finds free

    @property
    def _narrowed(self) -> bool:
        """Whether vLLM's context is shorter than the model's own, for want of memory or by an option."""
        config = self._engine.model_config
        own = getattr(config.hf_text_config, "max_position_embeddings", None)
        return own is not None and config.max_model_len < own

    def _as_answer(self, output: Any, sampling: Sampling) -> Answer:
        done, read = output.outputs[0], len(output.prompt_token_ids)
        ids = list(done.token_ids)
        if done.finish_reason not in FINISH:
            print(
                f'{self.teacher}: vLLM ended an answer with "{done.finish_reason}", expected one of'
                f" {', '.join(FINISH)}; left out as refused",
                file=sys.stderr,
            )
            return Answer("", len(ids), "refused", read, lasting=False)
        text, _ = cut_at(self._tokenizer.decode(ids, skip_special_tokens=True), sampling.stop)
        finish = FINISH[done.finish_reason]
        # Cut by the context that this machine has memory for, not by the limit
        cut_here = finish == "length" and len(ids) < sampling.max_new_tokens and self._narrowed
        return Answer(text.strip(), len(ids), finish, read, lasting=not cut_here)


def _request(prompt: str, ids: list[int], sampling: Sampling) -> tuple[Any, Any]:
    """Return vLLM's input and parameters for a prompt."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.temperature else 1.0,
        seed=seed_of(prompt, sampling.seed) if sampling.temperature else None,
        ignore_eos=not sampling.stop_at_eos,
        repetition_penalty=sampling.repetition_penalty,
        top_k=sampling.top_k if sampling.temperature else 0,
        min_p=sampling.min_p if sampling.temperature else 0.0,
        stop=list(sampling.stop) or None,
        detokenize=bool(sampling.stop),  # it looks for stop texts in the text
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return tokens_input(ids), params


def _require(module: str, name: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise ImportError(
            f'engine "vllm": {name} is not installed here; it lives in an environment of its own, .venv-vllm,'
            " which make vllm builds"
        )
