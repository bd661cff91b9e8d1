"""FedBis: sites train one binary selector together; it labels the server's own pairs for DPO.

    s(x, y_A, y_B) = softmax over the letters A and B of the base under one adapter, asked which answer is better
    w ← Σ_k (n_k / Σ_j n_j) w_k                          over all sites, every round
    label    the base answers public prompts twice; chosen is what the selector takes for better
    align    DPO of the base on these pairs, at the server

Source: Wu et al. 2024, arXiv 2407.03038, where it stands beside FedBiscuit, whose several selectors are trained by
groups of sites. It is FedBiscuit with one selector: no warm-up, no grouping, no vote. Differs as
`accord.methods.fedbiscuit` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from accord.errors import check_least, check_positive
from accord.federation.local import Averaging
from accord.methods.fedbiscuit import FedBiscuitConfig, biscuit
from accord.methods.method import Method, Table
from accord.models.load import LoraSettings
from accord.stages.alignment import Aligned
from accord.stages.job import Job


@dataclass(frozen=True)
class FedBisConfig:
    """How the selector is trained, and what is done with it."""

    averaging: Averaging = field(default_factory=lambda: Averaging(rounds=35, local_steps=5, learning_rate=3e-3))
    prompts: int = 1500  # public ones that the base policy answers
    answers: int = 2  # per prompt, of which all pairs are labelled
    temperature: float = 1.0  # of the answers
    dpo_steps: int = 150
    dpo_learning_rate: float = 1e-3
    beta: float = 0.1  # β of DPO
    sft: float = 0.0  # α, how much the likelihood of the chosen answers counts beside
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to label or to train."""
        check_least(self, prompts=1, answers=2, dpo_steps=1, beta=0, sft=0)
        check_positive(self, "temperature", "dpo_learning_rate")


SETTINGS: Final = Table("fedbis", FedBisConfig)


def fedbis(job: Job, stage: str) -> Aligned:
    """Let one selector of all sites label the server's own pairs, and take DPO steps there."""
    return biscuit(job, stage, FedBiscuitConfig(selectors=1, warmup_rounds=0, **vars(SETTINGS.of(job.recipe))))


METHODS: Final = {
    "fedbis": Method(
        fedbis,
        "nothing: one selector of all sites labels the server's own pairs, then DPO",
        needs=frozenset({"private"}),
        grpo=lambda recipe: None,
        lora=lambda recipe: SETTINGS.of(recipe).lora,
        tables=(SETTINGS,),
        steps=lambda recipe: SETTINGS.of(recipe).averaging.rounds,
        training=lambda recipe: (
            f"at the sites: {SETTINGS.of(recipe).averaging.told} of one selector; "
            f"at the server: {SETTINGS.of(recipe).dpo_steps} steps of DPO"
        ),
    )
}
