"""Reads the reasoning dataset; writes System 2's training traces and held-out problems."""

from distill_app.core.files import save_json
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.data.params import PrepareS2Params
from distill_app.data.reasoning import prepare_traces


def main() -> None:
    """Prepare System 2's data."""
    params = read_section("prepare_s2", PrepareS2Params)
    train, heldout, metrics = prepare_traces(
        dataset=params.dataset,
        slice_str=params.slice,
        **params.model_dump(exclude={"dataset", "slice"}),
    )
    save_json("data/omnithought_cot.json", train)
    save_json("data/heldout_s2.json", heldout)
    save_json("metrics/prepare_s2.json", metrics)
    print(f"prepare_s2: {len(train)} traces to train on, {len(heldout)} problems held out")


if __name__ == "__main__":
    run_stage(main)
