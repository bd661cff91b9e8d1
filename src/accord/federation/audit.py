"""Name the site whose updates spoil a shared model, by labelled questions of the server that each is tried without.

    d_ik   = ℓ_i(w + Σ_j p_j Δ_j) − ℓ_i(w + Σ_{j≠k} p_j Δ_j)   what site k's update adds to the loss of question i
    O_k    = − mean over the questions of site k's own kinds of Σ_t d_ik          what it teaches of them so far
    H_k    = mean over kinds of the mean over their questions of Σ_t d_ik         what it spoils over all kinds so far
    u_k    = median_j of (O_j − 2 s_j), all over the rounds in which k sent one   what a site teaches, s its error
    named  O_k + 2 s_k < u_k / 4  it teaches next to nothing of its own kind;     or H_k − 2 s_k > u_k / 2  it spoils

Updates of different honest sites pull in different directions, so that distances and majorities name specialists
(`accord.federation.aggregation`). What no honest site does is not to teach its own kind: its local steps descend just
that loss. Who sends an opposite spoils that; ALIE and IPM, which send what others send, teach others' kinds or none. A
long opposite of the others' mean may still favour its sender's kind, and is seen over all kinds.

The change that is tried is the plain weighted mean of the updates, whatever the rule makes of them: it has no memory,
and is not divided by its own size. It is shortened by `bounded` first. The errors s are over questions, each of which
carries its sum over the rounds, so that rounds need not be independent. A site that comes late is compared over the
rounds that it was there: the first teach most. A warning, the metrics and the report name the
site, and a person decides; with `leaves_out` it is left out of the average, from the round that names it on, and goes
on being asked.

Limits: at least three sites, fewer than half of which lie; four questions of a site's kinds, or it is not judged. A
site that teaches its own kind and spoils others by less than u_k / 2 is not named: nor is an honest specialist, who
does the same. A site that was honest for long must spoil as much as it has taught before it is named.

Sources: leave-one-out loss on labelled examples, Fang et al. 2020, arXiv 1911.11815, section 5 (LFR); a server's own
examples as the measure, Xie et al. 2019, arXiv 1805.10032 (Zeno). Differs: both judge one round, by all examples;
here the sum over rounds is judged, by a site's own kinds first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accord.federation.aggregation import BOUND, Update, Weights, bounded, mean, moved

SITES, QUESTIONS = 3, 4
"""The fewest sites among which one is judged, and the fewest questions of its kinds by which."""


@dataclass(frozen=True)
class Finding:
    """What the rounds so far tell of a site, in nats of the mean loss of a question."""

    taught: float  # O_k, of its own kinds
    spoilt: float  # H_k, over all kinds
    named: int = 0  # the first round after which it was named, from 1; 0 for not


class Audit:
    """Judge the sites of one training by what each one's updates do to the server's labelled questions.

    Args:
        losses: `ℓ [N]` of the questions under given weights.
        kinds: of each question, `[N]`.
        own: for every site, whether each question is of its own kinds, `[N]`.
        leaves_out: whether a named site is left out of the averages.

    Attributes:
        findings: by site, of those that were judged; empty before the first round.
    """

    def __init__(
        self,
        losses: Callable[[Weights], Tensor],
        kinds: Sequence[str],
        own: Mapping[str, Sequence[bool]],
        *,
        leaves_out: bool = False,
    ) -> None:
        self.losses, self.leaves_out = losses, leaves_out
        count = Counter(kinds)
        self.alike = torch.tensor([1 / (len(count) * count[kind]) for kind in kinds], dtype=torch.double)  # sums to 1
        same = torch.tensor([[kind == other for other in kinds] for kind in kinds], dtype=torch.double)
        self.of_kind = same / same.sum(dim=1, keepdim=True)  # [N, N]: to the mean over a question's kind
        self.own = {site: torch.tensor(each, dtype=torch.bool) for site, each in own.items()}
        self.harm: list[dict[str, Tensor]] = []  # d_ik `[N]` of every round that was judged, by site
        self.findings: dict[str, Finding] = {}

    @property
    def left_out(self) -> set[str]:
        """The sites that the averages go without."""
        return {site for site, found in self.findings.items() if found.named} if self.leaves_out else set()

    def round(
        self, number: int, current: Weights, updates: Mapping[str, Update], weights: Mapping[str, float]
    ) -> list[str]:
        """Take in a round; return the sites that are named for the first time.

        Args:
            number: the round, from 1.
            current: w.
            updates: Δ_k of the sites that sent one.
            weights: p_k of the same sites.
        """
        judged = [site for site in updates if site in self.own and int(self.own[site].sum()) >= QUESTIONS]
        if len(judged) < SITES:
            return []
        shorter = dict(zip(updates, bounded([*updates.values()], BOUND), strict=True))
        total = mean([shorter[site].change for site in updates], [weights[site] for site in updates])
        together = self.losses(moved(current, total)).double()
        self.harm.append({})
        for site in judged:
            own = shorter[site].change
            rest = {name: change - weights[site] * own[name].double() for name, change in total.items()}
            harm = together - self.losses(moved(current, rest)).double()
            self.harm[-1][site] = harm.nan_to_num(
                0.0, posinf=0.0, neginf=0.0
            )  # what breaks the model is named elsewhere
        there = defaultdict(list)
        for site in judged:
            there[tuple(n for n, sent in enumerate(self.harm) if site in sent)].append(site)
        return [site for rounds, sites in there.items() for site in self._judge(number, sites, rounds)]

    def _judge(self, number: int, judged: Sequence[str], rounds: Sequence[int]) -> list[str]:
        """Judge sites that sent updates in the same rounds, by these; return those named for the first time."""
        sums: dict[str, Tensor] = {}
        for sent in (self.harm[n] for n in rounds):
            for site, harm in sent.items():
                sums[site] = sums.get(site, 0.0) + harm
        taught = {}
        for site, harm in sums.items():
            of_own = -harm[self.own[site]]
            taught[site] = of_own.mean().item(), 2 * (of_own.std() / len(of_own) ** 0.5).item()
        usual = sorted(good - unsure for good, unsure in taught.values())[len(taught) // 2]
        new = []
        for site in judged:
            (good, unsure), within = taught[site], sums[site] - self.of_kind @ sums[site]
            bad, doubt = (self.alike @ sums[site]).item(), 2 * (self.alike * within).norm().item()
            wrong = usual > 0 and (good + unsure < usual / 4 or bad - doubt > usual / 2)
            before = self.findings[site].named if site in self.findings else 0
            new += [site] if wrong and not before else []
            self.findings[site] = Finding(good, bad, before or (number if wrong else 0))
        return new
