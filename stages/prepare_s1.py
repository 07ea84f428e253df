"""Reads the instruction dataset; writes System 1's training and held-out instructions.

`--explain ROW` says what becomes of a row, and writes nothing.
"""

from distill_app.core.files import save_json
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.data.command import explained_row
from distill_app.data.instructions import explain_instructions, prepare_instructions
from distill_app.data.params import PrepareS1Params
from distill_app.data.selection import Outputs


def main() -> None:
    """Prepare System 1's data, or explain a row."""
    params = read_section("prepare_s1", PrepareS1Params)
    row = explained_row()
    if row is not None:
        print("\n".join(explain_instructions(**params.source(), rules=params.rules(), row=row)))
        return
    outputs = Outputs(
        train="data/train_instructions.json",
        heldout="data/heldout_s1.json",
        rejects="data/rejects_s1.json",
        tokens="metrics/prepare_s1_tokens.csv",
    )
    metrics = prepare_instructions(**params.source(), rules=params.rules(), outputs=outputs)
    save_json("metrics/prepare_s1.json", metrics)
    print(f"prepare_s1: {metrics['train']} instructions to train on, {metrics['heldout']} held out")


if __name__ == "__main__":
    run_stage(main)
