import pytest
import torch
from PIL import Image

from accord.models.generate import answer
from accord.models.inputs import prompt_text
from accord.models.load import placeholder_tokens
from accord.types import vqa_prompt


def test_greedy_answers_are_those_of_one_question_at_a_time(vlm, ask):
    """Padding and batching must not show: 3 questions of different length in batches of 2; the first also by hand."""
    model, processor = vlm
    questions = [ask(0), ask(1, "blue", text="is it red? or is it some other colour?"), ask(2, "green", text="?")]
    together = answer(model, processor, questions, max_new_tokens=3, batch_size=2)
    assert together == [answer(model, processor, [q], max_new_tokens=3)[0] for q in questions]
    assert [len(answers) for answers in together] == [1, 1, 1]
    inputs = processor(
        images=[[Image.new("RGB", (32, 32), "red")]],
        text=[prompt_text(processor, vqa_prompt(questions[0].text))],
        return_tensors="pt",
    )
    model.eval()
    ids = inputs["input_ids"]
    asked = ids.shape[1]
    with torch.no_grad():
        for _ in range(3):
            inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
            ids = torch.cat([ids, model(**inputs).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == processor.tokenizer.eos_token_id:
                break
    assert processor.tokenizer.decode(ids[0, asked:], skip_special_tokens=True).strip() == together[0][0]


def test_samples_come_per_question_and_depend_on_the_seed(vlm, ask):
    model, processor = vlm
    questions = [ask(0), ask(1, "blue")]
    draws = [answer(model, processor, questions, max_new_tokens=4, samples=3, seed=seed) for seed in (0, 0, 1)]
    assert [[len(each) for each in draw] for draw in draws] == [[3, 3]] * 3
    assert draws[0] == draws[1] != draws[2]
    assert len({text for each in draws[0] for text in each}) > 1


def test_sampling_leaves_the_callers_random_numbers_alone(vlm, ask):
    model, processor = vlm
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    answer(model, processor, [ask(0)], max_new_tokens=2, samples=2)
    assert torch.equal(torch.rand(2), expected)


def test_answering_leaves_the_gpus_random_numbers_alone(vlm, ask, monkeypatch):
    """Two GPUs that hold the states 7 and 8, and that `torch.manual_seed` seeds together with the CPU."""
    states, seeds = {0: 7, 1: 8}, []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: (seeds.append(seed), states.update(dict.fromkeys(states, seed)))
    )
    model, processor = vlm
    answer(model, processor, [ask(0)], max_new_tokens=2, samples=2, seed=3)
    assert (seeds, states) == ([3], {0: 7, 1: 8})


@pytest.mark.parametrize("training", [True, False])
def test_the_model_returns_to_the_mode_it_was_in(vlm, ask, training):
    model, processor = vlm
    model.train(training)
    answer(model, processor, [ask(0)], max_new_tokens=1)
    assert model.training is training


def test_views_and_progress(vlm, ask):
    """5 questions in batches of 2: 2, 2 and 1; every image passes through the view."""
    model, processor = vlm
    seen, steps = [], []

    def view(image):
        seen.append(image.getpixel((0, 0)))
        return image

    given = answer(
        model,
        processor,
        [ask(n, c) for n, c in enumerate(("red", "blue", "red", "red", "blue"))],
        max_new_tokens=1,
        batch_size=2,
        view=view,
        on_batch=steps.append,
    )
    red, blue = (255, 0, 0), (0, 0, 255)
    assert (steps, len(given), seen) == ([2, 2, 1], 5, [red, blue, red, red, blue])
    assert answer(model, processor, [], max_new_tokens=1) == []


def test_an_image_placeholder_is_never_an_answer(vlm, ask):
    """However likely: all else is far below it. Stock `generate` keeps to it too, since the saved settings say so."""
    model, processor = vlm
    (token,) = placeholder_tokens(model)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.full((head.out_features,), -50.0))
    head.bias.data[token] = 50.0
    inputs = processor(
        images=[[Image.new("RGB", (32, 32))]], text=[prompt_text(processor, vqa_prompt("?"))], return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert token not in ids[0, inputs["input_ids"].shape[1] :]
    assert "<image>" not in answer(model, processor, [ask(0)], max_new_tokens=3)[0][0]
