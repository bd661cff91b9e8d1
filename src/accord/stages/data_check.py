"""Say before anything is trained what is wrong with a recipe's data, and what it costs.

`accord plan --check` reads all of it: every row, every image, every site's own pairs, every reference answer in the
policy's tokens. It goes on after a fault, so that one reading says them all. Nothing is trained, and of the models only
tokenizers and configurations are read, where they are on this machine.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from transformers import PreTrainedTokenizerBase

from accord.attacks.scores import has_words
from accord.data.preferences import read_preferences
from accord.errors import AccordError, DataError, DataWarning
from accord.models.load import load_tokenizer, locate, reads_images
from accord.recipe import Recipe, SiteConfig
from accord.runs import Run
from accord.stages.job import Job
from accord.stages.sites import check_sites, site_pairs
from accord.types import PreferencePair, Prompt, Question, prompt_of

MOST_CUT: Final = 0.05
"""Share of reference answers over the limit of which a run warns; a few long ones are in most data."""

LEARNED_FROM: Final = ("public", "dev", "test")
"""Splits whose questions the policy answers within `max_completion_length`."""


@dataclass
class DataCheck:
    """What was found."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # some rows are lost, or some answers
    problems: list[str] = field(default_factory=list)  # a run would end with this error

    def __str__(self) -> str:
        """Return it as text."""
        found = [f"problem: {text}" for text in self.problems] + [f"warning: {text}" for text in self.warnings]
        return "\n".join(["data", *[f"  {line}" for line in self.lines], "", *(found or ["nothing is wrong with it"])])

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Take down errors and warnings, and go on."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            try:
                yield
            except AccordError as error:
                self.problems = [*dict.fromkeys([*self.problems, str(error)])]
        told = [str(each.message) for each in caught if issubclass(each.category, DataWarning)]
        self.warnings = [*dict.fromkeys([*self.warnings, *told])]  # two methods may lack the same


def check_data(recipe: Recipe, methods: Iterable[Callable[[Job], str]] = ()) -> DataCheck:
    """Read a recipe's data and return what is wrong with it.

    Args:
        recipe: its questions, its sites' pairs and its policy.
        methods: what its methods take of the server's questions, and lack (`Method.check_data`).
    """
    found, job = DataCheck(), Job(recipe, cast(Run, None), quiet=True)
    with found.noting():
        for name, questions in job.questions.items():
            found.lines += [_counted(f"split {name}", questions)] if questions else []
    for site in recipe.sites:
        if site.preferences:
            with found.noting():
                pairs = read_preferences(Path(site.preferences))
                found.lines.append(_counted_pairs(f"site {site.name}", pairs))
                _check_sight(site.checkpoint, f"site {site.name!r}", sum(bool(pair.images) for pair in pairs))
    if "questions" not in vars(job):  # the first error says why, and what follows reads them again
        return found
    pictured = sum(q.image is not None for q in job.questions.get("public", []))
    with found.noting():
        _check_sight(recipe.policy.checkpoint, "the policy", pictured)
    clusters = recipe.dealing is not None and recipe.dealing.by == "clusters"
    with found.noting():
        if not clusters:  # they are cut by a model's features
            for name, questions in job.private.items():
                found.lines += [_counted(f"site {name}", questions)] if questions else []
        if not found.problems:
            check_sites(job)
    with found.noting():
        warn_of_triggers(job, held=not clusters)
    taken: list[str] = []
    for check in methods:
        with found.noting():
            taken.append(check(job))
    found.lines += [line for line in dict.fromkeys(taken) if line]  # two methods may take the same
    with found.noting():
        if not recipe.captions and Path(locate(recipe.policy.checkpoint)).is_dir():
            text = too_long(recipe, job.questions, load_tokenizer(recipe.policy.checkpoint), least=0)
            found.warnings += [text] if text else []
    return found


def warn_of_long_answers(job: Job) -> None:
    """Warn where the policy cannot say many of the reference answers that it is aligned, chosen or tested by.

    Warns:
        DataWarning: says their share, the limit and the remedy.
    """
    if job.recipe.captions:  # they are judged, and a description may be shorter than another
        return
    text = too_long(job.recipe, job.questions, load_tokenizer(job.recipe.policy.checkpoint), least=MOST_CUT)
    if text:
        warnings.warn(text, DataWarning, stacklevel=2)


def warn_of_triggers(job: Job, *, held: bool) -> None:
    """Warn where no question has the words on which alone a site lies: it would be honest throughout.

    Args:
        job: of the run.
        held: whether the sites' own questions are there to look at, for a site that poisons its pairs.

    Warns:
        DataWarning: names the site, and says the remedy.
    """
    for site in job.recipe.sites:
        if site.attack is None or not site.attack.trigger or (site.attack.kind == "poison" and not held):
            continue
        if not any(has_words(prompt, site.attack.trigger) for prompt in _attacked(job, site)):
            questions = "about which it has pairs" if site.attack.kind == "poison" else "that it is asked"
            warnings.warn(
                f"site {site.name!r} lies only where a question has the words trigger = {site.attack.trigger!r}, and "
                f"no question {questions} has them: it never lies; write trigger to the letter, or take it out",
                DataWarning,
                stacklevel=2,
            )


def _attacked(job: Job, site: SiteConfig) -> list[Prompt]:
    """Return what a site lies about: what it is asked, or what its pairs are about where it poisons these."""
    assert site.attack is not None
    if site.attack.kind != "poison":
        return [prompt_of(q) for q in (*job.prompts, *job.questions.get("base", []))]
    if site.preferences:
        return [pair.prompt for pair in site_pairs(job, site.name)]
    judged = [row.photograph for row in job.judged[site.name]] if site.judgements else []
    return [prompt_of(q) for q in (*job.private[site.name], *judged)]


def too_long(
    recipe: Recipe, questions: dict[str, list[Question]], tokenizer: PreTrainedTokenizerBase, *, least: float
) -> str | None:
    """Say what share of the reference answers needs more than `max_completion_length` tokens.

    A question counts where every right answer to it does. The token that ends an answer is not counted.

    Args:
        recipe: has the limit.
        questions: by split; those that the policy answers count.
        tokenizer: the policy's.
        least: the share above which there is something to say.

    Returns:
        One sentence with the remedy, or None.
    """
    limit = recipe.alignment.max_completion_length
    asked = [q for split in LEARNED_FROM for q in questions.get(split, [])]
    length = _length_by(tokenizer)
    lengths = [min(map(length, (q.answer, *q.references))) for q in asked]
    over = [(n, q) for n, q in zip(lengths, asked, strict=True) if n > limit]
    if not asked or len(over) <= least * len(asked):
        return None
    longest, example = max(over, key=lambda item: item[0])
    return (
        f"{len(over) / len(asked):.0%} of the reference answers ({len(over)} of {len(asked)} in "
        f"{', '.join(LEARNED_FROM)}) need more than max_completion_length = {limit} tokens, up to {longest} as in "
        f"{example.answer!r:.60}: the policy can never give them; raise alignment.max_completion_length to "
        f"{longest + 1}"
    )


def _length_by(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    known: dict[str, int] = {}

    def length(text: str) -> int:
        if text not in known:
            known[text] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return known[text]

    return length


def _check_sight(checkpoint: str, whose: str, pictured: int) -> None:
    """Refuse images for a text-only model, where its configuration is on this machine."""
    if pictured and Path(locate(checkpoint)).is_dir() and not reads_images(checkpoint):
        raise DataError(
            f"{whose} is {checkpoint}, a text-only model, and {pictured} of its rows have an image; name a "
            "vision-language checkpoint, or leave the images out"
        )


def _counted(what: str, questions: Sequence[Question]) -> str:
    images = len({image for q in questions for image in q.images})
    types = Counter(q.question_type for q in questions)
    named = ", ".join(f"{name} {count}" for name, count in types.most_common(6)) + (", …" if len(types) > 6 else "")
    return f"{what:<20} {len(questions)} questions about {images or 'no'} images{_several(questions)}: {named}"


def _counted_pairs(what: str, pairs: Sequence[PreferencePair]) -> str:
    images = len({image for pair in pairs for image in pair.images})
    return f"{what:<20} {len(pairs)} preference pairs of its own about {images or 'no'} images{_several(pairs)}"


def _several(items: Sequence[Question] | Sequence[PreferencePair]) -> str:
    count = sum(len(item.images) > 1 for item in items)
    return f" ({count} about several, which a run tries with each model before it trains)" if count else ""
