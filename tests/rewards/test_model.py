import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accord.errors import CheckpointError, RunError
from accord.models.load import LoraSettings
from accord.rewards import model as module
from accord.rewards.model import RewardModel, Standardisation
from accord.types import vqa_prompt

PROMPTS = [vqa_prompt("what colour is it?"), vqa_prompt("is it red?")]
IMAGES = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")]
ANSWERS = [["red", "blue", "no idea at all"], ["yes"]]
LORA = LoraSettings(rank=2, alpha=4)


def score(model):
    return torch.cat(model.score(PROMPTS, IMAGES, ANSWERS))


def unfold(model, seed=0):
    """Draw the matrices B of an adapter, which are born 0, so that the adapter matters."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def saved(llava, tmp_path):
    RewardModel.from_checkpoint(llava).save(tmp_path / "reward")
    return tmp_path / "reward"


def refuse(folder, *expected):
    with pytest.raises(CheckpointError) as caught:
        RewardModel.load(folder)
    for part in (str(folder), *expected):
        assert part in str(caught.value)


def test_standardisation():
    """(1 - 1) / (2 + 1e-6) = 0 and (3 - 1) / (2 + 1e-6) = 0.9999995."""
    scores = Standardisation(mean=1.0, deviation=2.0)(torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(scores, torch.tensor([0.0, 2 / 2.000001], dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_site_whose_scores_do_not_differ_gives_finite_scores():
    assert Standardisation(mean=1.0, deviation=0.0)(torch.tensor([1.0])).tolist() == [0.0]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_saved_model_scores_identically(family, checkpoints, tmp_path, lora):
    model = unfold(RewardModel.from_checkpoint(checkpoints[family], lora=lora))
    model.standardisation = Standardisation(0.1 + 0.2, 1 / 3)
    model.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward")
    assert torch.equal(score(model), score(again))
    assert (again.standardisation, again.lora, again.architecture) == (model.standardisation, lora, model.architecture)
    assert not again.training
    again.save(tmp_path / "twice")
    assert torch.equal(score(model), score(RewardModel.load(tmp_path / "twice")))


def test_the_score_is_the_head_on_the_end_token(family, checkpoints):
    """R = w · h + b, with h the last hidden state of transformers' own forward over one row."""
    model = RewardModel.from_checkpoint(checkpoints[family]).eval()
    model.standardisation = Standardisation(mean=0.5, deviation=2.0)
    for n, (p, answer) in enumerate([(0, "red"), (0, "blue"), (0, "no idea at all"), (1, "yes")]):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        text = model.processor.apply_chat_template([*PROMPTS[p], turn], tokenize=False)
        inputs = model.processor(images=[[IMAGES[p]]], text=[text], return_tensors="pt")
        with torch.no_grad():
            hidden = model.backbone(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            expected = (hidden @ model.head.weight[0] + model.head.bias[0] - 0.5) / 2.000001
        torch.testing.assert_close(score(model)[n], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_small_batches_do_not_change_scores(llava, rows):
    model = RewardModel.from_checkpoint(llava)
    torch.testing.assert_close(
        torch.cat(model.score(PROMPTS, IMAGES, ANSWERS, batch_rows=rows)), score(model), atol=1e-6, rtol=1e-5
    )


def test_chunks_keep_a_prompts_rows_together():
    """Limit 5: 2 + 3 fit, 4 starts anew, 9 stays whole, 1 + 0 follow."""
    chunks = module._chunks([2, 3, 4, 9, 1, 0], 5)
    assert [list(chunk) for chunk in chunks] == [[0, 1], [2], [3], [4, 5]]
    assert list(module._chunks([], 5)) == []


def test_scoring_returns_to_the_mode_it_was_in(llava):
    model = RewardModel.from_checkpoint(llava)
    for training in (True, False):
        model.train(training)
        score(model)
        assert model.training is training and model.backbone.training is training


def test_a_full_model_needs_nothing_else(saved, llava, tmp_path):
    """The backbone inside is an ordinary checkpoint; an adapter instead names its base."""
    assert json.loads((saved / "reward.json").read_text())["base"] is None
    assert RewardModel.load(saved).architecture == "LlavaForConditionalGeneration"
    RewardModel.from_checkpoint(llava, lora=LORA).save(tmp_path / "adapted")
    assert json.loads((tmp_path / "adapted" / "reward.json").read_text())["base"] == llava
    assert not (tmp_path / "adapted" / "backbone").exists()


def test_a_missing_folder(tmp_path):
    refuse(tmp_path / "missing", "no reward.json", "accord site train")


def test_a_folder_of_another_kind(llava):
    refuse(Path(llava), "no reward.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}'])
def test_a_damaged_description(saved, content):
    (saved / "reward.json").write_text(content)
    refuse(saved, "train the site again")


def test_another_format(saved):
    described = (saved / "reward.json").read_text()
    (saved / "reward.json").write_text(described.replace("reward-model-1", "reward-model-9"))
    refuse(saved, "'accord-reward-model-9'", "'accord-reward-model-1'")


def test_a_head_of_another_size(saved):
    described = (saved / "reward.json").read_text()
    (saved / "reward.json").write_text(described.replace('"hidden_size": 32', '"hidden_size": 64'))
    refuse(saved, "64", "32", "train the site again")


@pytest.mark.parametrize("part", ["head.safetensors", "backbone/model.safetensors"])
def test_a_damaged_or_missing_part(saved, part):
    (saved / part).write_bytes((saved / part).read_bytes()[:-9])
    refuse(saved)
    (saved / part).unlink()
    refuse(saved)


@pytest.mark.parametrize(
    "weights",
    [
        {"weight": torch.zeros(1, 31), "bias": torch.zeros(1)},
        {"weight": torch.zeros(1, 32)},
        {"weight": torch.zeros(1, 32), "bias": torch.zeros(1), "more": torch.zeros(1)},
        {"weight": torch.full((1, 32), torch.nan), "bias": torch.zeros(1)},
    ],
    ids=["shape", "missing", "surplus", "nan"],
)
def test_a_head_of_other_weights(saved, weights):
    save_file(weights, saved / "head.safetensors")
    refuse(saved, "head.safetensors", "train the site again")


@pytest.mark.parametrize("damage", ["missing", "truncated", "half"])
def test_a_damaged_adapter(llava, tmp_path, damage):
    """Half an adapter would otherwise be completed with random weights."""
    folder = tmp_path / "reward"
    RewardModel.from_checkpoint(llava, lora=LORA).save(folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    if damage == "missing":
        shutil.rmtree(folder / "adapter")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        weights = load_file(file)
        save_file(dict(list(weights.items())[:3]), file)
    refuse(folder, "train the site again")


def test_an_adapter_whose_base_is_gone(llava, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llava, base)
    RewardModel.from_checkpoint(str(base), lora=LORA).save(tmp_path / "reward")
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="no such folder"):
        RewardModel.load(tmp_path / "reward")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_leaves_the_earlier_model(saved, llava, monkeypatch, error):
    earlier = {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()}

    def full(*_):
        raise error

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RunError, match="the disk is full"):
        RewardModel.from_checkpoint(llava).save(saved)
    assert {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()} == earlier
    assert [entry.name for entry in saved.parent.iterdir()] == ["reward"]
