"""The `benchmark` section of params.yaml."""

from typing import Annotated

from pydantic import Field

from distill_app.core.params import NoPath, Section


class TaskParams(Section):
    """A task with settings of its own; what is None is as public tables of that task have it (`PUBLIC`), or
    as the section says for all."""

    task: str
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool | None = None
    max_gen_toks: int | None = Field(default=None, ge=1)  # an answer ends here at the latest
    metric: str | None = None  # that decides; all are kept
    filter: str | None = None  # through which the metric reads an answer


class BenchmarkParams(Section):
    """Which tasks are run, and how."""

    # Names of tasks or groups, or such with settings; none runs nothing
    tasks: Annotated[list[str | TaskParams], NoPath()]
    task_dir: str  # folder of task files of one's own, which go before those of the harness
    limit: int | None = Field(ge=1)  # questions of a task, at most; None takes all
    num_fewshot: int | None = Field(ge=0)  # solved examples in a prompt; None leaves it to the task
    batch_size: int = Field(ge=1)  # requests at a time
    apply_chat_template: bool  # each model's own; else every model reads the same text

    def settings(self) -> list[TaskParams]:
        """Return each task with all that is known of its settings."""
        return [self._settings(TaskParams(task=one) if isinstance(one, str) else one) for one in self.tasks]

    def _settings(self, own: TaskParams) -> TaskParams:
        of_all = {
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.apply_chat_template,
        }
        layers = (of_all, PUBLIC.get(own.task, {}), own.model_dump())
        known = [{key: value for key, value in layer.items() if value is not None} for layer in layers]
        return TaskParams.model_validate({key: value for layer in known for key, value in layer.items()})


# How tables of distilled students run these tasks: the metric that they show, and what a chat model needs to
# be read fairly. ifeval: arXiv:2311.07911. gsm8k: the flexible filter reads answers that lack "####".
PUBLIC: dict[str, dict[str, str | int | bool]] = {
    "ifeval": {"apply_chat_template": True, "max_gen_toks": 1280, "metric": "prompt_level_strict_acc"},
    "gsm8k": {
        "apply_chat_template": True,
        "max_gen_toks": 1024,
        "metric": "exact_match",
        "filter": "flexible-extract",
    },
    "math500": {"apply_chat_template": True, "max_gen_toks": 2048, "metric": "right"},
    "arc_easy": {"metric": "acc_norm"},
    "arc_challenge": {"metric": "acc_norm"},
    "hellaswag": {"metric": "acc_norm"},
    "mmlu": {"metric": "acc"},
}
