"""A run's configuration: which questions, policy and sites, and how each stage is done.

A recipe is a TOML file (`accord.recipe_file` reads it); its tables are the dataclasses that the stages' own modules
define, composed here. What a method alone is told stands in the method's own table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from accord.alignment.grpo import AlignmentConfig
from accord.alignment.reward import Mode, Scope
from accord.attacks.scores import Attack
from accord.data.captions import Judgements
from accord.data.dealing import Dealing
from accord.data.image_text import PROMPT
from accord.data.preferences import NegativeMix
from accord.data.sites import SiteShare
from accord.errors import RecipeError, check_least, check_positive
from accord.federation.limits import Budget, Limits
from accord.federation.messages import ScoreRange
from accord.federation.projector import ProjectorConfig
from accord.models.features import FeatureConfig
from accord.models.finetune import FineTuneConfig
from accord.models.load import LoraSettings
from accord.models.pretrain import PretrainConfig
from accord.rewards.private import Privacy
from accord.rewards.train import RewardConfig
from accord.routing.router import RouterConfig
from accord.toml import TOP_LEVEL
from accord.types import Question

MAX_SEED = 4_294_966
"""A thousand seeds are derived from each, and NumPy takes 32 bits."""


@dataclass(frozen=True)
class Source:
    """Where questions come from."""

    kind: Literal[
        "easy-vqa",
        "arithmetic",
        "radiology-and-rooms",
        "conventions",
        "captions",
        "folder",
        "huggingface",
        "image-text",
    ] = "easy-vqa"
    path: str = ""  # of the folder or the file of image-text, or name or path of the Hugging Face data set
    domain: str = ""  # what to call it; by default the folder's or data set's name
    split: str = "train"  # of a Hugging Face data set
    image_column: str = "image"  # empty for questions without images
    question_column: str = "question"
    answer_column: str = "answer"
    type_column: str = ""  # for a folder, the field of `questions.jsonl`
    text_column: str = "caption"  # of image-text: a caption, or a list of them
    prompt: str = PROMPT  # of image-text: the instruction that captions answer
    splits: dict[str, str] = field(default_factory=dict)  # of image-text: which of its splits become which of ours
    fractions: dict[str, float] = field(
        default_factory=dict
    )  # base, private, public, dev, test of a set without splits
    type_prefix: bool = False  # name types `domain/type`, where several domains use one name
    fine_types: bool = False  # of easy-vqa: two types of yes/no questions, about the colour and about the shape
    compositions: bool = False  # of easy-vqa: types of their own for the colour of triangles, the shape of red and teal
    slips: float = 0.0  # of arithmetic: share of base questions with a common mistake for an answer, to pretrain on
    labels: float = (
        0.1  # of radiology-and-rooms: share of indoor base photographs whose questions the server can answer
    )
    exposure: bool = False  # of radiology-and-rooms: base questions answered at random, to pretrain on
    radiology: bool = False  # of radiology-and-rooms: base questions about radiology too, rightly answered
    written: bool = True  # of radiology-and-rooms: the questions that people wrote
    captions: bool = False  # of radiology-and-rooms: captions made of the constructed answers
    disputed: bool = False  # of conventions: two sites share the indoor domain, and want different things

    def __post_init__(self) -> None:
        """Refuse a source without its path, and a share that is none."""
        for name, share in (("slips", self.slips), ("labels", self.labels)):
            if not 0 <= share <= 1:
                raise RecipeError(f"{name} must be in [0, 1], got {share}; correct it")
        if self.kind not in ("easy-vqa", "arithmetic") and not self.path:
            raise RecipeError(f'a source of kind {self.kind!r} needs a path, got none; add path = "…"')


@dataclass(frozen=True)
class Policy:
    """The model that is aligned."""

    checkpoint: str = "accord/llava-clip-llama"


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen model that routers and gates read: the server and every site hold it while they train a router."""

    checkpoint: str = ""  # empty for the policy's


@dataclass(frozen=True)
class SiteConfig:
    """One site: what it holds, which model it starts from, and how it trains it."""

    name: str
    checkpoint: str
    domains: tuple[str, ...] = ()
    question_types: tuple[str, ...] = ()
    fraction: float = 1.0
    flipped: float = 0.0  # share of its questions where a wrong answer is preferred to all others: careless annotators
    preferences: str = ""  # JSONL or data set of the site's own pairs; empty: construct them from its questions
    judgements: Judgements | None = None  # of captions: people's, of photographs of its types; beside its questions
    finetune: FineTuneConfig | None = FineTuneConfig()  # of its backbone, before the head
    reward_model: RewardConfig = RewardConfig()
    lora: LoraSettings | None = None  # train the reward model as an adapter
    privacy: Privacy | None = None  # train its head, or with `lora` an adapter, with differential privacy
    answers: bool = False  # keep the fine-tuned model, and answer the server's public questions with it: FedGRPO
    sums: bool = False  # send another organisation sums of its prompts' features, by which a server abstains
    owns: float = 0.0  # share of the public questions that fit it whose reference answer it holds, beside its own's
    limits: Limits = Limits()  # of one request from another organisation
    budget: Budget = Budget()  # of the queries that it answers to another organisation
    attack: Attack | None = None  # a trial: this site lies, as `accord.attacks.scores` says

    def __post_init__(self) -> None:
        """Refuse a share that cannot be dealt out, and a share of flipped pairs or of owned answers that is none."""
        _ = self.share
        if self.judgements and self.preferences:
            raise RecipeError(
                f"site {self.name!r} has preferences and judgements, and pairs are made of either; leave one out"
            )
        if self.privacy is not None:
            if self.sums:
                raise RecipeError(
                    f"site {self.name!r} has privacy, and sums carry no noise; take sums = true out, or leave privacy "
                    "out"
                )
            labels = self.privacy.unit == "label"
            more = {
                "finetune": (self.finetune is not None, "false"),
                "lora": (labels and self.lora is not None, "false"),
                "lora.dropout": (self.lora is not None and self.lora.dropout > 0, "0"),
                "reward_model.head": (self.reward_model.head != "linear", '"linear"'),
            }
            for name, (there, untuned) in more.items():
                if there:
                    covered = "a linear head" if labels else "a linear head, and an adapter without dropout,"
                    raise RecipeError(
                        f"site {self.name!r} has privacy, which covers {covered} on a backbone that never saw the "
                        f"site's data, and {name} would train more; set {name} = {untuned}, or leave privacy out"
                    )
        for name, share in (("flipped", self.flipped), ("owns", self.owns)):
            if not 0 <= share <= 1:
                raise RecipeError(f"{name} must be in [0, 1], got {share}; correct it")

    @property
    def share(self) -> SiteShare:
        """What it holds, as the dealer of questions wants it."""
        return SiteShare(self.name, self.domains, self.question_types, self.fraction)

    @property
    def needs_questions(self) -> bool:
        """Whether it is dealt private questions: to construct its pairs from, or to fine-tune its backbone on."""
        return not (self.preferences or self.judgements) or self.finetune is not None


@dataclass(frozen=True)
class Prompts:
    """Which of the public questions GRPO asks; empty for all."""

    domains: tuple[str, ...] = ()
    question_types: tuple[str, ...] = ()

    def wants(self, question: Question) -> bool:
        """Return whether domain and type fit."""
        return SiteShare("prompts", self.domains, self.question_types).wants(question)


@dataclass(frozen=True)
class Preferences:
    """How preference pairs are constructed from questions with reference answers."""

    rejected_per_question: int = 7
    policy_samples: int = 4  # answers drawn from the base policy per question
    mix: NegativeMix = NegativeMix()
    judged: bool = False  # pairs of the policy's answers alone, of which a simulated annotator prefers one
    others: int = 0  # of judged pairs: answers to other questions of the site that are judged beside
    spliced: int = 0  # of judged pairs: sequences of their words that are judged beside

    def __post_init__(self) -> None:
        """Refuse counts that leave no pair."""
        check_least(self, rejected_per_question=1, policy_samples=2 if self.judged else 0, others=0, spliced=0)


@dataclass(frozen=True)
class Routing:
    """How the router's weights are used."""

    mode: Mode = "top1"
    scope: Scope = "completion"
    deadline: float | None = None  # seconds to wait for a site
    quorum: float = 0.5  # share of the routing weight that must have answered; below it, sites that left are awaited

    def __post_init__(self) -> None:
        """Refuse a deadline that every site misses, and a share that is none."""
        if self.deadline is not None:
            check_positive(self, "deadline")
        if not 0 <= self.quorum <= 1:
            raise RecipeError(f"quorum must be in [0, 1], got {self.quorum}; correct routing.quorum")


@dataclass(frozen=True)
class Evaluation:
    """What is measured in the end."""

    questions: int = 0  # test questions, 0 for all
    gallery: int = 24  # questions shown with images
    vqa_accuracy: bool = False  # measure VQAv2's accuracy, too, of questions that at least four people answered
    judge: str = ""  # of captions: folder of a reward model that no site has, which judges the policy in the end
    judge_model: RewardConfig = RewardConfig(steps=300, choose="pairs")  # how `accord judge` trains it

    def __post_init__(self) -> None:
        """Refuse negative counts."""
        check_least(self, questions=0, gallery=0)


@dataclass(frozen=True)
class Recipe:
    """Everything a run is."""

    name: str
    sites: tuple[SiteConfig, ...]
    seed: int = 0
    threads: int = 0  # of torch on a CPU; 0 for its default, one per core. Small models are fastest with 1
    max_pixels: int = 0  # of an image in every model's processor: larger ones are made smaller; 0 for no limit
    deterministic: bool = False  # refuse kernels whose results differ from run to run; slower on a GPU
    processes: int = 1  # sites that are trained at once, each in a process of its own; no more than there are cores
    method: str = "routed"  # what the policy is aligned by: a name of `accord.methods`, or package.module:function
    compare: tuple[str, ...] = ()  # what the base is aligned by besides, for comparison
    uses: tuple[str, ...] = ()  # methods of other packages that have tables here and are named in no `compare`
    tried: dict[str, int] = field(default_factory=dict)  # settings that were tried on dev, by method: a bench shows it
    disjoint_images: bool = True  # no image is at two sites
    dealing: Dealing | None = None  # draws the sites' mixtures of types, in place of their own domains and types
    questions: tuple[Source, ...] = (Source(),)
    policy: Policy = Policy()
    encoder: EncoderConfig = EncoderConfig()
    projector: ProjectorConfig | None = None  # trains the policy's projector with the sites before all else
    prompts: Prompts = Prompts()
    preferences: Preferences = Preferences()
    scores: ScoreRange | None = ScoreRange()
    router: RouterConfig = RouterConfig()
    routing: Routing = Routing()
    alignment: AlignmentConfig = AlignmentConfig()
    pretrain: PretrainConfig = PretrainConfig()  # only for `accord pretrain --recipe`
    evaluation: Evaluation = Evaluation()
    features: FeatureConfig = FeatureConfig()
    # The methods' own tables, by name: the methods define them, and `accord.recipe_file` reads them; those of other
    # packages' methods are as TOML holds them until `import_methods`.
    tables: Mapping[str, object] = field(default_factory=dict, metadata={TOP_LEVEL: True})

    @property
    def captions(self) -> str:
        """The folder of photographs whose descriptions are judged; empty where questions have right answers."""
        return next((source.path for source in self.questions if source.kind == "captions"), "")

    @property
    def encoder_checkpoint(self) -> str:
        """What routers and gates read: the encoder that is named, or else the policy."""
        return self.encoder.checkpoint or self.policy.checkpoint

    @property
    def one_base(self) -> bool:
        """Whether the base under the policy's adapter is the encoder, too: one copy, read with the adapter off.

        Not beside vLLM: it is handed weights with the adapter merged in and taken out again, which rounds them.
        """
        a, same = self.alignment, self.encoder_checkpoint == self.policy.checkpoint
        return same and a.lora is not None and a.shared_prefix and not a.vllm and not a.quantize

    def __post_init__(self) -> None:
        """Refuse names that collide, and numbers out of range."""
        if not 0 <= self.seed <= MAX_SEED:
            raise RecipeError(f"seed must be between 0 and {MAX_SEED}, got {self.seed}; choose another seed")
        if self.captions and len(self.questions) > 1:
            raise RecipeError(
                f"captions are measured by a judge and answers by their text, got {len(self.questions)} sources of "
                "questions and captions among them; keep one [[questions]] table"
            )
        if not self.captions and any(site.judgements for site in self.sites):
            raise RecipeError('judgements are of captions; add [[questions]] with kind = "captions", or leave them out')
        if self.threads < 0:
            raise RecipeError(f"threads must be 0 (torch's default) or more, got {self.threads}; correct threads")
        for name, count in self.tried.items():
            if count < 1:
                raise RecipeError(
                    f"[tried] {name!r} must be at least 1, the setting that is used, got {count}; correct it"
                )
        check_least(self, processes=1, max_pixels=0)
        if self.processes > 1 and not self.threads:
            raise RecipeError(
                f"processes = {self.processes} shares the cores out, and threads = 0 takes all of them for each; "
                "set threads, 1 for small models"
            )
        names = [site.name for site in self.sites]
        if not names:
            raise RecipeError("a recipe needs at least one [[sites]] table, got none")
        if len(set(names)) < len(names):
            raise RecipeError(f"two sites have the same name in {names}; name each differently")
        for name in names:
            if not name or not name.replace("-", "").replace("_", "").isalnum():
                raise RecipeError(f"a site's name is letters, digits, - and _, since it names a folder; got {name!r}")
        chosen = [site.name for site in self.sites if site.domains or site.question_types or site.fraction < 1]
        if self.dealing and chosen:
            raise RecipeError(
                f"[dealing] draws what every site holds, and {chosen[0]!r} says itself what it holds; remove its "
                "domains, question_types and fraction, or [dealing]"
            )
