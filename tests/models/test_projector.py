"""The projector is found by its place, trained alone, and drawn anew from a seed."""

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from accord.data.images import load_image
from accord.errors import CheckpointError
from accord.models.inputs import build_batch
from accord.models.load import load_model
from accord.models.projector import Seen, find_projector, frozen_digest, mean_text, train_projector_alone
from accord.models.tower import vision_tower
from accord.types import vqa_prompt


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def qwen():
    """Qwen2.5-VL of a few thousand weights: its merger is inside the tower."""
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
    return Qwen2_5_VLForConditionalGeneration(config)


def test_the_projector_of_each_family_is_trained_alone(vlm):
    model, _ = vlm
    name, module = find_projector(model)
    train_projector_alone(model)
    assert name in ("model.multi_modal_projector", "model.connector")
    assert trained(model) == {f"{name}.{own}" for own, _ in module.named_parameters()} != set()
    model.train()
    assert not any(part.training for part in vision_tower(model).modules()) and module.training


def test_the_projector_of_a_convolutional_tower_is_trained_alone(efficientnet):
    model, _ = load_model(efficientnet)
    train_projector_alone(model)
    assert trained(model) == {f"model.multi_modal_projector.linear_{n}.{w}" for n in (1, 2) for w in ("weight", "bias")}


def test_a_digest_tells_a_frozen_statistic_and_not_the_projector(efficientnet):
    """The batch norms of a convolutional tower have a mean that is no parameter."""
    model, processor = load_model(efficientnet)
    train_projector_alone(model, seed=0)
    known = frozen_digest(model, processor)
    train_projector_alone(model, seed=1)
    assert torch.equal(frozen_digest(model, processor), known)
    size, processor.image_processor.size = processor.image_processor.size, {"height": 32, "width": 32}
    assert not torch.equal(frozen_digest(model, processor), known)
    processor.image_processor.size = size
    assert torch.equal(frozen_digest(model, processor), known)
    next(value for name, value in model.named_buffers() if name.endswith("running_mean")).add_(1.0)
    assert not torch.equal(frozen_digest(model, processor), known)


def test_the_merger_of_qwen_vl_is_drawn_anew_inside_a_frozen_tower(qwen):
    """Two linear layers are drawn; the one scale of its norm, of 16 entries, is 1."""
    qwen.model.visual.merger.ln_q.weight.data.fill_(3.0)
    before = {name: p.clone() for name, p in qwen.named_parameters()}
    train_projector_alone(qwen, seed=0)
    assert {name.split("merger.")[1] for name in trained(qwen)} == {
        "ln_q.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"
    }  # fmt: skip
    assert qwen.model.visual.merger.ln_q.weight.tolist() == [1.0] * 16
    changed = {name for name, p in qwen.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained(qwen)


def test_a_seed_draws_the_projector_and_nothing_else(vlm):
    model, _ = vlm
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    train_projector_alone(model, seed=1)
    first = {name: p.clone() for name, p in model.named_parameters()}
    train_projector_alone(model, seed=1)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
    assert {name for name in first if not torch.equal(first[name], before[name])} == trained(model)
    train_projector_alone(model, seed=2)
    assert all(not torch.equal(p, first[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_cannot_be_drawn_is_named(vlm):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.ones(2, 2))

    model, _ = vlm
    find_projector(model)[1].extra = Own()
    with pytest.raises(CheckpointError, match=r'Own does not say .* put initial = "keep"'):
        train_projector_alone(model, seed=0)
    train_projector_alone(model)


def test_a_model_without_a_projector_is_named(texts_only):
    model, _ = load_model(texts_only)
    with pytest.raises(CheckpointError, match=r"Qwen2ForCausalLM has no projector .* such as accord/llava-clip-llama"):
        train_projector_alone(model)


@pytest.fixture
def batch(vlm, square):
    _, processor = vlm
    images = [load_image(square(colour)) for colour in ("red", "blue")]
    return build_batch(processor, [vqa_prompt("is it red?")] * 2, images, [["yes"], ["no no"]])


@torch.no_grad()
def test_the_mean_visual_token_is_that_of_the_image_features(vlm, batch):
    model, _ = vlm
    features = model.get_image_features(**batch.image_inputs, return_dict=True).pooler_output
    seen = Seen(model, batch)
    assert torch.equal(seen.mean, torch.stack([each.mean(0) for each in features]))
    assert not torch.allclose(seen.mean[0], seen.mean[1])


@torch.no_grad()
def test_other_weights_of_the_projector_give_what_a_model_with_them_does(vlm, batch):
    model, _ = vlm
    train_projector_alone(model)
    seen = Seen(model, batch)
    other = {name: p + 0.1 for name, p in model.named_parameters() if p.requires_grad}
    told = seen.mean_under(other)
    assert not torch.allclose(told, seen.mean)
    for name, p in model.named_parameters():
        if name in other:
            p.copy_(other[name])
    assert torch.allclose(told, Seen(model, batch).mean, atol=1e-6)


@torch.no_grad()
def test_the_mean_text_token_leaves_image_and_padding_out(vlm, batch):
    """Row 0 is the shorter one: its last columns are padding."""
    model, processor = vlm
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert batch.attention_mask[0, -1] == 0 and (batch.input_ids == image).any()
    table = model.get_input_embeddings().weight
    for n, row in enumerate(mean_text(model, batch)):
        length = int(batch.attention_mask[n].sum())
        kept = [i for i in batch.input_ids[n, :length].tolist() if i != image]
        assert torch.allclose(row, table[kept].mean(0), atol=1e-6)
