import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch.nn.functional import logsigmoid, one_hot

from accord.errors import CheckpointError, RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.weights import read_weights
from accord.models import load as load_module
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.routing.fit import LocalRouterTraining, fit_router
from accord.routing.router import LearnedRouter, RouterConfig, RouterNetwork, load_router, save_router, without_prior
from accord.types import vqa_prompt

SMALL = RouterConfig(layers=2, width=8, heads=2)
PROMPTS = [vqa_prompt("what colour is it?"), vqa_prompt("is it red?")]
IMAGES = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")]
ANSWERS = [["red", "blue", "no idea at all"], ["yes"]]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return RouterNetwork(32, 3, SMALL).eval()


@pytest.fixture
def encoder(llava):
    return Encoder(*load_model(llava))


@pytest.fixture
def saved(network, tmp_path):
    save_router(tmp_path / "router", network)
    return tmp_path / "router"


def states(n=4, t=5):
    return torch.randn(n, t, 32, generator=torch.Generator().manual_seed(1)), torch.ones(n, t, dtype=torch.bool)


def test_the_encoder_is_frozen_and_gives_the_models_hidden_states(vlm):
    """Row by row, they are transformers' own last hidden states; its weights get no gradient."""
    model, processor = vlm
    encoder = Encoder(model, processor)
    hidden, mask = encoder(PROMPTS, IMAGES, ANSWERS)
    assert (hidden.shape[0], hidden.shape[2], mask.shape) == (4, encoder.features, hidden.shape[:2])
    assert encoder.features == 32
    assert not hidden.requires_grad and not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training
    for n, (p, answer) in enumerate([(0, "red"), (0, "blue"), (0, "no idea at all"), (1, "yes")]):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        text = processor.apply_chat_template([*PROMPTS[p], turn], tokenize=False)
        inputs = processor(images=[[IMAGES[p]]], text=[text], return_tensors="pt")
        with torch.no_grad():
            alone = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(hidden[n][mask[n]], alone, atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence(network):
    hidden, mask = states()
    padded = torch.cat([hidden, torch.full((4, 3, 32), 1e3)], dim=1)
    wide = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(network(padded, wide), network(hidden, mask), atol=1e-5, rtol=1e-5)


def test_rows_are_routed_by_themselves(network):
    hidden, mask = states()
    with torch.no_grad():
        together = network(hidden, mask)
        for n in range(4):
            torch.testing.assert_close(
                network(hidden[n : n + 1], mask[n : n + 1])[0], together[n], atol=1e-6, rtol=1e-5
            )


def test_a_network_has_the_layers_it_is_asked_for(network):
    assert (len(network.body.layers), network.head.out_features, network.enter[1].out_features) == (2, 3, 8)


def test_a_learned_router_gives_weights(encoder, network):
    """[N, K] = [3 + 1, 3]; rows sum to 1; equal to the softmax of the network's logits."""
    router = LearnedRouter(encoder, network.train())
    weights = router(PROMPTS, IMAGES, ANSWERS)
    assert weights.shape == (4, 3) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4))
    with torch.no_grad():
        torch.testing.assert_close(weights, network(*encoder(PROMPTS, IMAGES, ANSWERS)).softmax(dim=-1))
    assert not weights.requires_grad


@pytest.mark.parametrize(("rows", "taken"), [(1, [3, 1]), (3, [3, 1]), (4, [4])])
def test_rows_at_once_do_not_change_weights(encoder, rows, taken):
    """The 3 + 1 rows together, or each prompt by itself."""
    torch.manual_seed(0)
    network = RouterNetwork(32, 3, replace(SMALL, rows_at_once=rows)).eval()
    with torch.no_grad():
        expected = network(*encoder(PROMPTS, IMAGES, ANSWERS)).softmax(dim=-1)
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    weights = LearnedRouter(encoder, network)(PROMPTS, IMAGES, ANSWERS)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)
    assert seen == taken


def test_the_network_is_where_the_encoder_is(llava, network, monkeypatch):
    """On the device `meta`, which every machine has."""
    monkeypatch.setattr(load_module, "device", lambda: torch.device("meta"))
    router = LearnedRouter(Encoder(*load_model(llava)), network)
    assert {parameter.device.type for parameter in router.network.parameters()} == {"meta"}


def test_weights_travel_bitwise(network):
    torch.manual_seed(9)
    other = RouterNetwork(32, 3, SMALL)
    other.from_bytes(network.to_bytes())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), network.parameters(), strict=True))
    assert other.to_bytes() == network.to_bytes()


def change(network, **tensors):
    return save({**network.state_dict(), **tensors})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.bias": torch.zeros(4)}, r"head.bias is \(4,\) torch.float32, expected \(3,\) torch.float32"),
        ({"head.bias": torch.zeros(3, dtype=torch.float64)}, "torch.float64, expected"),
        ({"head.bias": torch.tensor([0.0, torch.nan, 0.0])}, "head.bias holds a value that is not finite"),
        ({"head.bias": torch.tensor([0.0, torch.inf, 0.0])}, "not finite"),
        ({"surplus": torch.zeros(1)}, "other names: .*surplus"),
    ],
    ids=["shape", "type", "nan", "inf", "name"],
)
def test_weights_that_must_not_be_used(network, changes, message):
    before = network.to_bytes()
    with pytest.raises(CheckpointError, match=message):
        network.from_bytes(change(network, **changes))
    assert network.to_bytes() == before


def test_weights_with_a_name_missing(network):
    weights = dict(network.state_dict())
    del weights["head.bias"]
    with pytest.raises(CheckpointError, match=r"other names: .*head.bias"):
        network.from_bytes(save(weights))


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 64, b"\x80\x04K\x01."], ids=["empty", "short", "huge", "pickle"])
def test_bytes_that_are_no_weights(network, data):
    with pytest.raises(CheckpointError, match=f"{len(data)} bytes that cannot be read"):
        network.from_bytes(data)


def test_truncated_weights(network):
    data = network.to_bytes()
    for length in range(0, len(data), 97):
        with pytest.raises(CheckpointError):
            read_weights(data[:length], network.state_dict())


def test_a_saved_router_is_the_same(saved, network, tmp_path):
    again = load_router(saved)
    assert (again.shape, again.config) == ((32, 3), SMALL)
    assert again.to_bytes() == network.to_bytes() and not again.training
    save_router(tmp_path / "twice", again)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "twice").iterdir()
    }


def test_a_folder_without_a_router(tmp_path, llava):
    for folder in (tmp_path / "missing", tmp_path, tmp_path.__class__(llava)):
        with pytest.raises(CheckpointError, match=r"not a router .*; train one with"):
            load_router(folder)


@pytest.mark.parametrize(
    "described",
    [
        "{",
        "[]",
        '{"features": 32}',
        '{"features": 32, "sites": 3, "config": {}, "more": 1}',
        '{"features": 32, "sites": 3, "config": {"heads": 3}}',
        '{"features": -1, "sites": 3, "config": {}}',
    ],
)
def test_a_damaged_description(saved, described):
    (saved / "router.json").write_text(described)
    with pytest.raises(CheckpointError, match="router"):
        load_router(saved)


def test_a_description_of_other_sizes(saved):
    described = json.loads((saved / "router.json").read_text())
    (saved / "router.json").write_text(json.dumps({**described, "sites": 5}))
    with pytest.raises(CheckpointError, match=r"expected \(5"):
        load_router(saved)


def test_a_damaged_or_missing_weight_file(saved):
    file = saved / "router.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        load_router(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="not a router"):
        load_router(saved)
    shutil.rmtree(saved)


def test_the_weight_file_is_what_travels(saved, network):
    loaded = load((saved / "router.safetensors").read_bytes())
    assert loaded.keys() == network.state_dict().keys()


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width(heads):
    with pytest.raises(RecipeError, match=f"got 8 and {heads}; change router.width or router.heads"):
        RouterConfig(width=8, heads=heads)


def best_logits(pairs):
    """Return the logits `[X, K]` that minimise the sites' weighted loss, for counts `[K, X]` of answers.

    L = Σ_k p_k E_k[BCE(σ(z), e_k)], one free logit for each of X kinds of answers and each output, by LBFGS.
    """
    counts = torch.tensor(pairs, dtype=torch.double)
    share = (counts / counts.sum()).T.contiguous()  # [X, K]: of all pairs, those of kind x and site k
    logits = torch.zeros_like(share, requires_grad=True)
    search = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        search.zero_grad()
        of_others = share.sum(1, keepdim=True) - share
        value = -(share * logsigmoid(logits) + of_others * logsigmoid(-logits)).sum()
        value.backward()
        return value

    search.step(loss)
    return logits.detach()


def test_duplicating_a_sites_pairs_does_not_change_the_choice():
    """Three sites, three kinds of answers. Whatever the sites' sizes, α_k = f_k(x) / Σ_j f_j(x), f_k a row's share.

    Without the correction, twenty copies of site 0's pairs win it the second kind, of which site 1 has more of its own.
    """
    pairs = torch.tensor([[7, 2, 1], [2, 6, 2], [1, 3, 6]])
    density = pairs.double() / pairs.sum(1, keepdim=True)
    expected = (density / density.sum(0)).T
    corrected, plain = [], []
    for copies in (1, 20):
        repeated = pairs * torch.tensor([copies, 1, 1])[:, None]
        logits = best_logits(repeated.tolist())
        weights = without_prior(logits, repeated.sum(1).tolist()).softmax(dim=-1)
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
        corrected.append(weights.argmax(dim=-1).tolist())
        plain.append(logits.argmax(dim=-1).tolist())
    assert corrected == [[0, 1, 2], [0, 1, 2]] and plain == [[0, 1, 2], [0, 0, 0]]


def test_duplicating_a_sites_pairs_changes_the_choice_of_a_trained_router_without_the_correction_alone():
    """The same with routers that three sites have trained, 10 pairs each, and 80 of site 0, which are its ten 8 times.

    States are one of three unit vectors, three times as long, with noise of 0.3; 20 new ones of each are routed.
    """
    settings = replace(RouterConfig(), layers=1, width=8, heads=1, rounds=25, local_steps=1, pairs_per_batch=80)
    settings = replace(settings, aggregation=replace(settings.aggregation, learning_rate=0.03))
    encoder = SimpleNamespace(features=3, model=SimpleNamespace(device=torch.device("cpu")))

    def hidden(counts, seed):
        kinds = torch.arange(3).repeat_interleave(torch.tensor(counts))
        noise = torch.randn(len(kinds), 1, 3, generator=torch.Generator().manual_seed(seed))
        return 3 * one_hot(kinds, 3)[:, None] + 0.3 * noise

    def site(k, counts, copies):
        rows = hidden([2 * count for count in counts], k).repeat(copies, 1, 1)
        training = LocalRouterTraining(encoder, range(len(rows) // 2), k, 3, settings)
        training.features = rows, torch.ones(rows.shape[:2], dtype=torch.bool)
        return training

    def choices(copies):
        pairs = [([7, 2, 1], copies), ([2, 6, 2], 1), ([1, 3, 6], 1)]
        sites = {name: site(k, *pairs[k]) for k, name in enumerate("abc")}
        network = fit_router(InProcessEngine(sites), 3, settings, seed=0)
        rows = hidden([20, 20, 20], 9)
        with torch.no_grad():
            logits = network(rows, torch.ones(rows.shape[:2], dtype=torch.bool))
        return logits.argmax(dim=-1), without_prior(logits, network.examples).argmax(dim=-1)

    (plain, corrected), (plain_copied, corrected_copied) = choices(1), choices(8)
    assert (corrected != corrected_copied).sum() <= 3
    assert (plain != plain_copied).sum() >= 20


def test_the_correction_by_hand():
    """z = 0 at all three: σ = 1/2. Sites of 1, 3 and 0 pairs: log(1/2) − log(1/4) = ln 2, ln(2/3), and no site."""
    found = without_prior(torch.zeros(1, 3), [1, 3, 0])
    torch.testing.assert_close(found, torch.tensor([[0.6931472, -0.4054651, -torch.inf]]))


def test_equal_sites_are_chosen_as_without_the_correction(encoder, network):
    """σ is monotone: the top site is the same, whether the counts are alike or not known."""
    torch.manual_seed(0)
    other = RouterNetwork(32, 3, replace(SMALL, prior_correction=True))
    top = LearnedRouter(encoder, network)(PROMPTS, IMAGES, ANSWERS).argmax(dim=-1)
    for counts in ((), (5, 5, 5)):
        other.examples = counts
        weights = LearnedRouter(encoder, other)(PROMPTS, IMAGES, ANSWERS)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4))
        assert torch.equal(weights.argmax(dim=-1), top)
    other.examples = (0, 1, 0)
    assert LearnedRouter(encoder, other)(PROMPTS, IMAGES, ANSWERS).tolist() == [[0, 1, 0]] * 4


def test_the_examples_stay_with_the_router(network, tmp_path):
    network.examples = (5, 0, 2)
    save_router(tmp_path / "router", network)
    assert load_router(tmp_path / "router").examples == (5, 0, 2)


def test_a_router_from_before_there_were_examples(saved):
    described = json.loads((saved / "router.json").read_text())
    del described["examples"], described["config"]["prior_correction"]
    (saved / "router.json").write_text(json.dumps(described))
    again = load_router(saved)
    assert again.examples == () and not again.config.prior_correction


@pytest.mark.parametrize("counts", [[1, 2], [1, -1, 2], [0, 0, 0]])
def test_examples_that_are_none(saved, counts):
    described = json.loads((saved / "router.json").read_text())
    (saved / "router.json").write_text(json.dumps({**described, "examples": counts}))
    with pytest.raises(CheckpointError, match="expected a count for each of 3 sites"):
        load_router(saved)
