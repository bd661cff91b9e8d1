import pytest
import torch
from PIL import Image

from accord.data.images import load_image
from accord.errors import DataError, DataWarning, warn_once
from accord.models.inputs import Batch, build_batch, chunks, completion_text, join_images, model_inputs, prompt_text
from accord.models.load import LoraSettings, add_lora, load_model, tokenizer_of
from accord.types import vqa_prompt

PROMPTS = [vqa_prompt("what colour is it?"), vqa_prompt("is it red?"), vqa_prompt("how many squares are there here?")]
IMAGES = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (48, 24), "blue"), Image.new("RGB", (20, 40), "green")]
COMPLETIONS = [["red", "light blue, perhaps", ""], ["yes"], ["two", "one"]]
ROWS = [(p, completion) for p, group in enumerate(COMPLETIONS) for completion in group]


def plain(processor, p, completion):
    """What transformers' own processor makes of one image with one whole conversation."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": completion}]}
    text = processor.apply_chat_template([*PROMPTS[p], turn], tokenize=False)
    return processor(images=[[IMAGES[p]]], text=[text], return_tensors="pt")


def vision_tower(model):
    inner = model.base_model
    return inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model


def test_one_batch_equals_one_forward_per_row(vlm):
    model, processor = vlm
    batch = build_batch(processor, PROMPTS, IMAGES, COMPLETIONS)
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits
        for n, (p, completion) in enumerate(ROWS):
            alone = plain(processor, p, completion)
            length = alone["input_ids"].shape[1]
            assert batch.input_ids[n, :length].tolist() == alone["input_ids"][0].tolist()
            torch.testing.assert_close(logits[n, :length], model(**alone).logits[0], atol=1e-5, rtol=1e-5)


def test_the_same_holds_for_hidden_states_under_an_adapter(vlm):
    """A fresh adapter changes nothing (B = 0), so B is drawn first."""
    model, processor = vlm
    adapted = add_lora(model, LoraSettings(rank=2, alpha=4))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    batch = build_batch(processor, PROMPTS, IMAGES, COMPLETIONS)
    inner = adapted.get_base_model().base_model
    with torch.no_grad():
        hidden = inner(**model_inputs(inner, batch), use_cache=False).last_hidden_state
        for n, (p, completion) in enumerate(ROWS):
            alone = plain(processor, p, completion)
            expected = adapted(**alone, output_hidden_states=True).hidden_states[-1][0]
            torch.testing.assert_close(hidden[n, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        with adapted.disable_adapter():
            assert (inner(**model_inputs(inner, batch)).last_hidden_state - hidden).abs().max() > 1e-3


def test_gradients_through_the_shared_image_are_the_sum_over_rows(vlm):
    """The loss is a sum over rows, so its gradient is the sum of the rows' gradients, in the vision tower too."""
    model, processor = vlm

    def answer_loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")

    batch = build_batch(processor, PROMPTS, IMAGES, COMPLETIONS)
    logits = model(**model_inputs(model, batch)).logits
    sum(answer_loss(row, labels) for row, labels in zip(logits, batch.labels, strict=True)).backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision" in name for name in shared)
    model.zero_grad()
    for n, (p, completion) in enumerate(ROWS):
        alone = plain(processor, p, completion)
        answer_loss(model(**alone).logits[0], batch.labels[n, : alone["input_ids"].shape[1]]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in shared)
        if parameter.grad is not None:
            torch.testing.assert_close(shared[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_the_vision_tower_sees_each_image_once(vlm):
    """3 images for 6 rows; one image of each size, as a family may need one call per size but never one per row."""
    model, processor = vlm
    images: list[int] = []
    vision_tower(model).register_forward_hook(lambda module, args, out: images.append(len(out.last_hidden_state)))
    batch = build_batch(processor, PROMPTS, IMAGES, COMPLETIONS)
    model(**model_inputs(model, batch))
    assert (sum(images), len(batch.input_ids)) == (3, 6)


def test_a_family_without_encoder_outputs_gets_its_pixels_repeated(llava, monkeypatch):
    model, processor = load_model(llava)
    batch = build_batch(processor, PROMPTS, IMAGES, COMPLETIONS)
    original = type(model).forward
    with torch.no_grad():
        expected = model(**model_inputs(model, batch)).logits

        def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
            return original(self, input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)

        monkeypatch.setattr(type(model), "forward", forward)
        warn_once.cache_clear()
        with pytest.warns(DataWarning, match="llava: an image is encoded anew for every answer"):
            inputs = model_inputs(model, batch)
        assert len(inputs["pixel_values"]) == 6
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_labels_cover_the_completion_and_its_end_token(vlm):
    _, processor = vlm
    batch = build_batch(processor, PROMPTS, IMAGES, COMPLETIONS)
    assert batch.prompt_index.tolist() == [0, 0, 0, 1, 2, 2]
    for n, (_, completion) in enumerate(ROWS):
        marked = batch.labels[n] != -100
        assert processor.tokenizer.decode(batch.labels[n][marked]) == completion + "</s>"
        assert torch.equal(batch.labels[n][marked], batch.input_ids[n][marked])
        assert batch.last_token[n] == marked.nonzero().max() == batch.attention_mask[n].nonzero().max()
        assert batch.input_ids[n, batch.last_token[n]] == processor.tokenizer.eos_token_id
        assert (batch.input_ids[n][batch.attention_mask[n] == 0] == processor.tokenizer.pad_token_id).all()


def test_the_number_of_image_tokens(vlm):
    """32 pixels / patches of 16 = 2 a side: 4 tokens an image (idefics3: patches of 8, 4 a side, shuffled by 2: 2)."""
    _, processor = vlm
    batch = build_batch(processor, PROMPTS[:1], IMAGES[:1], COMPLETIONS[:1])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.input_ids == image).sum(dim=1).tolist() == [4, 4, 4]


def test_the_completion_is_what_the_template_adds_to_the_prompt(vlm):
    _, processor = vlm
    assert prompt_text(processor, PROMPTS[0]) == "<s><image>what colour is it?\n"
    assert completion_text(processor, PROMPTS[0], "red") == "red</s>"


def test_a_template_is_rendered_once_for_the_same_words(vlm, monkeypatch):
    """Two prompts, four answers each: 2 + 8 renderings the first time, none the second; a new template renders anew."""
    _, processor = vlm
    stock, calls = type(processor).apply_chat_template, []

    def counting(self, turns, **how):
        calls.append(turns)
        return stock(self, turns, **how)

    monkeypatch.setattr(type(processor), "apply_chat_template", counting)
    images = [Image.new("RGB", (32, 32))] * 2
    asked = processor, PROMPTS[:2], images, [["red", "blue", "yes", "no"]] * 2
    first = build_batch(*asked)
    assert len(calls) == 10
    again = build_batch(*asked)
    assert len(calls) == 10
    assert torch.equal(first.input_ids, again.input_ids)
    before = prompt_text(processor, PROMPTS[0])
    processor.chat_template += "!"
    assert prompt_text(processor, PROMPTS[0]) == before + "!"


def test_a_template_that_tells_the_time_is_rendered_every_time(vlm, monkeypatch):
    _, processor = vlm
    processor.chat_template = "{{ strftime_now('%Y') }} " + processor.chat_template
    told = iter(["1999", "2000"])
    monkeypatch.setattr(type(processor), "apply_chat_template", lambda *_, **__: next(told))
    assert [prompt_text(processor, PROMPTS[0]) for _ in range(2)] == ["1999", "2000"]


def test_a_prompt_that_holds_its_picture_is_rendered_as_it_comes(vlm):
    """TRL puts the pictures into the prompts; they would stay in memory."""
    _, processor = vlm
    bare = PROMPTS[0]
    held = [{**bare[0], "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}, *bare[0]["content"][1:]]}]
    assert prompt_text(processor, held) == prompt_text(processor, bare)


def test_a_template_that_rewrites_the_prompt_gets_the_end_token(llava):
    """Qwen3's template, for one, opens the answer with an empty thought that a finished turn does not show."""
    _, processor = load_model(llava)
    processor.chat_template = "{{ messages | length }}{{ 'answer:' if add_generation_prompt }}"
    assert completion_text(processor, PROMPTS[0], "red") == "red</s>"


def test_a_system_turn_and_plain_text_come_along(llava):
    _, processor = load_model(llava)
    prompt = [{"role": "system", "content": "Be brief."}, *PROMPTS[0]]
    assert prompt_text(processor, prompt) == "<s>Be brief.\n<image>what colour is it?\n"


def test_a_prompt_without_completions_takes_no_row(llava):
    model, processor = load_model(llava)
    batch = build_batch(processor, PROMPTS, IMAGES, [["red"], [], ["two"]])
    assert batch.prompt_index.tolist() == [0, 1] and len(batch.image_inputs["pixel_values"]) == 2
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits
        alone = plain(processor, 2, "two")
        torch.testing.assert_close(
            logits[1, : alone["input_ids"].shape[1]], model(**alone).logits[0], atol=1e-5, rtol=1e-5
        )


def test_token_types_mark_the_prompt_only_and_reach_the_model(llava, monkeypatch):
    """Families with multi-axis positions need them for every row: those of the prompt, then 0 for the answer's text."""
    model, processor = load_model(llava)
    real = processor.__class__.__call__

    class WithTypes(type(processor)):
        def __call__(self, *args, **settings):
            encoded = real(self, *args, **settings)
            encoded["mm_token_type_ids"] = (encoded["input_ids"] == self.image_token_id).long()
            return encoded

    processor.__class__ = WithTypes
    batch = build_batch(processor, PROMPTS[:2], IMAGES[:2], COMPLETIONS[:2])
    assert torch.equal(batch.kinds["mm_token_type_ids"] == 1, batch.input_ids == processor.image_token_id)
    assert "mm_token_type_ids" not in batch.image_inputs
    assert "mm_token_type_ids" not in model_inputs(model, batch)  # LLaVA's forward pass names no such thing
    original = type(model).forward

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, mm_token_type_ids=None):
        return original(self, input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)

    monkeypatch.setattr(type(model), "forward", forward)
    assert model_inputs(model, batch)["mm_token_type_ids"] is batch.kinds["mm_token_type_ids"]


def test_tensors_of_several_prompts_follow_each_other_padded_at_the_end():
    """Prompt 0 has 1 row of 2 tiles, prompt 1 has 2 rows of 1: three rows of 2 tiles; prompt 2 has no image."""
    parts = [{"a": torch.tensor([[1, 2]])}, {"a": torch.tensor([[3], [4]]), "b": torch.tensor([5])}, {}]
    joined = join_images([parts[p] for p in (1, 2, 0, 1)])
    assert joined["a"].tolist() == [[3, 0], [4, 0], [1, 2], [3, 0], [4, 0]] and joined["b"].tolist() == [5, 5]


def test_a_batch_moves_whole(llava):
    _, processor = load_model(llava)
    moved = build_batch(processor, PROMPTS, IMAGES, COMPLETIONS).to(torch.device("meta"))
    assert isinstance(moved, Batch)
    tensors = [moved.input_ids, moved.attention_mask, moved.labels, moved.prompt_index, *moved.image_inputs.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("sides", [(32, 32), (8, 8), (300, 20)])
def test_any_image_size_gives_the_same_number_of_tokens(vlm, sides):
    _, processor = vlm
    batch = build_batch(processor, PROMPTS[:1], [Image.new("RGB", sides)], [["red"]])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((batch.input_ids == image).sum()) == 4


def test_chunks_keep_a_prompts_rows_together():
    """Limit 5: 2 + 3 fit, 4 starts anew, 9 stays whole, 1 + 0 follow."""
    assert list(chunks([2, 3, 4, 9, 1, 0], 5)) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert list(chunks([], 5)) == []


def test_questions_without_images_make_rows_of_text_alone(texts_only, llava, square):
    """A text-only model and one that sees take the same rows; its template gets plain text, of every block."""
    prompts = [[{"role": "user", "content": [{"type": "text", "text": t} for t in ("what ", each)]}] for each in "ab"]
    for checkpoint in (texts_only, llava):
        _, processor = load_model(checkpoint)
        batch = build_batch(processor, prompts, [None, None], [["red", "blue"], ["one"]])
        assert batch.image_inputs == {} and batch.prompt_index.tolist() == [0, 0, 1]
        shown = [ids[mask.bool()] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        texts = [tokenizer_of(processor).decode(ids) for ids in shown]
        assert texts == ["<s>what a\nred</s>", "<s>what a\nblue</s>", "<s>what b\none</s>"]
    picture = load_image(square("red"))
    _, tokenizer = load_model(texts_only)
    with pytest.raises(DataError, match="a text-only model was asked about an image"):
        build_batch(tokenizer, [vqa_prompt("what?")], [picture], [["red"]])
