"""Times TRL's SFTTrainer with its defaults on an EasyDistill config's data; prints one line of JSON."""

import argparse
import json
import resource
from pathlib import Path

KIB = 1024  # bytes; ru_maxrss counts in these on Linux
SAME = ("output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
RECIPE = (*SAME, "max_length", "learning_rate", "weight_decay", "lr_scheduler_type", "save_strategy")


def main() -> None:
    """Train once and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    job = json.loads(Path(parser.parse_args().config).read_text())
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from distill_app.core.models import load_tokenizer
    from distill_app.core.prompts import format_prompt, format_response

    records = json.loads(Path(job["dataset"]["labeled_path"]).read_text())
    tokenizer = load_tokenizer(job["models"]["student"])
    pairs = [
        {
            "prompt": format_prompt(r["instruction"], r["input"]),
            "completion": format_response(r["output"]) + tokenizer.eos_token,
        }
        for r in records
    ]
    options = {key: job["training"][key] for key in RECIPE}
    arguments = SFTConfig(
        **options, warmup_steps=job["training"]["warmup_ratio"], report_to="none", use_cpu=True
    )
    trainer = SFTTrainer(job["models"]["student"], args=arguments, train_dataset=Dataset.from_list(pairs))
    seconds = trainer.train().metrics["train_runtime"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    trainer.save_model()
    limit = job["training"]["max_length"]
    tokens = sum(min(len(tokenizer(p["prompt"] + p["completion"])["input_ids"]), limit) for p in pairs)
    print("\n" + json.dumps({"tokens": tokens, "seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
