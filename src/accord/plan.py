"""Say what a recipe would run before anything is downloaded or trained: models, memory, rows and bytes per step.

Memory per parameter: 16 bytes where it is trained (weight, gradient and AdamW's two moments, each float32), 2 where it
is frozen (bfloat16), 4 in the reference of a policy that is trained whole, which TRL loads in the policy's float32. It
leaves out activations, which depend on the sequence length and on gradient checkpointing.
Sizes of checkpoints that are not on this machine are read from their names (`…-7B-…`), and said to be.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from accord.errors import CheckpointError
from accord.federation.projector import ProjectorConfig
from accord.methods import check_methods, find_method, needed
from accord.methods.method import Method
from accord.models.inspection import inspect_weights
from accord.models.load import locate
from accord.recipe import Recipe, SiteConfig

IMAGE_BYTES = 150_000
"""A photograph of about one megapixel as JPEG, where the data is not at hand."""


WITHOUT_PATH = {"easy-vqa": "from the package easy-vqa", "arithmetic": "made here"}
"""Where the questions of a source come from that needs no path."""

TRAINED, FROZEN, REFERENCE = 16, 2, 4
"""Bytes per parameter."""


@dataclass(frozen=True)
class Size:
    """How many parameters a checkpoint has, and how that is known."""

    parameters: float
    known: str


def size_of(checkpoint: str) -> Size:
    """Read a local checkpoint's size from its safetensors headers, another's from its name."""
    try:
        place = Path(locate(checkpoint))
    except CheckpointError:
        return Size(0.0, "not there")
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    if files:
        total = 0
        for file in files:
            total += sum(math.prod(shape) for shape in inspect_weights(file).values())
        return Size(float(total), "counted")
    named = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", checkpoint, re.IGNORECASE)
    if named:
        return Size(float(named[1]) * (1e9 if named[2].lower() == "b" else 1e6), "by its name, to be downloaded")
    return Size(0.0, "unknown, to be downloaded")


def _trained(lora_rank: int) -> float:
    """Return the bytes per parameter of a model trained whole (rank 0) or through an adapter."""
    # A rank-r adapter on the linear layers of a transformer of width d adds about 2 r / d of its parameters; d ~ 4096.
    return FROZEN + TRAINED * 2 * lora_rank / 4096 if lora_rank else TRAINED


def _gigabytes(size: Size, bytes_each: float) -> str:
    total = size.parameters * bytes_each
    return "?" if not total else f"{total / 1e9:.1f} GB" if total >= 1e8 else f"{total / 1e6:.1f} MB"


def _count(size: Size) -> str:
    number = size.parameters
    text = f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.2f} M" if number else "?"
    return f"{text} ({size.known})"


def describe(recipe: Recipe) -> str:
    """Return the plan as text.

    Raises:
        RecipeError: a method cannot be done by this recipe.
    """
    check_methods(recipe, [recipe.method, *recipe.compare])
    policy = size_of(recipe.policy.checkpoint)
    lines = [
        f"plan of {recipe.name}, seed {recipe.seed}",
        "",
        "questions",
        *[f"  {s.kind:<12} {s.path or WITHOUT_PATH.get(s.kind, '')}" for s in recipe.questions],
        "",
        f"{'stage':<22} {'checkpoint':<40} {'parameters':<36} memory while training, without activations",
    ]
    names = [site.name for site in recipe.sites]
    method = find_method(recipe.method, names)
    needs = needed(recipe, [recipe.method, *recipe.compare])
    if recipe.projector is not None:
        lines += _projector(recipe.projector, recipe.policy.checkpoint, policy)
    if "sites" in needs:
        lines += [line for site in recipe.sites for line in _site(site)]
    if "router" in needs:
        lines += _router(recipe)
    lines += _alignment(recipe, method, policy)
    lines += [f"{'compare':<22} {arm:<40} {find_method(arm, names).about}" for arm in recipe.compare]
    return "\n".join([*lines, "", *_traffic(recipe, method)])


def _projector(config: ProjectorConfig, checkpoint: str, policy: Size) -> list[str]:
    averaging = config.averaging
    start = "from random weights" if config.initial == "random" else "from the checkpoint's weights"
    return [
        f"{'projector':<22} {checkpoint:<40} {_count(policy):<36} {_gigabytes(policy, REFERENCE)}, at every site too",
        f"{'':<22} {config.training}, {start}, {averaging.rounds} rounds over other captions each, "
        f"{averaging.aggregation.rule}, {averaging.aggregation.bits} bits a number",
    ]


def _site(site: SiteConfig) -> list[str]:
    size, reward = size_of(site.checkpoint), site.reward_model
    rank = site.lora.rank if site.lora else 0
    how = f"LoRA rank {rank}, " if rank else ""
    tuning = f"{site.finetune.steps} steps of fine-tuning, " if site.finetune else ""
    return [
        f"{'site ' + site.name:<22} {site.checkpoint:<40} {_count(size):<36} {how}{_gigabytes(size, _trained(rank))}",
        f"{'':<22} {tuning}{reward.steps} steps of Bradley–Terry, "
        f"{reward.prompts_per_batch * reward.gradient_accumulation} prompts × (1 + {reward.rejected_per_prompt})",
    ]


def _router(recipe: Recipe) -> list[str]:
    r, encoder = recipe.router, recipe.encoder_checkpoint
    memory = _gigabytes(size_of(encoder), FROZEN)
    return [
        f"{'router':<22} {encoder:<40} {'frozen encoder':<36} {memory}, at every site too",
        f"{'':<22} {r.layers} layers of width {r.width}, {r.rounds} rounds of {r.local_steps} local steps, "
        f"{r.aggregation.rule}, {r.aggregation.bits} bits a number",
    ]


def _alignment(recipe: Recipe, method: Method, policy: Size) -> list[str]:
    a, adapter = method.grpo(recipe), method.lora(recipe)
    rank = adapter.rank if adapter else 0
    memory = _gigabytes(policy, _trained(rank))
    if a is not None:  # the others have no reference beside the policy, or its own weights without the adapter
        memory += f" + reference {'(shared)' if rank else _gigabytes(policy, REFERENCE)}"
    lines = [
        f"{'align':<22} {recipe.policy.checkpoint:<40} {_count(policy):<36} {memory}",
        f"{'':<22} by {recipe.method}: {method.about or 'a method of another package'}",
    ]
    if training := method.training(recipe):
        lines.append(f"{'':<22} {training}")
    if a is not None:
        lines.append(
            f"{'':<22} {a.steps} steps of {a.prompts_per_step} prompts × {a.group_size} completions, KL weight {a.kl}, "
            f"learning rate {a.learning_rate}"
        )
    return lines


def _traffic(recipe: Recipe, method: Method) -> list[str]:
    a, asked, sites = recipe.alignment, method.asks(recipe), len(recipe.sites)
    stays = "stays at each site: its images, questions and preference pairs"
    if method.role == "bound" and "private" in method.needs:
        return ["all sites' questions and preference pairs are in one place, which no federation may do"]
    if not asked:
        if "sites" in method.needs:
            return ["nothing is sent while the policy is aligned", f"{stays}, and its reward model"]
        return ["no site is asked to judge an answer while the policy is aligned", stays]
    image = 300 if all(s.kind == "easy-vqa" for s in recipe.questions) else IMAGE_BYTES
    text = a.max_completion_length * 4
    # Where each completion goes to a site of its own, a prompt's image may go to several sites, at most to all.
    least = a.prompts_per_step * (asked * image + asked * a.group_size * text)
    most = a.prompts_per_step * (sites * image + asked * a.group_size * text)
    back = a.prompts_per_step * a.group_size * asked * 9
    return [
        f"to the sites, per GRPO step: {_bytes(least)} to {_bytes(most)} "
        f"(images of {_bytes(image)}, at most {text} bytes of text a completion)",
        f"from the sites, per GRPO step: {_bytes(back)} of scores; "
        f"in all {a.steps} steps: at most {_bytes(a.steps * most)} down, {_bytes(a.steps * back)} up",
        f"{stays}, and its reward model",
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
