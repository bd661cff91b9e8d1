"""MoR's reward with another loss than GRPO's: `loss` in [alignment], as a method to compare.

    grpo             mean over completions of their mean over tokens                    Shao et al. 2024, 2402.03300
    dr_grpo          sum over tokens by the greatest length, no deviation               Liu et al. 2025, 2503.20783
    dapo             mean over the tokens of the step, clip from 0.8 to 1.28            Yu et al. 2025, 2503.14476
    bnpo             mean over the tokens of one pass                                   as TRL; after Xiao et al. 2025
    discriminative   DisCO, `accord.alignment.discriminative`                           Li et al. 2025, 2505.12366

The first four are TRL's. Of DAPO the token mean and the higher clip are here, and neither its oversampling nor its
price of length; of BNPO (arXiv 2506.02864) the normalisation alone. As long as completions serve one update
(`iterations = 1`), nothing is clipped, and DisCO's constraint is idle.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from accord.methods.mor import offline, routed

METHODS: Final = {
    "routed-dr-grpo": offline(
        routed,
        "as routed by Dr. GRPO: no division by a deviation or by a length",
        change=partial(replace, loss="dr_grpo", scale_rewards="none"),
        as_the_recipe=True,
    ),
    "routed-dapo": offline(
        routed,
        "as routed by DAPO's loss: all tokens alike, a higher clip",
        change=partial(replace, loss="dapo"),
        as_the_recipe=True,
    ),
    "routed-bnpo": offline(
        routed,
        "as routed, all tokens of one pass alike",
        change=partial(replace, loss="bnpo"),
        as_the_recipe=True,
    ),
    "routed-discriminative": offline(
        routed,
        "as routed by DisCO: good completions against bad ones",
        change=partial(replace, loss="discriminative", scale_rewards="group"),
        as_the_recipe=True,
    ),
}
