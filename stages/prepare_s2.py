"""Reads the reasoning dataset; writes System 2's training traces and held-out problems.

`--explain ROW` says what becomes of each trace of a row, and writes nothing; `--into FOLDER
--format parquet` (or jsonl, json) writes there, and none of the stage's own files.
"""

from distill_app.core.files import save_json
from distill_app.core.inputs import read_inputs
from distill_app.core.stage import run_stage
from distill_app.data.command import outputs_into, read_options
from distill_app.data.params import PrepareS2Params
from distill_app.data.reasoning import explain_traces, prepare_traces
from distill_app.data.selection import Outputs


def main() -> None:
    """Prepare System 2's data, or explain a row."""
    params = read_inputs("prepare_s2", PrepareS2Params)
    options = read_options()
    if options.explain is not None:
        print("\n".join(explain_traces(**params.arguments(), rules=params.rules(), row=options.explain)))
        return
    outputs = Outputs(
        train="data/omnithought_cot.json",
        heldout="data/heldout_s2.json",
        rejects="data/rejects_s2.json",
        tokens="metrics/prepare_s2_tokens.csv",
    )
    if options.into is not None:
        outputs = outputs_into(options.into, options.format)
    metrics = prepare_traces(**params.arguments(), rules=params.rules(), outputs=outputs)
    if options.into is None:
        save_json("metrics/prepare_s2.json", metrics)
    print(f"prepare_s2: {metrics['train']} traces to train on, {metrics['heldout']} problems held out")


if __name__ == "__main__":
    run_stage(main)
