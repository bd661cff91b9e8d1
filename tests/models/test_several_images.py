"""Prompts about none, one and two images in one batch: every number is that of a prompt by itself."""

import pytest
import torch
from PIL import Image, ImageDraw

from accord.errors import CheckpointError
from accord.models import prefix
from accord.models.attention import skip_hidden
from accord.models.encoder import Encoder, state_key
from accord.models.generate import complete
from accord.models.inputs import accepted, build_batch, completion_text, encode_prompts, model_inputs, shared_inputs
from accord.models.load import load_model, tokenizer_of
from accord.models.trial import try_checkpoint, try_model
from accord.rewards.model import RewardModel
from accord.types import at_places

TEXTS = ["is <image> like <image>?", "2 + 2?", "what colour is it?", "are they alike?"]
COUNTS = [2, 0, 1, 2]
PROMPTS = [[{"role": "user", "content": at_places(text, n)}] for text, n in zip(TEXTS, COUNTS, strict=True)]
ANSWERS = [["yes", "not at all"], ["4"], ["red", "blue"], ["no"]]


def picture(colour, size):
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle([size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2], fill=colour)
    return image


RED, GREEN, BLUE = picture("red", (64, 64)), picture("green", (96, 40)), picture("blue", (64, 64))
IMAGES = [[RED, GREEN], None, RED, [BLUE, RED]]


def stock_row(model, processor, p, answer):
    """One whole row of prompt and answer by the stock chat template, and how many tokens the answer has."""
    given = iter(IMAGES[p] if isinstance(IMAGES[p], list) else [IMAGES[p]])
    content = [
        {**block, "image": next(given)} if block["type"] == "image" else block for block in PROMPTS[p][0]["content"]
    ]
    fields = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    fields = dict(accepted(model, fields))
    end = tokenizer_of(processor)([completion_text(processor, PROMPTS[p], answer)], add_special_tokens=False)
    end = torch.tensor(end["input_ids"])
    fields["input_ids"] = torch.cat([fields["input_ids"], end], dim=1)
    fields["attention_mask"] = torch.ones_like(fields["input_ids"])
    return fields, end.shape[1]


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skips"])
def test_states_are_those_of_one_stock_row_at_a_time(vlm, monkeypatch, skips):
    """Behind shared prefixes, and in full rows with the features of each image handed to every row of its prompt."""
    monkeypatch.setattr(prefix, "_worth_skipping", lambda *_: skips)
    model, processor = vlm
    skip_hidden(model.eval())
    inner = model.base_model
    batch = build_batch(processor, PROMPTS, IMAGES, ANSWERS)
    assert batch.counts == (2, 0, 1, 2)
    with torch.no_grad():
        inputs, where = shared_inputs(inner, batch)
        shared = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[where]
        told = model_inputs(inner, batch)
        full = inner(**told, use_cache=False).last_hidden_state
        for row, (p, answer) in enumerate((p, answer) for p, those in enumerate(ANSWERS) for answer in those):
            fields, length = stock_row(model, processor, p, answer)
            alone = inner(**fields, use_cache=False).last_hidden_state[0]
            real = batch.attention_mask[row].bool()
            assert len(alone) == int(real.sum()) and int((batch.labels[row] != -100).sum()) == length
            torch.testing.assert_close(shared[row][real], alone, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(full[row][real], alone, atol=2e-5, rtol=1e-4)
    assert len(inputs["input_ids"]) == 4 and "mm_encoder_outputs" in told


def test_padded_prompts_say_what_each_says_alone(vlm):
    model, processor = vlm
    how = {"max_new_tokens": 5, "do_sample": False}
    alone = [complete(model, processor, [p], [i], **how)[0] for p, i in zip(PROMPTS, IMAGES, strict=True)]
    assert complete(model, processor, PROMPTS, IMAGES, **how) == alone
    assert encode_prompts(processor, PROMPTS, IMAGES)["attention_mask"].shape[0] == 4


def test_a_reward_model(vlm, tmp_path):
    """Scores of a batch are those of each prompt alone; the order of images counts; what is loaded scores the same."""
    model = RewardModel(*vlm)
    scores = model.score(PROMPTS, IMAGES, ANSWERS)
    for p, those in enumerate(ANSWERS):
        (alone,) = model.score([PROMPTS[p]], [IMAGES[p]], [those])
        torch.testing.assert_close(scores[p], alone, atol=1e-5, rtol=1e-5)
    swapped, _, single, _ = model.score(PROMPTS, [[GREEN, RED], None, [RED], [BLUE, RED]], ANSWERS)
    assert (swapped - scores[0]).abs().min() > 1e-6 and torch.equal(single, scores[2])
    model.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward").score(PROMPTS, IMAGES, ANSWERS)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, scores, strict=True))


def test_an_encoder_remembers_by_all_images(llava):
    """What was read of two images is not taken for what is read of them in the other order, or of one of them."""
    encoder = Encoder(*load_model(llava))
    fresh, mask = encoder(PROMPTS[3:], [[BLUE, RED]], [["no"]])
    encoder.remember({state_key(PROMPTS[3], [BLUE, RED], "no"): torch.zeros(3, encoder.features)}, [BLUE, RED])
    known, _ = encoder(PROMPTS[3:], [[BLUE, RED]], [["no"]])
    other, _ = encoder(PROMPTS[3:], [[RED, BLUE]], [["no"]])
    assert known.shape[1] == 3 and not known.any() and other.shape == fresh.shape and other.any()
    assert mask.all()


def test_every_family_of_ours_takes_several(vlm, texts_only):
    try_model("tiny", *vlm, several=True)
    with pytest.raises(CheckpointError, match=r"is a text-only model, and prompts have several images; give every"):
        try_checkpoint(texts_only, several=True)


def test_a_processor_that_takes_one_image_is_refused_by_name(llava, monkeypatch):
    """Where the data have several; where they have one, the checkpoint is good."""
    model, processor = load_model(llava)
    stock = type(processor).__call__

    def one_only(self, images=None, text=None, **settings):
        if any(isinstance(own, list) and len(own) > 1 for own in images or []):
            raise ValueError("only one image is supported")
        return stock(self, images=images, text=text, **settings)

    monkeypatch.setattr(type(processor), "__call__", one_only)
    try_model("single", model, processor)
    found = (
        r"single: Accord does not carry several images a prompt with this model of the family 'llava': a forward pass "
        r"over three questions failed \(ValueError: only one image is supported\); give every prompt one image, or name"
    )
    with pytest.raises(CheckpointError, match=found):
        try_model("single", model, processor, several=True)
