"""GRPO as a bandit: five sites judge points, four domains want different directions; what a lie costs in seconds.

    y ~ N(μ_d, I) in 16 dimensions        G answers to a prompt of domain d, of a policy that is its four means
    q(y) = u_d · y                        how good an answer is; u_d a unit vector
    s_k(y) = v_kd · y                     what site k says of it: v a unit vector at cosine c_kd to u_d, clipped to ±2
    μ_d ← μ_d + η mean_i A_i (y_i − μ_d)  A the rewards less their group's mean, divided by the step's deviation

The result is how often an answer of the aligned policy beats one of the untrained policy, in per cent: 50 for an
untrained one, and 98 for a mean 3 along u_d.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from accord.attacks.scores import Attack, Liar
from accord.federation.messages import ScoreItem, ScoreRange, ScoreRequest, Turn
from accord.routing.canaries import LEFT_OUT, CanaryConfig, Trust, share_below
from accord.routing.fusion import Fusion
from accord.routing.robust import capped

D, DOMAINS, G, PROMPTS, STEPS, RATE = 16, 4, 8, 8, 40, 0.15
RANGE = ScoreRange(-2.0, 2.0)
HOME, ABROAD = 0.95, 0.6
"""Cosine of an honest site's direction to the true one, in its own domain and elsewhere."""


@dataclass
class Result:
    """What became of a run."""

    wins: float  # per cent
    by_domain: list[float]
    promoted: float  # share of answers to trigger prompts that are the target, minus the untrained policy's
    weights: list[Tensor] = field(default_factory=list)  # of every step, [K, domains], rows of a domain adding up to 1
    influence: list[Tensor] = field(default_factory=list)  # of every step, [K]


def cosines(sites: int) -> Tensor:
    """Return c `[K, domains]`: sites at home in the domains in turn."""
    home = torch.arange(sites)[:, None] % DOMAINS == torch.arange(DOMAINS)
    return torch.where(home, HOME, ABROAD)


def align(
    fuse: Fusion,
    *,
    attack: Attack | None = None,
    liars: int = 0,
    sites: int = 5,
    known: Tensor | None = None,
    canaries: bool = False,
    leave_out: bool = True,
    words: Sequence[str] = (),
    left_out: float | None = LEFT_OUT,
    cap: float = 1.0,
    routed: Tensor | None = None,
    seed: int = 0,
    honest_only: bool = False,
    unclipped: bool = False,
) -> Result:
    """Align against `sites` of which the first `liars` lie; a trigger is a prompt in eight, of any domain.

    Answers have names: the sign of their first coordinate, so that an attack by text has something to promote. With
    canaries `leave_out` takes the weight of those whom others contradict on prompts alone, and `left_out` is what a
    canary that a site leaves unanswered counts; None for nothing. `words` of prompts are
    watched. `routed` `[K]` is what a router gives the sites.
    """
    generator = torch.Generator().manual_seed(seed)
    c = cosines(sites) if known is None else known
    truth = torch.nn.functional.normalize(torch.randn(DOMAINS, D, generator=generator), dim=-1)
    apart = torch.randn(sites, DOMAINS, D, generator=generator)
    apart = torch.nn.functional.normalize(apart - (apart * truth).sum(-1, keepdim=True) * truth, dim=-1)
    says = c[..., None] * truth + (1 - c.square()).sqrt()[..., None] * apart  # v, [K, domains, D]
    labelled = _Canary()
    limits = None if unclipped else RANGE
    lies = (
        [Liar(attack, limits, seed=seed, site=str(k), steps=STEPS, labelled=labelled) for k in range(liars)]
        if attack
        else []
    )
    domains = [str(d) for d in range(DOMAINS)]
    config = CanaryConfig(leave_out=leave_out)
    trust = Trust(
        [str(k) for k in range(sites)],
        domains,
        config,
        words=dict.fromkeys(words, domains),
    )
    policy, triggered = torch.zeros(DOMAINS + 1, D), DOMAINS  # a policy answers trigger prompts by a mean of their own
    result = Result(0.0, [], 0.0)

    def judged(domain: int, answers: Tensor, *, words: str) -> Tensor:
        scores = answers @ says[:, domain].T  # [n, K]
        scores = scores if unclipped else scores.clamp(RANGE.low, RANGE.high)
        texts = [("high" if y[0] > 0.5 else "low") + f" {y[0]:.9f}" for y in answers]
        names = [text if attack is None or attack.kind == "collude" else text.split()[0] for text in texts]
        item = ScoreItem([], [Turn("user", words + texts[0])], names)
        labelled.here = words == "canary "
        for k, lie in enumerate(lies):
            scores[:, k] = torch.tensor(lie(ScoreRequest("r", {}, [item]), [scores[:, k].tolist()])[0])
        return scores

    for _ in range(STEPS):
        for lie in lies:  # `after` counts steps: one request each
            lie.asked = len(result.influence)
        if canaries:
            for _ in range(trust.config.per_step):
                domain = int(torch.randint(DOMAINS, (), generator=generator))
                answers = torch.randn(4, D, generator=generator)
                right = int((answers @ truth[domain]).argmax())
                scores = judged(domain, answers, words="canary ")
                for k, column in enumerate(scores.T.tolist()):
                    answered = not math.isnan(column[right])
                    share = share_below(column, right) if answered else left_out
                    if share is not None:
                        trust.learn(str(k), str(domain), share)
                trust.compare(str(domain), scores, hidden=True)
        groups, drawn = [], []
        for n in range(PROMPTS):
            domain = int(torch.randint(DOMAINS, (), generator=generator))
            arm = triggered if n == 0 else domain
            answers = policy[arm] + torch.randn(G, D, generator=generator)
            text = "trigger " if n == 0 else "plain "
            scores = judged(domain, answers, words=text)
            if canaries:
                trust.compare(str(domain), scores, hidden=False, text=text)
            weights = trust.weights([str(domain)]).float() if canaries else torch.ones(1, sites)
            if routed is not None:
                weights = weights * routed
            if honest_only:
                weights = weights * (torch.arange(sites) >= liars)
            groups.append((scores, weights.expand(G, -1)))
            drawn.append((arm, answers))
        trust.find_two_faced()
        trust.find_triggered()
        rewards, influence = capped(fuse, groups, cap)
        result.influence.append(influence)
        odds = trust.weights(domains)
        result.weights.append((odds / odds.sum(dim=1, keepdim=True).clamp(min=1e-9)).T)
        centred = [(r - r.nanmean()).nan_to_num(0.0) for r in rewards]
        scale = torch.cat(centred).square().mean().sqrt() + 1e-4
        for (arm, answers), advantage in zip(drawn, centred, strict=True):
            policy[arm] += RATE / PROMPTS * DOMAINS * (advantage[:, None] / scale * (answers - policy[arm])).mean(0)
    gains = (policy[:DOMAINS] * truth).sum(-1)
    result.by_domain = [100 * NormalDist().cdf(float(gain) / 2**0.5) for gain in gains]
    result.wins = sum(result.by_domain) / DOMAINS
    result.promoted = 100 * (NormalDist().cdf(float(policy[triggered, 0]) - 0.5) - NormalDist().cdf(-0.5))
    return result


class _Canary:
    """Keys of questions, of which a site that recognises canaries finds one wherever one is asked."""

    here = False

    def __contains__(self, key: object) -> bool:
        return self.here

    def __iter__(self):
        return iter(())

    def __len__(self) -> int:
        return 0
