"""A reward model with a guarantee whose language layers learn, too: a LoRA adapter and a linear head, by DP-SGD.

    g_i = ∇_ψ −log σ(w · (h(c_i) − h(r_i)))              ψ the adapter's weights and w; one pass for both answers
    g_u = clip_C(Σ_{i∈u} g_i)                            one unit's contribution, over all of ψ together
    ĝ   = (Σ_{u∈S} g_u + σ C ξ) / (q U)                  S: every unit with probability q; ξ standard normal
    ψ  ←  Adam(ψ, ĝ)                                     reads ĝ alone; the mean of the second half is the model

The guarantee is that of `accord.rewards.private`, and is accounted as it is; there is no projection to pay for. Both
answers of a pair stand in one row behind one copy of their prompt (`accord.models.prefix`), or in two rows whose
gradients are added, so that a pair is clipped once and not its two answers: a trainer that stacks 2 B rows and clips
each of them protects half of what it says.

The gradients of pairs come from the hooks of Opacus' `GradSampleModule`. They carry our reward models as they are: only
the linear layers of adapter and head are hooked, no weight of them is tied, and what has buffers or works in place is
frozen. Clip, noise and samples are our own, since Opacus draws them from torch's generator.

A hook and an optimiser hold weights by identity. Where a model's weights are made or replaced after they took hold, as
when it comes to its device after the adapter was added, training looks healthy, ε is spent, and no weight of the model
moves (Opacus issue 820). So the model is on its device first (`fresh_model`), and at every step the weights must be the
model's own and each have as many gradients as there were rows.

Sources: Abadi et al. 2016 (arXiv 1607.00133, algorithm 1); Hu et al. 2021 (arXiv 2106.09685) for the adapter; Li et al.
2022 (arXiv 2110.05679) and Yu et al. 2022 (arXiv 2110.06500), who train adapters by DP-Adam. Differs: the model is
evaluated as it scores, without dropout; the mean of iterates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from accord.data.images import load_images
from accord.errors import RecipeError, RunError
from accord.models.inputs import Batch, build_batch
from accord.models.load import LoraSettings
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, clip_rows
from accord.types import PreferencePair

RATE = 0.01
"""Adam's learning rate, where `privacy.learning_rate` is 0."""


def fresh_model(checkpoint: str, lora: LoraSettings, noise: SecretNoise) -> RewardModel:
    """Return an untrained reward model on its device, its adapter added there; its weights are of the key alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(noise.uniform(1) * 2**53))
        model = RewardModel.from_checkpoint(checkpoint, lora=lora)
    assert isinstance(model.head, nn.Linear)
    nn.init.zeros_(model.head.bias)
    model.head.bias.requires_grad_(False)  # a margin has none
    return model.eval()


class _Margins(nn.Module):
    """R(c) − R(r) of every pair of a batch, `[N]`; for each prompt it holds a chosen and a rejected answer."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        states = self.model.last_states(batch).unflatten(0, (-1, 2))
        margins: Tensor = self.model.head(states[:, 0] - states[:, 1]).squeeze(-1)
        return margins


def trained_weights(model: RewardModel) -> dict[str, nn.Parameter]:
    """Return what is trained of a model, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def pair_gradients(model: RewardModel) -> Iterator[Callable[[Sequence[PreferencePair]], Tensor]]:
    """Give a function that returns the gradient of each of N pairs, `[N, Ψ]`, over all trained weights as one vector.

    The model's hooks are taken away again.

    Raises:
        RecipeError: Opacus is not installed.
        RunError: a weight of the model is not one that the hooks are on.
    """
    try:
        from opacus import GradSampleModule
    except ImportError as error:
        raise RecipeError(
            'gradients of single pairs are computed by opacus, which is not installed; pip install "accord[privacy]"'
        ) from error
    weights = trained_weights(model)
    hooked = GradSampleModule(_Margins(model), batch_first=True, loss_reduction="sum")
    for layer in model.modules():  # Opacus listens where a layer is trained; all others stay as they score
        layer.train(any(w.requires_grad for w in layer.parameters(recurse=False)) and not any(layer.children()))

    def gradients(pairs: Sequence[PreferencePair]) -> Tensor:
        check_weights(model, weights, 0)
        batch = build_batch(
            model.processor,
            [pair.prompt for pair in pairs],
            [load_images(pair.images) for pair in pairs],
            [[pair.chosen, pair.rejected] for pair in pairs],
        )
        for weight in weights.values():
            weight.grad = weight.grad_sample = None  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            (-logsigmoid(hooked(batch.to(weight.device)))).sum().backward()
        check_weights(model, weights, len(pairs))
        found = [w.grad_sample.flatten(1).unflatten(0, (len(pairs), -1)).sum(1) for w in weights.values()]  # type: ignore[attr-defined]
        return torch.cat([rows.float() for rows in found], dim=1)

    try:
        yield gradients
    finally:
        hooked.to_standard_module()
        for weight in weights.values():
            weight.grad = None
        model.eval()


def check_weights(model: RewardModel, weights: dict[str, nn.Parameter], pairs: int) -> None:
    """Refuse to go on where the weights that are trained are not those that the model computes with.

    After a pass over so many pairs each has a gradient for every row; before one, with 0, they are the model's own.

    Raises:
        RunError: says which.
    """
    now = trained_weights(model)
    for name, weight in weights.items():
        rows = getattr(weight, "grad_sample", None)
        if now.get(name) is not weight or (pairs and (rows is None or len(rows) not in (pairs, 2 * pairs))):
            raise RunError(
                f"the weight {name} is not trained: the model's own was made or moved after its gradients were asked "
                "for; put the model on its device before the adapter is added, and train again"
            )


def private_adapter(
    model: RewardModel,
    pairs: Sequence[PreferencePair],
    unit: Tensor,
    privacy: Privacy,
    sigma: float,
    noise: SecretNoise,
    *,
    pairs_at_once: int = 16,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train adapter and head in place by DP-SGD.

    Args:
        model: of `fresh_model`.
        pairs: N pairs.
        unit: of every pair, `[N]`, from 0 to U − 1.
        privacy: settings; `dimensions` is not read.
        sigma: σ, of the noise of each step over the clip.
        noise: draws the noise and the samples; of a key that was used for `fresh_model` alone.
        pairs_at_once: pairs of one forward pass, and units whose gradients are held at once.
        on_step: called after every step, told nothing.

    Raises:
        RunError: as `pair_gradients`.
    """
    members: list[list[int]] = [[] for _ in range(int(unit.max()) + 1)]
    for place, mine in enumerate(unit.tolist()):
        members[mine].append(place)
    weights = list(trained_weights(model).values())
    sizes = [weight.numel() for weight in weights]
    optimiser = torch.optim.Adam(weights, lr=privacy.learning_rate or RATE)
    total, averaged = torch.zeros(sum(sizes), dtype=torch.float64), 0
    with pair_gradients(model) as gradients:
        for step in range(privacy.steps):
            drawn = (noise.uniform(len(members)) < privacy.sampling).nonzero().flatten().tolist()
            summed = torch.zeros(sum(sizes), dtype=torch.float64)
            for start in range(0, len(drawn), pairs_at_once):
                asked = [members[u] for u in drawn[start : start + pairs_at_once]]
                summed += unit_gradients(gradients, pairs, asked, privacy.clip, pairs_at_once).sum(dim=0)
            summed += sigma * privacy.clip * noise.normal(len(summed))
            mean = summed / (privacy.sampling * len(members))
            for weight, part in zip(weights, mean.split(sizes), strict=True):
                weight.grad = part.view_as(weight).to(weight)
            optimiser.step()
            if 2 * step >= privacy.steps - 1:
                total += torch.cat([weight.detach().double().flatten().cpu() for weight in weights])
                averaged += 1
            on_step()
    with torch.no_grad():
        for weight, part in zip(weights, (total / averaged).split(sizes), strict=True):
            weight.copy_(part.view_as(weight))


def unit_gradients(
    gradients: Callable[[Sequence[PreferencePair]], Tensor],
    pairs: Sequence[PreferencePair],
    units: Sequence[Sequence[int]],
    clip: float,
    pairs_at_once: int,
) -> Tensor:
    """Return what each unit adds to a step, `[U, Ψ]` in double precision, none longer than `clip`.

    A unit whose gradient is not finite adds nothing, whatever the others do.

    Args:
        gradients: of `pair_gradients`.
        pairs: N pairs.
        units: of each unit which pairs it has.
        clip: C.
        pairs_at_once: pairs of one forward pass.
    """
    owner = [(place, n) for n, unit in enumerate(units) for place in unit]
    found: list[Tensor] = []
    for start in range(0, len(owner), pairs_at_once):
        part = owner[start : start + pairs_at_once]
        rows = gradients([pairs[place] for place, _ in part]).double().cpu()
        if not found:
            found = [rows.new_zeros(len(units), rows.shape[1])]
        found[0].index_add_(0, torch.tensor([n for _, n in part]), rows)
    whole = found[0].isfinite().all(dim=1, keepdim=True)
    return clip_rows(torch.where(whole, found[0], 0.0), clip)
