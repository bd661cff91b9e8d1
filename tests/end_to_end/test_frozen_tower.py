"""A frozen tower through every stage: it ends as it began, and keeping its features changes no bit of any loss."""

import json
import shutil

import pytest
import torch

from accord.alignment.grpo import AlignmentConfig, align
from accord.models.encoder import Encoder
from accord.models.features import FEATURES, PIXELS, FeatureConfig, remember
from accord.models.finetune import FineTuneConfig, finetune
from accord.models.generate import answer
from accord.models.load import LoraSettings, load_model
from accord.models.tower import is_pinned, vision_tower
from accord.rewards.model import RewardModel
from accord.rewards.train import RewardConfig, train_reward_model

COLOURS = ("red", "blue", "green", "yellow")


@pytest.fixture
def frozen(request, efficientnet, checkpoints, tmp_path):
    """A checkpoint of each kind whose tower is frozen."""
    if request.param == "efficientnet":
        return efficientnet
    folder = tmp_path / request.param
    shutil.copytree(checkpoints[request.param], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["freeze_vision"]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def stages(frozen, ask, prefer, tmp_path):
    """Return a function that runs every stage with so much memory for features; it returns all numbers and models."""
    questions = [ask(n, colour) for n, colour in enumerate(COLOURS)]
    pairs = [prefer(n, colour, COLOURS[n - 1]) for n, colour in enumerate(COLOURS)]

    def run(memory, *, lora=None):
        for cache in (FEATURES, PIXELS):
            cache.clear()
        remember(FeatureConfig(memory, memory))
        torch.manual_seed(0)
        numbers, models = {}, []
        tuning = FineTuneConfig(steps=3, batch_size=4, symmetries=True)
        model, processor = load_model(frozen, trainable=True)
        numbers["finetune"] = finetune(model, processor, questions, tuning, seed=0, out=tmp_path)
        models.append(model)

        records = []
        reward = RewardModel.from_checkpoint(frozen, lora=lora)
        config = RewardConfig(steps=4, prompts_per_batch=2, evaluate_every=2, patience=0)
        ranking = train_reward_model(
            reward, pairs, questions, ["red", "blue"], config, seed=0, out=tmp_path, log=records.append
        )
        models.append(reward.backbone)
        numbers["reward"] = [records, ranking.by_type, reward.standardisation]

        policy, processor = load_model(frozen, trainable=lora is None)
        encoder = Encoder(*load_model(frozen))
        models.append(encoder.model)
        steps = []

        def scored(prompts, completions, image, **_):
            texts = [completion[-1]["content"] for completion in completions]
            scores = torch.cat(reward.score(prompts, image, [[text] for text in texts]))
            states, mask = encoder(prompts, image, [[text] for text in texts])
            return (scores + states[mask].std()).tolist()

        alignment = AlignmentConfig(
            steps=3,
            prompts_per_step=2,
            group_size=4,
            max_completion_length=4,
            evaluate_every=0,
            save_every=0,
            lora=lora,
        )
        models.append(
            align(policy, processor, questions, scored, alignment, seed=0, out=tmp_path / "grpo", log=steps.append)
        )
        numbers["grpo"] = steps
        numbers["answers"] = answer(policy, processor, questions, max_new_tokens=3, samples=2, seed=0)
        return numbers, models

    yield run
    for cache in (FEATURES, PIXELS):
        cache.clear()
    remember(FeatureConfig())


@pytest.mark.parametrize(
    ("frozen", "lora"),
    [
        ("efficientnet", None),
        ("efficientnet", LoraSettings(rank=2)),
        ("llava-siglip-qwen2", None),
        ("idefics3", LoraSettings(rank=2)),
    ],
    indirect=["frozen"],
)
def test_every_stage_leaves_the_tower_alone_and_no_loss_depends_on_the_cache(stages, frozen, lora):
    """Four images in all: a plain square is its own mirror image."""
    begun = vision_tower(load_model(frozen)[0])
    computed = stages(0, lora=lora)
    assert len(FEATURES) == 0
    kept = stages(10**9, lora=lora)
    assert kept[0] == computed[0]
    assert len(FEATURES) == FEATURES.misses == len(COLOURS)
    assert PIXELS.misses == len(COLOURS)
    assert FEATURES.hits > 10 * len(COLOURS)
    for model in (*computed[1], *kept[1]):
        tower = vision_tower(model)
        assert is_pinned(model)
        assert not any(module.training for module in tower.modules())
        for name, tensor in begun.state_dict().items():
            assert torch.equal(tensor, tower.state_dict()[name])
