"""The built-in trainer: `python -m distill_app.training --config FILE` reads EasyDistill 1.0's JSON."""
