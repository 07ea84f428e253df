"""Errors that have a meaning of their own; the rest are ValueError and FileNotFoundError."""


class SchemaError(ValueError):
    """A dataset whose columns are none that the readers know."""


class EmptyDataError(ValueError):
    """A dataset, slice or file that holds no record to work on."""


class TrainingError(RuntimeError):
    """A trainer that ran as a child process and failed."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineGone(RuntimeError):
    """A labelling engine cannot go on: its server, its workers or its memory are gone; one line."""
