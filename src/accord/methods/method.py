"""What a method is: how it aligns the base policy, and all that is asked about it elsewhere.

    METHOD = Method(align, about="what judges an answer", role="competes", needs={"sites", "router"})

A method takes a job and the name of its stage, and returns the aligned policy. Most are GRPO with another reward
(`by_reward`); those that share parameters train in their own way. All start from the same base, reach the sites through
the same engine, and count their bytes alike. `plan`, `watch`, `report`, `compare` and `bench` ask the method what they
want to know: nothing else in Accord names one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypeVar

from accord.alignment.grpo import AlignmentConfig, RewardFunction
from accord.alignment.reward import FederatedReward
from accord.errors import RecipeError
from accord.federation.messages import ScoreRange
from accord.models.encoder import Encoder
from accord.models.load import LoraSettings
from accord.recipe import Recipe
from accord.routing.router import Router
from accord.stages.alignment import Aligned, run_grpo
from accord.stages.job import Job

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Role: TypeAlias = Literal["competes", "control", "chance", "bound", "ceiling"]
"""Its place in a table: a control (the server alone), chance in the place of a choice, what no federation may do or
know, or the reference answers as reward, whose gain the others' are shares of. Only what competes can be best."""

Need: TypeAlias = Literal["sites", "router", "answers", "sums", "private"]
"""What must be there: the sites' reward models, the federated router, a site whose own model answers, sums of all
sites' prompts; and the sites' private questions and pairs in this process, which it can have only where all sites are
opened here."""

Align: TypeAlias = Callable[[Job, str], Aligned]
Config = TypeVar("Config", bound="DataclassInstance", covariant=True)


@dataclass(frozen=True)
class Table(Generic[Config]):
    """A method's own table in a recipe: `[name]` holds a `config`, its defaults where it is left out."""

    name: str
    config: type[Config]

    def of(self, recipe: Recipe) -> Config:
        """Return the settings that a recipe gives.

        Raises:
            RecipeError: what it has under the name are no such settings, as where a table has not been read.
        """
        given = recipe.tables.get(self.name)
        if given is None:
            return self.config()
        if not isinstance(given, self.config):
            raise RecipeError(
                f"[{self.name}] must be a {self.config.__name__}, got a {type(given).__name__}; pass one, or read the "
                "recipe by accord.recipe_file.import_methods"
            )
        return given


@dataclass(frozen=True)
class Method:
    """One way to align the policy.

    Attributes:
        align: aligns; gets the job, whose sites and router are trained as far as `needs` says, and its stage's name.
        about: what judges an answer, in a line.
        role: its place in a table.
        needs: what must be there.
        scores: the form in which it asks for scores: clipped to a range, None for unclipped, "raw" for not even
            standardised; by default as the recipe says, which is the one form that other organisations' sites send.
        check: refuses a recipe by which it cannot be done, before anything is trained.
        check_data: returns what it takes of the server's own questions, for `accord plan --check`: a line, or an empty
            one. What it lacks of them it tells by a warning or an AccordError. No run is open, so that the job has no
            folder.
        tables: its own tables in a recipe.
        steps: how many steps or rounds its stage takes, of a recipe; by default GRPO's.
        asks: how many sites judge one completion of GRPO, of a recipe; 0 where none is asked.
        training: what is trained where, beside or before the policy by GRPO, in a line for `accord plan`; empty for
            nothing.
        together: whether several processes may align by it: it is GRPO whose reward learns nothing on the way.
        grpo: GRPO's settings, of a recipe; None where the policy is not aligned by GRPO.
        lora: the adapter of the policy that is trained, of a recipe; None where the policy is trained whole.
        reward: the reward by which the policy was aligned, as it is when the stage is done, for the report; None where
            no site judges.
        opened: its router from a run folder, for a script of one's own (`accord.pipeline.open_reward`); None where its
            reward needs more than a run folder holds.
        findings: further fields of the summary, of the job, the method's stage and the sites' names: what it has learnt
            of the sites.
    """

    align: Align
    about: str = ""
    role: Role = "competes"
    needs: frozenset[Need] = frozenset()
    scores: ScoreRange | Literal["recipe", "raw"] | None = "recipe"
    check: Callable[[Recipe], None] = lambda recipe: None
    check_data: Callable[[Job], str] = lambda job: ""
    tables: tuple[Table[DataclassInstance], ...] = ()
    steps: Callable[[Recipe], int] = lambda recipe: recipe.alignment.steps
    asks: Callable[[Recipe], int] = lambda recipe: 0
    training: Callable[[Recipe], str] = lambda recipe: ""
    together: bool = False
    grpo: Callable[[Recipe], AlignmentConfig | None] = lambda recipe: recipe.alignment
    lora: Callable[[Recipe], LoraSettings | None] = lambda recipe: recipe.alignment.lora
    reward: Callable[[Job], FederatedReward] | None = None
    opened: Callable[[Path, Recipe, Encoder], Router] | None = None
    findings: Callable[[Job, str, Sequence[str]], Mapping[str, object]] = lambda job, stage, sites: {}


def refuse_private(method: str, does: str) -> Callable[[Recipe], None]:
    """Return a check that refuses a recipe in which a site's guarantee would not hold by this method.

    Args:
        method: its name.
        does: what it does with the site's pairs, after its name.
    """

    def check(recipe: Recipe) -> None:
        for site in recipe.sites:
            if site.privacy is not None:
                raise RecipeError(
                    f"site {site.name!r} has privacy, and {method!r} {does}, which its guarantee does not cover; leave "
                    f"{method!r} out, or privacy out of the site's table"
                )

    return check


def by_reward(
    make: Callable[[Job], RewardFunction],
    *,
    change: Callable[[AlignmentConfig], AlignmentConfig] = lambda settings: settings,
    reads: Callable[[Job], Encoder | None] | None = None,
) -> Align:
    """Return how to align by GRPO with the reward that `make` returns.

    Args:
        make: of a job.
        change: GRPO's settings from the recipe's.
        reads: the encoder by which the reward reads completions, if it does: spared what the reference has computed.
    """

    def align(job: Job, stage: str) -> Aligned:
        return run_grpo(
            job,
            stage,
            make(job),
            settings=change(job.recipe.alignment),
            encoder=reads(job) if reads else None,
        )

    return align
