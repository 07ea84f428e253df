"""Reads the reasoning dataset; writes System 2's training traces and held-out problems.

`--explain ROW` says what becomes of each trace of a row, and writes nothing.
"""

from distill_app.core.files import save_json
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.data.command import explained_row
from distill_app.data.params import PrepareS2Params
from distill_app.data.reasoning import explain_traces, prepare_traces
from distill_app.data.selection import Outputs


def main() -> None:
    """Prepare System 2's data, or explain a row."""
    params = read_section("prepare_s2", PrepareS2Params)
    row = explained_row()
    if row is not None:
        print("\n".join(explain_traces(**params.source(), rules=params.rules(), row=row)))
        return
    outputs = Outputs(
        train="data/omnithought_cot.json",
        heldout="data/heldout_s2.json",
        rejects="data/rejects_s2.json",
        tokens="metrics/prepare_s2_tokens.csv",
    )
    metrics = prepare_traces(**params.source(), rules=params.rules(), outputs=outputs)
    save_json("metrics/prepare_s2.json", metrics)
    print(f"prepare_s2: {metrics['train']} traces to train on, {metrics['heldout']} problems held out")


if __name__ == "__main__":
    run_stage(main)
