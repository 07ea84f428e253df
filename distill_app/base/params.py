"""The `base_models` section of params.yaml."""

from pydantic import Field

from distill_app.core.params import Section


class BaseModelsParams(Section):
    """Where the teacher comes from and how many of its layers each student starts with."""

    teacher: str | None  # PACKAGE/FILE.gguf, or a checkpoint folder; null: nothing is built here
    system1_layers: int = Field(ge=1)
    system2_layers: int = Field(ge=1)
