import random

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from accord.data.images import load_image
from accord.models.inputs import build_batch, model_inputs, shared_inputs
from accord.models.load import load_vlm
from accord.models.prefix import can_share, completions_per_row, pack, prefix_positions, take_images
from accord.types import vqa_prompt

PROMPTS = [vqa_prompt("is it red?"), vqa_prompt("what colour is it?"), vqa_prompt("how many squares?")]
ANSWERS = [["red", "not quite red"], ["blue"], ["one", "two", "three or more"]]


def test_the_states_are_those_of_full_rows(vlm, square):
    """Six rows over three prompts of different length: every token's state, in every family."""
    model, processor = vlm
    images = [load_image(square(colour)) for colour in ("red", "blue", "green")]
    batch = build_batch(processor, PROMPTS, images, ANSWERS)
    inner = model.eval().base_model
    with torch.no_grad():
        inputs, where = shared_inputs(inner, batch)
        shared = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[where]
        full = inner(**model_inputs(inner, batch), use_cache=False).last_hidden_state
    real = batch.attention_mask.bool()
    assert len(inputs["input_ids"]) == 3 and shared.shape == full.shape
    torch.testing.assert_close(shared[real], full[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_of_several_axes(attention):
    """Qwen2.5-VL: three images of different grids, positions by time, height and width, against one row at a time."""
    draw = random.Random(0)
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 400,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    grids = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 4, 4]])
    images = {"pixel_values": torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 14 * 14), "image_grid_thw": grids}
    tokens = (grids.prod(-1) // 4).tolist()
    prefixes = [[10, 7, *[5] * count, 8, 11, 12, *range(13, 14 + n)] for n, count in enumerate(tokens)]
    types = [[int(token == 5) for token in prefix] for prefix in prefixes]
    completions = [[[draw.randrange(20, 400) for _ in range(1 + n)] for n in range(4)] for _ in prefixes]
    positions = prefix_positions(model, prefixes, types, images)
    packed = pack(model, prefixes, completions, positions, pad=0)
    assert packed.position_ids.shape == (3, 3, packed.input_ids.shape[1])
    with torch.no_grad():
        states = model.base_model(**packed.model_inputs(), **images, use_cache=False).last_hidden_state
        for p, prefix in enumerate(prefixes):
            for n, completion in enumerate(completions[p]):
                ids = torch.tensor([prefix + completion])
                alone = model.base_model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=torch.tensor([types[p] + [0] * len(completion)]),
                    **take_images(images, [1, 1, 1], [p]),
                    use_cache=False,
                ).last_hidden_state[0]
                start = packed.starts[p][n]
                mine = states[p, start : start + len(completion)]
                torch.testing.assert_close(mine, alone[len(prefix) :], atol=1e-5, rtol=1e-5)


def test_images_are_taken_by_prompt_by_image_and_by_patch():
    """Prompts with 2, 0 and 1 images: rows 2, 0, 2 are images 2, 0, 1, 2."""
    by_image, by_prompt = torch.tensor([10, 11, 12, 13]), torch.tensor([[0], [1], [2]])
    assert take_images({"a": by_image}, [2, 0, 2], [2, 0, 2])["a"].tolist() == [12, 13, 10, 11, 12, 13]
    assert take_images({"a": by_prompt}, [1, 1, 1], [2, 0])["a"].tolist() == [[2], [0]]
    grid = torch.tensor([[1, 1, 2], [1, 1, 1], [1, 1, 3]])
    patches = torch.arange(6)
    taken = take_images({"pixel_values": patches, "image_grid_thw": grid}, [1, 1, 1], [2, 0])
    assert taken["pixel_values"].tolist() == [3, 4, 5, 0, 1]
    assert taken["image_grid_thw"].tolist() == [[1, 1, 3], [1, 1, 2]]


def test_a_sliding_window_cannot_be_shared():
    """Its mask depends on the distance in the row, which packing changes."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for window, able in ((None, True), (16, False)):
        config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=window, **shape)
        assert can_share(MistralForCausalLM(config)) is able


def test_completions_of_a_row(llava):
    """32 features: √(300 (256 + 300)) = 408.4; so 13 of 32 tokens, 3 of 128, and one at least."""
    model = load_vlm(llava)[0]
    assert [completions_per_row(model, 300, length) for length in (0.5, 32, 128, 5000)] == [408, 13, 3, 1]
