import random
from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from accord.data.sampling import draw_balanced
from accord.models.finetune import SYMMETRIES, FineTuneConfig, finetune, trainer_arguments, transform
from accord.models.generate import answer
from accord.models.load import load_model


def test_types_are_drawn_equally_often_and_without_repetition():
    """8 draws over types a (5 rows) and b (2 rows): 4 each; b's two rows come twice, no row of a comes twice."""
    drawn = draw_balanced(["a", "a", "b", "a", "a", "b", "a"], 8, random.Random(0))
    assert Counter(i in (2, 5) for i in drawn) == {False: 4, True: 4}
    assert Counter(i for i in drawn if i in (2, 5)) == {2: 2, 5: 2}
    assert len({i for i in drawn if i not in (2, 5)}) == 4


def test_the_draw_depends_on_the_generator_alone():
    draws = [draw_balanced(["a", "b"] * 20, 30, random.Random(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_longer_draw_begins_like_a_shorter_one():
    """So that a resumed training, which draws again, sees the same rows."""
    types = ["a", "b", "a"]
    assert draw_balanced(types, 9, random.Random(4))[:5] == draw_balanced(types, 5, random.Random(4))


def test_the_symmetries_are_the_eight_of_the_square():
    """The pixels 1 2 / 3 4 take the 8 orders that keep neighbours neighbours; the first is the picture itself."""
    image = Image.new("L", (2, 2))
    image.putdata([1, 2, 3, 4])
    orders = [tuple(transform([image], s)[0].get_flattened_data()) for s in range(len(SYMMETRIES))]
    upright = {(1, 2, 3, 4), (2, 1, 4, 3), (3, 4, 1, 2), (4, 3, 2, 1)}
    lying = {(1, 3, 2, 4), (2, 4, 1, 3), (3, 1, 4, 2), (4, 2, 3, 1)}
    assert orders[0] == (1, 2, 3, 4) and set(orders) == upright | lying


def test_the_answers_of_a_toy_are_learnt(vlm, ask, tmp_path):
    """Red and blue squares, 40 steps: each greedy answer is its square's colour, and ends by itself."""
    model, processor = vlm
    questions = [ask(n, colour) for n, colour in enumerate(["red", "blue"] * 4)]
    config = FineTuneConfig(steps=40, batch_size=8, learning_rate=5e-3)
    finetune(model, processor, questions, config, seed=0, out=tmp_path)
    assert answer(model, processor, questions[:2], max_new_tokens=4) == [["red"], ["blue"]]


def test_the_same_seed_gives_the_same_weights(llava, ask, tmp_path):
    """With symmetries and two batches to a step, so that every random draw takes part."""
    questions = [ask(n, colour) for n, colour in enumerate(["red", "blue", "green"])]
    config = FineTuneConfig(steps=2, batch_size=2, symmetries=True, gradient_accumulation=2)
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        model, processor = load_model(llava)
        finetune(model, processor, questions, config, seed=seed, out=tmp_path)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_gradient_checkpointing_changes_memory_only(llava, ask, tmp_path):
    weights = []
    for checkpointing in (False, True):
        model, processor = load_model(llava)
        config = FineTuneConfig(steps=2, batch_size=2, gradient_checkpointing=checkpointing)
        finetune(model, processor, [ask(0), ask(1, "blue")], config, seed=0, out=tmp_path)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_several_visible_gpus_change_no_batch(tmp_path, monkeypatch):
    """Left alone, transformers takes 4 rows for each of the 2 GPUs: 8 a step."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    stock = TrainingArguments(str(tmp_path), per_device_train_batch_size=4)
    assert (stock.n_gpu, stock.train_batch_size, stock.parallel_mode) == (2, 8, ParallelMode.NOT_DISTRIBUTED)
    ours = trainer_arguments(tmp_path, seed=3, per_device_train_batch_size=4)
    assert (ours.n_gpu, ours.train_batch_size, ours.parallel_mode) == (1, 4, ParallelMode.NOT_PARALLEL)


def test_stages_report_nowhere_and_may_say_otherwise(tmp_path):
    shared = trainer_arguments(tmp_path, seed=3)
    assert (shared.report_to, shared.disable_tqdm, shared.seed) == ([], True, 3)
    assert shared.lr_scheduler_type == "cosine"
    assert trainer_arguments(tmp_path, seed=3, lr_scheduler_type="constant").lr_scheduler_type == "constant"
    with pytest.raises(TypeError, match="no_such_setting"):
        trainer_arguments(tmp_path, seed=3, no_such_setting=1)
