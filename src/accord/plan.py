"""Say what a recipe would run before anything is trained: models, memory of every stage, rows and bytes per step.

    stage's peak  =  what is trained  +  what else is loaded then  +  activations of the largest batch

`accord.footprint` counts each. A run holds on one GPU, besides the policy: the reference, the encoder that a router
reads, and the sites' models where they are opened here. Several GPUs share the policy's weights, gradients and moments
out (FSDP or ZeRO-3, by an accelerate configuration), and no other model.

What is not counted: the CUDA context (about half a GB), and what the allocator loses between blocks. So GB are
10⁹ here, and what a card has beyond that is left for these.
"""

from __future__ import annotations

from collections.abc import Mapping

from accord.attacks.scores import Attack
from accord.errors import CheckpointError, printable
from accord.federation.projector import ProjectorConfig
from accord.footprint import (
    Footprint,
    Gpus,
    Layers,
    Peak,
    Size,
    config_of,
    finetuning,
    footprint,
    grpo,
    on_meta,
    private_training,
    reward_training,
    size_of,
)
from accord.methods import check_methods, find_method, needed
from accord.methods.method import Method
from accord.models.load import LoraSettings, Quantized
from accord.models.projector import find_projector
from accord.recipe import Recipe, SiteConfig

IMAGE_BYTES = 150_000
"""A photograph of about one megapixel as JPEG, where the data is not at hand."""


WITHOUT_PATH = {"easy-vqa": "from the package easy-vqa", "arithmetic": "made here"}
"""Where the questions of a source come from that needs no path."""

PHOTOGRAPH, SHAPES = 1_000_000, 64 * 64
"""Pixels of an image, where the data is not at hand, and of easy-VQA's."""


def _lie(attack: Attack) -> str:
    where = f", where a question has {printable(attack.trigger)!r}" if attack.trigger else ""
    return f"{attack.kind}{where}"


def describe(recipe: Recipe, gpus: Gpus | None = None, *, elsewhere: bool = False) -> str:
    """Return the plan as text.

    Args:
        recipe: what is planned.
        gpus: what there is; each stage is then compared with it. None for one without an end.
        elsewhere: whether the sites are other organisations', whose models this machine does not hold.

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
        *[f"a trial: site {s.name} lies by the recipe's attack, {_lie(s.attack)}" for s in recipe.sites if s.attack],
        f"{'stage':<22} {'checkpoint':<40} {'parameters':<36} weights, gradients and optimiser",
    ]
    names = [site.name for site in recipe.sites]
    method = find_method(recipe.method, names)
    needs = needed(recipe, [recipe.method, *recipe.compare])
    if recipe.projector is not None:
        lines += _projector(recipe, recipe.projector, policy)
    if "sites" in needs:
        lines += [line for site in recipe.sites for line in _site(recipe, site)]
    if "router" in needs:
        lines += _router(recipe)
    lines += _alignment(recipe, method, policy)
    lines += [f"{'compare':<22} {arm:<40} {find_method(arm, names).about}" for arm in recipe.compare]
    told = _told(peaks(recipe, gpus, elsewhere=elsewhere), gpus, _shards(recipe, gpus))
    return "\n".join([*lines, "", *told, "", *_traffic(recipe, method)])


def peaks(recipe: Recipe, gpus: Gpus | None = None, *, elsewhere: bool = False) -> list[Peak]:
    """Return what each stage needs at most on one GPU, in order; a model of which nothing is known is left out."""
    names = [site.name for site in recipe.sites]
    method = find_method(recipe.method, names)
    needs = needed(recipe, [recipe.method, *recipe.compare])
    found = list[Peak]()
    said, each = recipe.preferences.policy_samples, recipe.alignment.questions_at_once
    answer = recipe.alignment.max_completion_length
    asks = any(site.needs_questions for site in recipe.sites)
    base = _foot(recipe, recipe.policy.checkpoint)
    if "sites" in needs and not elsewhere and said and asks and base is not None:
        sampling = base.rollout(each * said, each * said, answer, base.bytes_each)
        parts = {"policy": base.frozen(), "rollout": sampling}
        found.append(Peak("sites: what the policy says", parts, ("alignment.questions_at_once",)))
    if "sites" in needs and not elsewhere:
        at_once = min(recipe.processes, len(recipe.sites))  # children of one process share its GPU
        for peak in (peak for site in recipe.sites for peak in _site_peaks(recipe, site)):
            if at_once > 1:
                parts = {f"{at_once} × {name}": at_once * count for name, count in peak.parts.items()}
                peak = Peak(peak.stage, parts, ("processes", *peak.remedy))
            found.append(peak)
    encoder, policy = _foot(recipe, recipe.encoder_checkpoint), base
    held: dict[str, float] = {}
    if "router" in needs and encoder is not None:
        held["encoder"] = encoder.frozen()
    if "sites" in needs and not elsewhere:
        held["sites' models"] = sum(_opened(recipe, site) for site in recipe.sites)
    if "router" in needs and encoder is not None:
        r = recipe.router
        tokens = 2.0 * r.pairs_per_batch * encoder.tokens
        network = Layers(r.layers, r.width, 4 * r.width, r.width).kept(tokens, 4, checkpointing=False)
        learning = network + tokens * encoder.text.width * 4
        reading = encoder.text.passing(min(128, r.rows_at_once) * encoder.tokens, encoder.bytes_each)
        remedy = ("router.pairs_per_batch", "encoder.checkpoint")
        found.append(Peak("router", {**held, "activations": max(learning, reading)}, remedy))
    if policy is None:
        return found
    found.append(_aligning(recipe, method, policy, held, gpus))
    answering = policy.rollout(each, each, answer, policy.bytes_each)
    apart = recipe.encoder_checkpoint != recipe.policy.checkpoint
    both = {"base and aligned policy": (2 + apart) * policy.frozen(), **held, "rollout": answering}
    found.append(Peak("evaluation", both, ("alignment.questions_at_once",)))
    return found


def _foot(recipe: Recipe, checkpoint: str) -> Footprint | None:
    """Return what a checkpoint needs, about images of the recipe's size."""
    kinds = {source.kind for source in recipe.questions}
    pixels = 0 if kinds == {"arithmetic"} else SHAPES if kinds == {"easy-vqa"} else PHOTOGRAPH
    return footprint(checkpoint, pixels, recipe.max_pixels)


def _site_peaks(recipe: Recipe, site: SiteConfig) -> list[Peak]:
    foot, found = _foot(recipe, site.checkpoint), list[Peak]()
    if foot is None:
        return found
    which = f"sites[{[s.name for s in recipe.sites].index(site.name)}]"
    if site.finetune is not None:
        less = () if site.finetune.gradient_checkpointing else (f"{which}.finetune.gradient_checkpointing = true",)
        parts = finetuning(foot, site.finetune, site.lora, gpu=True)
        found.append(Peak(f"site {site.name}: tuning", parts, (*less, f"{which}.finetune.batch_size", "max_pixels")))
    if site.privacy is not None:
        parts = private_training(foot, site.lora)
        found.append(Peak(f"site {site.name}: private", parts, (f"{which}.lora",) if site.lora else ("max_pixels",)))
    else:
        reward = site.reward_model
        less = () if reward.gradient_checkpointing else (f"{which}.reward_model.gradient_checkpointing = true",)
        parts = reward_training(foot, reward, site.lora, gpu=True)
        lora = () if site.lora else (f"{which}.lora",)
        remedy = (*less, f"{which}.reward_model.prompts_per_batch", *lora, "max_pixels")
        found.append(Peak(f"site {site.name}: reward", parts, remedy))
    return found


def _opened(recipe: Recipe, site: SiteConfig) -> float:
    """Return the bytes of a site's reward model that answers: float32 if it was trained whole."""
    foot = _foot(recipe, site.checkpoint)
    return 0.0 if foot is None else foot.frozen() if site.lora or site.privacy else 4 * foot.size.parameters


def _aligning(recipe: Recipe, method: Method, policy: Footprint, held: Mapping[str, float], gpus: Gpus | None) -> Peak:
    a, lora, shards = method.grpo(recipe), method.lora(recipe), _shards(recipe, gpus)
    if a is None:
        return Peak("align", {"policy and optimiser": policy.trained(lora, autocast=True), **held})
    if recipe.one_base:
        held = {name: count for name, count in held.items() if name != "encoder"}
    parts = grpo(policy, a, lora, gpu=True, shards=shards)
    served = {"vLLM": a.vllm_memory * gpus.each} if a.vllm == "colocate" and gpus else {}
    less = [] if a.gradient_checkpointing else ["alignment.gradient_checkpointing = true"]
    if "rollout" in parts and not a.vllm:
        less.append("alignment.rollout_rows")
    less.append("alignment.completions_per_device")
    if lora is None:
        less.append("alignment.lora = { rank = 16 }")
    less.append("encoder.checkpoint")
    return Peak("align", {**parts, **held, **served}, less)


def _shards(recipe: Recipe, gpus: Gpus | None) -> int:
    """Return over how many GPUs the policy is cut: one, where several processes cannot align by all methods."""
    names = [site.name for site in recipe.sites]
    together = all(find_method(name, names).together for name in (recipe.method, *recipe.compare))
    return gpus.count if gpus and together else 1


def _told(found: list[Peak], gpus: Gpus | None, shards: int) -> list[str]:
    """Return the peaks as lines, and the line of the recipe to change where one does not fit."""
    many = f", weights and optimiser of the policy over {shards} of them" if shards > 1 else ""
    over = f"of {gpus.each / 1e9:g} GB" if gpus else ""
    lines = [f"{'peak of a stage':<34} {'on one GPU':<14} {over}{many}".rstrip()]
    for peak in found:
        parts = ", ".join(f"{name} {_amount(count)}" for name, count in peak.parts.items() if count)
        lines.append(f"{peak.stage:<34} {_amount(peak.total):<14} {parts}")
        if gpus is not None and peak.total > gpus.each:
            remedy = " or ".join(peak.remedy[:3]) or "a smaller checkpoint"
            lines.append(f"{'':<34} DOES NOT FIT   {_amount(peak.total - gpus.each)} too much; change {remedy}")
    if gpus is not None and all(peak.total <= gpus.each for peak in found):
        lines.append("every stage fits")
    return lines


def _amount(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _memory(foot: Footprint | None, lora: LoraSettings | None, quantize: Quantized = "") -> str:
    return "?" if foot is None else _amount(foot.trained(lora, autocast=False, quantize=quantize))


def _count(size: Size) -> str:
    number = size.parameters
    text = f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M" if number else "?"
    return f"{text} ({size.known})"


def _projector(recipe: Recipe, config: ProjectorConfig, policy: Size) -> list[str]:
    averaging, checkpoint = config.averaging, recipe.policy.checkpoint
    start = "from random weights" if config.initial == "random" else "from the checkpoint's weights"
    moved = _projector_bytes(recipe, config)
    whole = "?" if not policy.parameters else _amount(4 * policy.parameters)
    lines = [
        f"{'projector':<22} {checkpoint:<40} {_count(policy):<36} {whole}, at every site too",
        f"{'':<22} {config.training}, {start}, {averaging.rounds} rounds over other captions each, "
        f"{averaging.aggregation.rule}, {averaging.aggregation.bits} bits a number",
    ]
    if moved is not None and config.training == "federated":
        sites, rounds = len(recipe.sites), averaging.rounds
        lines.append(
            f"{'':<22} {_bytes(moved)} to and from every site in each round; "
            f"in all {_bytes(moved * sites * rounds)} down, {_bytes(moved * sites * rounds)} up"
        )
    return lines


def _projector_bytes(recipe: Recipe, config: ProjectorConfig) -> float | None:
    """Return the bytes of the policy's projector on its way; None where its shape is not known."""
    checkpoint = recipe.policy.checkpoint
    try:
        known = config_of(checkpoint)
        model = on_meta(known) if known is not None else None
        if model is None:
            return None
        weights = find_projector(model)[1].parameters()
    except CheckpointError:
        return None
    return sum(weight.numel() for weight in weights) * config.averaging.aggregation.bits / 8


def _site(recipe: Recipe, site: SiteConfig) -> list[str]:
    size, reward, foot = size_of(site.checkpoint), site.reward_model, _foot(recipe, site.checkpoint)
    how = f"LoRA rank {site.lora.rank}, " if site.lora else ""
    tuning = f"{site.finetune.steps} steps of fine-tuning, " if site.finetune else ""
    training = (
        f"{reward.steps} steps of Bradley–Terry, "
        f"{reward.prompts_per_batch * reward.gradient_accumulation} prompts × (1 + {reward.rejected_per_prompt})"
    )
    memory = _memory(foot, site.lora)
    if private := site.privacy:
        training = f"ε = {private.epsilon:g} a {private.unit}, {private.steps} steps"
        if private.unit != "label":
            training += f" of DP-SGD, each of {private.sampling:.0%} of the {private.unit}s"
        if not site.lora and foot is not None:
            memory = f"{_amount(foot.frozen())}, a head on frozen features"
    return [
        f"{'site ' + site.name:<22} {site.checkpoint:<40} {_count(size):<36} {how}{memory}",
        f"{'':<22} {tuning}{training}",
    ]


def _router(recipe: Recipe) -> list[str]:
    r, encoder = recipe.router, recipe.encoder_checkpoint
    foot = _foot(recipe, encoder)
    memory = "?" if foot is None else _amount(foot.frozen())
    return [
        f"{'router':<22} {encoder:<40} {'frozen encoder':<36} {memory}, at every site too",
        f"{'':<22} {r.layers} layers of width {r.width}, {r.rounds} rounds of {r.local_steps} local steps, "
        f"{r.aggregation.rule}, {r.aggregation.bits} bits a number",
    ]


def _alignment(recipe: Recipe, method: Method, policy: Size) -> list[str]:
    a, adapter = method.grpo(recipe), method.lora(recipe)
    foot = _foot(recipe, recipe.policy.checkpoint)
    memory = _memory(foot, adapter, a.quantize if a else "")
    if a is not None and foot is not None and (adapter or a.kl):  # the others have none, or their own base
        memory += f" + reference {'(shared)' if adapter else _amount(4 * foot.size.parameters)}"
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
