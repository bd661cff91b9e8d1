import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pytest import approx
from torch import tensor

from accord.data.images import load_image
from accord.data.questions import uniform
from accord.errors import CheckpointError, DataError, DataWarning, RecipeError, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import AnswerReply, AnswerRequest
from accord.methods.fedgrpo import FedGrpoConfig
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.routing.competence import (
    CompetenceRouter,
    ConfidenceGraph,
    RandomExperts,
    _Experts,
    embed,
    grade,
    load_graph,
    measure,
    save_graph,
)
from accord.types import vqa_prompt

NAN = math.nan
SITES = ("a", "b", "c")
PICTURE = Image.new("RGB", (4, 4), "red")
PROMPT = vqa_prompt("what?")


def graph_of(correct, features=None):
    """Items along the directions of `features`, by default the four of a compass."""
    directions = tensor(features or [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.double)
    correct = tensor(correct, dtype=torch.double)
    return ConfidenceGraph(
        tuple(f"type {a}" for a in range(len(directions))),
        directions,
        torch.zeros(2, dtype=torch.double),
        correct,
    )


class Compass:
    """An encoder whose feature of a picture is written down: (cos, sin) of the red value in degrees."""

    def before_answers(self, prompts, images):
        angles = [math.radians(image.getpixel((0, 0))[0]) for image in images]
        return torch.stack([tensor([math.cos(angle), math.sin(angle)]) for angle in angles])


def towards(degrees):
    return Image.new("RGB", (1, 1), (degrees, 0, 0))


def route(router, degrees, sizes=None):
    """Weights of prompts towards `degrees`, by default with one completion each."""
    sizes = sizes or [1] * len(degrees)
    return router([PROMPT] * len(degrees), [towards(d) for d in degrees], [["x"] * n for n in sizes])


def make(correct, *, sites=SITES, seed=0, experts=1, neighbours=1, **settings):
    return CompetenceRouter(
        Compass(), graph_of(correct), sites=sites, experts=experts, neighbours=neighbours, seed=seed, **settings
    )


def answering(*answers, asked=None):
    """A site that gives these answers, one an item."""

    def answer(request):
        assert isinstance(request, AnswerRequest)
        if asked is not None:
            asked.append(request)
        return AnswerReply(request.id, list(answers))

    return answer


def gone(request):
    raise RuntimeError("gone")


silent = pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auxiliary": 0, "neighbours": 0}, "auxiliary must be at least 1"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"experts": 0}, "experts must be at least 1"),
        ({"refresh_every": -1}, "refresh_every must be at least 0"),
        ({"form": -0.1}, "form must be at least 0"),
        ({"form": NAN}, "form must be at least 0"),
        ({"auxiliary": 10, "neighbours": 11}, "neighbours must be at most auxiliary = 10, got 11"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        FedGrpoConfig(**settings)


def test_the_defaults_are_the_papers():
    config = FedGrpoConfig()
    assert (config.auxiliary, config.neighbours, config.experts, config.form) == (100, 20, 2, 1 / 8)


def test_competence_by_hand():
    """Towards 30° the nearest items are east (cos 30° = .87), north (.5), south (−.5), west.

    Site a knows east and west, b north and south, c answered nothing. L = 1: 1, 0. L = 2: 1/2 each. L = 3 adds south:
    1/3, 2/3. L = 4 and more: 1/2 each. Length does not matter: 10 (cos 30°, sin 30°) says the same.
    """
    graph = graph_of([[1, 0, 1, 0], [0, 1, 0, 1], [NAN] * 4])
    direction = tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]])
    for neighbours, a, b in ((1, 1, 0), (2, 1 / 2, 1 / 2), (3, 1 / 3, 2 / 3), (4, 1 / 2, 1 / 2), (9, 1 / 2, 1 / 2)):
        for features in (direction, 10 * direction):
            known = graph.competence(features, neighbours)
            assert known.shape == (1, 3)
            assert known[0, :2].tolist() == approx([a, b]) and known[0, 2].isnan()


def test_features_are_seen_as_the_items_were():
    """Mean (1, 11): (3, 12) is (2, 1), nearer to east; without it (3, 12) points north."""
    graph = replace(graph_of([[1, 0, 0, 0]]), mean=tensor([1.0, 11.0]).double())
    assert graph.competence(tensor([[3.0, 12.0]]), 1).tolist() == [[1.0]]


def test_of_items_equally_near_the_first_count():
    graph = graph_of([[0, 1, 1]], features=[[1.0, 0.0]] * 3)
    assert graph.competence(tensor([[1.0, 0.0]]), 1).tolist() == [[0.0]]
    assert graph.competence(tensor([[1.0, 0.0]]), 2).tolist() == [[0.5]]


def test_arrays_that_do_not_fit():
    with pytest.raises(DataError, match=r"graph's features are \(4, 2\), expected \(3, 2\); measure it anew"):
        replace(graph_of([[1, 0, 1, 0]]), types=("x", "y", "z"))


def test_answers_are_graded_here(ask):
    """Case and the final stop do not matter; site b has both wrong; no label is in a request."""
    asked = []
    engine = InProcessEngine({"a": answering("Red.", "green", asked=asked), "b": answering("blue", "red")})
    assert grade(engine, [ask(0, "red"), ask(1, "blue")]).tolist() == [[1, 0], [0, 0]]
    (request,) = asked
    assert len(request.items) == 2 and len(request.images) == 2
    assert all(item.images[0] in request.images for item in request.items)
    said = json.dumps(
        [[block.text for block in item.prompt[0].content if hasattr(block, "text")] for item in request.items]
    )
    assert "what colour" in said and "blue" not in said


def test_a_further_reference_is_right_as_well(ask):
    engine = InProcessEngine({"a": answering("crimson", "blue"), "b": answering("red", "scarlet")})
    questions = [replace(ask(n, "red"), references=("Crimson.",)) for n in (0, 1)]
    assert grade(engine, questions).tolist() == [[1, 0], [1, 0]]


def test_a_picture_travels_once_and_a_question_without_one_travels_alone(ask):
    asked = []
    engine = InProcessEngine({"a": answering("red", "two", "4", asked=asked)})
    questions = [ask(0), ask(1, text="how many?", answer="two"), replace(ask(2, text="2 + 2?", answer="4"), image=None)]
    assert grade(engine, questions).tolist() == [[1, 1, 1]]
    (request,) = asked
    assert len(request.images) == 1
    assert [len(item.images) for item in request.items] == [1, 1, 0]


def test_whoever_does_not_answer_is_absent_and_not_wrong(ask):
    """Gone, or with one answer too few: a row of NaN, and a warning each; 0 would be a site that knows nothing."""
    engine = InProcessEngine({"a": gone, "b": answering("red"), "c": answering("red", "red")})
    with pytest.warns(DataWarning) as told:
        correct = grade(engine, [ask(0), ask(1)])
    assert correct[:2].isnan().all() and correct[2].tolist() == [1, 1]
    assert {str(w.message).split()[1] for w in told} == {"a", "b"}
    assert "nothing new is known of its competence" in str(told[0].message)


@silent
def test_where_nobody_answers_there_is_nobody_to_choose(ask):
    """Found before a policy is trained for hours on no reward; the encoder is not even asked."""
    with pytest.raises(RunError, match=r"none of the sites a, b answered .* 2 auxiliary .* answers = true"):
        measure(InProcessEngine({"a": gone, "b": gone}), Compass(), [ask(0), ask(1)])


def test_no_questions():
    with pytest.raises(DataError, match="on 0 questions"):
        grade(InProcessEngine({"a": gone}), [])


def test_the_whole_measurement(llava, ask, tmp_path):
    """Two red squares and two blue ones: a prompt about red has the red ones nearest, where site a is right."""
    questions = [ask(0, "red"), ask(1, "blue", question_type="other"), ask(2, "red"), ask(3, "blue")]
    encoder = Encoder(*load_model(llava))
    engine = InProcessEngine({"a": answering(*["red"] * 4), "b": answering(*["blue"] * 4)})
    graph = measure(engine, encoder, questions)
    assert graph.types == ("colour", "other", "colour", "colour")
    assert graph.correct.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    torch.testing.assert_close(graph.features.norm(dim=1), torch.ones(4, dtype=torch.double))
    raw = embed(encoder, [vqa_prompt(q.text) for q in questions], [load_image(q.image) for q in questions])
    torch.testing.assert_close(graph.mean, raw.double().mean(dim=0))
    assert graph.competence(raw, 2).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]

    save_graph(tmp_path / "graph", graph)
    loaded = load_graph(tmp_path / "graph")
    assert loaded.types == graph.types
    for name, tensor_ in graph.tensors().items():
        assert torch.equal(getattr(loaded, name), tensor_)

    router = CompetenceRouter(encoder, loaded, sites=engine.sites, experts=1, neighbours=2, seed=0)
    weights = router(
        [vqa_prompt(questions[0].text), vqa_prompt(questions[1].text)],
        [load_image(questions[0].image), load_image(questions[1].image)],
        [["red", "blue"], ["red"]],
    )
    assert weights.tolist() == [[1, 0], [1, 0], [0, 1]]


def test_many_prompts_are_read_in_parts_alike():
    directions = [d % 180 for d in range(0, 130 * 7, 7)]
    features = embed(Compass(), [PROMPT] * 130, [towards(d) for d in directions])
    assert features[:, 0].tolist() == approx([math.cos(math.radians(d)) for d in directions])


@pytest.mark.parametrize("damage", ["absent", "cut", "json", "shape"])
def test_a_damaged_graph(damage, tmp_path):
    save_graph(tmp_path / "graph", graph_of([[1, 0, 1, 0]]))
    file = tmp_path / "graph" / "graph.safetensors"
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "json":
        (tmp_path / "graph" / "graph.json").write_text('{"types": [1]}')
    else:
        (tmp_path / "graph" / "graph.json").write_text('{"types": ["x"]}')
    with pytest.raises(CheckpointError, match=r"no confidence graph .*measured anew"):
        load_graph(tmp_path / "graph")


def test_an_absent_row_survives_the_disk(tmp_path):
    save_graph(tmp_path / "graph", graph_of([[1, 0, 1, 0], [NAN] * 4]))
    assert load_graph(tmp_path / "graph").correct.isnan().tolist() == [[False] * 4, [True] * 4]


def test_weights_by_hand():
    """L = 2, M = 2. Towards 10° east and north count: a 1/2, b 1/2, c 0; towards 170°, west and north: 0, 1/2, 1.

    So a and b judge, then b and c, half each, and all completions of a prompt alike.
    """
    router = make([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], neighbours=2, experts=2)
    assert route(router, [10], [3]).tolist() == [[0.5, 0.5, 0.0]] * 3
    router = make([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]], neighbours=2, experts=2)
    assert route(router, [170], [2]).tolist() == [[0.0, 0.5, 0.5]] * 2


def test_fewer_sites_than_experts_are_all_asked():
    router = make([[1, 0, 0, 0], [NAN] * 4, [0, 0, 0, 1]], experts=3)
    assert route(router, [10]).tolist() == [[0.5, 0.0, 0.5]]


def test_a_site_that_is_not_known_gets_no_weight():
    """Even where the others are never right, and no row of weights where nobody is known."""
    router = make([[0] * 4, [NAN] * 4, [NAN] * 4])
    assert route(router, [0, 40, 80, 120]).tolist() == [[1, 0, 0]] * 4
    nobody = make([[NAN] * 4] * 3, experts=2)
    assert route(nobody, [0]).tolist() == [[0, 0, 0]]


def test_ties_are_broken_evenly_and_again_alike():
    """Four equal sites, M = 1: of 400 prompts each gets 100, give or take 3.5 deviations of √(400 · ¼ · ¾) = 8.7."""
    sites = ("a", "b", "c", "d")
    router = make([[1] * 4] * 4, sites=sites)
    weights = route(router, [0] * 400)
    assert weights.sum(dim=1).tolist() == [1] * 400
    assert all(abs(n - 100) < 30 for n in weights.sum(dim=0).tolist())
    assert torch.equal(route(make([[1] * 4] * 4, sites=sites), [0] * 400), weights)
    assert not torch.equal(route(make([[1] * 4] * 4, sites=sites, seed=1), [0] * 400), weights)
    assert not torch.equal(route(router, [0] * 400), weights)


def test_a_better_site_wins_every_draw():
    router = make([[1] * 4, [1, 1, 1, 0], [1] * 4], neighbours=4, experts=2)
    assert route(router, [0] * 50).tolist() == [[0.5, 0.0, 0.5]] * 50


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_the_order_of_sites_carries_over(experts):
    """Whoever is chosen for a prompt, by competence or by a draw, is so under every order of the sites."""
    correct = [[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]]
    degrees = [10 * n for n in range(18)] * 3
    weights = route(make(correct, neighbours=2, experts=experts), degrees)
    for order in ([2, 0, 1], [1, 0, 2]):
        other = make([correct[k] for k in order], sites=[SITES[k] for k in order], neighbours=2, experts=experts)
        assert torch.equal(route(other, degrees), weights[:, order])


def test_graph_and_sites_must_fit():
    with pytest.raises(DataError, match="graph of 2 sites, and there are 3"):
        make([[1] * 4] * 2)


def test_a_refresh_by_hand():
    """Measured again at calls 3 and 5. Site a is best at first; then b is, and a, silent, keeps its row; then c."""
    news = iter([[[NAN] * 4, [1] * 4, [0] * 4], [[NAN] * 4, [NAN] * 4, [1] * 4]])
    router = make(
        [[1] * 3 + [0], [0] * 4, [0] * 4], neighbours=4, refresh_every=2, grade=lambda: graph_of(next(news)).correct
    )
    chosen = [route(router, [0]).argmax().item() for _ in range(4)]
    assert chosen == [0, 0, 1, 1]
    assert router.graph.correct.tolist() == [[1, 1, 1, 0], [1] * 4, [0] * 4]
    route(router, [0])
    assert router.graph.correct.tolist() == [[1, 1, 1, 0], [1] * 4, [1] * 4]


def test_without_a_schedule_nothing_is_measured_again():
    router = make([[1] * 4, [0] * 4, [0] * 4], grade=lambda: pytest.fail("measured"))
    assert [route(router, [0]).argmax().item() for _ in range(5)] == [0] * 5


def test_a_site_that_was_away_is_asked_again():
    """Nothing is known of b, so it is asked at the 11th call, and found best; then nobody is unknown or asked."""
    asked = []

    def grade_again():
        asked.append(1)
        return graph_of([[1, 1, 1, 0], [1] * 4, [0] * 4]).correct

    router = make([[1, 1, 1, 0], [NAN] * 4, [0] * 4], neighbours=4, grade=grade_again)
    chosen = [route(router, [0]).argmax().item() for _ in range(25)]
    assert chosen == [0] * 10 + [1] * 15 and len(asked) == 1


def test_a_resumed_router_goes_on_as_it_would_have():
    """Draws, the schedule of refreshes and what they found: all of it is in the state."""

    def start():
        return make(
            [[1] * 4] * 3, refresh_every=3, experts=2, grade=lambda: graph_of([[1] * 4, [1] * 4, [0, 0, 1, 1]]).correct
        )

    whole = start()
    for _ in range(4):
        route(whole, [0, 90])
    resumed = make([[1] * 4] * 3, refresh_every=3, experts=2, grade=whole.grade)
    resumed.load_state_dict({name: tensor_.clone() for name, tensor_ in whole.state_dict().items()})
    for _ in range(5):
        assert torch.equal(route(whole, [0, 90]), route(resumed, [0, 90]))
    assert torch.equal(whole.graph.correct, resumed.graph.correct)
    # the draws go on: they are not those of a router that begins
    assert not torch.equal(route(whole, [0] * 50), route(make([[1] * 4] * 3, experts=2), [0] * 50))


def test_a_prompt_without_a_picture_is_embedded_without_one():
    seen = []

    class Blind:
        def before_answers(self, prompts, images):
            seen.extend(images)
            return torch.ones(len(prompts), 2)

    assert embed(Blind(), [PROMPT] * 2, [None, PICTURE]).shape == (2, 2)
    assert seen == [None, PICTURE]


def test_the_feature_is_the_prompts_own_last_state(vlm):
    """That of the model on the prompt alone, without any answer: the prompt is not changed by what follows it."""
    model, processor = vlm
    text = processor.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    picture = PICTURE.resize((32, 32))
    inputs = processor(images=[[picture]], text=[text], return_tensors="pt")
    features = embed(Encoder(model, processor), [PROMPT], [picture])
    with torch.no_grad():
        alone = model.base_model(**inputs).last_hidden_state[:, -1]
    torch.testing.assert_close(features, alone.float(), atol=1e-4, rtol=1e-4)


def test_a_state_of_other_sites():
    router, other = make([[1] * 4] * 3), make([[1] * 4] * 2, sites=("a", "b"))
    with pytest.raises(CheckpointError, match=r"holds \(2, 4\) as 'correct', expected \(3, 4\)"):
        router.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="holds nothing as"):
        router.load_state_dict({})


def test_random_experts():
    """Two of three for every prompt, the same for its completions; each for 2/3 of the prompts, give or take."""
    router = RandomExperts(SITES, 2, seed=0)
    weights = route(router, [0] * 300, [2] * 300)
    assert torch.equal(weights[::2], weights[1::2])
    assert set(map(tuple, weights.tolist())) == {(0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5)}
    assert all(200 - 29 < n < 200 + 29 for n in (weights[::2] > 0).sum(dim=0).tolist())  # 3.5 × √(300 · 2/9) = 28.6
    assert torch.equal(route(RandomExperts(SITES, 2, seed=0), [0] * 300, [2] * 300), weights)
    assert route(RandomExperts(SITES, 9, seed=0), [0]).tolist() == [approx([1 / 3] * 3)]


def test_random_experts_resumed_and_in_another_order():
    whole = RandomExperts(SITES, 1, seed=3)
    route(whole, [0] * 7)
    resumed, other = RandomExperts(SITES, 1, seed=3), RandomExperts(SITES[::-1], 1, seed=3)
    for router in (resumed, other):
        router.load_state_dict(whole.state_dict())
    expected = route(whole, [0] * 20)
    assert torch.equal(route(resumed, [0] * 20), expected)
    assert torch.equal(route(other, [0] * 20), expected.flip(1))
    with pytest.raises(CheckpointError, match="'prompts'"):
        resumed.load_state_dict({})


def test_only_sites_that_are_equal_at_the_margin_are_drawn(monkeypatch):
    """The choice is that of all sites in order of competence and draw; a draw is a hash, and few of them are needed."""
    drawn = []

    def counted(*given):
        drawn.append(given)
        return uniform(*given)

    monkeypatch.setattr("accord.routing.competence.uniform", counted)
    generator = torch.Generator().manual_seed(0)
    competence = torch.randint(0, 21, (40, 256), generator=generator) / 20
    competence[::7, ::3] = torch.nan
    sites = tuple(f"site-{k}" for k in range(256))
    weights = _Experts(sites, 5, 3).choose(competence)
    assert len(drawn) < 40 * 256 / 8
    for p, row in enumerate(competence.tolist()):
        known = [k for k, value in enumerate(row) if value == value]
        order = sorted(known, key=lambda k: (-row[k], uniform("expert", 3, sites[k], str(p))))
        assert sorted(order[:5]) == weights[p].nonzero().flatten().tolist()
