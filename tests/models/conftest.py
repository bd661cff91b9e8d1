import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


@pytest.fixture
def several_axes():
    """Return a function that makes a model with positions along three axes, and prompts for it."""

    def build(attention="sdpa"):
        """A small Qwen2.5-VL, and three prompts whose images have different grids."""
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
        return model, images, prefixes, [[int(token == 5) for token in each] for each in prefixes]

    return build


@pytest.fixture
def image_of():
    """Return a function that takes the tensors of one prompt's image out of those of a batch with a grid."""

    def take(images, prompt):
        patches = images["image_grid_thw"].prod(dim=-1).tolist()
        grid = images["image_grid_thw"][prompt : prompt + 1]
        return {"pixel_values": images["pixel_values"].split(patches)[prompt], "image_grid_thw": grid}

    return take
