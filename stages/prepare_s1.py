"""Reads the instruction dataset; writes System 1's training and held-out instructions.

`--explain ROW` says what becomes of a row, and writes nothing; `--into FOLDER
--format parquet` (or jsonl, json) writes there, and none of the stage's own files.
"""

from distill_app.core.files import save_json
from distill_app.core.inputs import read_inputs
from distill_app.core.stage import run_stage
from distill_app.data.command import outputs_into, read_options
from distill_app.data.instructions import explain_instructions, prepare_instructions
from distill_app.data.params import PrepareS1Params
from distill_app.data.selection import Outputs


def main() -> None:
    """Prepare System 1's data, or explain a row."""
    params = read_inputs("prepare_s1", PrepareS1Params)
    options = read_options()
    if options.explain is not None:
        print(
            "\n".join(explain_instructions(**params.arguments(), rules=params.rules(), row=options.explain))
        )
        return
    outputs = Outputs(
        train="data/train_instructions.json",
        heldout="data/heldout_s1.json",
        rejects="data/rejects_s1.json",
        tokens="metrics/prepare_s1_tokens.csv",
    )
    if options.into is not None:
        outputs = outputs_into(options.into, options.format)
    metrics = prepare_instructions(**params.arguments(), rules=params.rules(), outputs=outputs)
    if options.into is None:
        save_json("metrics/prepare_s1.json", metrics)
    print(f"prepare_s1: {metrics['train']} instructions to train on, {metrics['heldout']} held out")


if __name__ == "__main__":
    run_stage(main)
