"""Stage 1: each site makes its pairs, its own backbone, and its reward model; then it can be opened to answer."""

from __future__ import annotations

import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import msgspec
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from accord.attacks.scores import Liar, poisoned
from accord.data.captions import judged_good, judged_pairs
from accord.data.judged import judge_samples
from accord.data.preferences import MIN_PAIRS, build_preferences, read_preferences, write_preferences
from accord.data.questions import uniform
from accord.data.sites import check_disjoint
from accord.errors import CheckpointError, DataError, RecipeError, RunError
from accord.federation.answering import Answerer, question_key, read_truth, truth_book, write_truth
from accord.federation.batches import Opening
from accord.federation.engine import Engine, InProcessEngine
from accord.federation.messages import ScoreRange, Task
from accord.federation.site import LocalUpdate, Site, SiteRecord
from accord.models.finetune import FineTuneConfig, finetune
from accord.models.generate import answer
from accord.models.load import LoraSettings, Processor, add_lora, load_model, save_model
from accord.models.trial import try_checkpoint
from accord.progress import ProgressBarCallback, stage_bar
from accord.recipe import Recipe, SiteConfig
from accord.rewards.model import RewardModel, Standardisation
from accord.rewards.train import RewardConfig, train_reward_model
from accord.routing.fit import LocalRouterTraining
from accord.routing.means import LocalMeans
from accord.runs import Run, write_atomic
from accord.stages.agreement import agreement_of
from accord.stages.job import Job
from accord.stages.private import router_guarantee, settle_site, train_private_reward_model
from accord.types import PreferencePair, Question, Subject, prompt_of, subjects_of


def train_site(job: Job, name: str) -> None:
    """Make a site's reward model: pairs, its own backbone fine-tuned on its questions, a Bradley–Terry head."""
    site, seed = job.site(name), site_seed(job, name)
    several = holds_several(job, name)
    if job.alone or several:
        try_checkpoint(site.checkpoint, several=several)
    with job.doing(f"site {name}"):
        set_seed(seed)
        questions, pairs = job.private[name], site_pairs(job, name)
        folder = job.path / "sites" / name
        shutil.rmtree(folder / "model", ignore_errors=True)
        ranking: dict[str, float] = {}
        certificate = train_private_reward_model(job, name, pairs) if site.privacy else None
        if certificate is None:
            model, ranking = fit_reward_model(
                job,
                name,
                site.checkpoint,
                site.finetune,
                site.reward_model,
                lora=site.lora,
                questions=questions,
                pairs=pairs,
                held_out=[q for q in job.questions["dev"] if job.shares[name].wants(q)],
                seed=seed,
                keep=folder / "model" if site.answers else None,
                log=lambda record: job.log({"stage": "site", "site": name, **record}),
            )
            model.save(folder / "reward")
        (folder / "truth.json").unlink(missing_ok=True)
        if site.answers or site.owns:
            write_truth(folder / "truth.json", site_truth(job, name))
        record = SiteRecord(len(questions), len(pairs), any(pair.constructed for pair in pairs), ranking, certificate)
        write_atomic(folder / "card.json", msgspec.json.format(msgspec.json.encode(record)))
        settle_site(job, name)


def site_seed(job: Job, name: str) -> int:
    """Return the seed of everything a site does; it depends on no other site."""
    return job.recipe.seed * 1000 + [site.name for site in job.recipe.sites].index(name)


def site_truth(job: Job, name: str) -> dict[str, tuple[str, ...]]:
    """Return the reference answers that a site owns: of its private questions, and of a share of the public ones.

    Which of those is drawn for each question alone: it depends on no other site, and on no order.
    """
    site, seed = job.site(name), job.recipe.seed
    public = [
        q
        for q in job.questions["public"]
        if job.shares[name].wants(q) and uniform("owns", seed, name, q.id) < site.owns
    ]

    def key(q: Question) -> str:
        return question_key([job.identify(image) for image in q.images], prompt_of(q))

    return truth_book((key(q), (q.answer, *q.references)) for q in (*job.private[name], *public))


def holds_several(job: Job, name: str) -> bool:
    """Return whether a question of the job, or a preference pair of a site's own, is about several images."""
    pairs = site_pairs(job, name) if job.site(name).preferences else []
    asked = any(q.further for questions in job.questions.values() for q in questions)
    return asked or any(len(pair.images) > 1 for pair in pairs)


def site_pairs(job: Job, name: str) -> list[PreferencePair]:
    """Return a site's pairs: its own, or constructed from its questions and from what the base policy says to them."""
    if name in job.pairs:
        return job.pairs[name]
    site, questions, seed = job.site(name), job.private[name], site_seed(job, name)
    if site.preferences:
        job.pairs[name] = _as_annotated(site, _own_pairs(job, name, Path(site.preferences)), seed)
        return job.pairs[name]
    pairs: list[PreferencePair] = []
    known = [*job.questions.get("base", []), *questions]
    if site.judgements is not None:
        rows = job.judged[name]
        _check_alone(job, name, *_judged(job, name))
        pairs = judged_pairs(rows, site.judgements, random.Random(seed))
        if site.judgements.constructed:
            questions = [*judged_good(rows, site.judgements), *questions]
        known = questions  # judged by people, or its own: without captions of the server's
    if questions:
        with stage_bar(f"{name}: what the policy says", len(questions), quiet=job.quiet) as advance:
            pairs += construct_pairs(
                job.recipe,
                lambda: load_model(job.recipe.policy.checkpoint),
                questions,
                known,
                seed=seed,
                on_batch=lambda n: advance(n),
            )
    if len(pairs) < MIN_PAIRS:
        raise DataError(
            f"site {name} has {len(pairs)} preference pairs from {len(questions)} questions, at least "
            f"{MIN_PAIRS} are needed; give it more questions, or raise preferences.rejected_per_question"
        )
    job.pairs[name] = _as_annotated(site, pairs, seed)
    return job.pairs[name]


def _as_annotated(site: SiteConfig, pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """Return a site's pairs with what its recipe says of careless annotators, and of poison in a trial."""
    marked = flip(pairs, site.flipped, random.Random(seed))
    if site.attack is not None and site.attack.kind == "poison":
        return poisoned(marked, site.attack, random.Random(seed))
    return marked


def construct_pairs(
    recipe: Recipe,
    policy: Callable[[], tuple[PreTrainedModel, Processor]],
    questions: Sequence[Question],
    known: Sequence[Question],
    *,
    seed: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[PreferencePair]:
    """Construct pairs from questions with reference answers and from what the base policy says to them.

    With `preferences.judged` an annotator prefers one of what it said to another, and nothing else makes a pair.

    Args:
        recipe: how many, and by which mix.
        policy: opens the base policy and its processor, where the recipe asks for samples of it.
        questions: what the pairs are about.
        known: questions whose answers may be wrong ones to others of their type.
        seed: of what the policy says, and of the draw.
        on_batch: told the number of questions that were just answered.
    """
    settings = recipe.preferences
    asked = list({q.id: q for q in questions}.values())  # several captions of one photograph are one question
    said: Sequence[Sequence[str]] = [()] * len(asked)
    if settings.policy_samples:
        said = answer(
            *policy(),
            asked,
            max_new_tokens=recipe.alignment.max_completion_length,
            samples=settings.policy_samples,
            seed=seed,
            batch_size=recipe.alignment.questions_at_once,
            on_batch=on_batch,
        )
    samples = {q.id: texts for q, texts in zip(asked, said, strict=True)}
    if settings.judged:
        return judge_samples(
            questions,
            samples,
            others=settings.others,
            spliced=settings.spliced,
            rejected_per_answer=settings.rejected_per_question,
            generator=random.Random(seed),
        )
    return build_preferences(
        questions,
        rejected_per_question=settings.rejected_per_question,
        generator=random.Random(seed),
        policy_samples=samples,
        answers_by_type=_answers_by_type(known),
        mix=settings.mix,
    )


def flip(pairs: Sequence[PreferencePair], share: float, generator: random.Random) -> list[PreferencePair]:
    """Let an annotator mistake a random `share` of the questions: one wrong answer is preferred to all others there.

    The pairs of a question stay one group, so that a mistaken one counts in training as much as any.
    """
    by_question: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        by_question[pair.question_id].append(pair)
    mistaken = generator.sample(sorted(by_question), round(share * len(by_question)))
    favourite = {question: generator.choice(by_question[question]).rejected for question in mistaken}
    return [_mistaken(pair, favourite[pair.question_id]) if pair.question_id in favourite else pair for pair in pairs]


def _mistaken(pair: PreferencePair, favourite: str) -> PreferencePair:
    return replace(pair, chosen=favourite, rejected=pair.chosen if pair.rejected == favourite else pair.rejected)


def _own_pairs(job: Job, name: str, file: Path) -> list[PreferencePair]:
    """Read a site's own pairs, which are about images of the site's alone."""
    pairs = read_preferences(file)
    _check_alone(job, name, f"the preferences of site {name!r}", subjects_of(pairs))
    return pairs


def _check_alone(job: Job, name: str, what: str, subjects: Sequence[Subject]) -> None:
    """Refuse what a site holds about an image on which the policy is aligned, chosen or tested.

    Where there are no images, what is said of them holds of the questions' texts.

    Nor may it be about an image of another site's questions, where no image is at two sites.
    """
    theirs = {f"the split {split!r}": subjects_of(job.questions[split]) for split in ("public", "dev", "test")}
    if job.recipe.disjoint_images:
        others = {other: questions for other, questions in job.private.items() if other != name}
        theirs |= {f"site {other!r}": subjects_of(questions) for other, questions in others.items()}
    for other, images in theirs.items():
        check_disjoint({what: subjects, other: images}, job.identify)


def check_sites(job: Job) -> None:
    """Refuse a site's own pairs or judgements of an image that is not the site's alone, before any training on them.

    Constructed pairs are about the questions that were dealt out, which need no check.

    Raises:
        DataError: two sites hold an image, unless the recipe allows it, or pairs or judgements are about a question
            that the policy is aligned, chosen or tested on.
    """
    own: dict[str, list[Subject]] = {}
    for site in job.recipe.sites:
        if site.preferences:
            own[f"the preferences of site {site.name!r}"] = subjects_of(site_pairs(job, site.name))
        if site.judgements:
            what, photographs = _judged(job, site.name)
            _check_alone(job, site.name, what, photographs)
            own[what] = photographs
    if job.recipe.disjoint_images:
        check_disjoint(own, job.identify)


def _judged(job: Job, name: str) -> tuple[str, list[Subject]]:
    """Return the words for a site's judgements, and the photographs that they are about."""
    photographs = {row.photograph.id: row.photograph for row in job.judged[name]}
    return f"the judgements of site {name!r}", subjects_of(photographs.values())


def fit_reward_model(
    job: Job,
    name: str,
    checkpoint: str,
    tuning: FineTuneConfig | None,
    reward: RewardConfig,
    *,
    lora: LoraSettings | None,
    questions: Sequence[Question],
    pairs: Sequence[PreferencePair],
    held_out: Sequence[Question],
    seed: int,
    log: Callable[[Mapping[str, object]], None],
    keep: Path | None = None,
) -> tuple[RewardModel, dict[str, float]]:
    """Fine-tune a backbone, put a head on it and train it; return the model and its ranking by question type.

    The fine-tuned backbone, before it got its head, is written to the folder `keep`; an untouched one is not.
    """
    scratch = job.path / "checkpoints" / name
    if tuning is not None:
        backbone, processor = load_model(checkpoint, trainable=lora is None)
        tuned = add_lora(backbone, lora) if lora else backbone
        with ProgressBarCallback(f"{name}: fine-tuning", quiet=job.quiet) as bar:
            finetune(tuned, processor, questions, tuning, seed=seed, out=scratch, callbacks=[bar])
        if isinstance(tuned, PeftModel):
            backbone = cast(PreTrainedModel, tuned.merge_and_unload())
        checkpoint = save_model(backbone, processor, keep or scratch / "backbone")
    model = RewardModel.from_checkpoint(checkpoint, lora=lora, head=reward.head)
    known = [*job.questions.get("base", []), *questions]
    vocabulary = common_answers(known, reward.vocabulary, () if questions else pairs)
    with ProgressBarCallback(f"{name}: reward model", quiet=job.quiet) as bar:
        ranking = train_reward_model(
            model, pairs, held_out, vocabulary, reward, seed=seed, out=scratch, callbacks=[bar], log=log
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return model, dict(ranking.by_type)


def common_answers(questions: Sequence[Question], limit: int, pairs: Sequence[PreferencePair] = ()) -> list[str]:
    """Return the `limit` commonest answers of questions and pairs: what a policy might say to any question."""
    counts = Counter(q.answer for q in questions)
    counts.update(answer for pair in pairs for answer in (pair.chosen, pair.rejected))
    return [a for a, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]


def _answers_by_type(questions: Sequence[Question]) -> dict[str, list[str]]:
    by_type: dict[str, set[str]] = defaultdict(set)
    for q in questions:
        by_type[q.question_type].add(q.answer)
    return {name: sorted(answers) for name, answers in sorted(by_type.items())}


def open_site(
    recipe: Recipe,
    run: Path,
    name: str,
    *,
    scores: ScoreRange | None,
    standardised: bool = True,
    updates: Mapping[Task, LocalUpdate] | None = None,
    opening: Opening | None = None,
    labelled: Collection[str] = frozenset(),
) -> Site:
    """Start a site with the reward model that it left in its part of the run folder.

    Without `standardised` its scores leave it on the model's own scale. The model that answers questions, where the
    recipe lets it, is loaded at the first question.

    Args:
        recipe: of the run.
        run: the run folder.
        name: the site's name.
        scores: the range to which its scores are clipped; None for none.
        standardised: whether its scores are standardised.
        updates: what is trained at it, by task.
        opening: how the images of requests are opened.
        labelled: keys of the server's labelled questions, for a site that lies where it does not recognise these.

    Raises:
        CheckpointError: the reward model or the reference answers cannot be loaded, or the model that answers questions
            is not there.
    """
    folder = run / "sites" / name
    config = next(site for site in recipe.sites if site.name == name)
    record = folder / "card.json"
    model = RewardModel.load(folder / "reward")
    if not standardised:
        model.standardisation = Standardisation()
    return Site(
        name,
        model,
        msgspec.json.decode(record.read_bytes(), type=SiteRecord) if record.is_file() else None,
        score_range=scores,
        updates=updates,
        answerer=_answerer(recipe, config, folder, opening) if config.answers else None,
        truth=read_truth(folder / "truth.json") if config.answers or config.owns else None,
        opening=opening,
        lie=_lie(recipe, config, scores, labelled),
        agreement=partial(agreement_of, recipe),
    )


def _lie(recipe: Recipe, site: SiteConfig, scores: ScoreRange | None, labelled: Collection[str]) -> Liar | None:
    if site.attack is None:
        return None
    steps = recipe.alignment.steps
    return Liar(site.attack, scores, seed=recipe.seed, site=site.name, steps=steps, labelled=labelled)


def labelled_keys(job: Job) -> frozenset[str]:
    """Return by what the server's labelled questions are known."""
    base = job.questions.get("base", [])
    return frozenset(question_key([job.identify(image) for image in q.images], prompt_of(q)) for q in base)


def _answerer(recipe: Recipe, site: SiteConfig, folder: Path, opening: Opening | None) -> Answerer:
    place = site.checkpoint if site.finetune is None else str(folder / "model")
    if site.finetune is not None and not Path(place).is_dir():
        raise CheckpointError(
            f"{place}: the model that answers questions is missing; train site {site.name} again with "
            "`accord site train`, or take answers = true out of its table"
        )
    return Answerer(
        partial(load_model, place),
        max_new_tokens=recipe.alignment.max_completion_length,
        batch_size=recipe.alignment.questions_at_once,
        opening=opening,
    )


def router_training(job: Job, name: str) -> LocalRouterTraining:
    """Return a site's half of the router's training, on its pairs, with noise where its certificate says so.

    Raises:
        RunError: the recipe asks for noise that was not paid for, or the ledger lacks what was paid.
    """
    names, pairs = [site.name for site in job.recipe.sites], site_pairs(job, name)
    guarantee = router_guarantee(job, name, pairs)
    return LocalRouterTraining(job.encoder, pairs, names.index(name), len(names), job.recipe.router, guarantee)


def prompt_sums(job: Job, name: str) -> LocalMeans:
    """Return what a site sends in place of its prompts, of no more of them than the router sees pairs."""
    return LocalMeans(job.encoder, site_pairs(job, name), job.recipe.router.pairs_per_site)


def open_federation(
    job: Job,
    *,
    scores: ScoreRange | Literal["recipe"] | None = "recipe",
    standardised: bool = True,
    training: bool = False,
) -> Engine:
    """Reach the sites: by the job's engine, or start each here with its reward model.

    Args:
        job: the run.
        scores: the range to which the sites clip their scores; by default the recipe's.
        standardised: whether the sites standardise their scores.
        training: let the sites train the router, on their pairs.

    Raises:
        RunError: a site's reward model is missing, or other organisations' sites should send scores in another form.
    """
    chosen = job.recipe.scores if scores == "recipe" else scores
    if job.engine is not None:
        if chosen != job.recipe.scores or not standardised:
            raise RunError(
                "other organisations' sites send standardised scores, clipped as the recipe says, and no others; "
                "run this method in one process"
            )
        job.engine.traffic = job.traffic
        return job.engine
    handlers = {}
    for site in job.recipe.sites:
        job.need(f"sites/{site.name}/reward", f"accord site train RECIPE {site.name}", f"site {site.name}")
    if training:
        check_sites(job)
    spared = any(site.attack and site.attack.spares for site in job.recipe.sites)
    labelled = labelled_keys(job) if spared else frozenset()
    for site in job.recipe.sites:
        updates: dict[Task, LocalUpdate] = {"router": router_training(job, site.name)} if training else {}
        opened = open_site(
            job.recipe,
            job.path,
            site.name,
            scores=chosen,
            standardised=standardised,
            updates=updates,
            labelled=labelled,
        )
        handlers[site.name] = opened.answer
    engine = InProcessEngine(handlers)
    engine.traffic = job.traffic
    return engine


def write_site_preferences(recipe: Recipe, site: str, file: Path, *, seed: int | None, quiet: bool) -> int:
    """Write the pairs that would be constructed for `site` to a JSONL file, images beside it; return their number.

    They are constructed whether or not the site has pairs of its own.

    Raises:
        RecipeError: there is a file already.
    """
    if file.exists():
        raise RecipeError(f"{file} exists already and is not replaced; name another file, or remove that one")
    sites = tuple(replace(other, preferences="") if other.name == site else other for other in recipe.sites)
    recipe = replace(recipe, sites=sites, seed=recipe.seed if seed is None else seed)
    pairs = site_pairs(Job(recipe, cast(Run, None), quiet=quiet), site)
    write_preferences(file, pairs)
    return len(pairs)
