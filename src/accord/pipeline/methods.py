"""Every way to align the policy, by name: MoR, its relatives, and what they are measured against.

A method takes a job, whose sites and router are trained, and the name of its stage, and returns the aligned policy.
Most are GRPO with another reward; those that share parameters train in their own way. All start from the same base,
reach the sites through the same engine, and count their bytes alike.

    from accord.pipeline.methods import by_reward

    def everyone(job, stage):  # "my_package.my_module:everyone" in a recipe's `compare`
        return by_reward(lambda job: federated_reward(job, open_federation(job), my_router(job)))(job, stage)
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TypeAlias, Unpack

from transformers import set_seed

from accord.alignment.feedback import AnchorChange, LossSign, OnlineUpdate, QuantileLoss, RandomBit, Signal
from accord.alignment.grpo import RewardFunction, exact_match_reward
from accord.alignment.reward import FederatedReward
from accord.data.preferences import build_preferences
from accord.errors import RecipeError
from accord.evaluation.accuracy import sample_questions
from accord.federation.engine import Engine, InProcessEngine
from accord.federation.site import Site, SiteRecord
from accord.models.load import save_model
from accord.pipeline import anchors, baselines
from accord.pipeline.alignment import Aligned, RewardOptions, federated_reward, run_grpo
from accord.pipeline.anchors import client_id_network
from accord.pipeline.fedgrpo import Variant, fedgrpo, fedgrpo_reward, last_graph
from accord.pipeline.job import Job
from accord.pipeline.routing import RandomRouter, constant_router, trained_router
from accord.pipeline.sites import common_answers, fit_reward_model, open_federation, site_pairs
from accord.pipeline.traffic import save_traffic
from accord.rewards.model import RewardModel
from accord.rewards.train import rank
from accord.routing import fusion
from accord.routing.fusion import Fusion
from accord.routing.online import OnlineConfig, OnlineRouter
from accord.routing.router import LearnedRouter

Method: TypeAlias = Callable[[Job, str], Aligned]


def by_reward(make: Callable[[Job], RewardFunction], *, kl: float | None = None) -> Method:
    """Return the method that aligns by GRPO with the reward that `make` returns, and with KL weight `kl` if given."""

    def method(job: Job, stage: str) -> Aligned:
        settings = job.recipe.alignment
        return run_grpo(job, stage, make(job), settings=settings if kl is None else replace(settings, kl=kl))

    return method


def routed(job: Job, **options: Unpack[RewardOptions]) -> FederatedReward:
    """Return MoR's reward with the offline router."""
    router = LearnedRouter(job.encoder, client_id_network(job))
    return federated_reward(job, open_federation(job), router, **options)


def routed_unclipped(job: Job, *, standardised: bool = True) -> FederatedReward:
    """Return MoR's reward over scores that the sites do not clip, and if not `standardised` over their raw scores."""
    router = LearnedRouter(job.encoder, client_id_network(job))
    engine = open_federation(job, clipped=False, standardised=standardised)
    return federated_reward(job, engine, router, clipped=False)


def everyone(job: Job, rule: Fusion) -> FederatedReward:
    """Ask every site, and fuse by `rule`."""
    count = len(job.recipe.sites)
    return federated_reward(job, open_federation(job), constant_router([1 / count] * count), mode="soft", fusion=rule)


def single_site_reward(job: Job, k: int) -> FederatedReward:
    """Let one site judge everything."""
    return federated_reward(job, open_federation(job), constant_router(_one_hot(job, k)))


def _one_hot(job: Job, k: int) -> list[float]:
    return [float(i == k) for i in range(len(job.recipe.sites))]


def best_site(job: Job) -> int:
    """Return the index of the site whose reward model ranks right answers first most often over all dev questions."""
    asked = sample_questions(job.questions["dev"], 300, seed=0)
    vocabulary = common_answers(asked, 64)
    models = [RewardModel.load(job.path / "sites" / site.name / "reward") for site in job.recipe.sites]
    macros = [rank(model, asked, vocabulary).macro for model in models]
    return macros.index(max(macros))


def random_site(job: Job, stage: str) -> Aligned:
    """Send every completion to a site drawn at random."""
    router = RandomRouter(len(job.recipe.sites), job.recipe.seed)
    return run_grpo(job, stage, federated_reward(job, open_federation(job), router), memory=router)


def plural_alpha(job: Job, stage: str) -> Aligned:
    """Ask every site, and favour those that have been served worse."""
    rule = fusion.PluralAlpha()
    return run_grpo(job, stage, everyone(job, rule), memory=rule)


def online(job: Job, stage: str, *, signal: Callable[[Job], Signal], config: OnlineConfig | None = None) -> Aligned:
    """Route by Thompson sampling on the offline router's head, which learns from `signal` as the policy is aligned."""
    router = OnlineRouter(job.encoder, client_id_network(job), config or job.recipe.online, seed=job.recipe.seed)
    reward = federated_reward(job, open_federation(job), router, mode="top1", scope="completion")
    update = OnlineUpdate(router, signal(job))
    return run_grpo(job, stage, reward, memory=update, callbacks=[update])


def anchor_change(job: Job) -> AnchorChange:
    """Return the signal of 256 of the server's labelled questions, which MoR itself does not read."""
    asked = sample_questions(job.questions["base"], 256, seed=0)
    pairs = build_preferences(asked, rejected_per_question=1, generator=random.Random(0))
    return AnchorChange(job.encoder.processor, pairs)


def pooled(job: Job, stage: str) -> Aligned:
    """Train one reward model on all sites' pairs in one place, and align with it: what no consortium may do."""
    return run_grpo(job, stage, federated_reward(job, _pooled_engine(job, stage), constant_router([1.0])))


def local(job: Job, stage: str, site: str) -> Aligned:
    """Let a site align the base by itself: its own reward model, its own questions, nothing crosses a border."""
    k = [each.name for each in job.recipe.sites].index(site)
    reward = federated_reward(job, open_federation(job), constant_router(_one_hot(job, k)))
    model, processor = run_grpo(job, stage, reward, questions=job.private[site])
    job.traffic.counts.clear()
    return model, processor


def _pooled_engine(job: Job, stage: str) -> InProcessEngine:
    settings = job.recipe.pooled
    folder = job.path / "compare" / "pooled-reward"
    if not folder.is_dir():
        seed = job.recipe.seed * 1000 + 999
        questions = [q for site in job.recipe.sites for q in job.private[site.name]]
        pairs = [  # ids are unique at a site only
            replace(pair, question_id=f"{site.name}/{pair.question_id}")
            for site in job.recipe.sites
            for pair in site_pairs(job, site.name)
        ]
        set_seed(seed)
        model, _ = fit_reward_model(
            job,
            "pooled",
            settings.checkpoint,
            settings.finetune,
            settings.reward_model,
            lora=None,
            questions=questions,
            pairs=pairs,
            held_out=job.questions["dev"],
            seed=seed,
            log=lambda record: job.log({"stage": stage, **record, "step": 0, "reward_model_step": record["step"]}),
        )
        model.save(folder)
    judge = Site("pooled", RewardModel.load(folder), SiteRecord(), score_range=job.recipe.scores)
    return InProcessEngine({"pooled": judge.answer})


def main_reward(job: Job, engine: Engine) -> FederatedReward:
    """Return the reward that the recipe's `method` aligns by; FedGRPO's by its graph as it was last measured."""
    if job.recipe.method == "fedgrpo":
        return fedgrpo_reward(job, engine, graph=last_graph(job))
    return federated_reward(job, engine, LearnedRouter(job.encoder, trained_router(job)))


def align_policy(job: Job) -> None:
    """Align the policy by the recipe's `method`, and keep it: the run's own result."""
    with job.doing("align"):
        if job.recipe.method == "fedgrpo":
            model, processor = fedgrpo(job, "align")
        else:
            model, processor = run_grpo(job, "align", main_reward(job, open_federation(job)))
        save_model(model, processor, job.path / "policy")
        save_traffic(job, "align")
    # Not before the stage is done: killed in between, a run would have every step to do again.
    shutil.rmtree(job.path / "checkpoints" / "align", ignore_errors=True)


METHODS: dict[str, Method] = {
    "routed": by_reward(routed),
    "routed-soft": by_reward(partial(routed, mode="soft")),
    "routed-prompt": by_reward(partial(routed, scope="prompt")),
    "routed-unclipped": by_reward(routed_unclipped),
    "routed-raw": by_reward(partial(routed_unclipped, standardised=False)),
    "routed-kl-0": by_reward(routed, kl=0.0),
    "routed-kl-0.005": by_reward(routed, kl=0.005),
    "routed-kl-0.08": by_reward(routed, kl=0.08),
    "average": by_reward(partial(everyone, rule=fusion.mixture)),
    "median": by_reward(partial(everyone, rule=fusion.median)),
    "trimmed-mean": by_reward(partial(everyone, rule=fusion.trimmed_mean)),
    "minimum": by_reward(partial(everyone, rule=fusion.minimum)),
    "pessimistic": by_reward(partial(everyone, rule=fusion.Pessimistic())),
    "plural-alpha": plural_alpha,
    "mor": partial(online, signal=lambda job: LossSign()),
    "mor-raw": partial(online, signal=lambda job: LossSign(), config=OnlineConfig(scale="raw", exploration=0.1)),
    "mor-opposite": partial(online, signal=lambda job: LossSign("-loss")),
    "mor-quantile": partial(online, signal=lambda job: QuantileLoss()),
    "mor-anchor": partial(online, signal=anchor_change),
    "mor-random-feedback": partial(online, signal=lambda job: RandomBit(job.recipe.seed)),
    "preference-gate": anchors.preference_gate,
    "correctness": anchors.correctness,
    "anchored": anchors.anchored,
    "oracle": anchors.oracle,
    "fedgrpo": fedgrpo,
    "fedgrpo-reward": partial(fedgrpo, variant=Variant("reward", truth=False)),
    "fedgrpo-answer": partial(fedgrpo, variant=Variant("answer", truth=False)),
    "fedgrpo-random": partial(fedgrpo, variant=Variant(choice="random")),
    "fedgrpo-all": partial(fedgrpo, variant=Variant(choice="all")),
    "fedgrpo-reward-random": partial(fedgrpo, variant=Variant("reward", truth=False, choice="random")),
    "fedgrpo-reward-all": partial(fedgrpo, variant=Variant("reward", truth=False, choice="all")),
    "fedgrpo-literal": partial(fedgrpo, variant=Variant(fusion=fusion.literal)),
    "fedgrpo-chunks": partial(fedgrpo, variant=Variant(fusion=fusion.chunks)),
    "fedgrpo-halves": partial(fedgrpo, variant=Variant(fusion=fusion.halves)),
    "fedgrpo-reward-1-expert": partial(fedgrpo, variant=Variant("reward", truth=False, experts=1)),
    "fedgrpo-reward-3-experts": partial(fedgrpo, variant=Variant("reward", truth=False, experts=3)),
    "fedgrpo-reward-5-nearest": partial(fedgrpo, variant=Variant("reward", truth=False, neighbours=5)),
    "fedgrpo-reward-50-nearest": partial(fedgrpo, variant=Variant("reward", truth=False, neighbours=50)),
    "fedavg-reward": baselines.shared_reward,
    "fedit-fedavg": partial(baselines.tune_together, algorithm="fedavg"),
    "fedit-fedprox": partial(baselines.tune_together, algorithm="fedprox"),
    "fedit-scaffold": partial(baselines.tune_together, algorithm="scaffold"),
    "feddpo": baselines.dpo_together,
    "fedbiscuit": baselines.biscuit,
    "random": random_site,
    "best-site": by_reward(lambda job: single_site_reward(job, best_site(job))),
    "pooled": pooled,
    "ground-truth": by_reward(lambda job: exact_match_reward),
}
"""What `compare` may name, besides `site <name>`, `local <name>` and `package.module:function`."""


def find_method(job: Job, name: str) -> Method:
    """Return the method of that name.

    Raises:
        RecipeError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    names = [site.name for site in job.recipe.sites]
    if (site := name.removeprefix("site ")) in names and site != name:
        return by_reward(partial(single_site_reward, k=names.index(site)))
    if (site := name.removeprefix("local ")) in names and site != name:
        return partial(local, site=site)
    module, _, function = name.partition(":")
    try:
        found: Method = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"compare names {name!r}, which cannot be imported: {error}; correct the name") from error
    return found
