"""What each stage of a run reads, computes and takes, from the params alone."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from distill_app.core.files import iter_records
from distill_app.core.hub import hub_inputs
from distill_app.core.models import Quantization, compute_dtype, is_local_path
from distill_app.core.params import Section
from distill_app.core.prompts import Mode
from distill_app.core.stage import one_line
from distill_app.easydistill.params import TrainParams
from distill_app.evaluation.asking.params import MeasureParams
from distill_app.labeling.params import LabelParams
from distill_app.planning.counts import (
    ANSWER_SHARE,
    CUT_SHARE,
    WHOLE_SHARE,
    Selected,
    selected,
    task_of,
)
from distill_app.planning.hardware import Device
from distill_app.planning.models import Models
from distill_app.planning.shapes import Shape
from distill_app.planning.training import checkpoint_bytes, is_checkpointed, training_bytes
from distill_app.planning.work import Texts, reading_seconds, training_seconds, writing_seconds
from distill_app.refining.params import RefineParams, RefineS2Params
from distill_app.training.memory import FULL_BYTES, HALF, SHARE, token_bytes

CHAT_TOKENS = 25  # that a chat template adds to a prompt
LOGITS_BYTES = 3  # of an answer token for each likeliest token kept: 92 for 32 of Qwen's
READINGS = 6  # of the teacher's and the student's answers, in which fidelity is measured
SMALLER: tuple[Quantization, ...] = ("8bit", "4bit")
STAGES: tuple[tuple[Mode, str], ...] = (("system1", "s1"), ("system2", "s2"))


@dataclass
class StagePlan:
    """What one stage takes; 0 and empty where it takes nothing of the kind."""

    stage: str
    reads: list[str] = field(default_factory=list)  # datasets and models
    downloads: int = 0  # bytes from the Hub, as far as known
    tokens_read: float = 0
    tokens_written: float = 0
    tokens_trained: float = 0  # all epochs together
    memory: int = 0  # bytes of the device at least
    disk: int = 0  # bytes that are written, checkpoints on the way included
    seconds: float = 0
    cost: float = 0  # of a server that is paid by tokens
    needs: str = ""  # what is missing to plan it; then the figures above are 0
    fault: str = ""  # why it does not fit, and which param would fix that


@dataclass
class Plan:
    """The stages in the order of the graph, and what is to be known of them all."""

    device: Device
    room: int  # bytes of the device that a stage may take; the rest is CUDA's own and fragments
    stages: list[StagePlan]
    assumed: list[str]
    unpinned: list[str]

    @property
    def is_whole(self) -> bool:
        return not any(stage.needs for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def money(self, price: float) -> float:
        """Return what so much an hour of the device comes to, with what servers take for tokens."""
        return price * self.seconds / 3600 + sum(stage.cost for stage in self.stages)


def plan_run(sections: Mapping[str, Any], device: Device) -> Plan:
    """Return the plan of all sections of a params file.

    A stage whose models or data are not known here says so in `needs`, and the rest is planned.
    """
    planner = _Planner(sections, device, Models(sections))
    stages = list(planner.stages())
    return Plan(device, planner.room, stages, planner.assumed, list(_unpinned(sections)))


def _unpinned(sections: Mapping[str, Section]) -> Iterator[str]:
    for name, section in sections.items():
        yield from (f"{item.name}: {item.repo}" for item in hub_inputs(name, section) if not item.is_pinned)


class _Planner:
    """The sections, the device, and the models and texts that stages share."""

    def __init__(self, sections: Mapping[str, Any], device: Device, models: Models) -> None:
        self.sections, self.device, self.models = sections, device, models
        self.room = int(SHARE * device.memory)
        self.label: LabelParams = sections["label"]
        self.measure: MeasureParams = sections["measure"]
        self.assumed: list[str] = []
        self.downloaded: set[str] = set()
        self.selected: dict[Mode, Selected] = {}

    def stages(self) -> Iterator[StagePlan]:
        """Yield the plans in the order of the graph."""
        yield self._planned("base_models", self._base_models)
        yield self._planned("prepare_s1", partial(self._prepare, mode="system1"))
        yield self._planned("label", self._label)
        yield self._planned("prepare_s2", partial(self._prepare, mode="system2"))
        yield self._planned("score_s2", self._score)
        yield StagePlan("write_config", seconds=self.device.start_sec)
        for mode, short in STAGES:
            yield self._planned(f"train_{short}", partial(self._train, mode=mode))
        for mode, short in STAGES:
            yield self._planned(f"refine_{short}", partial(self._refine, mode=mode))
        yield self._planned("measure", self._measure)
        yield self._planned("benchmark", self._benchmark)
        yield StagePlan("compare", seconds=self.device.start_sec)

    def _planned(self, stage: str, fill: Callable[[StagePlan], None]) -> StagePlan:
        plan = StagePlan(stage, seconds=self.device.start_sec)
        try:
            fill(plan)
        except (OSError, ValueError) as err:
            return StagePlan(stage, plan.reads, needs=one_line(err))
        return plan

    def _base_models(self, plan: StagePlan) -> None:
        params = self.sections["base_models"]
        if params.teacher is None:
            plan.seconds = 0
            return
        shape = self.models.shape("teacher")
        students = [self.models.shape(mode) for mode, _ in STAGES]
        plan.reads = [params.teacher]
        plan.memory = shape.weight_bytes()
        plan.disk = sum(HALF * one.parameters for one in (shape, *students))

    def _prepare(self, plan: StagePlan, mode: Mode) -> None:
        params = self.sections[plan.stage]
        plan.reads = [f"{one.dataset} {one.slice}" for one in (params, *params.mix)]
        plan.seconds = 2.0  # no torch
        length = self.sections["train_s2"].max_length if mode == "system2" else self.label.max_new_tokens
        found = selected(params, mode, self.models.tokenizer, ANSWER_SHARE * length)
        self.selected[mode] = found
        if not found.is_counted:
            self._assume(
                f"{plan.stage}: no row of the Hub's is dropped; 100 tokens a question, and an output half of"
                f" {length} tokens (its dataset is not read here)"
            )

    def _texts(self, mode: Mode) -> Selected:
        if mode not in self.selected:
            raise ValueError(f"the number of texts, see prepare_{'s1' if mode == 'system1' else 's2'}")
        return self.selected[mode]

    def _labels(self, side: Literal["train", "heldout"]) -> Texts:
        """Return System 1's labelled texts of a side: whole answers of an assumed length."""
        found, limit = self._texts("system1"), self.label.max_new_tokens
        lost = CUT_SHARE if self.label.on_truncated == "drop" else 0.0
        length = limit * (WHOLE_SHARE if lost else ANSWER_SHARE)
        kept = getattr(found, side) * (1 - lost)
        return Texts(kept.count, kept.prompt_tokens, kept.count * length)

    def _label(self, plan: StagePlan) -> None:
        params, found = self.label, self._texts("system1")
        samples = params.samples
        count = (found.train.count + found.heldout.count) * samples
        prompts = (found.train.prompt_tokens + found.heldout.prompt_tokens) * samples + CHAT_TOKENS * count
        texts = Texts(count, prompts, count * ANSWER_SHARE * params.max_new_tokens)
        self._assume(
            "label: a mean answer has half of max_new_tokens, and a fifth are cut there"
            f" (on_truncated: {params.on_truncated})"
        )
        if samples > 1 and params.choose == "judge":
            self._assume("label.choose: the judge's replies are not counted")
        plan.tokens_read, plan.tokens_written = texts.prompt_tokens, texts.answer_tokens
        if params.engine == "openai":
            plan.reads = [f"{params.teacher} at {params.base_url}"]
            plan.cost = (params.price_in * texts.prompt_tokens + params.price_out * texts.answer_tokens) / 1e6
            return
        self._reads(plan, "teacher")
        longest = texts.prompt_tokens / count + params.max_new_tokens
        workers = params.engine_workers
        self._writes(plan, "teacher", params.quantization, texts * (1 / workers), params.batch_size, longest)
        if params.top_logits:
            plan.tokens_read += texts.tokens
            plan.seconds += reading_seconds(self.models.shape("teacher"), texts, self.device)
            plan.disk += round(LOGITS_BYTES * params.top_logits * texts.answer_tokens)

    def _writes(
        self,
        plan: StagePlan,
        who: str,
        quantization: Quantization,
        texts: Texts,
        rows: int,
        longest: float,
    ) -> None:
        """Add what a model's answers take, and whether it fits with one row of the longest."""
        shape, gpus = self.models.shape(who), self.label.gpus_per_worker
        weights = shape.weight_bytes(quantization)
        plan.seconds += writing_seconds(shape, texts, longest, rows, self.device, weights)
        row = round(longest * shape.kv_bytes())
        plan.memory = (weights + row) // gpus
        if plan.memory <= self.room:
            return
        for smaller in SMALLER:
            if (shape.weight_bytes(smaller) + row) // gpus <= self.room:
                plan.fault = f"set label.quantization: {smaller}"
                return
        needed = math.ceil((weights + row) / self.room)
        plan.fault = f"set label.gpus_per_worker: {needed}, with label.engine: vllm"

    def _score(self, plan: StagePlan) -> None:
        top = self.sections["score_s2"].top_logits
        if not top:
            plan.seconds = 0
            return
        texts, shape = self._texts("system2").train, self.models.shape("teacher")
        self._reads(plan, "teacher")
        plan.tokens_read = texts.tokens
        plan.seconds += reading_seconds(shape, texts, self.device)
        plan.memory = shape.weight_bytes(self.label.quantization)
        plan.disk = round(LOGITS_BYTES * top * texts.answer_tokens)

    def _train(self, plan: StagePlan, mode: Mode, examples: Texts | None = None) -> None:
        """Add a training as its section says, on these examples in place of its own data."""
        params: TrainParams = self.sections["train_s1" if mode == "system1" else "train_s2"]
        self._reads(plan, mode)
        shape = self.models.shape(mode)
        examples = examples or (self._labels("train") if mode == "system1" else self._texts("system2").train)
        texts = examples * (1 - params.validation_fraction)
        batch = params.batch_size * params.gradient_accumulation_steps
        each = texts.tokens / params.tokens_per_step if params.tokens_per_step else texts.count / batch
        plan.tokens_trained += params.num_epochs * texts.tokens
        plan.seconds += 2 * self.device.start_sec  # the stage, the check of the student, the trainer
        plan.seconds += training_seconds(
            shape, texts, params.num_epochs, params.num_epochs * each, self.device, is_checkpointed(params)
        )
        plan.memory = self._training_bytes(shape, params)
        plan.disk = checkpoint_bytes(shape, params)
        plan.fault = self._train_fault(plan, shape, params)

    def _train_fault(self, plan: StagePlan, shape: Shape, params: TrainParams) -> str:
        """Return the first change of params with which a training fits, tried from the cheapest on."""
        tries: list[tuple[str, dict[str, Any]]] = [
            ("tokens_at_a_time: null", {"tokens_at_a_time": None}),
            ("training: {gradient_checkpointing: true}", {"training": {"gradient_checkpointing": True}}),
            ("lora_rank: 16 and gradient_checkpointing", {"lora_rank": 16}),
            ("quantization: 4bit with lora_rank: 16", {"quantization": "4bit"}),
        ]
        changed = params
        if plan.memory <= self.room:
            return ""
        for said, change in tries:
            changed = changed.model_copy(update=change)
            if self._training_bytes(shape, changed) <= self.room:
                return f"set {plan.stage}.{said}"
        return f"lower {plan.stage}.max_length, take a smaller student, or {plan.stage}.accelerate: fsdp"

    def _refine(self, plan: StagePlan, mode: Mode) -> None:
        params: RefineParams = self.sections[plan.stage]
        if isinstance(params, RefineS2Params) and params.method == "verified":
            self._verify(plan, params)
            return
        if not params.steps:
            plan.seconds = 0
            return
        self._reads(plan, "teacher")
        shape, teacher = self.models.shape(mode), self.models.shape("teacher")
        found = self._labels("train") if mode == "system1" else self._texts("system2").train
        prompt = found.prompt_tokens / found.count
        rows, steps = params.batch_size, params.steps
        own = Texts(rows, rows * prompt, rows * ANSWER_SHARE * params.max_new_tokens)
        known = found * (rows / found.count)
        for texts, share in ((own, params.on_policy), (known, 1 - params.on_policy)):
            one = training_seconds(shape, texts, 1, 1, self.device, params.gradient_checkpointing)
            plan.seconds += steps * share * (one + reading_seconds(teacher, texts, self.device))
            plan.tokens_trained += steps * share * texts.tokens
        drawn = writing_seconds(
            shape, own, params.max_new_tokens, rows, self.device, 2 * HALF * shape.parameters
        )
        plan.seconds += steps * params.on_policy * drawn
        plan.tokens_written = steps * params.on_policy * own.answer_tokens
        longest = round(rows * (prompt + params.max_new_tokens))
        plan.memory = (
            teacher.weight_bytes(self.label.quantization)
            + FULL_BYTES * shape.parameters
            + longest * token_bytes(shape.config, params.gradient_checkpointing)
        )
        plan.disk = 2 * 16 * shape.parameters + HALF * shape.parameters
        if plan.memory > self.room:
            fix = (
                "lower {}.batch_size"
                if params.gradient_checkpointing
                else "set {}.gradient_checkpointing: true"
            )
            plan.fault = fix.format(plan.stage)

    def _verify(self, plan: StagePlan, params: RefineS2Params) -> None:
        """Add what verification rounds take where each trains on all that may be kept: the most it can be."""
        if not params.rounds:
            plan.seconds = 0
            return
        shape, traces = self.models.shape("system2"), self._texts("system2").train
        more = sum(1 for _ in iter_records(params.problems)) if params.problems else 0
        problems = traces * (1 + more / traces.count)
        count = problems.count * params.samples
        drawn = Texts(
            count, problems.prompt_tokens * params.samples, count * ANSWER_SHARE * params.max_new_tokens
        )
        longest = traces.prompt_tokens / traces.count + params.max_new_tokens
        learned = traces * (1 + problems.count * min(params.keep, params.samples) / traces.count)
        for _ in range(params.rounds):
            self._train(plan, "system2", learned)
            memory, fault = plan.memory, plan.fault
            self._writes(plan, "system2", "none", drawn, self.label.batch_size, longest)
            plan.memory, plan.fault = max(memory, plan.memory), fault or plan.fault
        plan.tokens_written = params.rounds * drawn.answer_tokens
        plan.disk += params.rounds * HALF * shape.parameters

    def _measure(self, plan: StagePlan) -> None:
        params = self.measure
        for who in ("teacher", "system1", "system2"):  # students before distillation among them
            self._reads(plan, who)
        heldout = {"system1": self._labels("heldout"), "system2": self._texts("system2").heldout}
        most = {"system1": params.instruction_prompts, "system2": params.reasoning_prompts}
        asked = {mode: self._answers(heldout[mode], most[mode]) for mode, _ in STAGES}
        for mode, _ in STAGES:
            before = () if self._is_teacher(mode) else (mode,)
            for who in ("teacher", mode, *before):
                self._asks(plan, who, asked[mode])
            for who in ("teacher", mode):
                self._times(plan, who, asked[mode])
        some = self._answers(heldout["system1"], params.fidelity_prompts)
        self._asks(plan, "teacher", some)  # a second answer, drawn with another seed
        for who in ("teacher", "system1"):
            plan.seconds += READINGS / 2 * reading_seconds(self.models.shape(who), some, self.device)
        plan.tokens_read += READINGS * some.tokens
        together = params.engine != "vllm"  # all models stay loaded
        weights = [self._weights(who) for who in ("teacher", "system1", "system1", "system2", "system2")]
        plan.memory = sum(weights) if together else max(weights)
        if plan.memory > self.room:
            plan.fault = f"set measure.{'engine: vllm' if together else 'teacher_quantization: 8bit'}"

    def _answers(self, texts: Texts, most: int) -> Texts:
        """Return what is asked of held-out texts, so many at most, and answers of an assumed length."""
        count = min(most, texts.count)
        prompts = count * (texts.prompt_tokens / texts.count + CHAT_TOKENS) if count else 0.0
        return Texts(count, prompts, count * ANSWER_SHARE * self.measure.max_new_tokens)

    def _weights(self, who: str) -> int:
        quantization = self.measure.teacher_quantization if who == "teacher" else "none"
        return self.models.shape(who).weight_bytes(quantization)

    def _asks(self, plan: StagePlan, who: str, texts: Texts) -> None:
        params, shape = self.measure, self.models.shape(who)
        plan.tokens_read += texts.prompt_tokens
        plan.tokens_written += texts.answer_tokens
        plan.seconds += writing_seconds(
            shape, texts, params.max_new_tokens, params.batch_size, self.device, self._weights(who)
        )

    def _times(self, plan: StagePlan, who: str, texts: Texts) -> None:
        """Add the answers by which a model is timed: one at a time, and some at once."""
        params, shape = self.measure, self.models.shape(who)
        tokens = params.timed_tokens or ANSWER_SHARE * params.max_new_tokens
        for rows, times in ((1, params.timed_prompts), (params.load_prompts, 1)):
            each = Texts(rows, rows * texts.prompt_tokens / max(1, texts.count), rows * tokens)
            seconds = writing_seconds(shape, each, tokens, rows, self.device, self._weights(who))
            plan.seconds += params.timed_rounds * times * seconds
            plan.tokens_written += params.timed_rounds * times * each.answer_tokens

    def _is_teacher(self, mode: Mode) -> bool:
        """Tell whether a student starts as its teacher is, so that its answers before are the teacher's."""
        start, teacher = self.models.shape(mode), self.models.shape("teacher")
        return self.models.is_built(mode) and start.parameters == teacher.parameters

    def _benchmark(self, plan: StagePlan) -> None:
        params = self.sections["benchmark"]
        models = ["teacher", *(mode for mode, _ in STAGES)]
        models += [mode for mode, _ in STAGES if not self._is_teacher(mode)]  # before distillation
        for settings in params.settings():
            task = task_of(settings.task, params.task_dir)
            if task is None:
                self._assume(f"benchmark: {settings.task} is not counted, since its size is not known here")
                continue
            plan.reads.append(settings.task)
            count = min(task.questions, settings.limit or task.questions) * task.choices
            limit = settings.max_gen_toks or self.measure.max_new_tokens
            written = count * ANSWER_SHARE * limit if task.is_written else 0.0
            texts = Texts(count, count * task.prompt_tokens, written)
            plan.tokens_read += len(models) * texts.prompt_tokens
            plan.tokens_written += len(models) * texts.answer_tokens
            for who in models:
                shape = self.models.shape(who)
                plan.seconds += (
                    writing_seconds(shape, texts, limit, params.batch_size, self.device, self._weights(who))
                    if task.is_written
                    else reading_seconds(shape, texts, self.device)
                )
        plan.memory = max(map(self._weights, models))
        if plan.memory > self.room:
            plan.fault = "set measure.teacher_quantization: 8bit"

    def _reads(self, plan: StagePlan, who: str) -> None:
        """Add the model that a stage loads, and its download the first time that it is named."""
        name = self.models.name(who)
        plan.reads.append(name)
        if not is_local_path(name) and name not in self.downloaded and not self.models.is_built(who):
            self.downloaded.add(name)
            plan.downloads += self.models.shape(who).weight_bytes()

    def _assume(self, text: str) -> None:
        if text not in self.assumed:
            self.assumed.append(text)

    def _training_bytes(self, shape: Shape, params: TrainParams) -> int:
        in_halves = self.device.is_gpu or compute_dtype() == "bfloat16"
        return training_bytes(shape, params, self.device, in_halves)
