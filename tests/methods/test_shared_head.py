from dataclasses import replace

import pytest
import torch
from pytest import approx
from torch import tensor

from accord.data.images import load_image
from accord.errors import DataError, RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.local import Averaging
from accord.federation.rounds import federated_rounds
from accord.federation.site import Site
from accord.federation.weights import set_trainable_weights, trainable_weights
from accord.methods.shared_head import LocalHead, Rotation, SharedHeadConfig, fresh_model
from accord.rewards.model import RewardModel

SMALL = SharedHeadConfig(averaging=Averaging(rounds=3, local_steps=4, batch_size=4, learning_rate=1e-2), blocks=2)


def test_a_rotation_by_hand():
    """X = [[0, 1], [-1, 0]] is its own A: (I + A)(I − A)⁻¹ = [[0, 1], [−1, 0]], a quarter turn; from 0 it is I."""
    rotation = Rotation(4, 2)
    assert torch.equal(rotation(), torch.eye(4))
    with torch.no_grad():
        rotation.x[1] = tensor([[0.0, 1.0], [-1.0, 0.0]])
    expected = torch.eye(4)
    expected[2:, 2:] = tensor([[0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(rotation(), expected)
    with pytest.raises(RecipeError, match="4 features make no 3 equal blocks"):
        Rotation(4, 3)


def test_any_rotation_is_orthogonal():
    torch.manual_seed(0)
    rotation = Rotation(12, 3)
    torch.nn.init.normal_(rotation.x)
    torch.testing.assert_close(rotation() @ rotation().T, torch.eye(12), atol=1e-5, rtol=0)
    assert (rotation()[:4, 4:] == 0).all()


@pytest.fixture
def trained(llava, prefer):
    """Return a function: three rounds of two sites that want the opposite of each other."""

    def train(rotated):
        torch.manual_seed(0)
        model = fresh_model(replace(SMALL, checkpoint=llava))
        pairs = {"a": [prefer(n, "red", "blue") for n in range(4)], "b": [prefer(n, "blue", "red") for n in range(4)]}
        local = {name: LocalHead(model, own, SMALL, rotated=rotated) for name, own in pairs.items()}
        engine = InProcessEngine(
            {name: Site(name, model, updates={"reward": own}).answer for name, own in local.items()}
        )
        seen = []
        start = trainable_weights(model.head)
        weights = federated_rounds(
            engine,
            "reward",
            start,
            3,
            seed=0,
            on_replies=lambda _, replies: seen.append(replies),
            on_round=lambda *_: None,
        )
        set_trainable_weights(model.head, weights)
        return model, local, start, engine

    return train


@pytest.mark.parametrize("rotated", [True, False])
def test_what_two_sites_share(trained, rotated):
    """Two sites that contradict each other: each is right about its own pairs behind its own rotation alone.

    Without rotations both have one judge. The backbone stays, and nothing of the size of a rotation travels.
    """
    model, local, start, engine = trained(rotated)
    assert not any(name.startswith("backbone") for name in trainable_weights(model))
    margins = {}
    for name, own in local.items():
        with torch.no_grad():
            scores = own.scores(own.features[0])
        margins[name] = float(scores[0] - scores[1])
    identity = [torch.equal(own.rotation(), torch.eye(model.features)) for own in local.values()]
    assert identity == [not rotated] * 2
    if rotated:
        assert min(margins.values()) > 0
    else:
        assert min(margins.values()) < 0
    head = sum(p.numel() for p in model.head.parameters()) * 4
    for name in local:
        count = engine.traffic.counts[name, "reward"]
        assert count.messages == 3 and 3 * head < count.bytes_from_site < 3 * head + 3000
    assert not all(torch.equal(start[name], weight) for name, weight in trainable_weights(model.head).items())


def test_a_sites_model_has_the_rotation_in_its_head(trained, prefer, tmp_path):
    """Saved and loaded it scores as the site did, standardised over the site's own answers: mean 0, deviation 1."""
    model, local, *_ = trained(True)
    before = trainable_weights(model.head)
    local["b"].own_model().save(tmp_path / "b")
    assert all(torch.equal(before[name], weight) for name, weight in trainable_weights(model.head).items())
    loaded, pair = RewardModel.load(tmp_path / "b"), prefer(0, "blue", "red")
    (found,) = loaded.score([pair.prompt], [load_image(pair.image)], [["blue", "red"]])
    with torch.no_grad():
        raw = local["b"].scores(local["b"].features[0])
    pooled = torch.cat([local["b"].scores(each) for each in local["b"].features]).detach()
    assert found.tolist() == approx(((raw - pooled.mean()) / pooled.std()).tolist(), abs=1e-3)
    assert found[0] > 0 > found[1]


def test_a_site_without_pairs(llava):
    with pytest.raises(DataError, match="cannot train a head on 0 preference pairs"):
        LocalHead(fresh_model(replace(SMALL, checkpoint=llava)), [], SMALL, rotated=True)
