"""The server alone: the policy tuned on the server's own labelled questions, without any site. A control.

    L(θ) = − Σ_t log π_θ(a_t | image, question, a_<t)          over the N labelled questions that the gates read

Whatever reads labels at the server must be held against it: N labels can train a gate, choose experts, or simply tune
the policy. It is no federation, asks no site, and sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from transformers import set_seed

from accord.data.sampling import sample_questions
from accord.errors import DataError, check_least
from accord.methods.gates import ANCHOR_QUESTIONS
from accord.methods.method import Method, Table
from accord.models.finetune import FineTuneConfig, finetune
from accord.models.load import load_model
from accord.progress import ProgressBarCallback
from accord.stages.alignment import Aligned
from accord.stages.job import Job


@dataclass(frozen=True)
class ServerAloneConfig:
    """What the server tunes the policy on, and how."""

    questions: int = ANCHOR_QUESTIONS  # N, of the split `base`: those that the gates read
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)

    def __post_init__(self) -> None:
        """Refuse no questions."""
        check_least(self, questions=1)


SETTINGS: Final = Table("server_alone", ServerAloneConfig)


def server_alone(job: Job, stage: str) -> Aligned:
    """Tune the policy on the server's labelled questions.

    Raises:
        DataError: no question has the split `base`.
    """
    config = SETTINGS.of(job.recipe)
    labelled = job.questions.get("base", [])
    if not labelled:
        raise DataError("no question has the split 'base', which the server's labels are from; give the source some")
    set_seed(job.recipe.seed)
    job.run.truncate(stage)  # an attempt that was broken off starts over
    model, processor = load_model(job.recipe.policy.checkpoint, trainable=True)
    asked = sample_questions(labelled, config.questions, seed=job.recipe.seed)
    scratch = job.path / "checkpoints" / stage
    with ProgressBarCallback(stage, quiet=job.quiet) as bar:
        finetune(model, processor, asked, config.finetune, seed=job.recipe.seed, out=scratch, callbacks=[bar])
    return model.to(job.policy[0].dtype), processor  # type: ignore[arg-type]


METHODS: Final = {
    "server-alone": Method(
        server_alone,
        "nothing: the policy is tuned on the server's own labelled questions",
        role="control",
        grpo=lambda recipe: None,
        lora=lambda recipe: None,
        training=lambda recipe: (
            f"at the server: {SETTINGS.of(recipe).finetune.steps} steps on {SETTINGS.of(recipe).questions} questions"
        ),
        tables=(SETTINGS,),
        steps=lambda recipe: SETTINGS.of(recipe).finetune.steps,
    )
}
