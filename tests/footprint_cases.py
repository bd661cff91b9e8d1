"""The trainings whose memory is both planned and measured: small batches, so that the weights decide."""

from accord.alignment.grpo import AlignmentConfig
from accord.models.finetune import FineTuneConfig
from accord.rewards.train import RewardConfig

TUNING = FineTuneConfig(steps=2, batch_size=4)
REWARD = RewardConfig(steps=2, prompts_per_batch=2, rejected_per_prompt=3, evaluate_on=0)
GRPO = AlignmentConfig(
    steps=2, prompts_per_step=2, group_size=4, max_completion_length=4, evaluate_every=0, save_every=0
)
