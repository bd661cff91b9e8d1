import pytest
import torch

from accord.models.load import load_model, parameter_count, save_model
from accord.models.tiny import FAMILIES, TEXT_FAMILIES, build_tiny, train_tokenizer

TEXTS = ["what colour is it?", "red", "blue"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.mark.parametrize("text", ["what colour?", "où est-il ?", "日本語 🙂", "tabs\tand\nlines", "  two  spaces "])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_has_its_special_tokens_and_size(tokenizer):
    """7 special tokens come first; the 256 bytes and a few merges follow."""
    assert tokenizer.convert_ids_to_tokens(list(range(4))) == ["<pad>", "<s>", "</s>", "<image>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert 263 <= len(tokenizer) <= 300
    assert tokenizer.padding_side == "left"


def test_the_tokenizer_depends_on_its_texts_alone():
    first, again = (train_tokenizer(TEXTS, vocab_size=300) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()


@pytest.mark.parametrize("family", [*FAMILIES, *TEXT_FAMILIES])
def test_weights_depend_on_the_seed_alone(family, tokenizer, tiny_config):
    torch.manual_seed(0)
    first, _ = build_tiny(family, tokenizer, tiny_config, seed=7)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    again, _ = build_tiny(family, tokenizer, tiny_config, seed=7)
    other, _ = build_tiny(family, tokenizer, tiny_config, seed=8)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)  # building leaves the caller's random numbers alone


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_classes_load_what_was_saved(family, checkpoints, tiny_config):
    built, _ = build_tiny(family, train_tokenizer(TEXTS, vocab_size=300), tiny_config, seed=0)
    model, processor = load_model(checkpoints[family])
    assert type(model) is type(built)
    assert type(model).__module__.startswith("transformers.")
    assert parameter_count(model) > 0
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.bos_token_id) == (2, 1)
    assert model.generation_config.pad_token_id == 0
    assert processor.tokenizer.eos_token_id == 2


def test_the_three_families_differ(checkpoints):
    models = [load_model(checkpoint)[0] for checkpoint in checkpoints.values()]
    assert len({(type(m).__name__, m.config.get_text_config().model_type) for m in models}) == 3


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_text_only_model_reads_as_it_was_built_and_numbers_by_their_digits(family, tokenizer, tiny_config, tmp_path):
    built, own = build_tiny(family, tokenizer, tiny_config, seed=0)
    model, processor = load_model(save_model(built, own, tmp_path / family))
    assert type(model) is type(built) and tokenizer.chat_template is None
    for text in ("is it red? 4096", "Ünïcode\n 12+7", "one 10two"):
        assert processor(text)["input_ids"] == own(text)["input_ids"]
        assert processor.decode(processor(text)["input_ids"]) == text
    pieces = processor.tokenize("one 10")
    assert pieces[-2:] == ["1", "0"]
