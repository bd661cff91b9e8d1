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

from typing import Final

from accord.methods.fedbiscuit import FedBisConfig, FedBiscuitConfig, biscuit
from accord.methods.method import Method, Table
from accord.stages.alignment import Aligned
from accord.stages.job import Job

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
