"""The models that the params name, by their configs: of packages, folders, the Hub or its cache."""

from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

from distill_app.core.hub import ask_commit
from distill_app.core.models import check_local, is_local_path, quiet_transformers
from distill_app.planning.shapes import Shape, shape_of

BUILT = "models/base/"  # where the stage base_models puts what it builds


class Models:
    """The shapes of teacher and students; no weights are read."""

    def __init__(self, sections: Any) -> None:
        self.sections = sections
        self.shape = cache(self._shape)
        quiet_transformers()

    def name(self, who: str) -> str:
        """Return the Hub id or folder of `teacher`, `system1` or `system2`.

        Raises:
            ValueError: the teacher is a server's.
        """
        if who != "teacher":
            return str(self._student(who).student)
        label, measure = self.sections["label"], self.sections["measure"]
        if label.engine == "openai" and measure.teacher is None:
            raise ValueError("the teacher's weights, which are a server's; name them in measure.teacher")
        return str(measure.teacher if label.engine == "openai" else label.teacher)

    def is_built(self, who: str) -> bool:
        """Tell whether the stage base_models makes the model."""
        return self.sections["base_models"].teacher is not None and self.name(who).startswith(BUILT)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, which the students share; None where it is not to be had."""
        try:
            return _tokenizer_of(*self._source("teacher"))
        except (OSError, ValueError):
            return None

    def _shape(self, who: str) -> Shape:
        """Raises OSError where no config is to be had."""
        layers = None
        if self.is_built(who) and who != "teacher":
            layers = getattr(self.sections["base_models"], f"{who}_layers")
        return shape_of(_config(*self._source(who)), layers)

    def _source(self, who: str) -> tuple[str, dict[str, Any]]:
        """Return where transformers finds a model, and the options that it needs for that."""
        if self.is_built(who):
            return _packaged(self.sections["base_models"].teacher)
        name, revision = self.name(who), self._revision(who)
        check_local(name)
        local = is_local_path(name) or not _hub_shows(name, revision)
        return name, {"revision": revision, "local_files_only": local}

    def _student(self, who: str) -> Any:
        return self.sections[f"train_s{who[-1]}"]

    def _revision(self, who: str) -> str | None:
        if who != "teacher":
            return self._student(who).revision
        label, measure = self.sections["label"], self.sections["measure"]
        return measure.teacher_revision if label.engine == "openai" else label.revision


def _packaged(source: str) -> tuple[str, dict[str, Any]]:
    """Return the folder of a base teacher, and the option that names its GGUF file."""
    from distill_app.base.embedded import packaged_file

    if not source.endswith(".gguf"):
        return source, {}
    path = packaged_file(source)
    return str(path.parent), {"gguf_file": path.name}


def _config(name: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as err:
        if is_local_path(name):
            raise
        raise OSError(
            f"config.json of {name}, which is not in the local cache and not to be had from the Hub"
        ) from err


def _tokenizer_of(name: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, **options)


@cache
def _hub_shows(name: str, revision: str | None) -> bool:
    """Tell whether the Hub is reached and has a model: one try, where a download would try for a minute."""
    try:
        ask_commit(name, revision, "model")
    except OSError:
        return False
    return True
