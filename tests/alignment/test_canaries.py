"""A federation with liars as one reward function: hidden questions, trust, the cap, and what a policy learns."""

from dataclasses import replace

import pytest
import torch
from pytest import approx

from accord.alignment.grpo import AlignmentConfig
from accord.alignment.reward import FederatedReward, PerGroup
from accord.attacks.scores import Attack, Liar
from accord.data.images import image_bytes
from accord.errors import RunError
from accord.federation.answering import key_of
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreItem, ScoreRange, ScoreReply, image_name, to_turns
from accord.models.generate import answer
from accord.recipe import Policy
from accord.routing.canaries import Canaries, Canary, CanaryConfig
from accord.routing.robust import Deviations, Ranks
from accord.runs import read_lines
from accord.stages.alignment import remembered, run_grpo
from accord.stages.routing import constant_router
from accord.types import vqa_prompt

RANGE = ScoreRange(0.0, 2.0)
SITES = ("a", "b", "c", "d", "e")
TEXTS = ("no", "one", "green", "yellow", "what colour")
pytestmark = pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")


def judge(lie=None):
    """A site that likes long answers: a tenth of the number of letters, at most 2; or says what its lie says."""

    def answer(request):
        scores = [[min(len(text) / 10, 2.0) for text in item.candidates] for item in request.items]
        return ScoreReply(request.id, lie(request, scores) if lie else scores)

    return answer


class Spy(InProcessEngine):
    asked = ()

    def ask(self, requests, *, deadline=None):
        self.asked = (*self.asked, dict(requests))
        return super().ask(requests, deadline=deadline)


def federation(attack, liars, labelled=frozenset()):
    """Five sites of which the first `liars` lie, and recognise the `labelled` questions."""
    lies = [Liar(attack, RANGE, site=name, labelled=labelled) if n < liars else None for n, name in enumerate(SITES)]
    return Spy({name: judge(lie) for name, lie in zip(SITES, lies, strict=True)})


def canaries(square, count=200, words=None, **settings):
    pool = [
        Canary(vqa_prompt("what?"), (square("red", (4 + n // 40, 4 + n % 40)),), TEXTS[-1], TEXTS[:-1], "colour")
        for n in range(count)
    ]
    return Canaries(pool, SITES, CanaryConfig(**settings), key=0, words=words)


def defended(engine, known, rule="median", fuse=None):
    per_group = PerGroup(fuse or Ranks(rule, 0.02), cap=0.5)
    router = constant_router([0.2] * 5)
    return FederatedReward(
        engine, router, mode="soft", scope="prompt", per_group=per_group, scores=RANGE, canaries=known
    )


def ask(reward, log=None, step=0, word="step"):
    """Ask about four answers to one question, as TRL does."""
    prompts = [[{"role": "user", "content": f"{word} {step}"}]] * 4
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS[:4]]
    return reward(
        prompts, completions, question_type=["colour"] * 4, log_metric=({} if log is None else log).__setitem__
    )


def test_canaries_find_a_majority_of_liars(square):
    """Three of five flip. A request's own canaries count for its prompts: four are enough at the first step.

    The honest have ranks −1, −1/3, 1/3, 1 for 2, 3, 5 and 6 letters.
    """
    known = canaries(square, per_step=4)
    engine, log = federation(Attack("flip"), 3), {}
    reward = defended(engine, known)
    first = ask(reward)
    for step in range(1, 5):
        last = ask(reward, log, step)
    assert first == last == approx([-1, -1 / 3, 1 / 3, 1])
    assert [log[f"trust/{site}"] for site in SITES] == approx([0, 0, 0, 0.5, 0.5])
    assert log["influence/a"] == 0
    off = ask(defended(federation(Attack("flip"), 3), None))
    assert off == approx([1, 1 / 3, -1 / 3, -1])


def test_scores_weighted_by_trust_leave_liars_out_too(square):
    """The reward is then that of honest sites alone; unwatched, the three liars win."""
    known = canaries(square, per_step=4)
    reward = defended(federation(Attack("flip"), 3), known, fuse=Deviations(0.02))
    for step in range(5):
        last = ask(reward, step=step)
    honest = ask(defended(federation(Attack("flip"), 0), None, fuse=Deviations(0.02)))
    assert last == approx(honest) and last[0] < last[1] < last[2] < last[3]
    off = ask(defended(federation(Attack("flip"), 3), None, fuse=Deviations(0.02)))
    assert off[0] > off[1] > off[2] > off[3]


def test_sites_that_recognise_every_hidden_question_are_found(square):
    """Two of five are right at all of them and flip the rest: trusted at first, then seen through by the other three.

    What a run remembers of it is enough to go on.
    """
    known = canaries(square, per_step=4, leave_out=True)
    keys = {key_of(ScoreItem([image_name(image_bytes(c.images[0]))], to_turns(c.prompt), [])) for c in known.pool}
    reward, log = defended(federation(Attack("flip", spares=1.0), 2, keys), known, rule="mean"), {}
    first = ask(reward, log)
    assert log["trust/a"] == approx(0.2) and first == approx([-0.2, -0.2 / 3, 0.2 / 3, 0.2])
    for step in range(1, 12):
        last = ask(reward, log, step)
    assert last == approx([-1, -1 / 3, 1 / 3, 1]) and log["trust/a"] == log["trust/b"] == 0
    assert known.trust.kinds_where(known.trust.two_faced) == {n: ("colour",) * (n in "ab") for n in SITES}
    again = canaries(square, per_step=4)
    again.load_state_dict(known.state_dict())
    assert torch.equal(again.trust.two_faced, known.trust.two_faced) and not again.trust.aside.any()
    assert torch.equal(again.trust.between.counts, known.trust.between.counts)


def test_sites_that_lie_where_a_word_is_are_named(square):
    """Two of five flip where a question says "zebra", which no canary does: they are told of, and heard as before."""
    known = canaries(square, per_step=1, words={"zebra": ["colour"], "step": ["colour"]})
    reward, log = defended(federation(Attack("flip", trigger="zebra"), 2), known, rule="mean"), {}
    for step in range(40):
        ask(reward, step=step)
        ask(reward, log, step, word="zebra")
    assert known.trust.words_where(known.trust.triggered) == {n: ("zebra",) * (n in "ab") for n in SITES}
    assert log["trust/a"] == approx(0.2) and not known.trust.two_faced.any()


def test_every_site_goes_on_being_asked(square):
    """Set aside or not: a site that was no longer asked about prompts would know which questions are canaries."""
    known = canaries(square, per_step=2)
    engine = federation(Attack("flip"), 1)
    reward = defended(engine, known)
    for step in range(20):
        ask(reward, step=step)
    assert known.trust.aside[0].all() and not known.trust.aside[1:].any()
    for site, request in engine.asked[-1].items():
        assert len(request.items) == 3 and request.id == f"score-20-{site}"
        assert sum(item.prompt[0].content == "step 19" for item in request.items) == 1


def test_rewards_are_those_of_the_ordinary_questions(square):
    """Whatever canaries are mixed in, honest sites' rewards are as without them."""
    plain = ask(defended(federation(Attack(), 0), None))
    assert (
        ask(defended(federation(Attack(), 0), canaries(square, per_step=7))) == plain == approx([-1, -1 / 3, 1 / 3, 1])
    )


def test_several_processes_have_no_canaries(square, monkeypatch):
    engine = federation(Attack(), 0)
    monkeypatch.setattr(type(engine), "processes", 2)
    with pytest.raises(RunError, match="canaries are one process's, and 2 ask together"):
        defended(engine, canaries(square))


STEPS = 24


@pytest.fixture
def aligned(job, ask, llava, square):
    """Return a function that aligns the tiny policy against five sites, three of which flip, and measures it.

    It returns the mean number of letters of 64 answers drawn from the policy.
    """
    settings = AlignmentConfig(
        steps=STEPS,
        prompts_per_step=2,
        group_size=8,
        max_completion_length=3,
        learning_rate=1e-2,
        evaluate_every=0,
        save_every=0,
        scale_rewards="batch",
    )
    job.recipe = replace(job.recipe, policy=Policy(llava), alignment=settings)
    questions = [ask(n, colour) for n, colour in enumerate(("red", "blue"))]
    job.questions = {"dev": questions[:1], "public": questions}

    def align(stage, known):
        with job.doing(stage):
            policy, processor = run_grpo(job, stage, defended(federation(Attack("flip"), 3), known), memory=known)
        said = answer(policy, processor, questions, max_new_tokens=3, samples=32, seed=0, batch_size=2)
        letters = [len(text) for texts in said for text in texts]
        return sum(letters) / len(letters)

    return align


def test_a_policy_learns_what_the_honest_say(aligned, job, square):
    """GRPO of a real, tiny policy. With canaries its answers become longer than without, by more than a letter.

    Metrics have each site's trust and influence; what was learnt of the sites is in the run folder.
    """
    known = canaries(square, per_step=3)
    with_defence, without = aligned("compare canary", known), aligned("compare none", None)
    assert with_defence > without + 1
    record = [r for r in read_lines(job.path / "metrics.jsonl") if r["stage"] == "compare canary" and "trust" in r][-1]
    assert record["trust"] == approx({"a": 0, "b": 0, "c": 0, "d": 0.5, "e": 0.5}) and set(record["influence"]) == set(
        SITES
    )
    kept = remembered(job.path, "compare canary")
    assert torch.equal(kept["counts"], known.trust.counts) and int(kept["used"]) == 3 * STEPS
