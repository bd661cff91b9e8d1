import math
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from torch import tensor

from accord.alignment.reward import FederatedReward, Waiting
from accord.data.images import load_image
from accord.errors import CheckpointError, DataError, DataWarning, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.weights import to_bytes
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.routing.means import (
    Abstaining,
    ClassMeans,
    LocalMeans,
    MeansRouter,
    blank,
    check_sums,
    collect_means,
    load_means,
    own_quantile,
    save_means,
    shrunk,
    sums_of,
)
from accord.types import vqa_prompt

A, B = [[0.0, 0.0], [2.0, 2.0]], [[4.0, 0.0], [6.0, 2.0]]
"""Prompts of two sites: means (1, 1) and (5, 1), all variances 1."""


def of(*sites, quantiles=None):
    """Return the class means of sites with these rows `[n, D]`."""
    rows = [tensor(each, dtype=torch.float64).reshape(-1, 2) for each in sites]
    return ClassMeans(
        tensor([float(len(each)) for each in rows], dtype=torch.float64),
        torch.stack([each.sum(dim=0) for each in rows]),
        torch.stack([each.square().sum(dim=0) for each in rows]),
        tensor(quantiles or [0.0] * len(rows), dtype=torch.float64),
    )


def reads(*rows):
    """An encoder that reads these states in order, whatever it is given."""
    return SimpleNamespace(before_answers=lambda prompts, images: tensor(rows))


def prompts(count):
    return [vqa_prompt("what?")] * count, [None] * count


def test_the_nearest_mean_by_hand():
    """From (2.5, 1) it is 1.5 to a and 2.5 to b: z = −1.125 and −3.125, so α_a = σ(2); from (3, 1) it is 2 to both."""
    found = of(A, B).posterior(tensor([[2.5, 1.0], [3.0, 1.0]]))
    assert found[0].tolist() == approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    assert found[1].tolist() == approx([0.5, 0.5])


def test_a_site_that_holds_all_twice_is_chosen_no_more_often():
    x = tensor([[2.5, 1.0], [3.0, 1.0]])
    assert torch.allclose(of(A, B * 2).posterior(x), of(A, B).posterior(x))


def test_the_variance_is_pooled_over_sites_and_shrunk():
    """Variances (1, 1) and (9, 1) pool to (5, 1), whose mean is 3: σ² = (0.95 · 5 + 0.15, 0.95 + 0.15) = (4.9, 1.1)."""
    wide = of(A, [[2.0, 0.0], [8.0, 2.0]])
    z = [-0.5 * 1.5**2 / 4.9, -0.5 * 2.5**2 / 4.9]
    assert wide.posterior(tensor([[2.5, 1.0]]))[0].tolist() == approx(tensor(z).softmax(dim=0).tolist())
    assert shrunk(tensor([5.0, 1.0])).tolist() == approx([4.9, 1.1])
    assert shrunk(tensor([0.0, 0.0])).tolist() == approx([1e-6, 1e-6])


def test_the_margin_by_hand():
    """log f is −2 at both from (3, 1), where variances are 1: above a's quantile of −3 by 1, below b's of −1 by 1."""
    x = tensor([[3.0, 1.0]])
    assert of(A, B, quantiles=[-3.0, -1.0]).margin(x).item() == approx(1)
    assert of(A, B, quantiles=[-1.0, -1.0]).margin(x).item() == approx(-1)
    assert of(A, B, quantiles=[-1.0, -1.5]).margin(x).item() == approx(-0.5)


def test_one_low_quantile_makes_every_prompt_known():
    """Prompts ten deviations from both sites: unknown by honest quantiles, and known once b sends the lowest one taken.

    Of two features that is −200, and it is sent with b's true sums.
    """
    x = tensor([[3.0, 11.0], [3.0, -9.0], [-9.0, 1.0]])
    lie = -200.0
    check_sums(2, tensor(B).sum(dim=0), tensor(B).square().sum(dim=0), tensor(lie))
    assert (of(A, B, quantiles=[-3.0, -3.0]).margin(x) < 0).all()
    assert (of(A, B, quantiles=[-3.0, lie]).margin(x) >= 0).all()


def test_a_site_that_is_absent_is_never_chosen_and_knows_nothing():
    """Its zero sums would be a mean at (0, 0), nearer to (0, 0) than a's."""
    found, x = of(A, [], quantiles=[-1.0, 0.0]), tensor([[0.0, 0.0]])
    assert found.posterior(x).tolist() == [[1.0, 0.0]]
    assert found.margin(x).item() == approx(0.0)  # −½ (1 + 1) at a, its quantile


def test_the_quantile_is_of_prompts_that_the_gaussian_has_not_seen():
    """0 and 2 are N(1, 1), 1 and 3 are N(2, 1): each half has one row 2 from the other's mean, and one at it: −2 and 0.

    Judged by the Gaussian of all four, of mean 1.5 and variance 1.25, the least would be −0.9 − ½ ln 1.25 = −1.01.
    """
    assert own_quantile(tensor([[0.0], [1.0], [2.0], [3.0]])).item() == approx(-2.0)


def test_two_prompts_of_no_variance_have_the_least_quantile_that_is_taken():
    """Each half is one row: by a variance of 1e−6 the other, 2 away, has −½ · 4 / 1e−6 + 7 nats, of 1 feature −100."""
    assert own_quantile(tensor([[0.0], [2.0]])).item() == -100
    sums = sums_of(tensor([[0.0], [2.0]]))
    check_sums(2, **sums)


def test_weights_of_a_prompt_are_those_of_all_its_completions():
    router = MeansRouter(reads([1.0, 1.0], [5.0, 1.0]), of(A, B))
    weights = router(*prompts(2), [["x"], ["y", "z"]])
    assert weights.shape == (3, 2) and weights.argmax(dim=-1).tolist() == [0, 1, 1]
    assert torch.equal(weights[1], weights[2]) and weights.sum(dim=-1).tolist() == approx([1, 1, 1])


def test_where_no_site_knows_the_prompt_nobody_is_asked():
    """(5, 1) is b's mean; (100, 1) is nobody's, though b's is nearest: its answers have no reward, and none waits."""
    known = of(A, B, quantiles=[-3.0, -3.0])
    encoder = reads([5.0, 1.0], [100.0, 1.0])
    engine = InProcessEngine({name: lambda request: 1 / 0 for name in "ab"})
    router = Abstaining(MeansRouter(encoder, known), encoder, known)
    weights = router(*prompts(2), [["x"], ["y", "z"]])
    assert weights.argmax(dim=-1)[0] == 1 and weights[1:].tolist() == [[0, 0], [0, 0]]
    by_itself = MeansRouter(encoder, known, abstains=True)
    assert torch.equal(by_itself(*prompts(2), [["x"], ["y", "z"]]), weights)

    alone = reads([100.0, 1.0])
    nobody = Abstaining(MeansRouter(alone, known), alone, known)
    told = {}
    reward = FederatedReward(engine, nobody, waiting=Waiting(quorum=1.0))
    assert reward([vqa_prompt("what?")[:0]] * 2, ["y", "z"], log_metric=told.__setitem__) == [None, None]
    assert told == {"routed/a": 0, "routed/b": 0, "absent": 1} and not engine.traffic.counts


@pytest.fixture
def encoder(llava):
    return Encoder(*load_model(llava))


def request_of(features):
    return UpdateRequest("means-a", "means", 0, to_bytes(blank(features)), 0)


def test_a_site_sums_over_each_of_its_prompts_once(encoder, prefer):
    """Two pairs of one question are one prompt."""
    pairs = [prefer(0), prefer(0, rejected="green"), prefer(1, chosen="blue", rejected="red"), prefer(2, "green")]
    engine = InProcessEngine({"a": LocalMeans(encoder, pairs, 500), "b": LocalMeans(encoder, pairs, 2)})
    found = collect_means(engine, encoder.features)
    one = [pairs[0], pairs[2], pairs[3]]
    x = encoder.before_answers([p.prompt for p in one], [load_image(p.image) for p in one]).double()
    assert found.count.tolist() == [3, 2]
    assert torch.allclose(found.total[0], x.sum(dim=0)) and torch.allclose(found.square[0], x.square().sum(dim=0))
    counted = engine.traffic.counts["a", "means"]
    assert counted.messages == 1 and counted.bytes_from_site > 8 * (2 * encoder.features + 1)


def test_a_site_refuses_features_of_another_size_and_a_single_prompt(encoder, prefer):
    with pytest.raises(CheckpointError, match=r"a request for class means: .* expected"):
        LocalMeans(encoder, [prefer(0), prefer(1)], 9)(request_of(encoder.features + 1))
    with pytest.raises(DataError, match="need 2 prompts or more, got 1"):
        LocalMeans(encoder, [prefer(0), prefer(0, rejected="green")], 9)(request_of(encoder.features))


def sends(examples=2, **changed):
    """A site that sends the sums of A, but for what is changed."""
    rows = tensor(A, dtype=torch.float64)
    sums = {"total": rows.sum(dim=0), "square": rows.square().sum(dim=0), "quantile": tensor(-3.0, dtype=torch.float64)}
    sums |= {name: torch.as_tensor(value, dtype=torch.float64) for name, value in changed.items()}
    return lambda request: UpdateReply(request.id, to_bytes(sums), examples, 0.0)


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (sends(square=[4.0, 1.9]), r"feature 1 has Σ x = 2 and Σ x² = 1.9"),
        (sends(total=[0.0, 1e200], square=[4.0, 0.0]), r"feature 1 has Σ x = 1e\+200 and Σ x² = 0"),
        (sends(examples=500, total=[0.0, 0.0], square=[1e9, 4.0]), r"feature 0 has a root mean square of 1\.41e\+03"),
        (sends(quantile=-1e300), r"the quantile of 2 features is -1e\+300; within ±200 is taken"),
        (sends(quantile=201.0), "within ±200 is taken"),
        (sends(examples=0), "0 examples"),
        (sends(total=[0.0, math.inf]), "not finite"),
        (sends(quantile=math.nan), "not finite"),
        (sends(total=[2.0]), "expected"),
        (lambda request: 1 / 0, "no answer"),
    ],
)
def test_sums_that_cannot_be_are_an_absence(site, words):
    engine = InProcessEngine({"a": sends(), "b": site})
    with pytest.warns(DataWarning, match=words):
        found = collect_means(engine, 2)
    assert found.count.tolist() == [2, 0] and found.total.tolist() == [[2, 2], [0, 0]]
    assert found.posterior(tensor([[0.0, 0.0]])).tolist() == [[1, 0]]


def test_without_any_site_there_are_no_means():
    with pytest.warns(DataWarning), pytest.raises(RunError, match="no site sent its class means"):
        collect_means(InProcessEngine({"a": sends(examples=0)}), 2)


def test_saved_and_loaded(tmp_path):
    means = of(A, B, quantiles=[-3.0, -1.0])
    save_means(tmp_path / "m.safetensors", means)
    loaded = load_means(tmp_path / "m.safetensors")
    assert all(torch.equal(value, vars(means)[name]) for name, value in vars(loaded).items())


@pytest.mark.parametrize(
    "change", [{"count": [0.0, 0.0]}, {"quantile": [0.0]}, {"total": [1.0]}, {"count": [1, math.nan]}]
)
def test_a_damaged_file_is_refused(tmp_path, change):
    good = vars(of(A, B))
    file = tmp_path / "m.safetensors"
    file.write_bytes(to_bytes({**good, **{name: tensor(value, dtype=torch.float64) for name, value in change.items()}}))
    with pytest.raises(CheckpointError, match="no class means"):
        load_means(file)
