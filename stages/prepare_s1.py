"""Reads the instruction dataset; writes System 1's training and held-out instructions."""

from distill_app.core.files import save_json
from distill_app.core.params import read_section
from distill_app.core.stage import run_stage
from distill_app.data.instructions import prepare_instructions
from distill_app.data.params import PrepareS1Params


def main() -> None:
    """Prepare System 1's data."""
    params = read_section("prepare_s1", PrepareS1Params)
    train, heldout, metrics = prepare_instructions(
        params.dataset, params.slice, params.revision, params.heldout_fraction, params.seed
    )
    save_json("data/train_instructions.json", train)
    save_json("data/heldout_s1.json", heldout)
    save_json("metrics/prepare_s1.json", metrics)
    print(f"prepare_s1: {len(train)} instructions to train on, {len(heldout)} held out")


if __name__ == "__main__":
    run_stage(main)
