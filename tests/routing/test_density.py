import math
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from torch import tensor

from accord.errors import CheckpointError, DataError, DataWarning, ReplyError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.weights import to_bytes
from accord.routing import density, means
from accord.routing.density import (
    LEAST,
    PRIOR,
    Centres,
    LocalMixture,
    Mixtures,
    OrEverybody,
    centres_of,
    check_mixture,
    collect_mixtures,
    load_mixtures,
    log_mixture,
    own_quantile,
    save_mixtures,
    sketch,
    sums_of,
)
from accord.routing.means import ClassMeans, MeansRouter
from accord.types import vqa_prompt

TWO = Centres(tensor([[0.0], [10.0]], dtype=torch.float64), tensor([1.0], dtype=torch.float64))


def rows(*values):
    return tensor(values, dtype=torch.float64)[:, None]


def of(*sites, quantiles=None):
    """The mixtures of sites with these features `[n]`, at the centres 0 and 10."""
    told = [sums_of(rows(*site), (rows(*site)[:, 0] > 5).long(), 2) for site in sites]
    stacked = [torch.stack([each[name] for each in told]) for name in ("count", "total", "square")]
    return Mixtures(*stacked, tensor(quantiles or [0.0] * len(sites), dtype=torch.float64))


def test_a_mixture_by_hand():
    """Components of 3 rows about 0 and 1 row at 10; variances 2/3 and 0, whose mean over rows is 2/4 = 1/2.

    Moved by 5 further rows of it: (2 + 2.5) / 8 = .5625 and (0 + 2.5) / 6 = .41667; one feature is its own mean.
    f(0) = 3/4 N(0; 0, .5625) + 1/4 N(0; 10, .41667), without 1 / √(2π).
    """
    sums = sums_of(rows(-1.0, 0.0, 1.0, 10.0), tensor([0, 0, 0, 1]), 2)
    assert sums["count"].tolist() == [3, 1] and sums["square"].flatten().tolist() == [2, 100] and PRIOR == 5
    first, second = 0.75 / math.sqrt(0.5625), 0.25 / math.sqrt(2.5 / 6)
    expected = [first + second * math.exp(-50 / (2.5 / 6)), first * math.exp(-50 / 0.5625) + second]
    assert log_mixture(rows(0.0, 10.0), **sums).exp().tolist() == approx(expected)


def test_an_absent_site_has_no_density_and_is_never_chosen():
    found = of([0.0] * 10, [])
    assert found.log_densities(rows(0.0))[0, 1] == -torch.inf
    assert found.posterior(rows(3.0)).tolist() == [[1, 0]] and found.margin(rows(0.0)).isfinite().all()


def test_a_site_that_holds_all_twice_is_chosen_no_more_often():
    """No n_k is in the choice."""
    a, b, x = [-1.0, 1.0] * 60, [1.0, 3.0] * 60, rows(0.8, 1.0, 1.2)
    once, twice = of(a, b).posterior(x), of(a, b * 2).posterior(x)
    torch.testing.assert_close(once, twice)


def test_a_component_has_ten_prompts_or_is_dissolved():
    """Nine of twenty-nine are nearest to 10: they go to 0. Ten stay; and where all have too few, one is left."""
    few = rows(*[0.0] * 20, *[10.0] * 9)
    assert LEAST == 10 and TWO.assign(few).tolist() == [0] * 29
    enough = rows(*[0.0] * 20, *[10.0] * 10)
    assert TWO.assign(enough).tolist() == [0] * 20 + [1] * 10
    assert len(set(TWO.assign(rows(0.0, 0.0, 10.0)).tolist())) == 1


def test_the_quantile_is_of_prompts_that_the_mixture_has_not_seen():
    """Even places 0 and 2, odd ones 1 and 3: one component each, of mean 1 and 2, whose variance is 1: least −½ 2²."""
    assert own_quantile(rows(0.0, 1.0, 2.0, 3.0), TWO).item() == approx(-2.0)


def test_centres_are_those_of_public_prompts():
    """Two heaps: at −1 and 1 about 0, and at 99 and 101 about 100, whatever the draw."""
    for seed in range(3):
        found = centres_of(rows(*[-1.0, 1.0] * 4, *[99.0, 101.0] * 4), seed=seed, components=2)
        assert sorted(found.centre.flatten().tolist()) == approx([0, 100])
    with pytest.raises(DataError, match="8 centres need as many public prompts, got 2"):
        centres_of(rows(0.0, 1.0), seed=0)


def two_heaps(count, generator):
    """Points of a density with a hole in the middle, which one Gaussian would fill."""
    signs = torch.randint(2, (count, 1), generator=generator) * 2 - 1
    return signs * 5 + torch.randn(count, 4, generator=generator, dtype=torch.float64) * 0.5


def test_what_one_gaussian_takes_for_known_a_mixture_does_not():
    """The middle between a site's two heaps: novel by the mixture, the very mean by one Gaussian."""
    draw = torch.Generator().manual_seed(0)
    x = two_heaps(400, draw)
    told = sketch(x, centres_of(two_heaps(100, draw), seed=0, components=2))
    mixtures = Mixtures(*(told[name][None] for name in ("count", "total", "square", "quantile")))
    sums = means.sums_of(x)
    one = ClassMeans(tensor([400.0], dtype=torch.float64), *(sums[n][None] for n in ("total", "square", "quantile")))
    middle = torch.zeros(1, 4, dtype=torch.float64)
    assert mixtures.margin(middle).item() < 0 < one.margin(middle).item()
    fresh = two_heaps(1000, draw)
    assert (mixtures.margin(fresh) < 0).double().mean().item() < 0.04


def reads(*states):
    return SimpleNamespace(before_answers=lambda prompts, images: tensor(states), features=1)


def test_where_no_site_has_seen_the_prompt_everybody_is_asked():
    """0 is a's; 100 is nobody's: a third of the weight each, for both of its completions."""
    known = of([-1.0, 1.0] * 10, [9.0, 11.0] * 10, [4.0] * 3, quantiles=[-3.0] * 3)
    encoder = reads([0.0], [100.0])
    router = OrEverybody(MeansRouter(encoder, known), encoder, known)
    weights = router([vqa_prompt("?")] * 2, [None] * 2, [["x"], ["y", "z"]])
    assert weights[0].tolist() == [1, 0, 0] and weights[1:].flatten().tolist() == approx([1 / 3] * 6)
    nobody = MeansRouter(encoder, known, abstains=True)([vqa_prompt("?")] * 2, [None] * 2, [["x"], ["y", "z"]])
    assert nobody[1:].sum().item() == 0


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(density, "COMPONENTS", 2)


@pytest.mark.usefixtures("few")
def test_one_round_gathers_them(prefer):
    """a has 12 prompts at 0 and 10 at 10, b one prompt: it fails, is told of, and has no density."""

    def site(count, states):
        return LocalMixture(reads(*states), [prefer(n, "red", "blue") for n in range(count)], 100)

    here, there = site(22, [[0.0]] * 12 + [[10.0]] * 10), site(1, [[0.0]])
    engine = InProcessEngine({"a": here, "b": there})
    with pytest.warns(DataWarning, match="site b.*no prompt is taken for one of its own"):
        found = collect_mixtures(engine, TWO)
    assert sorted(found.count[0].tolist()) == [10, 12] and found.count[1].tolist() == [0, 0]
    assert sorted(found.total[0].flatten().tolist()) == [0, 100]
    with pytest.raises(CheckpointError, match="a request for mixtures"):
        here(UpdateRequest("x", "means", 0, to_bytes({"centre": torch.zeros(3, 1)}), 0))


@pytest.mark.usefixtures("few")
def test_what_a_site_sends_for_64_features_and_8_components_is_8_kb(monkeypatch):
    monkeypatch.setattr(density, "COMPONENTS", 8)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    sent = to_bytes(sketch(x, centres_of(x[:200], seed=0, components=8)))
    assert 8 * (8 * 129 + 1) < len(sent) < 8 * (8 * 129 + 1) + 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": [2.0, 2.0]}, "which are not 3 in all"),
        ({"count": [1.5, 1.5]}, "which are not 3 in all"),
        ({"count": [-1.0, 4.0]}, "which are not 3 in all"),
        ({"square": [[0.0], [100.0]]}, "sums that 2 numbers cannot have"),
        ({"count": [3.0, 0.0], "total": [[3.0], [10.0]], "square": [[3.0], [100.0]]}, "component 1 has sums of no"),
        ({"quantile": -1e3}, "the quantile of 1 features is -1e"),
    ],
)
def test_sums_that_no_prompts_have_are_refused(change, message):
    """Rows 0, 1 and 10: N = (2, 1), Σ = (1, 10), Σ x² = (1, 100)."""
    told = {**sums_of(rows(0.0, 1.0, 10.0), tensor([0, 0, 1]), 2), "quantile": tensor(-1.0, dtype=torch.float64)}
    check_mixture(3, told)
    with pytest.raises(ReplyError, match=message):
        check_mixture(3, told | {name: tensor(value, dtype=torch.float64) for name, value in change.items()})


def test_they_are_kept(tmp_path):
    save_mixtures(tmp_path / "m.safetensors", of([0.0, 1.0], [2.0, 10.0]))
    assert torch.equal(load_mixtures(tmp_path / "m.safetensors").total, of([0.0, 1.0], [2.0, 10.0]).total)
    with pytest.raises(CheckpointError, match="no mixtures"):
        load_mixtures(tmp_path / "none.safetensors")


def test_a_reply_of_another_kind_of_sums_is_none():
    def strange(request):
        return UpdateReply(request.id, to_bytes({"count": torch.zeros(2)}), 5, 0.0)

    engine = InProcessEngine({"a": strange})
    with pytest.warns(DataWarning, match="site a"), pytest.raises(Exception, match="no site sent its mixture"):
        collect_mixtures(engine, TWO)
