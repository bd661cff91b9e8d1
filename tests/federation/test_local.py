import pytest
import torch
from pytest import approx
from safetensors.torch import load
from torch import nn, tensor

from accord.errors import CheckpointError, RecipeError
from accord.federation.local import Averaging, begin, finish, round_rate, take_steps
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.weights import to_bytes


def model(*weights):
    built = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    built[0].weight.data = tensor([list(weights)])
    return built


def asking(*weights, bits=32, task="reward"):
    """A request whose weights are those of the first layer; the second is frozen."""
    return UpdateRequest("r", task, 0, to_bytes({"0.weight": tensor([list(weights)])}, bits=bits), 0, bits=bits)


def half_frozen(*weights):
    built = model(*weights)
    built[1].requires_grad_(False)
    return built


def test_a_change_by_hand():
    """From (3, 5), which was sent, to (4, 4.5): Δ = (1, −0.5), whatever the model held before."""
    built = half_frozen(1.0, 2.0)
    start = begin(built, asking(3.0, 5.0))
    assert built[0].weight.tolist() == [[3.0, 5.0]] and start["0.weight"].tolist() == [[3.0, 5.0]]
    built[0].weight.data = tensor([[4.0, 4.5]])
    reply = finish(built, asking(3.0, 5.0), start, examples=7, loss=0.5, steps=3, state=b"beside", distance=2.5)
    assert reply == UpdateReply("r", reply.change, 7, 0.5, b"beside", 3, 2.5)
    assert list(load(reply.change)) == ["0.weight"]
    assert load(reply.change)["0.weight"].tolist() == [[1.0, -0.5]]


def test_a_change_in_16_bits_is_from_what_was_read():
    """1 + 2⁻¹² is sent and read as 1; a step to 1.5 is then 0.5, which float16 holds."""
    request = asking(1 + 2**-12, 5.0, bits=16)
    built = half_frozen(0.0, 0.0)
    start = begin(built, request)
    assert built[0].weight.tolist() == [[1.0, 5.0]] and start["0.weight"].dtype == torch.float32
    built[0].weight.data = tensor([[1.5, 5.0]])
    change = load(finish(built, request, start, examples=1, loss=0.0, steps=1).change)["0.weight"]
    assert change.tolist() == [[0.5, 0.0]] and change.dtype == torch.float16


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asking(1.0), r"weights of the task 'router': 0.weight is \(1, 1\)"),
        (asking(1.0, float("nan")), "weights of the task 'router': 0.weight holds a value that is not finite"),
    ],
    ids=["shape", "nan"],
)
def test_weights_of_another_model_are_not_trained(request_, message):
    built = half_frozen(1.0, 2.0)
    with pytest.raises(CheckpointError, match=message):
        begin(built, UpdateRequest("r", "router", 0, request_.weights, 0))
    assert built[0].weight.tolist() == [[1.0, 2.0]]


def test_steps_by_hand():
    """Loss b · (w₁ + w₂), gradient (b, b): SGD of length 0.5 from (1, 2) over b = 1, 3 is at (-1, 0).

    Losses: 1 · 3 = 3, then 3 · (0.5 + 1.5) = 6; mean 4.5. In one step of two batches the gradient is their mean, 2: at
    (0, 1), with losses 3 and 9, mean 6. A correction that doubles the gradient doubles the way: (-3, -2).
    """

    def run(**settings):
        built = model(1.0, 2.0)
        sgd = torch.optim.SGD(built.parameters(), lr=0.5)
        mean = take_steps(built, [1.0, 3.0], lambda b: b * built[0].weight.sum(), sgd, seed=0, **settings)
        return built[0].weight.tolist(), mean

    assert run() == ([[-1.0, 0.0]], 4.5)
    assert run(accumulate=2) == ([[0.0, 1.0]], 6.0)
    # Doubled: (1, 2) → (0, 1) → (-3, -2), with losses 3 and 3.
    assert run(correct=lambda name, gradient, weight: 2 * gradient) == ([[-3.0, -2.0]], 3.0)


def test_dropout_has_its_seed_and_the_process_keeps_its_own():
    built = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Dropout(0.5))
    ones = torch.ones(1, 8)

    def run(seed):
        optimiser = torch.optim.SGD(built.parameters(), lr=1e-9)
        return take_steps(built, [ones] * 3, lambda x: built(x).square().sum(), optimiser, seed=seed)

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = run(3), run(3), run(4)
    assert torch.equal(torch.random.get_rng_state(), before) and not built.training
    assert first == approx(again, rel=1e-4) and first != approx(other, rel=1e-2)


def test_the_learning_rate_of_a_round_by_hand():
    """Half a cosine over 4 rounds: 0.1 · (1 + cos 0, π/4, π/2, 3π/4) / 2; no round has 0."""
    half = 0.5**0.5
    expected = [0.1, 0.05 * (1 + half), 0.05, 0.05 * (1 - half)]
    assert [round_rate(0.1, number, 4) for number in range(4)] == approx(expected)
    assert round_rate(0.1, 0, 1) == approx(0.1)


@pytest.mark.parametrize("setting", ["rounds", "local_steps", "batch_size", "gradient_accumulation"])
def test_settings_that_leave_nothing_to_train(setting):
    with pytest.raises(RecipeError, match=f"{setting} must be at least 1, got 0"):
        Averaging(**{setting: 0})


def test_a_learning_rate_of_0_is_refused_since_scaffold_divides_by_it():
    with pytest.raises(RecipeError, match="learning_rate must be above 0"):
        Averaging(learning_rate=0)


def test_a_round_draws_what_its_steps_need():
    """3 steps of 2 batches of 5."""
    assert Averaging(local_steps=3, batch_size=5, gradient_accumulation=2).drawn == 30
