import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn, tensor

from accord.errors import CheckpointError, RunError
from accord.federation.weights import (
    narrowed,
    read_update,
    read_weights,
    set_trainable_weights,
    to_bytes,
    trainable_weights,
)

EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros(())}


def of_one_value(value, like=EXPECTED):
    return {name: torch.full_like(t, value) for name, t in like.items()}


def payload(data):
    """Return how many bytes of safetensors are numbers: behind 8 bytes of length and the header come only these."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_trainable_weights_are_copies_of_what_is_trained():
    built = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    built[0].weight.data = tensor([[1.0, 2.0]])
    built[1].requires_grad_(False)
    weights = trainable_weights(built)
    assert list(weights) == ["0.weight"]
    set_trainable_weights(built, {"0.weight": tensor([[5.0, 6.0]])})
    assert weights["0.weight"].tolist() == [[1.0, 2.0]] and built[0].weight.tolist() == [[5.0, 6.0]]
    assert torch.equal(load(to_bytes(weights))["0.weight"], weights["0.weight"])


def test_a_tied_weight_is_there_once():
    built = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    built[1].weight = built[0].weight
    assert list(trainable_weights(built)) == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_in_32_bits_nothing_is_lost(dtype):
    """Numbers travel in their own type; what is not contiguous does so, too."""
    weights = {
        "a": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).T.to(dtype),
        "b": tensor(0.1).to(dtype),
    }
    back = read_weights(to_bytes(weights), weights)
    assert all(torch.equal(back[name], weights[name]) and back[name].dtype == dtype for name in weights)


def test_a_round_trip_in_16_bits_by_hand():
    """float16 has 10 bits of fraction: its steps are 2⁻¹⁰ from 1 to 2, and 1 from 1024 to 2048.

    1 + 2⁻¹² is nearest 1, 1 + 3 · 2⁻¹² nearest 1 + 2⁻¹⁰, 1025.5 halfway and so 1026, the even one; −0.5 and 65504,
    the largest of all, are there; 2⁻²⁶ is below half of the least, 2⁻²⁴, and 0.
    """
    weights = {"w": tensor([1 + 2**-12, 1 + 3 * 2**-12, 1025.5, -0.5, 65504.0, 2.0**-26])}
    sent = to_bytes(weights, bits=16)
    assert load(sent)["w"].dtype == torch.float16
    back = read_weights(sent, weights, bits=16)["w"]
    assert back.tolist() == [1.0, 1 + 2**-10, 1026.0, -0.5, 65504.0, 0.0] and back.dtype == torch.float32


@given(st.lists(st.floats(-60_000, 60_000, width=32), min_size=1, max_size=20))
def test_what_is_read_is_what_was_said_to_be_read(values):
    """Off by half a step at most: 2⁻¹¹ of a number, or 2⁻²⁵ where float16 is subnormal. A second trip loses nothing."""
    weights = {"w": tensor(values)}
    back = read_weights(to_bytes(weights, bits=16), weights, bits=16)
    assert torch.equal(back["w"], narrowed(weights, 16)["w"])
    error = (back["w"].double() - weights["w"].double()).abs()
    assert (error <= weights["w"].double().abs() * 2**-11 + 2**-25).all()
    assert torch.equal(narrowed(back, 16)["w"], back["w"])
    assert torch.equal(narrowed(weights, 32)["w"], weights["w"])


@pytest.mark.parametrize("value", [65_520.0, -70_000.0, 1e30])
def test_what_float16_cannot_hold_is_told_where_it_is_sent(value):
    """Its largest is 65504; half a step above it, 65520, is the first number that becomes infinite."""
    weights = {"a": tensor([1.0]), "layer.w": tensor([[1.0, value]])}
    said = f"layer.w holds {value:g}, and float16 ends at ±65504; put bits = 32 into the table `aggregation`"
    with pytest.raises(RunError, match=re.escape(said)):
        to_bytes(weights, bits=16)
    assert read_weights(to_bytes(weights), weights)["layer.w"].tolist() == weights["layer.w"].tolist()
    to_bytes(
        {"w": tensor([65_519.0, torch.inf])}, bits=16
    )  # infinite before: not float16's fault, and refused on reading


@pytest.mark.parametrize(
    ("dtype", "travels"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.float16), (torch.float16, torch.float16)]
    + [(dtype, dtype) for dtype in (torch.float64, torch.int64, torch.bool)],
    ids=str,
)
def test_what_travels_in_16_bits_and_what_comes_back(dtype, travels):
    """A 1 of every type; float64 is nobody's weights by accident, and counts are not fractions."""
    weights = {"w": torch.ones(2, dtype=dtype)}
    sent = to_bytes(weights, bits=16)
    assert load(sent)["w"].dtype == travels
    back = read_weights(sent, weights, bits=16)["w"]
    assert back.dtype == narrowed(weights, 16)["w"].dtype == dtype and torch.equal(back, weights["w"])


def test_an_update_in_16_bits_is_half_the_bytes():
    """7 numbers: 28 bytes, then 14. Of 1000 · 1000, 4 MB and 2 MB."""
    assert [payload(to_bytes(EXPECTED, bits=bits)) for bits in (32, 16)] == [28, 14]
    large = {"w": torch.zeros(1000, 1000)}
    assert [payload(to_bytes(large, bits=bits)) for bits in (32, 16)] == [4_000_000, 2_000_000]


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(2, 3)}, r"an update of the router with other names: \['b'\]"),
        ({**EXPECTED, "c": torch.zeros(1)}, r"an update of the router with other names: \['c'\]"),
        ({"a\x1b[2J": torch.zeros(2, 3), "b": torch.zeros(())}, r"other names: \['a', 'a\\x1b\[2J'\]"),
        ({**EXPECTED, "a": torch.zeros(3, 2)}, r"an update of the router: a is \(3, 2\) .*, expected \(2, 3\) torch"),
        ({**EXPECTED, "b": torch.zeros(1)}, r"an update of the router: b is \(1,\) .*, expected \(\) torch"),
        ({**EXPECTED, "b": tensor(0.0).double()}, r"an update of the router: b is \(\) torch.float64, expected"),
        ({**EXPECTED, "b": tensor(0)}, r"an update of the router: b is \(\) torch.int64, expected \(\) torch.float"),
        ({**EXPECTED, "b": tensor(float("nan"))}, "an update of the router: b holds a value that is not finite"),
        ({**EXPECTED, "b": tensor(-float("inf"))}, "an update of the router: b holds a value that is not finite"),
    ],
    ids=["too few", "too many", "name", "shape", "no scalar", "float64", "int64", "nan", "inf"],
)
def test_what_is_not_used_and_what_it_is_about(changed, message, bits):
    with pytest.raises(CheckpointError, match=message):
        read_weights(to_bytes(changed, bits=bits), EXPECTED, bits=bits, what="an update of the router")


@pytest.mark.parametrize(("sent", "read"), [(16, 32), (32, 16)])
def test_the_number_of_bits_is_agreed(sent, read):
    weights = {"a": torch.zeros(2, 3)}
    message = rf"an update: a is \(2, 3\) torch.float{sent}, expected \(2, 3\) torch.float{read}"
    with pytest.raises(CheckpointError, match=message):
        read_weights(to_bytes(weights, bits=sent), weights, bits=read, what="an update")


def test_a_number_beyond_float16_is_not_finite_there():
    """65520, halfway from 65504, the largest, to where the next would be, is infinite."""
    with pytest.raises(CheckpointError, match=r"weights: [ab] holds a value that is not finite"):
        read_weights(save({name: t.half() for name, t in of_one_value(65520.0).items()}), EXPECTED, bits=16)
    assert read_weights(to_bytes(of_one_value(65519.0), bits=16), EXPECTED, bits=16)["b"].item() == 65504


@pytest.mark.parametrize("data", [b"", b"no tensors", b"\xff" * 16, save(EXPECTED)[:-1], save(EXPECTED) + b"\x00"])
def test_bytes_that_are_no_weights(data):
    """The message has their number and not themselves: a site may have made them up for whoever reads it."""
    with pytest.raises(
        CheckpointError, match=rf"an update of the selector: {len(data)} bytes that cannot be read"
    ) as told:
        read_weights(data, EXPECTED, what="an update of the selector")
    assert "no tensors" not in str(told.value)


def test_an_update_waits_in_the_bits_in_which_it_came():
    """Half of float32; each look gives the type of the model's own weights, and a site's update is read as before."""
    expected = {"a": tensor([0.0, 0.0]), "b": tensor([[0.0]], dtype=torch.float64)}
    sent = to_bytes({"a": tensor([0.1, 2.0]), "b": tensor([[3.0]], dtype=torch.float64)}, bits=16)
    update = read_update(sent, expected, bits=16)
    assert {name: held.dtype for name, held in update.tensors.items()} == {"a": torch.float16, "b": torch.float64}
    assert list(update) == ["a", "b"] and len(update) == 2
    assert {name: held.dtype for name, held in update.items()} == {"a": torch.float32, "b": torch.float64}
    read = read_weights(sent, expected, bits=16)
    assert all(torch.equal(read[name], update[name]) for name in expected)
