"""The sizes that the configurations on the hub give for the models of the paper, without their weights."""

from transformers import LlavaOnevisionConfig, Qwen2_5_VLConfig, Qwen2VLConfig

_SEES = {"depth": 32, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN25_TOWER = {**_SEES, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}


def _words(width, layers, heads, keys, inner, vocabulary):
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }


PUBLISHED = {
    "Qwen/Qwen2.5-VL-7B-Instruct": Qwen2_5_VLConfig(
        text_config=_words(3584, 28, 28, 4, 18944, 152064),
        vision_config={**_QWEN25_TOWER, "out_hidden_size": 3584},
        tie_word_embeddings=False,
        dtype="bfloat16",
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": Qwen2_5_VLConfig(
        text_config=_words(2048, 36, 16, 2, 11008, 151936),
        vision_config={**_QWEN25_TOWER, "out_hidden_size": 2048},
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    "Qwen/Qwen2-VL-2B-Instruct": Qwen2VLConfig(
        text_config=_words(1536, 28, 12, 2, 8960, 151936),
        vision_config={**_SEES, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16},
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_words(896, 24, 14, 2, 4864, 152000)},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        tie_word_embeddings=True,
        dtype="float16",
    ),
}
