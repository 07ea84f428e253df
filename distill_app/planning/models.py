"""The models that the params name, by their configs: of packages, folders, the Hub or its cache."""

from functools import cache, cached_property
from typing import Any

from distill_app.core.hub import ask_commit
from distill_app.core.models import check_local, compute_dtype, is_local_path, quiet_transformers
from distill_app.planning.shapes import Shape, shape_of, with_layers

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

    def tokenizer(self) -> Any:
        """Return the teacher's tokenizer, which the students share; None where it is not on this machine."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            if not self.is_built("teacher"):
                return _tokenizer_of(self.name("teacher"), self._revision("teacher"))
            return _base_tokenizer(self.sections["base_models"].teacher)
        except (OSError, ValueError):
            return None

    def computes_in_halves(self) -> bool:
        """Tell whether this machine's CPU computes in bfloat16."""
        return compute_dtype() == "bfloat16"

    def _shape(self, who: str) -> Shape:
        """Raises OSError where no config is to be had."""
        base = self.sections["base_models"]
        if not self.is_built(who):
            return shape_of(_config(self.name(who), self._revision(who)))
        config = _base_config(base.teacher)
        return shape_of(config if who == "teacher" else with_layers(config, getattr(base, f"{who}_layers")))

    def _student(self, who: str) -> Any:
        return self.sections[f"train_s{who[-1]}"]

    def _revision(self, who: str) -> str | None:
        if who != "teacher":
            return self._student(who).revision
        label, measure = self.sections["label"], self.sections["measure"]
        return measure.teacher_revision if label.engine == "openai" else label.revision


def _base_config(source: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(*_packaged(source)[:1], **_packaged(source)[1])


def _base_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    folder, options = _packaged(source)
    return AutoTokenizer.from_pretrained(folder, **options)


def _packaged(source: str) -> tuple[str, dict[str, str]]:
    """Return the folder of a base teacher, and the option that names its GGUF file."""
    from distill_app.base.embedded import packaged_file

    if not source.endswith(".gguf"):
        return source, {}
    path = packaged_file(source)
    return str(path.parent), {"gguf_file": path.name}


def _config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    check_local(name)
    try:
        return AutoConfig.from_pretrained(name, **_options(name, revision))
    except (OSError, ValueError) as err:
        if is_local_path(name):
            raise
        raise OSError(
            f"config.json of {name}, which is not in the local cache and not to be had from the Hub"
        ) from err


def _tokenizer_of(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    check_local(name)
    return AutoTokenizer.from_pretrained(name, **_options(name, revision))


def _options(name: str, revision: str | None) -> dict[str, Any]:
    return {
        "revision": revision,
        "local_files_only": is_local_path(name) or not _hub_shows(name, revision),
    }


@cache
def _hub_shows(name: str, revision: str | None) -> bool:
    """Tell whether the Hub is reached and has a model: one try, where a download would try for a minute."""
    try:
        ask_commit(name, revision, "model")
    except OSError:
        return False
    return True
