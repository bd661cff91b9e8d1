import math

import pytest
import torch
from torch import tensor

from accord.data.images import load_image
from accord.errors import CheckpointError, DataError, DataWarning
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.routing import anchors as module
from accord.routing.anchors import Anchors, collect, last_states, load_anchors, pair_accuracy, save_anchors
from accord.routing.router import RouterConfig, RouterNetwork

WORTH = {"red": 1.0, "blue": -1.0, "green": 0.5, "yellow": 0.25}


def judge(factor, seen=None):
    """A site to which an answer is worth `factor` times its worth."""

    def answer(request):
        if seen is not None:
            seen.append(request)
        return ScoreReply(request.id, [[factor * WORTH[c] for c in item.candidates] for item in request.items])

    return answer


def silent(request):
    raise RuntimeError("gone")


@pytest.fixture(scope="module")
def encoder(checkpoints):
    return Encoder(*load_model(checkpoints["llava-clip-llama"]))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return RouterNetwork(32, 2, RouterConfig(layers=1, width=8, heads=2)).eval()


@pytest.fixture
def pairs(prefer):
    """Three pairs of two questions, those of question 0 not together; "red" is of both."""
    return [prefer(0, "red", "blue"), prefer(1, "green", "red"), prefer(0, "red", "yellow")]


def small(**tensors):
    fields = {"prompts": torch.zeros(1, 4), "answers": torch.zeros(1, 2, 4), "questions": torch.zeros(1).long()}
    return Anchors(**{"scores": torch.zeros(1, 2, 2), **fields, **tensors})


def test_scores_are_where_they_belong(encoder, pairs):
    """Site b doubles what site a says: pair 1 is (0.5, 1) for a, (1, 2) for b."""
    found = collect(InProcessEngine({"a": judge(1.0), "b": judge(2.0)}), encoder, pairs)
    assert found.scores.tolist() == [[[1, 2], [-1, -2]], [[0.5, 1], [1, 2]], [[1, 2], [0.25, 0.5]]]
    assert found.questions.tolist() == [0, 1, 0]
    assert (found.sites, found.logits) == (2, None)


def test_a_question_travels_once_with_its_distinct_answers(encoder, pairs):
    seen = []
    engine = InProcessEngine({"a": judge(1.0, seen)})
    collect(engine, encoder, pairs)
    assert [[item.candidates for item in request.items] for request in seen] == [
        [["red", "blue", "yellow"], ["green", "red"]]
    ]
    assert [len(request.images) for request in seen] == [2]
    assert engine.traffic.counts["a", "score"].messages == 1


def test_requests_are_of_bounded_size(encoder, pairs, monkeypatch):
    """One question in each: the same scores in two requests."""
    seen = []
    whole = collect(InProcessEngine({"a": judge(1.0)}), encoder, pairs)
    monkeypatch.setattr(module, "QUESTIONS_AT_ONCE", 1)
    parts = collect(InProcessEngine({"a": judge(1.0, seen)}), encoder, pairs)
    assert torch.equal(parts.scores, whole.scores)
    assert [len(request.items) for request in seen] == [1, 1] and len({request.id for request in seen}) == 2


def test_features_are_the_encoders(encoder, network, pairs):
    """Of every answer by itself, and of the prompt before any, whatever else was in the batch."""
    found = collect(InProcessEngine({"a": judge(1.0), "b": judge(1.0)}), encoder, pairs, network, rows_at_once=1)
    together = collect(InProcessEngine({"a": judge(1.0), "b": judge(1.0)}), encoder, pairs, network)
    assert (found.prompts.shape, found.answers.shape, found.logits.shape) == ((3, 32), (3, 2, 32), (3, 2, 2))
    for n, pair in enumerate(pairs):
        prompt, image = pair.prompt, load_image(pair.images[0])
        rows = [encoder([prompt], [image], [[text]]) for text in (pair.chosen, pair.rejected)]
        alone = torch.cat([last_states(*row) for row in rows])
        before = encoder.before_answers([prompt], [image])[0]
        with torch.no_grad():
            logits = torch.cat([network(*row) for row in rows])
        for each in (found, together):
            torch.testing.assert_close(each.prompts[n], before, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(each.answers[n], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(each.logits[n], logits, atol=1e-5, rtol=1e-5)


def test_an_empty_answer_is_an_answer(encoder, prefer):
    found = collect(InProcessEngine({"a": lambda r: ScoreReply(r.id, [[1.0, 0.0]])}), encoder, [prefer(0, "red", "")])
    assert found.scores.tolist() == [[[1.0], [0.0]]]
    assert found.answers.isfinite().all() and not torch.equal(found.answers[0, 1], found.prompts[0])


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (silent, r"site b gave no answer \(error\)"),
        (
            lambda request: ScoreReply(request.id, []),
            "site b sent scores that cannot be used .*0 questions, expected 2",
        ),
    ],
)
def test_an_absent_site_is_nan_and_not_zero(encoder, pairs, handler, message):
    engine = InProcessEngine({"a": judge(1.0), "b": handler})
    with pytest.warns(DataWarning, match=message):
        found = collect(engine, encoder, pairs)
    assert found.scores.isnan().tolist() == [[[False, True]] * 2] * 3
    assert engine.traffic.counts["b", "score"].absences == 1


def test_a_score_that_is_not_finite_makes_its_question_absent(encoder, pairs):
    def handler(request):
        return ScoreReply(request.id, [[1.0, math.nan, 0.0], [1.0, 0.0]])

    with pytest.warns(DataWarning, match="site a sent a score that is not finite"):
        found = collect(InProcessEngine({"a": handler}), encoder, pairs)
    assert found.scores.isnan().flatten(1).all(dim=1).tolist() == [True, False, True]


def test_pairs_that_cannot_be_asked(encoder):
    engine = InProcessEngine({"a": judge(1.0)})
    with pytest.raises(DataError, match="0 public pairs"):
        collect(engine, encoder, [])


def test_last_states_are_those_of_the_last_real_token():
    states = torch.arange(12.0).view(2, 3, 2)
    mask = tensor([[True, True, True], [True, False, False]])
    assert last_states(states, mask).tolist() == [[4, 5], [6, 7]]


def test_pair_accuracy_by_hand():
    """Pair 1: 0.5 · 1 + 0.5 · 0 = 0.5 > 0.25. Pair 2: site 2 alone is asked, and says 0 against 1."""
    scores = tensor([[[1.0, 0.0], [0.0, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])
    weights = tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]]])
    assert pair_accuracy(scores, weights).tolist() == [True, False]


def test_taking_rows_takes_everything():
    many = Anchors(
        torch.arange(12.0).view(3, 2, 2),
        torch.arange(6.0).view(3, 2),
        torch.arange(12.0).view(3, 2, 2),
        tensor([0, 0, 7]),
        torch.arange(12.0).view(3, 2, 2) + 1,
    )
    last = many.take(tensor([2]))
    assert (last.prompts.tolist(), last.questions.tolist()) == ([[4, 5]], [7])
    assert last.logits.tolist() == [[[9, 10], [11, 12]]]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompts": torch.zeros(2, 4)}, r"prompts are \(2, 4\), expected \(1, 4\)"),
        ({"logits": torch.zeros(1, 2, 3)}, r"logits are \(1, 2, 3\), expected \(1, 2, 2\)"),
        ({"questions": torch.zeros(1, 1)}, "questions are"),
    ],
)
def test_arrays_that_do_not_fit(tensors, message):
    with pytest.raises(DataError, match=message):
        small(**tensors)


@pytest.mark.parametrize("logits", [None, torch.ones(1, 2, 2)])
def test_saved_anchors_are_the_same(tmp_path, logits):
    written = small(scores=tensor([[[1.0, math.nan], [0.5, 2.0]]]), logits=logits)
    save_anchors(tmp_path / "a.safetensors", written)
    again = load_anchors(tmp_path / "a.safetensors")
    assert again.tensors().keys() == written.tensors().keys()
    for name, each in written.tensors().items():
        torch.testing.assert_close(again.tensors()[name], each, rtol=0, atol=0, equal_nan=True)


def test_files_that_hold_no_anchors(tmp_path):
    file = tmp_path / "a.safetensors"
    for data in (None, b"", b"\x80\x04K\x01."):
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"no anchors .*; remove the file"):
            load_anchors(file)
