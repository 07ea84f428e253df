"""Standard benchmarks: tasks of lm-evaluation-harness, or of one's own, on the five models."""
