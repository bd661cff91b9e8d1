"""The recipe behind the shipped checkpoints, and the checkpoints themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accord.cli import main
from accord.data.easy_vqa import load_easy_vqa
from accord.data.images import load_image
from accord.errors import RecipeError
from accord.evaluation.accuracy import count_correct
from accord.models.finetune import FineTuneConfig
from accord.models.generate import answer
from accord.models.load import SHIPPED, load_model
from accord.models.pretrain import (
    PretrainConfig,
    _labels,
    _turned,
    first_of_each_domain,
    pretrain,
    pretrain_families,
)
from accord.models.tiny import FAMILIES, TEXT_FAMILIES
from accord.types import vqa_prompt

TYPES = ("colour", "shape", "yes/no")


@pytest.fixture
def questions(ask):
    """Two pictures with a colour and a number each, and a third with a yes/no question only."""
    number = {"text": "how many squares?", "question_type": "number"}
    closed = {"text": "is it red?", "question_type": "yes/no"}
    return [
        ask(0, "red"),
        ask(1, "blue"),
        ask(2, "red", **{**number, "answer": "one"}),
        ask(3, "blue", **{**number, "answer": "two"}),
        ask(4, "red", **{**closed, "answer": "yes"}),
        ask(5, "green", **{**closed, "answer": "no"}),
    ]


@pytest.fixture
def quick(tiny_config):
    instruction = FineTuneConfig(steps=2, batch_size=4, learning_rate=1e-3)
    return PretrainConfig(
        tiny=tiny_config, vision_steps=4, instruction_images=2, vocabulary=300, instruction=instruction
    )


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_few_images_are_of_every_domain(ask):
    """Of two images of shapes and three of scans, one each; with 0 all five. Questions of one image count once."""
    shapes = [ask(0, "red", domain="shapes"), ask(1, "red", domain="shapes"), ask(2, "blue", domain="shapes")]
    scans = [ask(3 + i, answer, domain="scans") for i, answer in enumerate(("red", "green", "blue"))]
    one = first_of_each_domain([*shapes, *scans], 1)
    assert sorted(domain for domain, _ in one) == ["scans", "shapes"]
    assert one < first_of_each_domain([*shapes, *scans], 0)
    assert len(first_of_each_domain([*shapes, *scans], 0)) == 5


def test_the_few_texts_are_not_the_first_of_the_alphabet(ask):
    """Of a hundred sums twenty: by their words they would be 100 + 0 to 100 + 19."""
    sums = [replace(ask(n, text=f"100 + {n:02}?"), image=None) for n in range(100)]
    few = first_of_each_domain(sums, 20)
    assert len(few) == 20 and len(few & {(q.domain, str(q.subjects[0])) for q in sums[:20]}) < 12


def test_labels_are_the_answers_to_open_questions(questions, square):
    """Types in order: colour (blue 0, red 1) and number (one 0, two 1).

    The third picture, asked about with yes or no alone, has neither (−100); nor does yes/no become a type.
    """
    images, types, labels = _labels(questions)
    assert types == ["colour", "number"]
    of = dict(zip(images, labels.tolist(), strict=True))
    assert of == {square("red"): [1, 0], square("blue"): [0, 1], square("green"): [-100, -100]}


def test_labels_of_an_image_without_a_type_are_left_out(ask, square):
    """Red has a colour and no number: −100, which the loss leaves out."""
    images, types, labels = _labels([ask(0, "red"), ask(1, "blue", question_type="number", answer="two")])
    assert types == ["colour", "number"]
    assert labels[images.index(square("red"))].tolist() == [0, -100]
    assert labels[images.index(square("blue"))].tolist() == [-100, 0]


def test_the_eight_symmetries_are_eight():
    """A picture without symmetry of its own has eight; 4 quarters are none, and two flips are none."""
    picture = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(8, 1, 2, 2)
    turned = _turned(picture, torch.arange(8))
    assert turned[0].flatten().tolist() == [1, 2, 3, 4]
    assert turned[1].flatten().tolist() == [2, 4, 1, 3]  # a quarter against the clock
    assert turned[2].flatten().tolist() == [4, 3, 2, 1]
    assert turned[4].flatten().tolist() == [2, 1, 4, 3]  # left and right exchanged
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8


def test_the_same_seed_gives_the_same_weights(family, questions, quick):
    torch.manual_seed(1)  # what was drawn before must not matter
    first, processor = pretrain(family, questions, quick, quiet=True)
    again, _ = pretrain(family, questions, quick, quiet=True)
    assert torch.equal(flat(first), flat(again)) and flat(first).isfinite().all()
    assert not first.training
    (text,) = answer(first, processor, questions[:1], max_new_tokens=3)
    assert len(text) == 1


def test_without_an_open_question_only_the_instruction_step_is_done(ask, quick):
    closed = [ask(n, c, text="is it red?", answer=a) for n, (c, a) in enumerate([("red", "yes"), ("blue", "no")])]
    model, _ = pretrain("llava-clip-llama", closed, quick, quiet=True)
    assert flat(model).isfinite().all()


def test_a_batch_without_a_label_teaches_nothing(questions, quick, monkeypatch):
    """One image a step: of 20 draws among three, some are of the picture whose every loss is NaN."""
    monkeypatch.setattr("accord.models.pretrain.VISION_BATCH", 1)
    config = replace(quick, vision_steps=20)
    model, _ = pretrain("llava-clip-llama", questions, config, quiet=True)
    assert flat(model).isfinite().all()


def test_families_are_made_in_their_folders(questions, quick, tmp_path):
    (made,) = pretrain_families(tmp_path / "out", questions, quick, ["idefics3"], quiet=True)
    assert made == tmp_path / "out" / "idefics3"
    load_model(str(made))
    with pytest.raises(RecipeError, match="no family 'lava' for these questions; use one of llava-clip-llama"):
        pretrain_families(tmp_path / "other", questions, quick, ["idefics3", "lava"], quiet=True)
    assert not (tmp_path / "other").exists()


# the shipped checkpoints


def test_what_ships_is_small():
    sizes = {path: path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 6_500_000
    assert sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) == sorted([*FAMILIES, *TEXT_FAMILIES])
    assert {path.suffix for path in sizes} <= {".json", ".jinja", ".safetensors", ".md"}


@pytest.fixture(scope="module")
def dev():
    """100 dev questions of each type, of images that no checkpoint was made from."""
    everything = [q for q in load_easy_vqa() if q.split == "dev"]
    return [q for kind in TYPES for q in [q for q in everything if q.question_type == kind][:100]]


def accuracies(place, dev):
    model, processor = load_model(str(place))
    given = answer(model, processor, dev, max_new_tokens=4)
    counts = count_correct(dev, [texts[0] for texts in given])
    return {name: right / n for name, (right, n) in counts.items()}


def test_shipped_checkpoints_speak_and_are_often_wrong(family, dev):
    """Room for alignment: on 300 dev questions, 100 of each type, the macro accuracy lies between 40 % and 60 %."""
    by_type = accuracies(f"accord/{family}", dev)
    assert 0.40 < sum(by_type.values()) / 3 < 0.60, by_type


def test_shipped_checkpoints_take_their_own_chat_template(family, dev):
    _, processor = load_model(f"accord/{family}")
    text = processor.apply_chat_template(vqa_prompt(dev[0].text), add_generation_prompt=True)
    inputs = processor(images=[load_image(dev[0].image)], text=[text], return_tensors="pt")
    assert inputs["input_ids"].shape[0] == 1 and inputs["pixel_values"].isfinite().all()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_command_still_makes_the_shipped_checkpoint(dev, monkeypatch, capsys, tmp_path):
    """The shipped files come from `accord pretrain` and nothing else.

    Another processor rounds differently, and 6,000 steps turn that into other weights, so accuracies are compared. On
    100 questions a type's accuracy has a standard error of 5 points, the difference of two of them 7: 20 points are
    almost three, and a colour guessed (1 in 8) would be 35 points off.
    """
    monkeypatch.setattr("sys.argv", ["accord", "pretrain", str(tmp_path), "--family", "llava-clip-llama", "--quiet"])
    main()
    made = Path(capsys.readouterr().out.strip())
    assert made == tmp_path / "llava-clip-llama"
    expected, found = accuracies("accord/llava-clip-llama", dev), accuracies(made, dev)
    assert {path.name for path in made.iterdir()} == {path.name for path in (SHIPPED / made.name).iterdir()}
    assert found.keys() == expected.keys() == set(TYPES)
    for kind in TYPES:
        assert found[kind] == pytest.approx(expected[kind], abs=0.20), (found, expected)
