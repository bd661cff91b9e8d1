import inspect
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from accord.data.images import load_image
from accord.errors import AccordError, DataError, RecipeError, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import Absence, CardRequest, UpdateRequest
from accord.federation.weights import to_bytes, trainable_weights
from accord.models.finetune import FineTuneConfig
from accord.models.load import LoraSettings
from accord.recipe import SiteConfig
from accord.recipe_file import recipe_of
from accord.rewards.accounting import Mechanism, epsilon_of
from accord.rewards.certificate import Certificate
from accord.rewards.model import checkpoint_fingerprint
from accord.rewards.private import Privacy, Sigmas, check_delta
from accord.rewards.spending import fingerprint_of, read_entries
from accord.rewards.train import RewardConfig
from accord.routing.router import RouterConfig, RouterNetwork
from accord.stages import private
from accord.stages.job import Job
from accord.stages.sites import open_site, router_training, train_site
from accord.toml import dump_toml
from accord.types import vqa_prompt
from accord.version import VERSION

pytest.importorskip("dp_accounting")

COLOURS = ("red", "blue", "green", "yellow")
PRIVACY = Privacy(epsilon=4.0, steps=10, dimensions=4)
LABELS = Privacy(epsilon=1.0, unit="label", steps=2, dimensions=4)


@pytest.fixture
def settle(job, prefer, llava):
    """Return a function that gives site `a` pairs of its own and a guarantee; it returns the site's folder."""

    def give(privacy=PRIVACY, **fields):
        site = SiteConfig("a", llava, finetune=None, privacy=privacy, **fields)
        job.recipe = replace(job.recipe, sites=(site, job.recipe.sites[1]))
        job.questions = {"private": [], "public": [], "dev": [], "test": []}
        vars(job)["private"] = {"a": [], "b": []}
        job.pairs["a"] = [prefer(n, COLOURS[n % 4], COLOURS[(n + 1) % 4]) for n in range(24)]
        return job.path / "sites" / "a"

    return give


def score(job, square):
    site = open_site(job.recipe, job.path, "a", scores=None)
    return site, site.reward_model.score([vqa_prompt("what colour?")], [load_image(square("red"))], [COLOURS])[0]


def test_a_private_site_is_a_site_like_any_other(job, settle, square):
    """Its model is a linear head on the backbone as it came; its card bears what the ledger says."""
    folder = settle()
    train_site(job, "a")
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "reward"]
    site, scores = score(job, square)
    assert scores.shape == (4,) and scores.isfinite().all() and scores.std() > 0
    assert site.reward_model.kind == "linear" and site.reward_model.head.bias.item() == 0
    card = site.card(CardRequest("c"))
    (entry,) = read_entries(job.path / "privacy" / "a.json")
    assert card.privacy.id == entry.id and entry.settled and card.ranking == {}
    assert 3.9 < card.privacy.epsilon == card.privacy.total <= 4
    always, here = ("counts", "shared training", "gates", "settings"), ("making", "other runs", "backbone")
    assert set(card.privacy.uncovered) == {*always, *here}
    assert set(private._uncovered(SiteConfig("a", "accord/idefics3"), [])) == {*always}  # everybody's backbone
    assert (card.privacy.router, card.privacy.router_steps) == (0, 0)
    assert entry.fingerprint not in (folder / "card.json").read_text()


@pytest.mark.parametrize("way", ["head", "adapter", "labels"])
def test_the_noise_is_what_the_ledger_says(job, settle, monkeypatch, way):
    """Each mechanism gets the σ that its entry has paid for."""
    monkeypatch.setattr("accord.rewards.spending.calibrate", lambda *_: Sigmas(2.0, 5.0, 40.0))
    given = {}

    def spied(name):
        function, known = getattr(private, name), inspect.signature(getattr(private, name))

        def spy(*args, **fields):
            given[name] = known.bind(*args, **fields).arguments
            return function(*args, **fields)

        monkeypatch.setattr(private, name, spy)

    for name in ("private_head", "private_adapter", "private_standardisation", "draw_flips", "label_head"):
        spied(name)
    privacy = LABELS if way == "labels" else replace(PRIVACY, steps=2)
    settle(privacy, lora=LoraSettings(rank=2, alpha=4) if way == "adapter" else None)
    train_site(job, "a")
    (entry,) = read_entries(job.path / "privacy" / "a.json")
    if way == "labels":
        assert given["draw_flips"]["flip"] == given["label_head"]["flip"] == entry.mechanisms[0].flip > 0.26
        return
    assert given["private_standardisation"]["sigma"] == entry.sigmas.standardisation == 40.0
    if way == "head":
        assert given["private_head"]["sigmas"] == entry.sigmas == Sigmas(2.0, 5.0, 40.0)
        assert [each.sigma for each in entry.mechanisms] == [2.0, 5.0, 40.0]
    else:
        assert given["private_adapter"]["sigma"] == entry.sigmas.gradient == 2.0


def test_scores_cost_nothing(job, settle, square):
    """T18: the ledger is not opened to answer, so that a million scores leave ε where it was."""
    settle()
    train_site(job, "a")
    ledger = job.path / "privacy" / "a.json"
    before, spent = ledger.read_bytes(), ledger.stat().st_mtime_ns
    site, _ = score(job, square)
    for _ in range(3):
        site.reward_model.score([vqa_prompt("what colour?")], [load_image(square("blue"))], [[*COLOURS] * 5])
    assert ledger.read_bytes() == before and ledger.stat().st_mtime_ns == spent
    entry = read_entries(ledger)[0]
    assert epsilon_of(entry.mechanisms, 1e-6) == site.card(CardRequest("c")).privacy.epsilon


def test_the_same_training_again_is_the_model_that_is_there(job, settle, monkeypatch):
    """It was paid for once and its key is gone: the stage is done again without a step, and nothing is spent."""
    folder = settle()
    train_site(job, "a")
    left = {file: file.read_bytes() for file in sorted(job.path.rglob("*")) if file.suffix in (".json", ".safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(private, "private_head", lambda *_, **__: pytest.fail("trained"))
        train_site(job, "a")
    assert job.run.done("site a") and len(left) > 3
    assert {file: file.read_bytes() for file in left} == left
    shutil.rmtree(folder / "reward")
    with pytest.raises(RecipeError, match=r"ε = 4 is spent"):
        train_site(job, "a")


def test_other_pairs_are_not_trained_on_for_the_same_price(job, settle):
    settle()
    train_site(job, "a")
    job.pairs["a"] = job.pairs["a"][:-1]
    with pytest.raises(RecipeError, match=r"ε = 4 is spent"):
        train_site(job, "a")


def test_a_killed_training_leaves_no_card_of_an_earlier_model(job, settle, monkeypatch):
    folder = settle()
    train_site(job, "a")
    settle(replace(PRIVACY, epsilon=8.0))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(private, "certify", killed)
        train_site(job, "a")
    assert not (folder / "card.json").exists()
    train_site(job, "a")
    card = json.loads((folder / "card.json").read_text())["privacy"]
    assert 7.9 < card["total"] <= 8 and card["id"] == read_entries(job.path / "privacy" / "a.json")[1].id


class Killed(BaseException):
    pass


def killed(*_, **__):
    raise Killed


def test_a_kill_in_training_costs_once_and_the_retry_is_the_same_model(job, settle, square, monkeypatch):
    """By the key that the entry holds until the end; a kill after the card trains nothing again."""
    folder = settle()

    for place in ("private_head", "private_standardisation", "certify"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(private, place, killed)
            train_site(job, "a")
        (entry,) = read_entries(job.path / "privacy" / "a.json")
        assert not entry.settled and not (folder / "card.json").exists()
    _, there = score(job, square)  # written before the certificate
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(private, "settle", killed)
        train_site(job, "a")
    _, once = score(job, square)
    assert torch.equal(there, once)
    with monkeypatch.context() as patch:
        patch.setattr(private, "private_head", killed)
        train_site(job, "a")
    _, again = score(job, square)
    assert torch.equal(once, again)
    (settled,) = read_entries(job.path / "privacy" / "a.json")
    assert settled.id == entry.id and settled.settled


def test_an_adapter_is_trained_with_the_same_ledger_and_certificate(job, settle, square, monkeypatch):
    """A kill costs once, the retry is the same model, and what is loaded scores as what was trained."""
    folder = settle(replace(PRIVACY, steps=2, sampling=0.5), lora=LoraSettings(rank=2, alpha=4))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(private, "certify", killed)
        train_site(job, "a")
    _, first = score(job, square)
    train_site(job, "a")
    site, again = score(job, square)
    assert torch.equal(first, again) and again.std() > 0
    assert (folder / "reward" / "adapter").is_dir() and site.reward_model.head.bias.item() == 0
    (entry,) = read_entries(job.path / "privacy" / "a.json")
    assert entry.settled and [each.releases for each in entry.mechanisms] == [2, 4]  # no projection is paid for
    proof = site.card(CardRequest("c")).privacy
    assert (proof.way, proof.steps, proof.sampling, proof.projection) == ("adapter", 2, 0.5, 0.0)
    assert 3.9 < proof.total == epsilon_of(entry.mechanisms, 1e-6) <= 4


@pytest.mark.parametrize("stages", [1, 2])
def test_labels_alone_are_protected(job, settle, square, stages):
    """The certificate says so; ε is spent without δ, and once."""
    folder = settle(Privacy(epsilon=1.0, unit="label", steps=10, stages=stages, dimensions=4))
    train_site(job, "a")
    site, scores = score(job, square)
    assert scores.isfinite().all() and scores.std() > 0
    proof = site.card(CardRequest("c")).privacy
    assert (proof.way, proof.unit, proof.delta) == ("labels", "label", 0.0) and "inputs" in proof.uncovered
    assert proof.epsilon == proof.total == pytest.approx(1.0) and proof.flip == pytest.approx(0.2689, abs=1e-4)
    shutil.rmtree(folder / "reward")
    with pytest.raises(RecipeError, match="is spent"):
        train_site(job, "a")
    assert len(read_entries(job.path / "privacy" / "a.json")) == 1


def test_labels_are_flipped_before_anything_reads_them(job, settle, monkeypatch):
    """What features are computed of, and the head is trained on, are the pairs that the key has turned round."""
    settle(Privacy(epsilon=1.0, unit="label", steps=2, dimensions=4))
    seen = []
    monkeypatch.setattr(private, "draw_flips", lambda count, *_: torch.arange(count) % 2 == 0)
    compute = private.pair_features
    monkeypatch.setattr(private, "pair_features", lambda m, pairs, **k: seen.extend(pairs) or compute(m, pairs, **k))
    train_site(job, "a")
    expected = [(p.rejected, p.chosen) if n % 2 == 0 else (p.chosen, p.rejected) for n, p in enumerate(job.pairs["a"])]
    assert [(pair.chosen, pair.rejected) for pair in seen] == expected


def test_a_ledger_of_pairs_takes_no_labels(job, settle):
    """One says what a whole pair is hidden by, the other what its label alone is: they do not add up."""
    settle()
    train_site(job, "a")
    settle(Privacy(epsilon=20.0, unit="label", steps=2))
    with pytest.raises(RecipeError, match=r"accounts for every pair, and privacy\.unit is 'label'"):
        train_site(job, "a")


def test_a_shared_ledger_sees_other_runs(job, settle, tmp_path):
    folder = settle(replace(PRIVACY, ledger=str(tmp_path / "all.json")))
    train_site(job, "a")
    assert not (job.path / "privacy" / "a.json").exists() and len(read_entries(tmp_path / "all.json")) == 1
    certificate = json.loads((folder / "card.json").read_text())["privacy"]
    assert "other runs" not in certificate["uncovered"]
    for path in folder.iterdir():  # as in a new run folder
        path.unlink() if path.is_file() else None
    with pytest.raises(RecipeError, match="is spent"):
        train_site(job, "a")


def test_a_link_to_a_ledger_is_that_ledger(job, settle, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "all.json")
    settle(Privacy(epsilon=1.0, unit="label", steps=2, ledger=str(link)))
    train_site(job, "a")
    assert link.is_symlink() and len(read_entries(tmp_path / "all.json")) == 1


def test_a_ledger_that_lacks_what_was_paid_is_refused(job, settle, tmp_path):
    """It was removed, or another one is named: either would be a new budget for the same data."""
    folder = settle(LABELS)
    train_site(job, "a")
    ledger = job.path / "privacy" / "a.json"
    ledger.rename(tmp_path / "all.json")
    with pytest.raises(RunError, match=r"a\.json does not have the training [0-9a-f]{16}, .*put the ledger back"):
        train_site(job, "a")
    assert not ledger.exists() and (folder / "reward").is_dir()
    settle(replace(LABELS, ledger=str(tmp_path / "all.json")))
    train_site(job, "a")  # the one that has it
    assert job.run.done("site a") and len(read_entries(tmp_path / "all.json")) == 1


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4)])
@pytest.mark.parametrize("broken", ["checkpoint", "image"])
def test_what_cannot_be_trained_costs_nothing(job, settle, tmp_path, lora, broken):
    """Neither the model nor the first pairs come after the price."""
    settle(lora=lora)
    if broken == "checkpoint":
        site = replace(job.site("a"), checkpoint=str(tmp_path / "nowhere"))
        job.recipe = replace(job.recipe, sites=(site, job.recipe.sites[1]))
    else:
        job.pairs["a"][3] = replace(job.pairs["a"][3], images=(b"no picture",))
    with pytest.raises(AccordError):
        train_site(job, "a")
    assert read_entries(job.path / "privacy" / "a.json") == ()


def test_a_delta_that_lets_one_unit_be_published_is_refused_before_it_is_paid_for(job, settle):
    """24 pairs: 24 · 0.05 is above 1; of six persons 6 · 0.05 is below it, as for labels, which have none."""
    settle(replace(PRIVACY, delta=0.05))
    with pytest.raises(RecipeError, match=r"delta must be below 1 / 24 for 24 pairs, got 0\.05: .*to 4e-04 or less"):
        train_site(job, "a")
    assert read_entries(job.path / "privacy" / "a.json") == ()
    check_delta(Privacy(delta=0.05, unit="person"), 6)
    check_delta(Privacy(delta=0.05, unit="label"), 24)


def test_persons_are_protected_where_the_pairs_name_them(job, settle):
    settle(replace(PRIVACY, unit="person"))
    with pytest.raises(DataError, match="24 of 24 pairs have no person"):
        train_site(job, "a")
    job.pairs["a"] = [replace(pair, person=f"p{n % 6}") for n, pair in enumerate(job.pairs["a"])]
    train_site(job, "a")
    card = json.loads((job.path / "sites" / "a" / "card.json").read_text())
    assert card["privacy"]["unit"] == "person"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"finetune": FineTuneConfig()}, "finetune"),
        ({"lora": LoraSettings(dropout=0.1)}, "lora.dropout"),
        ({"lora": LoraSettings(), "privacy": Privacy(unit="label")}, "lora"),
        ({"reward_model": RewardConfig(head="mlp")}, "reward_model.head"),
    ],
)
def test_what_trains_more_than_is_covered_is_refused(fields, named):
    with pytest.raises(RecipeError, match=f"site 'a' has privacy.*{named} would train more"):
        SiteConfig("a", "x", **{"privacy": Privacy(), "finetune": None, **fields})


def test_a_recipe_says_it_in_one_line():
    table = {
        "name": "a",
        "checkpoint": "x",
        "finetune": False,
        "privacy": {"epsilon": 8, "delta": 1e-6, "unit": "pair"},
    }
    recipe = recipe_of({"name": "x", "sites": [table]})
    assert recipe.sites[0].privacy == Privacy(8.0, 1e-6, "pair")
    assert 'unit = "pair"' in dump_toml(recipe)
    with pytest.raises(RecipeError, match="unit"):
        recipe_of({"name": "x", "sites": [{**table, "privacy": {"unit": "patient"}}]})


def test_the_noise_is_not_the_recipe_s(job, settle, square, monkeypatch):
    """Of one seed, one recipe and the same pairs in two runs the models differ: the server knows all three."""
    monkeypatch.setattr("accord.rewards.spending.calibrate", lambda *_: Sigmas(2.0, 2.0, 2.0))
    folder = settle()
    train_site(job, "a")
    _, one = score(job, square)
    (job.path / "privacy" / "a.json").unlink()
    (folder / "card.json").unlink()
    train_site(job, "a")
    _, other = score(job, square)
    assert not torch.allclose(one, other)
    assert Certificate.__struct_config__.forbid_unknown_fields


ROUTED = replace(PRIVACY, router=0.3)
ROUTER = RouterConfig(layers=1, width=8, heads=2, rounds=3, local_steps=2, pairs_per_site=16)


@pytest.fixture
def route(job, settle, llava):
    """Return a function that trains site `a` with steps of a router, and one that asks for some of them."""

    def ask(number=0, *, seed=0, site=None):
        torch.manual_seed(seed)
        network = RouterNetwork(job.encoder.features, 2, job.recipe.router)
        request = UpdateRequest(f"r{number}", "router", number, to_bytes(trainable_weights(network)), 7)
        return (site or router_training(job, "a"))(request)

    def train(privacy=ROUTED, **fields):
        settle(privacy, **fields)
        job.recipe = replace(job.recipe, router=ROUTER, policy=replace(job.recipe.policy, checkpoint=llava))
        train_site(job, "a")
        return job.path / "privacy" / "a.json"

    return train, ask


def test_the_router_s_steps_are_in_the_budget_and_on_the_certificate(job, route):
    """ε of all that the entry pays for, the router's 3 rounds of 2 steps with it, is the certificate's and below 4."""
    train, _ = route
    (entry,) = read_entries(train())
    proof = json.loads((job.path / "sites" / "a" / "card.json").read_text())["privacy"]
    assert (proof["router"], proof["router_steps"]) == (entry.router.sigma, 6) and entry.settled
    assert entry.mechanisms[-1] == Mechanism(proof["router"], 0.2, 6)
    assert 3.9 < proof["total"] == epsilon_of(entry.mechanisms, 1e-6) <= 4
    assert "other training" in proof["uncovered"] and "shared training" not in proof["uncovered"]


def test_a_router_s_steps_are_taken_by_what_was_paid(job, route):
    """Noise, samples and unit are the ledger's, and not those of the recipe by now."""
    train, _ = route
    (entry,) = read_entries(train())
    job.recipe = replace(job.recipe, sites=(replace(job.site("a"), privacy=None), job.recipe.sites[1]))
    given = router_training(job, "a").guarantee
    assert (given.unit, given.sampling, given.clip) == ("pair", 0.2, 0.5)
    assert given.sigma == entry.router.sigma > 0


def test_the_same_request_has_the_same_answer_and_is_paid_for_once(job, route):
    """T18: also by a site that has started again; other weights, or another round, cost their two steps."""
    train, ask = route
    ledger = train()
    first = ask()
    assert first.loss == 0 and ask() == first
    assert read_entries(ledger)[0].router_taken == 2
    assert ask(1).change != first.change and ask(seed=1).change != first.change
    (entry,) = read_entries(ledger)
    assert entry.router_taken == 6
    assert epsilon_of(entry.mechanisms, 1e-6) <= 4


def test_a_server_cannot_make_a_site_spend_more_than_it_set_aside(job, route):
    """T18: the seventh step is refused, and the site is absent from that round; repeats are answered still."""
    train, ask = route
    ledger = train()
    answers = [ask(number) for number in range(3)]
    before = ledger.read_bytes()
    with pytest.raises(RecipeError, match=r"has 0 of 6 paid steps of the router left, and a new request asks for 2"):
        ask(3)
    site = open_site(job.recipe, job.path, "a", scores=None, updates={"router": router_training(job, "a")})
    engine = InProcessEngine({"a": site.answer})
    absent = engine.ask({"a": UpdateRequest("x", "router", 9, ask(0).change, 0)})
    assert absent["a"] == Absence("a", "error")
    assert [ask(number) for number in range(3)] == answers and ledger.read_bytes() == before


def test_a_kill_between_payment_and_answer_costs_the_steps(job, route, monkeypatch):
    """Nothing was sent, and the next answer has other noise."""
    train, ask = route
    ledger = train()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("accord.routing.fit.private_steps", killed)
        ask()
    assert read_entries(ledger)[0].router_taken == 2
    assert ask() == ask() and read_entries(ledger)[0].router_taken == 4


def test_other_pairs_never_get_the_noise_of_these(job, route):
    """One noise on two data sets would show their difference: they are another request, which is paid for."""
    train, ask = route
    ledger = train()
    first = ask()
    job.pairs["a"] = [*job.pairs["a"][:-1], replace(job.pairs["a"][-1], rejected="none")]
    assert ask().change != first.change and read_entries(ledger)[0].router_taken == 4


def test_noise_that_was_not_paid_for_is_refused(job, route):
    train, ask = route
    train(PRIVACY)
    assert router_training(job, "a").guarantee is None and ask().loss > 0
    job.recipe = replace(job.recipe, sites=(replace(job.site("a"), privacy=ROUTED), job.recipe.sites[1]))
    with pytest.raises(RunError, match=r"site 'a' has privacy.router = 0.3, and its reward model was trained without"):
        router_training(job, "a")


def test_a_router_whose_ledger_is_gone_is_refused(job, route):
    train, ask = route
    train().unlink()
    with pytest.raises(RunError, match=r"a\.json does not have the training [0-9a-f]{16}, with which the steps"):
        ask()


def test_a_service_takes_the_same_steps_from_the_same_ledger(job, route, square):
    """As between organisations: its folder is all that it has, and the ledger stands there."""
    train, ask = route
    ledger = train()
    here = ask()
    elsewhere = Job(job.recipe, None, quiet=True, alone="a", pairs=job.pairs, folder=job.path)
    there = router_training(elsewhere, "a")
    assert ask(site=there) == here and read_entries(ledger)[0].router_taken == 2
    ask(1, site=there)
    assert read_entries(ledger)[0].router_taken == 4


def test_without_a_share_nothing_differs(job, settle):
    """A site whose certificate says nothing of a router is fingerprinted, paid for and described as before."""
    folder = settle()
    pairs, site = job.pairs["a"], job.site("a")
    train_site(job, "a")
    rows = [
        (p.prompt, p.chosen, p.rejected, [job.identify(s) for s in p.images], p.question_id, p.person) for p in pairs
    ]
    settings = {name: value for name, value in asdict(PRIVACY).items() if name != "router"}
    (entry,) = read_entries(job.path / "privacy" / "a.json")
    assert entry.fingerprint == fingerprint_of(
        rows, checkpoint_fingerprint(site.checkpoint), [settings, None], VERSION, str(torch.__version__)
    )
    assert "router" not in (folder / "card.json").read_text().replace("shared training", "")
    assert "router" not in (job.path / "privacy" / "a.json").read_text()
