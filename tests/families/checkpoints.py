"""Tiny random checkpoints of vision-language families, with real processors: ordinary folders, no hub.

Special tokens, chat templates (shortened), tied embeddings, post-processors that begin a sequence, and generation
defaults follow the published checkpoints. Image sizes are small, but the number of image tokens varies with the image
where it does there.
"""

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXTS = ["What colour is the square? red green blue left right circle how many one two three yes no Is it"] * 4


def tokenizer(special, *, eos, pad, bos=None, adds_bos=False, named=None):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=list(dict.fromkeys(special)),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        raw.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        padding_side="left",
        **({"extra_special_tokens": named} if named else {}),
    )
    return fast


def ids(tok, *names):
    return [tok.convert_tokens_to_ids(n) for n in names]


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for c in message['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in message['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is not string and message['content'][0]['type'] == 'image' %}{{ ':' }}"
    "{% else %}{{ ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% elif c['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% elif c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PALIGEMMA = (  # published ones have none; this is what a user writes
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for c in message['content'] %}{% if c['type'] == 'image' %}<image>{% elif c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}[IMG]{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}[/INST]"
    "{% else %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}"
    "{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}<|image|>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def _text(tok, **more):
    return {
        "vocab_size": len(tok),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        **more,
    }


def _qwen_processor(kind, patch):
    tok = tokenizer(QWEN, eos="<|im_end|>", pad="<|endoftext|>")
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    size = {"shortest_edge": (2 * patch) ** 2 * 2, "longest_edge": (2 * patch) ** 2 * 16}
    image = tf.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)
    video = (tf.Qwen3VLVideoProcessor if kind == "qwen3_vl" else tf.Qwen2VLVideoProcessor)(
        patch_size=patch, merge_size=2, temporal_patch_size=2
    )
    cls = {"qwen2_vl": tf.Qwen2VLProcessor, "qwen2_5_vl": tf.Qwen2_5_VLProcessor, "qwen3_vl": tf.Qwen3VLProcessor}[kind]
    return tok, cls(image_processor=image, tokenizer=tok, video_processor=video, chat_template=template)


def _qwen_ids(tok):
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return dict(
        zip(names, ids(tok, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"), strict=True)
    )


def qwen2_vl():
    tok, processor = _qwen_processor("qwen2_vl", 14)
    config = tf.Qwen2VLConfig(
        text_config=_text(
            tok, rope_parameters=MROPE, use_sliding_window=False, sliding_window=32768, max_window_layers=2
        ),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        tie_word_embeddings=True,
        **_qwen_ids(tok),
    )
    model = tf.Qwen2VLForConditionalGeneration(config)
    _generation(model, tok, do_sample=True, temperature=0.01, top_k=1, top_p=0.001, two_ends="<|endoftext|>")
    return model, processor


def qwen2_5_vl():
    tok, processor = _qwen_processor("qwen2_5_vl", 14)
    config = tf.Qwen2_5_VLConfig(
        text_config=_text(
            tok, rope_parameters=MROPE, use_sliding_window=False, sliding_window=32768, max_window_layers=2
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **_qwen_ids(tok),
    )
    model = tf.Qwen2_5_VLForConditionalGeneration(config)
    _generation(model, tok, do_sample=True, temperature=1e-6, repetition_penalty=1.05, two_ends="<|endoftext|>")
    return model, processor


def qwen3_vl():
    tok, processor = _qwen_processor("qwen3_vl", 16)
    config = tf.Qwen3VLConfig(
        text_config=_text(tok, head_dim=16, rope_parameters={**MROPE, "mrope_interleaved": True}),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **_qwen_ids(tok),
    )
    model = tf.Qwen3VLForConditionalGeneration(config)
    _generation(model, tok, do_sample=True, temperature=0.7, top_k=20, top_p=0.8, two_ends="<|endoftext|>")
    return model, processor


def llava_onevision():
    tok = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos="<|im_end|>", pad="<|endoftext|>"
    )
    pins = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
    image = tf.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=pins)
    video = tf.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32})
    processor = tf.LlavaOnevisionProcessor(
        image_processor=image,
        tokenizer=tok,
        video_processor=video,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    a, b = ids(tok, "<image>", "<video>")
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(
            **TOWER,
            vision_use_head=False,
        ),
        text_config=tf.Qwen2Config(
            **_text(tok, tie_word_embeddings=True, use_sliding_window=False, sliding_window=32768)
        ),
        image_token_index=a,
        video_token_index=b,
        image_grid_pinpoints=pins,
        tie_word_embeddings=True,
    )
    model = tf.LlavaOnevisionForConditionalGeneration(config)
    _generation(model, tok)
    return model, processor


def llava_next():
    tok = tokenizer(["<unk>", "<s>", "</s>", "<image>", "<pad>"], eos="</s>", bos="<s>", pad="<pad>", adds_bos=True)
    pins = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    image = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pins
    )
    processor = tf.LlavaNextProcessor(
        image_processor=image,
        tokenizer=tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(
            **TOWER,
        ),
        text_config=tf.LlamaConfig(**_text(tok)),
        image_token_index=ids(tok, "<image>")[0],
        image_grid_pinpoints=pins,
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    model = tf.LlavaNextForConditionalGeneration(config)
    _generation(model, tok)
    return model, processor


def internvl():
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tok = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named=named,
    )
    image = tf.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    video = tf.InternVLVideoProcessor(size={"height": 32, "width": 32})
    processor = tf.InternVLProcessor(
        image_processor=image,
        tokenizer=tok,
        video_processor=video,
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    config = tf.InternVLConfig(
        vision_config={
            **TOWER,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        text_config=tf.Qwen2Config(**_text(tok, use_sliding_window=False, sliding_window=32768)),
        image_token_id=ids(tok, "<IMG_CONTEXT>")[0],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = tf.InternVLForConditionalGeneration(config)
    _generation(model, tok)
    return model, processor


def _idefics(kind):
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tok = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *rows, "<video>"],
        eos="<end_of_utterance>",
        bos="<|im_start|>",
        pad="<|im_end|>",
        named=named if kind == "smolvlm" else None,
    )
    image_class = tf.SmolVLMImageProcessor if kind == "smolvlm" else tf.Idefics3ImageProcessor
    image = image_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True)
    if kind == "smolvlm":
        video = tf.SmolVLMVideoProcessor(
            size={"longest_edge": 32},
            max_image_size={"longest_edge": 32},
            video_sampling={"max_frames": 4, "fps": 1, "video_size": {"longest_edge": 32}},
        )
        processor = tf.SmolVLMProcessor(image, tok, video, image_seq_len=4, chat_template=IDEFICS)
    else:
        processor = tf.Idefics3Processor(image, tok, image_seq_len=4, chat_template=IDEFICS)
    vision = {
        **TOWER,
    }
    config_class, model_class = (
        (tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)
        if kind == "smolvlm"
        else (tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)
    )
    config = config_class(
        vision_config=vision,
        text_config=tf.LlamaConfig(**_text(tok)),
        image_token_id=ids(tok, "<image>")[0],
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    model = model_class(config)
    _generation(model, tok)
    return model, processor


def smolvlm():
    return _idefics("smolvlm")


def idefics3():
    return _idefics("idefics3")


def gemma3():
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values()],
        eos="<end_of_turn>",
        bos="<bos>",
        pad="<pad>",
        adds_bos=True,
        named=named,
    )
    image = tf.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = tf.Gemma3Processor(image, tok, chat_template=GEMMA, image_seq_length=4)
    boi, eoi, img = ids(tok, *named.values())
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(
            **TOWER,
            vision_use_head=False,
        ),
        text_config=_text(
            tok,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=img,
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    _generation(model, tok, do_sample=True, top_k=64, top_p=0.95, two_ends="<eos>")
    return model, processor


def paligemma():
    tok = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<image>"], eos="<eos>", bos="<bos>", pad="<pad>", named={"image_token": "<image>"}
    )
    image = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    image.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(image, tok, chat_template=PALIGEMMA)
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(
            **TOWER,
            projection_dim=64,
            vision_use_head=False,
        ),
        text_config=tf.GemmaConfig(**_text(tok, head_dim=16, num_image_tokens=16)),
        image_token_index=ids(tok, "<image>")[0],
        projection_dim=64,
        hidden_size=64,
    )
    model = tf.PaliGemmaForConditionalGeneration(config)
    _generation(model, tok)
    return model, processor


def _pixtral_processor(merge):
    tok = tokenizer(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"],
        eos="</s>",
        bos="<s>",
        pad="<pad>",
        adds_bos=True,
    )
    image = tf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    return tok, tf.PixtralProcessor(
        image_processor=image, tokenizer=tok, patch_size=8, spatial_merge_size=merge, chat_template=MISTRAL
    )


def _pixtral_vision():
    return tf.PixtralVisionConfig(**{**TOWER, "image_size": 64})


def pixtral():
    tok, processor = _pixtral_processor(1)
    config = tf.LlavaConfig(
        vision_config=_pixtral_vision(),
        text_config=tf.MistralConfig(**_text(tok, head_dim=16, sliding_window=None)),
        image_token_index=ids(tok, "[IMG]")[0],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
    )
    model = tf.LlavaForConditionalGeneration(config)
    _generation(model, tok)
    return model, processor


def mistral3():
    tok, processor = _pixtral_processor(2)
    config = tf.Mistral3Config(
        vision_config=_pixtral_vision(),
        text_config=tf.MistralConfig(**_text(tok, head_dim=16, sliding_window=None)),
        image_token_index=ids(tok, "[IMG]")[0],
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    model = tf.Mistral3ForConditionalGeneration(config)
    _generation(model, tok)
    return model, processor


def mllama():
    tok = tokenizer(
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|finetune_right_pad_id|>",
            "<|python_tag|>",
        ],
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        pad="<|finetune_right_pad_id|>",
        adds_bos=True,
    )
    vocab = len(tok)
    tok.add_tokens([AddedToken("<|image|>", special=True, normalized=False)])  # beyond the output layer, as published
    image = tf.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=2)
    processor = tf.MllamaProcessor(image, tok, chat_template=LLAMA3)
    text = _text(
        tok,
        num_hidden_layers=3,
        cross_attention_layers=[1],
        vocab_size=vocab,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 2,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config=text,
        image_token_index=ids(tok, "<|image|>")[0],
    )
    model = tf.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, p in model.named_parameters():  # published gates are trained; at 0 no image would be seen
            if "gate" in name and p.numel() == 1:
                p.fill_(0.5)
    _generation(model, tok, do_sample=True, temperature=0.6, top_p=0.9)
    return model, processor


def _generation(model, tok, two_ends=None, **settings):
    g = model.generation_config
    g.bos_token_id, g.pad_token_id = tok.bos_token_id, tok.pad_token_id
    g.eos_token_id = [tok.eos_token_id, *ids(tok, two_ends)] if two_ends else tok.eos_token_id
    for name, value in settings.items():
        setattr(g, name, value)


FAMILIES = {
    f.__name__: f
    for f in (
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        llava_onevision,
        llava_next,
        internvl,
        smolvlm,
        idefics3,
        gemma3,
        paligemma,
        pixtral,
        mistral3,
        mllama,
    )
}


def build(name, folder, seed=0):
    """Write the checkpoint of a family to a folder."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[name]()
    with torch.no_grad():  # spread answers out: at 0.02 all logits are alike and any two models agree
        for p in model.parameters():
            if p.ndim >= 2:
                if not p.any():  # Gemma 3's projection begins at 0, and no image would be seen
                    p.normal_(std=0.02)
                p.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
