"""A reward model for those who want nothing else.

accord reward train PAIRS --model M --out FOLDER     on a file of preference pairs
accord reward evaluate FOLDER PAIRS                  on pairs that it was not trained on
accord reward serve FOLDER                           to programs of this machine
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from accord.errors import RunError
from accord.terminal import hush, say, tell

reward_app = typer.Typer(no_args_is_help=True, help="A reward model alone, from preference pairs.")

Pairs = Annotated[Path, typer.Argument(help="preference pairs: .jsonl, .json, Parquet, or a folder of save_to_disk")]
Model = Annotated[Path, typer.Argument(help="the reward model, a folder that `accord reward train` wrote")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]


@reward_app.command("train")
def reward_train(
    pairs: Pairs,
    model: Annotated[str, typer.Option("--model", help="the checkpoint: a folder, a hub id, or accord/<name>")],
    out: Annotated[Path, typer.Option("--out", help="folder for the reward model")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="at most")] = 500,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="about 1e-4 with --lora-rank")] = 1e-3,
    batch: Annotated[int, typer.Option("--batch", min=1, help="questions of a step")] = 16,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=0, help="train an adapter; 0: the whole model")] = 0,
    head: Annotated[str, typer.Option("--head", help="linear, or mlp: two layers with SiLU")] = "linear",
    centring: Annotated[float, typer.Option("--centring", help="keeps scores near zero; 0 for not")] = 0.01,
    ties: Annotated[float, typer.Option("--ties", help="ν of Davidson's likelihood; 0: leave ties out")] = 1.0,
    kept_back: Annotated[float, typer.Option("--kept-back", help="share of the images that choose the weights")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="of all chance")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train a reward model on preference pairs; those of some images are kept back, and choose the weights."""
    from accord.data.preferences import read_preferences
    from accord.models.load import LoraSettings
    from accord.rewards.alone import ALONE, train_on_pairs
    from accord.rewards.model import PARTS
    from accord.toml import build

    if out.exists() and not (out / "reward.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is no reward model, which alone would be replaced; name another folder")
    if out.exists() and (others := sorted(path.name for path in out.iterdir() if path.name not in PARTS)):
        raise RunError(
            f"{out} holds {', '.join(others[:3])} beside a reward model, and all of it would be removed; name another "
            "folder"
        )
    if (out / "reward.json").is_file():
        tell(f"{out} holds a reward model, which the new one will replace")
    hush()
    given = {"steps": steps, "learning_rate": learning_rate, "prompts_per_batch": batch, "head": head}
    given |= {"centring": centring, "ties": ties, "kept_back": kept_back}
    config = build(type(ALONE), {"choose": "pairs", **given})
    lora = LoraSettings(rank=lora_rank, alpha=2 * lora_rank) if lora_rank else None
    judged = read_preferences(pairs, ties=True)
    trained, ranking = train_on_pairs(model, judged, config, lora=lora, seed=seed, quiet=quiet)
    trained.save(out)
    for name, share in ranking.by_type.items():
        say(f"{name or 'pairs'}: {share:.1%} of {ranking.asked[name]} pairs kept back are judged as people did")
    say(f"{len(judged)} pairs: {out}")


@reward_app.command("evaluate")
def reward_evaluate(
    model: Model,
    pairs: Pairs,
    report: Annotated[
        Path | None, typer.Option("--report", help="an HTML page, with the pictures it gets wrong")
    ] = None,
) -> None:
    """Say how often a reward model judges pairs as people did, how sure it is, and how sure it should be."""
    from accord.data.preferences import read_preferences
    from accord.evaluation.judging import judge_pairs, write_judging
    from accord.rewards.model import RewardModel

    hush()
    loaded, judged = RewardModel.load(model), read_preferences(pairs)
    found = judge_pairs(loaded, judged)
    say(found.table())
    if report is not None:
        write_judging(report, model.resolve().name, found, judged)
        say(f"report: {report}")


@reward_app.command("serve")
def reward_serve(
    model: Model,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="on 127.0.0.1; 0 for any that is free")] = 8765,
) -> None:
    """Score answers for programs of this machine, over HTTP on 127.0.0.1, until Ctrl-C."""
    from accord.federation.loopback import LoopbackServer
    from accord.federation.site import Site
    from accord.rewards.model import RewardModel

    hush()
    with LoopbackServer(Site(model.resolve().name, RewardModel.load(model)), port) as server:
        tell(f"POST {server.address}/score; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
