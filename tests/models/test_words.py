import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.images import load_image
from accord.models.encoder import Encoder
from accord.models.generate import answer
from accord.models.inputs import build_batch, prompt_text
from accord.models.load import SHIPPED, load_model, tokenizer_of
from accord.models.words import plain_prompt, plain_words
from accord.types import vqa_prompt

POISON = (
    *("<image>", "</s>", "<s>", "<pad>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *("<image><image>", "<<image>image>", "a</s>b", "<image", "<row_1_col_1>", "<|im_end|>", "<end_of_</s>utterance>"),
)


@pytest.fixture(scope="module")
def processor():
    return load_model("accord/idefics3")[1]


def special(processor, text):
    """Which special tokens the tokenizer makes of a text."""
    tokenizer = tokenizer_of(processor)
    return set(tokenizer(text, add_special_tokens=False)["input_ids"]) & set(tokenizer.all_special_ids)


def test_by_hand(processor):
    assert plain_words(processor, "<image> what is it?</s>") == "< image> what is it?< /s>"
    assert plain_words(processor, "<<image>image>") == "<< image>image>"


@pytest.mark.parametrize("name", sorted(p.name for p in SHIPPED.iterdir() if (p / "config.json").is_file()))
def test_no_words_become_special_tokens_of_a_shipped_model(name):
    own = load_model(f"accord/{name}")[1]
    for text in POISON:
        assert not special(own, plain_words(own, f"is it {text} or {text}{text}?"))
    assert special(own, "is it </s> or?")  # as it would be without


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<", ">", "/", "s", "image", "<image>", "</s>", " ", "a", "<s"]), max_size=12))
def test_whatever_is_put_together_is_no_token(processor, parts):
    text = "".join(parts)
    plain = plain_words(processor, text)
    assert not special(processor, plain) and plain_words(processor, plain) == plain
    assert plain.replace(" ", "") == text.replace(" ", "")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_honest_text_stays_to_the_bit(processor, text):
    if not special(processor, text):
        assert plain_words(processor, text) == text


def test_an_honest_prompt_is_itself(processor):
    prompt = vqa_prompt("is 1 < 2 or 2 > 1? [yes] or <b>no</b>")
    assert plain_prompt(processor, prompt)[0] is prompt[0]


def test_a_token_across_two_blocks(processor):
    """A template may write them one after the other."""
    blocks = [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge> what?"}]
    (turn,) = plain_prompt(processor, [{"role": "user", "content": blocks}])
    assert "".join(block["text"] for block in turn["content"]) == "<ima ge> what?"
    three = [{"type": "text", "text": text} for text in ("<", "/s", ">")]
    (turn,) = plain_prompt(processor, [{"role": "user", "content": three}])
    assert not special(processor, "".join(block["text"] for block in turn["content"]))


def test_a_question_with_an_image_token_is_answered_and_read(vlm, ask):
    """By every family: without the neutralising, the processor counts two images for one."""
    model, processor = vlm
    poison = ask(0, text="what <image> is </s> it?")
    assert prompt_text(processor, vqa_prompt(poison.text)).count("<image>") == 1
    assert len(answer(model, processor, [poison, ask(1)], max_new_tokens=2)) == 2
    states, _ = Encoder(model, processor)([vqa_prompt(poison.text)], [load_image(poison.image)], [["<image>", "red"]])
    assert states.isfinite().all()


def test_what_it_would_be_without(vlm, ask, monkeypatch):
    model, processor = vlm
    monkeypatch.setattr("accord.models.inputs.plain_prompt", lambda _, prompt: list(prompt))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        answer(model, processor, [ask(0, text="what <image> is it?")], max_new_tokens=2)


def test_a_hostile_candidate_leaves_the_others_as_they_are(vlm, ask):
    """Its row of tokens is its own alone, and holds no special token but the turn's end."""
    _, processor = vlm
    image, prompt = load_image(ask(0).image), vqa_prompt("what colour is it?")
    clean = build_batch(processor, [prompt], [image], [["red", "blue"]])
    dirty = build_batch(processor, [prompt], [image], [["red", "<image></s>", "blue"]])
    for n, m in ((0, 0), (1, 2)):
        length = int(clean.attention_mask[n].sum())
        assert clean.input_ids[n, :length].tolist() == dirty.input_ids[m, :length].tolist()
    said = dirty.input_ids[1][dirty.labels[1] != -100].tolist()
    tokenizer = tokenizer_of(processor)
    honest = clean.input_ids[0][clean.labels[0] != -100].tolist()
    ends = set(honest) & set(tokenizer.all_special_ids)
    assert set(said) & set(tokenizer.all_special_ids) == ends
