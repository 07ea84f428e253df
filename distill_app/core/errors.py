"""Errors that have a meaning of their own; the rest are ValueError, FileNotFoundError, RuntimeError."""


class SchemaError(ValueError):
    """A dataset whose columns are none that the readers know."""


class EmptyDataError(ValueError):
    """A dataset, slice or file that holds no record to work on."""
