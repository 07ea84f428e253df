"""The `benchmark` section of params.yaml, and what the benchmarks take from `measure`."""

from pydantic import ConfigDict, Field

from distill_app.core.params import Section


class BenchmarkParams(Section):
    """Which tasks are run, and how."""

    tasks: list[str]  # names of tasks or groups; none switches the stage off
    task_dir: str  # folder of task files of one's own, which go before those of the harness
    limit: int | None = Field(ge=1)  # questions of a task, at most; None takes all
    num_fewshot: int | None = Field(ge=0)  # solved examples in a prompt; None leaves it to the task
    batch_size: int = Field(ge=1)  # requests at a time
    apply_chat_template: bool  # each model's own; else every model reads the same text


class TeacherWeights(Section):
    """The one value of section `measure` that the benchmarks share."""

    model_config = ConfigDict(extra="ignore")

    teacher: str | None  # Hub id or folder of the teacher's weights; None takes label.teacher
