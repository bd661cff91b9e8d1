"""A checkpoint is tried against stock transformers; what differs, or fails, is refused with its family and a remedy."""

import os
import shutil

import pytest

from accord.errors import CheckpointError
from accord.models import trial
from accord.models.load import load_model
from accord.models.trial import try_checkpoint, try_model
from families.checkpoints import build


def test_each_family_passes(vlm, texts_only):
    for model, processor in (vlm, load_model(texts_only)):
        model.train()
        try_model("tiny", model, processor)
        assert model.training


def test_a_model_whose_tokens_see_their_neighbours_in_the_row_is_refused(llava):
    """A layer that mixes in the token on the left breaks behind a shared prefix, where that is another answer's."""
    model, processor = load_model(llava)
    embed = model.model.language_model.embed_tokens
    embed.register_forward_hook(lambda module, inputs, output: output + 20 * output.roll(1, dims=1))
    found = r"mixed: Accord does not carry this model of the family 'llava': states of .* differ .* \(allowed 0.001\)"
    with pytest.raises(CheckpointError, match=found):
        try_model("mixed", model, processor)


def test_other_tokens_than_the_templates_are_refused(llava, monkeypatch):
    model, processor = load_model(llava)
    real = trial.encode

    def longer(*given):
        return [type(each)([*each.ids, 5], each.kinds, each.images) for each in real(*given)]

    monkeypatch.setattr(trial, "encode", longer)
    with pytest.raises(CheckpointError, match=r"its prompts have .* tokens here, and .* by its own chat template"):
        try_model("odd", model, processor)


def test_what_a_forward_pass_raises_is_told_with_the_remedy(llava, monkeypatch):
    model, processor = load_model(llava)

    def broken(*given, **named):
        raise ValueError("no such mask\nand more")

    monkeypatch.setattr(type(model.base_model), "forward", broken)
    found = r"'llava': a forward pass over three questions failed \(ValueError: no such mask\); name a checkpoint"
    with pytest.raises(CheckpointError, match=found):
        try_model("broken", model, processor)


def test_files_that_have_not_changed_are_tried_once(llava, tmp_path, monkeypatch):
    folder, tried = tmp_path / "checkpoint", []
    shutil.copytree(llava, folder)
    monkeypatch.setattr(trial, "try_model", lambda name, *_: tried.append(name))
    for _ in range(2):
        try_checkpoint(str(folder))
    os.utime(folder / "config.json", ns=(1, 1))
    try_checkpoint(str(folder))
    assert tried == [str(folder)] * 2


def test_cross_attention_is_refused(tmp_path):
    build("mllama", tmp_path / "mllama")
    with pytest.raises(CheckpointError, match="does not carry models of the family 'mllama': it reads images by cross"):
        try_checkpoint(str(tmp_path / "mllama"))
