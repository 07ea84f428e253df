"""Whether an answer to a problem of MATH-500 is right."""

from distill_app.core.final_answers import is_right


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Return the score of one answer, 1 or 0."""
    return {"right": float(bool(is_right(results[0], f"\\boxed{{{doc['answer']}}}")))}
