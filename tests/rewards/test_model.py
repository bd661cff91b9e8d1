import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accord.errors import CheckpointError, RunError
from accord.models import load
from accord.models.load import LoraSettings, load_model
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


def test_two_layers_by_hand(llava):
    """V = 0, c = 1: every feature is SiLU(1) = 1 / (1 + e⁻¹) = 0.7310586. w = 1 / D, b = 2: R = 2.7310586."""
    model = RewardModel.from_checkpoint(llava, head="mlp").eval()
    model.standardisation = Standardisation(0.0, 1 - 1e-6)
    for parameter, value in zip(model.head.parameters(), (0.0, 1.0, 1 / model.features, 2.0), strict=True):
        torch.nn.init.constant_(parameter, value)
    torch.testing.assert_close(score(model), torch.full((4,), 2.7310586), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_two_layers_are_kept(llava, tmp_path, lora):
    """And trained: both get a gradient."""
    model = RewardModel.from_checkpoint(llava, lora=lora, head="mlp").eval()
    model.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward")
    assert torch.equal(score(model), score(again)) and again.kind == "mlp"
    assert all(parameter.requires_grad for parameter in again.head.parameters())
    described = json.loads((tmp_path / "reward" / "reward.json").read_text())
    (tmp_path / "reward" / "reward.json").write_text(json.dumps({**described, "head": "linear"}))
    refuse(tmp_path / "reward", "head.safetensors", "train the site again")


def test_a_folder_from_before_there_were_two_layers(llava, tmp_path):
    model = RewardModel.from_checkpoint(llava).eval()
    model.save(tmp_path / "reward")
    described = json.loads((tmp_path / "reward" / "reward.json").read_text())
    assert described.pop("head") == "linear"
    (tmp_path / "reward" / "reward.json").write_text(json.dumps(described))
    assert torch.equal(score(model), score(RewardModel.load(tmp_path / "reward")))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_small_batches_do_not_change_scores(llava, tmp_path, rows):
    """The 3 + 1 rows at once, or each prompt by itself, as it is after loading too."""
    model = RewardModel.from_checkpoint(llava)
    expected = score(model)
    taken = []
    model.register_forward_pre_hook(lambda _, inputs: taken.append(len(inputs[0].input_ids)))
    model.rows_at_once = rows
    torch.testing.assert_close(score(model), expected, atol=1e-6, rtol=1e-5)
    assert taken == ([4] if rows == 4 else [3, 1])
    model.save(tmp_path / "reward")
    assert RewardModel.load(tmp_path / "reward").rows_at_once == rows


def test_scoring_returns_to_the_mode_it_was_in(llava):
    model = RewardModel.from_checkpoint(llava)
    for training in (True, False):
        model.train(training)
        score(model)
        assert model.training is training and model.backbone.training is training


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_folder_is_all_it_needs(family, checkpoints, tmp_path, lora):
    """Its checkpoint goes before it is saved, and then the folder moves: scores and backbone are the same."""
    base = tmp_path / "base"
    shutil.copytree(checkpoints[family], base)
    model = unfold(RewardModel.from_checkpoint(str(base), lora=lora))
    shutil.rmtree(base)
    model.save(tmp_path / "reward")
    moved = (tmp_path / "reward").rename(tmp_path / "moved")
    assert json.loads((moved / "reward.json").read_text())["base"] is None
    assert torch.equal(score(model), score(RewardModel.load(moved)))
    (stored, _), (before, _) = load_model(str(moved / "backbone")), load_model(checkpoints[family])
    weights, expected = stored.state_dict(), before.state_dict()
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in weights)


def test_an_adapter_on_a_shipped_checkpoint_names_it(tmp_path):
    model = unfold(RewardModel.from_checkpoint("accord/idefics3", lora=LORA))
    model.save(tmp_path / "reward")
    assert json.loads((tmp_path / "reward" / "reward.json").read_text())["base"] == "accord/idefics3"
    assert not (tmp_path / "reward" / "backbone").exists()
    assert torch.equal(score(model), score(RewardModel.load(tmp_path / "reward")))


def change(checkpoint):
    """Train a checkpoint a little: its first weight grows by one."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_another_backbone_in_the_folder(llava, tmp_path, lora):
    RewardModel.from_checkpoint(llava, lora=lora).save(tmp_path / "reward")
    change(tmp_path / "reward" / "backbone")
    refuse(tmp_path / "reward", str(Path("reward", "backbone")), "not the backbone", "train the site again")


def test_another_shipped_checkpoint_of_the_same_name(llava, tmp_path, monkeypatch):
    """As after `accord pretrain` into the package."""
    shutil.copytree(llava, tmp_path / "shipped" / "small")
    monkeypatch.setattr(load, "SHIPPED", tmp_path / "shipped")
    RewardModel.from_checkpoint("accord/small", lora=LORA).save(tmp_path / "reward")
    RewardModel.load(tmp_path / "reward")
    change(tmp_path / "shipped" / "small")
    refuse(tmp_path / "reward", "accord/small is not the backbone", "put that one back")


@pytest.fixture
def hub(llava, tmp_path, monkeypatch):
    """Return a function that makes the next commit of somebody/small, in a cache of the hub as a download leaves it."""
    repository = tmp_path / "hub" / "models--somebody--small"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def commit(name):
        snapshot = repository / "snapshots" / name
        shutil.copytree(llava, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(name)
        return snapshot

    return commit


def test_an_adapter_on_a_checkpoint_of_the_hub_keeps_to_its_commit(hub, llava, tmp_path, monkeypatch):
    """A later commit is not taken for it, nor is a folder of that name."""
    first = hub("a" * 40)
    model = unfold(RewardModel.from_checkpoint("somebody/small", lora=LORA))
    model.save(tmp_path / "reward")
    described = json.loads((tmp_path / "reward" / "reward.json").read_text())
    assert (described["base"], described["fingerprint"]) == ("somebody/small", "a" * 40)
    change(hub("b" * 40))
    again = RewardModel.load(tmp_path / "reward")
    assert torch.equal(score(model), score(again))
    again.save(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "reward.json").read_text()) == described
    shutil.rmtree(first)
    with pytest.raises(CheckpointError, match="somebody/small: cannot load"):
        RewardModel.load(tmp_path / "reward")
    shutil.copytree(llava, tmp_path / "somebody" / "small")
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path / "reward", "somebody/small is not the backbone", "a" * 12)


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


@pytest.mark.parametrize(("lora", "type_"), [(None, torch.float32), (LORA, torch.bfloat16)], ids=["full", "lora"])
def test_what_is_trained_is_float32(llava, tmp_path, lora, type_):
    """On a bfloat16 checkpoint: all of it, or the adapter and the head alone. Loaded again, it scores identically."""
    model, processor = load_model(llava)
    base = load.save_model(model.to(torch.bfloat16), processor, tmp_path / "base")
    model = unfold(RewardModel.from_checkpoint(base, lora=lora))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model._plain.dtype == type_
    model.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward")
    assert again._plain.dtype == type_ and torch.equal(score(model), score(again))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_head_is_where_the_backbone_is(llava, monkeypatch, lora):
    """On the device `meta`, which every machine has."""
    monkeypatch.setattr(load, "device", lambda: torch.device("meta"))
    model = RewardModel.from_checkpoint(llava, lora=lora)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
