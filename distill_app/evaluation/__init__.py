"""Everything that yields a number: asking, scores, benchmarks, judge, statistics, verdict."""
