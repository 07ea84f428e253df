"""The verbs of the command `distill`, a module each: `HELP`, `add_arguments` and `run`."""
