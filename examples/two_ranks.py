"""Several training processes, one federation: the same sites score the completions of every process.

Under `torchrun` or `accelerate launch`, every process (rank) runs this whole script and has its share of the
completions of a step. `open_reward` opens the sites in the first process only. That process sends the questions of all
processes as one message a site and step, and each process gets the scores of its own completions back. Any other
engine works the same way: `FederatedReward(OneConnection(engine if rank == 0 else None, sites), router)`.

    accord demo                                                         makes runs/demo
    torchrun --nproc_per_node 2 examples/two_ranks.py runs/demo         two processes, on a CPU or a GPU each
    accelerate launch --num_processes 8 examples/two_ranks.py           the same; without GPUs it starts one process
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from accord.data.easy_vqa import load_easy_vqa
from accord.federation.ranks import rank_and_count
from accord.models.load import locate
from accord.pipeline import open_reward


def prompts(count: int) -> Dataset:
    questions = [q for q in load_easy_vqa() if q.split == "public"][:count]
    columns = {
        "prompt": [[{"role": "user", "content": q.text}] for q in questions],
        "image": [str(q.image) for q in questions],
    }
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def digest(model: torch.nn.Module) -> str:
    """Return a digest of all weights; it must be equal on every rank."""
    total = hashlib.sha256()
    for tensor in model.state_dict().values():
        total.update(tensor.detach().cpu().float().numpy().tobytes())
    return total.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description="several processes against one federation")
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"), help="with sites and router")
    parser.add_argument("--policy", default="accord/llava-clip-llama", help="the checkpoint to align")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="", help="folder for the aligned checkpoint; none is kept without it")
    parser.add_argument("--quick", action="store_true", help="two small steps")
    options = parser.parse_args()
    steps, group, rows = (2, 4, 16) if options.quick else (options.steps, 8, 128)
    rank, ranks = rank_and_count()
    if rows % (ranks * group):
        parser.error(f"{rows} completions a step are not {ranks} shares of whole groups of {group}")

    policy = locate(options.policy)
    reward = open_reward(options.run)  # on every rank
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(policy, trust_remote_code=False),
            processing_class=AutoProcessor.from_pretrained(policy, padding_side="left", trust_remote_code=False),
            reward_funcs=reward,
            train_dataset=prompts(steps * rows // group),
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=rows // ranks,  # a step has as many completions however many share it
                num_generations=group,
                max_completion_length=4,
                learning_rate=3e-4,
                beta=0.02,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),  # or several processes without a GPU train each for itself
            ),
        )
        trainer.train()
        if options.out:
            trainer.save_model(options.out)
            if rank == 0:
                trainer.processing_class.save_pretrained(options.out)

    # A line and its end in one write: ranks share a terminal, and torchrun's processes have no buffer.
    weights = digest(trainer.accelerator.unwrap_model(trainer.model))
    print(f"rank {rank} of {ranks}  weights {weights}\n", end="", flush=True)
    if rank == 0:
        absent = [entry["absent"] for entry in trainer.state.log_history if "absent" in entry]
        print(f"steps {len(absent)}  absent {sum(absent) / len(absent):.3f}")
        print("site        messages  to the site  from it")
        for (site, kind), count in sorted(reward.engine.traffic.counts.items()):
            if kind == "score":
                print(f"{site:<10} {count.messages:>9} {count.bytes_to_site:>10} B {count.bytes_from_site:>6} B")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    del trainer, reward  # threads of the process group live on with a model that speaks through it,
    gc.collect()  # and may abort the process at its end


if __name__ == "__main__":
    main()
