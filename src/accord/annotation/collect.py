"""Put pairs into an annotation's folder, those of a file or of policies, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from accord.annotation.folder import SETTINGS, Settings, read_all, read_settings, write_pairs, write_settings
from accord.annotation.pairs import Candidate, read_candidates
from accord.data.sampling import sample_questions
from accord.errors import RecipeError, RunError
from accord.types import Question

OVERLAP = 0.1


@dataclass(frozen=True)
class Source:
    """Where new pairs come from, if from anywhere, and what comes first."""

    file: Path | None = None
    data: str = ""  # where the questions are from, for the record
    questions: Callable[[], Sequence[Question]] | None = None  # asked of `policies`
    policies: tuple[str, ...] = ()
    samples: int = 4
    max_new_tokens: int = 128
    limit: int = 0  # at most so many pairs in the folder; 0 for all
    uncertain: Path | None = None  # a reward model: what it is least certain of comes first

    def __post_init__(self) -> None:
        """Refuse what is no source."""
        if len(self.policies) > 2:
            raise RecipeError(f"two policies at most are compared, got {len(self.policies)}; leave some out")
        if bool(self.policies) != (self.questions is not None):
            raise RecipeError("samples need questions and a policy; give --questions and --policy together")
        if len(self.policies) == 1 and self.samples < 2:
            raise RecipeError(f"a pair of one policy needs 2 samples at least, got {self.samples}; raise --samples")


def settle(folder: Path, *, overlap: float | None, seed: int | None) -> Settings:
    """Return a folder's settings, written if it is new; what is None is as it was, or the default.

    Raises:
        RecipeError: the overlap is no share.
        RunError: the folder is something else, or was started with other settings.
    """
    settings = read_settings(folder)
    if overlap is not None and not 0 <= overlap <= 1:
        raise RecipeError(f"overlap must be a share from 0 to 1, got {overlap}; correct --overlap")
    if settings is None:
        if folder.exists() and (not folder.is_dir() or any(each.name != "run.lock" for each in folder.iterdir())):
            raise RunError(f"{folder} exists and is no annotation: it has no {SETTINGS}; name another folder")
        settings = Settings(OVERLAP if overlap is None else overlap, seed or 0)
        write_settings(folder, settings)
    for name, given in (("overlap", overlap), ("seed", seed)):
        if given is not None and given != (was := getattr(settings, name)):
            raise RunError(f"{folder} was started with {name} {was}, got {given}; leave --{name} out")
    return settings


def collect(folder: Path, source: Source, *, tell: Callable[[str], None], quiet: bool = False) -> list[Candidate]:
    """Add the source's pairs to a folder that this process holds, and return all in the order in which they are shown.

    A pair that is in the folder already is not added again, and what was sampled of policies is not sampled again: the
    same call a second time changes nothing.

    Raises:
        DataError: the source cannot be read, or gives no pair.
        CheckpointError: a policy or the reward model cannot be loaded.
        RunError: there is no pair at all, or the folder cannot be written.
    """
    settings, known, judgements = read_all(folder)
    there = {each.id for each in known}
    new: list[Candidate] = []
    if source.file is not None:
        new = read_candidates(source.file)
    described = f"{', '.join(source.policies)}: {source.samples} samples of {source.data}, seed {settings.seed}"
    sampled = source.questions is not None and described not in settings.sampled
    if source.questions is not None and sampled:
        from accord.annotation.sampling import sample_candidates  # loads PyTorch, which a page alone does without

        questions = source.questions()
        if source.limit and source.uncertain is None:  # a pool to choose from is sampled whole
            questions = sample_questions(questions, source.limit, seed=settings.seed)
        new += sample_candidates(
            questions,
            source.policies,
            samples=source.samples,
            every=source.uncertain is not None,
            max_new_tokens=source.max_new_tokens,
            seed=settings.seed,
            quiet=quiet,
        )
        tell(f"{len(questions)} questions gave {len(new)} pairs of answers that differ")
    new = [each for each in new if each.id not in there]
    room = max(0, source.limit - len(known)) if source.limit else len(new)
    if source.uncertain is None:
        found = [*known, *new[:room]]
    else:
        from accord.annotation.sampling import least_certain
        from accord.rewards.model import RewardModel

        model = RewardModel.load(source.uncertain)
        judged = {each.pair for each in judgements}
        added = {each.id for each in least_certain(model, new)[:room]} if new else set()
        waiting = [each for each in (*known, *new) if each.id not in judged and (each.id in there or each.id in added)]
        found = [each for each in known if each.id in judged] + least_certain(model, waiting)
    if not found:
        raise RunError(f"{folder} has no pairs yet; add --pairs FILE, or --questions DATA with --policy CHECKPOINT")
    if found != known:
        write_pairs(folder, found)
    if sampled:
        write_settings(folder, msgspec.structs.replace(settings, sampled=[*settings.sampled, described]))
    return found
