"""A stock TRL script that uses a federation, by one line.

`open_reward` opens the sites' reward models and the router in the run folder of `accord demo`, as one reward function.
All other lines are those of any script with `trl.GRPOTrainer`. Mind one setting: TRL's default for `beta`, the weight
of the KL term, is 0.

    accord demo                                             makes runs/demo
    python examples/stock_trl.py --run runs/demo            aligns the same base policy for some steps
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from accord.data.easy_vqa import load_easy_vqa
from accord.models.load import locate
from accord.pipeline import open_reward


def prompts(count: int) -> Dataset:
    """Your data: a `prompt` and an `image` column. No answers are needed."""
    questions = [q for q in load_easy_vqa() if q.split == "public"][:count]
    columns = {
        "prompt": [[{"role": "user", "content": q.text}] for q in questions],
        "image": [str(q.image) for q in questions],
    }
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def main() -> None:
    parser = argparse.ArgumentParser(description="stock TRL against a federation")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run folder with sites and router")
    parser.add_argument("--policy", default="accord/llava-clip-llama", help="the checkpoint to align")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="", help="folder for the aligned checkpoint; none is kept without it")
    parser.add_argument("--quick", action="store_true", help="two small steps")
    options = parser.parse_args()
    steps, group, rows = (2, 4, 16) if options.quick else (options.steps, 8, 128)

    policy = locate(options.policy)  # a folder; a name on the hub stays as it is

    reward = open_reward(options.run)  # the one line
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(policy, trust_remote_code=False),
            processing_class=AutoProcessor.from_pretrained(policy, padding_side="left", trust_remote_code=False),
            reward_funcs=reward,
            train_dataset=prompts(steps * rows // group),
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=rows,
                num_generations=group,
                max_completion_length=4,
                learning_rate=3e-4,
                beta=0.02,
                logging_steps=max(steps // 10, 1),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=False,
            ),
        )
        trainer.train()
        if options.out:
            trainer.save_model(options.out)
            trainer.processing_class.save_pretrained(options.out)

    print("site        messages  to the site  from it")
    for (site, kind), count in sorted(reward.engine.traffic.counts.items()):
        if kind == "score":
            print(f"{site:<10} {count.messages:>9} {count.bytes_to_site:>10} B {count.bytes_from_site:>6} B")


if __name__ == "__main__":
    main()
