"""What the stages share: the recipe, the run folder, the questions, the frozen encoder."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, cast

from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from accord.data.arithmetic import load_arithmetic
from accord.data.captions import Judged, photographs, read_captions, read_judgements
from accord.data.conventions import load_conventions
from accord.data.dealing import deal, kind_of, mixtures, stands_for
from accord.data.easy_vqa import load_easy_vqa
from accord.data.image_text import read_image_text
from accord.data.questions import image_identity, read_vqa_dataset, read_vqa_folder, split_by_image
from accord.data.radiology_and_rooms import load_radiology_and_rooms
from accord.data.sampling import sample_questions
from accord.data.sites import SiteShare, check_disjoint, share_out
from accord.errors import DataError, RecipeError, RunError
from accord.federation.engine import Engine, Traffic
from accord.federation.ranks import Together
from accord.models.encoder import Encoder
from accord.models.load import Processor, load_model
from accord.recipe import Recipe, SiteConfig, Source
from accord.rewards.model import RewardModel
from accord.runs import Run
from accord.stages.profile import profiled
from accord.stages.silos import Silos, cut_silos
from accord.types import PreferencePair, Question, Subject, subjects_of

BUILT_ON_IT = {
    "projector": ("site", "router", "align", "compare", "evaluation"),
    "site": ("router", "align", "compare", "evaluation"),
    "router": ("align", "compare", "evaluation"),
    "align": ("evaluation",),
    "compare": ("evaluation",),
    "evaluation": (),
}
"""By the first word of a stage's name: the stages whose results are stale once it is done again."""


def load_questions(
    sources: Sequence[Source], needed: Sequence[str] = ("private", "public", "dev", "test")
) -> dict[str, list[Question]]:
    """Read every source; return the questions by split, with ids `domain/id` where there is more than one source.

    Args:
        sources: where to read.
        needed: the splits that may not be empty.

    Raises:
        DataError: a source cannot be read, two questions of one domain have the same id, an image is in two splits, or
            a split that is needed is empty.
    """
    splits: dict[str, list[Question]] = defaultdict(list)
    taken: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        questions = read_source(source)
        if source.fractions:
            questions = split_by_image(questions, source.fractions, seed=0)
        if source.domain:
            questions = [replace(q, domain=source.domain) for q in questions]
        if source.type_prefix:
            questions = [replace(q, question_type=f"{q.domain}/{q.question_type}") for q in questions]
        if len(sources) > 1:
            questions = [replace(q, id=f"{q.domain}/{q.id}") for q in questions]
        for q in questions:
            if taken.setdefault(q.id, number) != number:
                raise DataError(
                    f"question id {q.id!r} is in sources {taken[q.id]} and {number}, and an id stands for one image "
                    "and prompt; give the two [[questions]] tables different `domain`s"
                )
            splits[q.split].append(q)
    for missing in needed:
        if not splits[missing]:
            have = {name: len(items) for name, items in splits.items() if items}
            raise DataError(
                f"no question has the split {missing!r}; the sources have {have}. "
                "Give the questions a `split`, or the source `fractions` such as { private = 0.5, public = 0.2, … }"
            )
    check_disjoint({f"the split {name!r}": subjects_of(found) for name, found in splits.items()}, image_identity())
    return dict(splits)


def read_source(source: Source) -> list[Question]:
    """Read the questions of one source."""
    if source.kind == "easy-vqa":
        return load_easy_vqa(fine_types=source.fine_types, compositions=source.compositions)
    if source.kind == "arithmetic":
        return load_arithmetic(slips=source.slips)
    if source.kind == "radiology-and-rooms":
        return load_radiology_and_rooms(
            source.path,
            labels=source.labels,
            exposure=source.exposure,
            radiology=source.radiology,
            written=source.written,
            captions=source.captions,
        )
    if source.kind == "conventions":
        return load_conventions(source.path, disputed=source.disputed)
    if source.kind == "captions":
        return read_captions(source.path)
    if source.kind == "folder":
        return read_vqa_folder(source.path, type_field=source.type_column or "question_type")
    if source.kind == "image-text":
        return read_image_text(
            source.path,
            split=source.split,
            image_column=source.image_column,
            text_column=source.text_column,
            prompt=source.prompt,
            splits=source.splits,
            domain=source.domain or None,
        )
    return read_vqa_dataset(
        source.path,
        split=source.split,
        image_column=source.image_column or None,
        question_column=source.question_column,
        answer_column=source.answer_column,
        type_column=source.type_column or None,
        domain=source.domain or None,
    )


@dataclass
class Job:
    """A recipe, the folder it runs in, and what its stages share."""

    recipe: Recipe
    run: Run
    quiet: bool = False
    alone: str = ""  # the one site that works here: no questions but its own need be there
    engine: Engine | None = None  # reaches the sites where they are other organisations'; None: they are opened here
    together: Together | None = None  # the processes that align the policy together with this one
    main: Path | None = None  # the run folder that takes over what is made here; None: this one is no part of another
    written: Recipe | None = None  # the recipe before `on_own_projector`, where this run trains the projector
    traffic: Traffic = field(default_factory=Traffic)
    pairs: dict[str, list[PreferencePair]] = field(default_factory=dict)  # by site, once they are built
    profile: bool = False  # whether each stage's time is looked into (`accord.stages.profile`)
    base_captions: dict[str, list[str]] = field(default_factory=dict)  # by split, once the base was asked
    folder: Path | None = None  # of a run that is only read: no run is open

    @contextmanager
    def doing(self, stage: str, *, needs: Collection[str] | None = None) -> Iterator[None]:
        """Do a stage; what was built on its earlier result is done no longer, and what that left behind is removed.

        Args:
            stage: its name.
            needs: of "sites" and "router" those that it stands on; None for both.
        """
        later = BUILT_ON_IT[stage.split()[0]]
        made = {"site": "sites"}.get(stage.split()[0], stage.split()[0])
        if self.written is not None and stage != "projector":
            if self.written.projector is not None and self.written.projector.training == "local":
                raise RecipeError(f'{NO_POLICY}; say training = "federated" in a recipe that trains more')
            self.need(PROJECTOR, "accord pretrain-projector RECIPE", "projector")

        def stale(other: str) -> bool:
            stands_on = self.run.stands_on(other)
            on_it = made == "projector" or stands_on is None or made in stands_on  # all train or ask the policy
            return other.split()[0] in later and on_it

        for checkpoints in (self.path / "checkpoints").glob("*"):
            # A stage that is done has checkpoints only where a kill came before their removal.
            # One that reads the private data may stand on what it has kept of them, which goes below.
            kept = made == "sites" and "private" in (self.run.stands_on(checkpoints.name) or ())
            if stale(checkpoints.name) or kept or self.run.done(checkpoints.name):
                shutil.rmtree(checkpoints, ignore_errors=True)
        if "compare" in later:
            shutil.rmtree(self.path / "kept" / "router", ignore_errors=True)
        if "router" in later:
            shutil.rmtree(self.path / "kept" / "site", ignore_errors=True)
        for memory in (self.path / "kept" / "stage").glob("*"):
            if stale(memory.name):
                shutil.rmtree(memory, ignore_errors=True)
        looked_into = profiled(self.path, stage) if self.profile else nullcontext()
        with self.run.doing(stage, undoes=stale, stands_on=needs), looked_into:
            yield

    def log(self, record: Mapping[str, object]) -> None:
        """Note a measurement in `metrics.jsonl`, and its numbers for TensorBoard."""
        self.run.log(record)
        for name, value in scalars(record):
            self.board.add_scalar(name, value, cast(int, record.get("step", 0)))

    @cached_property
    def board(self) -> SummaryWriter:
        """The TensorBoard event file."""
        return SummaryWriter(str(self.run.path / "tensorboard"))

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder or self.run.path

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """All questions by split; `private` may be missing where no site needs it."""
        if self.alone:
            needed = ["private"] if self.site(self.alone).needs_questions else []
            return {"public": [], "dev": [], "test": []} | load_questions(self.recipe.questions, needed)
        here = self.engine is None and any(site.needs_questions for site in self.recipe.sites)
        private = ["private"] if here else []
        return load_questions(self.recipe.questions, [*private, "public", "dev", "test"])

    @cached_property
    def prompts(self) -> list[Question]:
        """The public questions that GRPO asks.

        Raises:
            DataError: the recipe's choice leaves none.
        """
        chosen = self.recipe.prompts
        found = [q for q in self.questions["public"] if chosen.wants(q)]
        if not found:
            there = sorted({f"{q.domain}/{q.question_type}".lstrip("/") for q in self.questions["public"]})
            wanted = ", ".join(map(repr, (*chosen.domains, *chosen.question_types)))
            raise DataError(
                f"no public question is of {wanted or 'any type'}, and they are of "
                f"{', '.join(there) or 'none'}; correct domains and question_types in [prompts]"
            )
        return found

    @cached_property
    def private(self) -> dict[str, list[Question]]:
        """Each site's private questions; none for a site that needs none."""
        if self.engine is not None:
            raise RunError("this needs the sites' private questions, which never leave them; run it in one process")
        private = self.questions.get("private", [])
        if self.recipe.dealing and self.recipe.dealing.by == "clusters":
            return self.silos.questions
        if self.recipe.dealing:
            return deal(
                private,
                self.mixtures,
                seed=self.recipe.seed,
                limit=self.recipe.dealing.images,
                disjoint_images=self.recipe.disjoint_images,
            )
        shares = [site.share for site in self.recipe.sites if site.needs_questions]
        dealt = self._share_out(private, shares)
        return {site.name: dealt.get(site.name, []) for site in self.recipe.sites}

    @cached_property
    def silos(self) -> Silos:
        """The private questions by clusters of what they are about, a site each, where the recipe deals them so.

        Raises:
            RecipeError: it does not; or a site works alone, and others' pictures are not there to tell clusters by.
        """
        dealing = self.recipe.dealing
        if dealing is None or dealing.by != "clusters":
            raise RecipeError('questions are dealt by no clusters; add [dealing] with by = "clusters"')
        if self.alone:
            raise RecipeError(
                f'[dealing] by = "clusters" cuts one pool of pictures into sites, and {self.alone!r} works alone and '
                "has its own; leave the table out of its recipe"
            )
        names = [site.name for site in self.recipe.sites]
        private = self.questions.get("private", [])
        seed, limit = self.recipe.seed, dealing.images
        return cut_silos(private, names, self.encoder, dealing.features, seed=seed, limit=limit)

    @cached_property
    def judged(self) -> dict[str, list[Judged]]:
        """Of each site that holds judgements, what people said of the photographs that it was dealt."""
        rows = read_judgements(self.recipe.captions, split="private")
        shares = [site.share for site in self.recipe.sites if site.judgements]
        dealt = self._share_out(photographs(rows), shares)
        found = {}
        for name, held in dealt.items():
            mine = {photograph.id for photograph in held}
            found[name] = [row for row in rows if row.photograph.id in mine]
        return found

    def _share_out(self, questions: Sequence[Question], shares: Sequence[SiteShare]) -> dict[str, list[Question]]:
        if self.alone:
            # A site that wants none of these questions has its own elsewhere; the draw is the same without it.
            shares = [share for share in shares if share.name == self.alone or any(map(share.wants, questions))]
        return share_out(questions, shares, seed=self.recipe.seed, disjoint_images=self.recipe.disjoint_images)

    @cached_property
    def mixtures(self) -> dict[str, dict[tuple[str, str], float]]:
        """Each site's mixture of domains and types, where the recipe has them drawn; empty where it does not."""
        if self.recipe.dealing is None or self.recipe.dealing.by == "clusters":
            return {}
        kinds = sorted({kind_of(q) for questions in self.questions.values() for q in questions})
        names = [site.name for site in self.recipe.sites]
        return mixtures(kinds, names, self.recipe.dealing.alpha, self.recipe.seed)

    @cached_property
    def shares(self) -> dict[str, SiteShare]:
        """What each site stands for: its domains and types, as the recipe says or as they were drawn."""
        return {
            site.name: stands_for(site.name, self.mixtures[site.name]) if self.mixtures else site.share
            for site in self.recipe.sites
        }

    @cached_property
    def identify(self) -> Callable[[Subject], str]:
        """What tells images apart: the SHA-256 of their stored bytes, each read once."""
        return image_identity()

    @cached_property
    def policy(self) -> tuple[PreTrainedModel, Processor]:
        """The base policy, frozen, and its processor."""
        if self.recipe.encoder_checkpoint == self.recipe.policy.checkpoint:
            return self.encoder.model, self.encoder.processor
        model, processor = load_model(self.recipe.policy.checkpoint)
        return model.eval().requires_grad_(False), processor

    @cached_property
    def encoder(self) -> Encoder:
        """The frozen encoder that routers and gates read: the base policy, unless the recipe names another model."""
        return Encoder(*load_model(self.recipe.encoder_checkpoint))

    @cached_property
    def judge(self) -> RewardModel:
        """What judges captions in the end: a reward model that no site has.

        Raises:
            RecipeError: the recipe names none.
            CheckpointError: it cannot be loaded.
        """
        if not self.recipe.evaluation.judge:
            raise RecipeError(
                "captions are measured by a judge, and the recipe names none; make one with `accord judge`, and add "
                'judge = "…" to [evaluation]'
            )
        return RewardModel.load(Path(self.recipe.evaluation.judge))

    def kept(self, name: str, *, after: Literal["site", "router"]) -> Path:
        """Return where a method keeps what it has made once for all stages of a run.

        Args:
            name: of the file or folder.
            after: what it was made from, the sites or the router; once either is trained again, it is gone.
        """
        return self.path / "kept" / after / name

    @cached_property
    def evaluated(self) -> list[Question]:
        """The test questions."""
        return sample_questions(self.questions["test"], self.recipe.evaluation.questions, seed=0)

    def site(self, name: str) -> SiteConfig:
        """Return the site's configuration."""
        for site in self.recipe.sites:
            if site.name == name:
                return site
        raise RunError(f"the recipe has no site {name!r}; it has {', '.join(s.name for s in self.recipe.sites)}")

    def need(self, place: str, command: str, stage: str) -> Path:
        """Return a file or folder that an earlier stage made.

        Raises:
            RunError: it is not there, or the stage is not done: it was broken off, or what it stands on was made again
                since. Says which command makes it.
        """
        path = self.path / place
        if not path.exists() or not self.run.done(stage):
            state = "out of date" if path.exists() else "missing"
            raise RunError(f"{path} is {state}; make it with `{command}`, or run the whole recipe with `accord run`")
        return path


NO_POLICY: Final = (
    'projector.training = "local" leaves every site a projector of its own, and none that a policy starts from'
)

PROJECTOR: Final = "projector/checkpoint"
"""Where a run keeps the policy whose projector it has trained."""


def on_own_projector(recipe: Recipe, run: Path) -> Recipe:
    """Return the recipe whose policy is the one with the projector that the run in the folder `run` trains.

    Routers and gates go on reading the checkpoint that the recipe names, which every site has. A recipe that trains no
    projector comes back as it is.
    """
    if recipe.projector is None:
        return recipe
    policy = replace(recipe.policy, checkpoint=str(run / PROJECTOR))
    return replace(
        recipe, projector=None, policy=policy, encoder=replace(recipe.encoder, checkpoint=recipe.encoder_checkpoint)
    )


@contextmanager
def open_job(
    recipe: Recipe,
    run: Run,
    *,
    quiet: bool = False,
    alone: str = "",
    main: Path | None = None,
    engine: Engine | None = None,
    together: Together | None = None,
) -> Iterator[Job]:
    """Work in the folder of `run`: it is this process's until the end, and what the stages opened is closed then."""
    with run:
        trains = recipe.projector is not None and not alone  # a site alone has the checkpoint that the recipe names
        settled = on_own_projector(recipe, run.path) if trains else recipe
        written = recipe if trains else None
        job = Job(settled, run, quiet=quiet, alone=alone, engine=engine, together=together, main=main, written=written)
        try:
            yield job
        finally:
            if "board" in vars(job):  # a cached property: only a stage that logged has opened it
                job.board.close()


def scalars(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a metrics record under slash-separated names, the stage first; the step is no name."""
    if not prefix:
        prefix = "/".join(str(record[key]) for key in ("stage", "site", "of") if key in record)
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}/{key}", float(value)
