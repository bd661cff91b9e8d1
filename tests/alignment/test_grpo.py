import gc
import io
import math
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, TrainingArguments

from accord.alignment.grpo import (
    AlignmentConfig,
    align,
    exact_match_reward,
    grpo_config,
    placeholders_muted,
    prompt_dataset,
)
from accord.data.images import load_image
from accord.errors import DataError, DataWarning, RecipeError
from accord.models.load import LoraSettings, load_model, placeholder_tokens, save_model

QUICK = AlignmentConfig(
    steps=2,
    prompts_per_step=2,
    group_size=3,
    learning_rate=3e-3,
    max_completion_length=3,
    evaluate_every=0,
    save_every=0,
)


def variety(prompts, completions, **_):
    """Any reward that a policy can raise: the number of different characters."""
    return [float(len(set(completion[-1]["content"]))) for completion in completions]


class StopAfter(TrainerCallback):
    """A run that is killed once step `last` is saved."""

    def __init__(self, last):
        self.last = last

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.last:
            control.should_training_stop = True


@pytest.fixture
def questions(ask):
    """Three questions about colour, one about number."""
    return [ask(0, "red"), ask(1, "blue"), ask(2, "green"), ask(3, "red", text="how many?", question_type="number")]


@pytest.fixture
def run(llava, questions, tmp_path):
    """Align a fresh copy of the policy; return it and what was logged."""

    def start(config=QUICK, reward=variety, *, seed=0, **settings):
        torch.manual_seed(int.from_bytes(random.randbytes(4)))  # what was drawn before must not matter
        records = []
        policy = align(
            *load_model(llava),
            questions,
            reward,
            config,
            seed=seed,
            out=tmp_path / "out",
            log=records.append,
            **settings,
        )
        return policy, records

    return start


def config(**changes):
    return replace(QUICK, **changes)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_prompts_come_balanced_and_in_a_given_order(questions):
    """8 prompts of 2 types: 4 each; the one about number comes 4 times, the three about colour 1 or 2 times."""
    data = prompt_dataset(questions, 8, random.Random(3))
    assert Counter(data["question_type"]) == {"colour": 4, "number": 4}
    assert sorted(Counter(data["question_id"]).values()) == [1, 1, 2, 4]
    again, other = (prompt_dataset(questions, 8, random.Random(seed)) for seed in (3, 4))
    assert list(again["question_id"]) == list(data["question_id"]) != list(other["question_id"])


def test_a_prompt_is_in_the_form_of_trl(questions):
    row = prompt_dataset(questions[:1], 1, random.Random(0))[0]
    assert row["prompt"] == [{"role": "user", "content": "what colour is it?"}]
    assert (row["question_id"], row["question_type"], row["answer"]) == ("q0", "colour", "red")
    assert row["image"].mode == "RGB" and row["image"].tobytes() == load_image(questions[0].image).tobytes()


def test_a_prompt_about_several_images_has_their_places(questions, square, llava):
    """With one such question all have the column `images`; an image that cannot be read is a row's error, if asked."""
    several = replace(questions[0], text="is <image> </s> like <image>?", further=(square("blue"),))
    rows = {row["question_id"]: row for row in prompt_dataset([several, questions[1]], 2, random.Random(0))}
    words, image = {"type": "text", "text": "like"}, {"type": "image"}
    (turn,) = rows["q0"]["prompt"]
    assert turn["content"] == [
        {**words, "text": "is"},
        image,
        {**words, "text": "</s> like"},
        image,
        {**words, "text": "?"},
    ]
    assert rows["q1"]["prompt"][0]["content"] == [image, {**words, "text": questions[1].text}]
    assert [picture.getpixel((0, 0)) for picture in rows["q0"]["images"]] == [(255, 0, 0), (0, 0, 255)]
    assert len(rows["q1"]["images"]) == 1 and "image" not in rows["q1"]
    (plain,) = prompt_dataset([several], 1, random.Random(0), processor=load_model(llava)[1])
    assert plain["prompt"][0]["content"][2]["text"] == "< /s> like"
    torn = replace(several, further=(b"no picture",))
    (row,) = prompt_dataset([torn], 1, random.Random(0), keep_errors=True)
    assert isinstance(row["images"], DataError)
    with pytest.raises(DataError, match="not a readable"):
        prompt_dataset([torn], 1, random.Random(0))[0]


def test_the_policy_sees_the_pixels_that_the_sites_see(questions):
    """A transparent picture lies on white for both, not on the black that Pillow keeps under transparency."""
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, format="PNG")
    question = replace(questions[0], image=buffer.getvalue())
    (row,) = prompt_dataset([question], 1, random.Random(0))
    assert row["image"].getpixel((0, 0)) == load_image(question.image).getpixel((0, 0)) == (255, 255, 255)


def test_the_stored_images_stay_reachable(questions, ask, tmp_path):
    """Undecoded, the column holds the very bytes, or the path of the file."""
    (tmp_path / "one.png").write_bytes(questions[1].image)
    given = [questions[0], replace(questions[1], image=tmp_path / "one.png")]
    data = prompt_dataset(given, 2, random.Random(0))
    stored = dict(zip(data["question_id"], data.with_format(None)["image"], strict=True))
    assert stored["q0"]["bytes"] == questions[0].image
    assert stored["q1"]["path"] == str(tmp_path / "one.png")
    assert load_image(questions[1].image).tobytes() in {row["image"].tobytes() for row in data}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2 to centre rewards, got 1; raise alignment.group_size"),
        ({"group_size": 0}, "got 0"),
        ({"questions_at_once": 0}, "questions_at_once must be at least 1, got 0; raise questions_at_once"),
        ({"prompts_per_step": 2, "group_size": 3, "completions_per_device": 4}, "divide .* = 6, got 4"),
        ({"steps": 0}, "steps must be at least 1, got 0; raise steps"),
        ({"kl": -0.1}, "kl must be at least 0, got -0.1; raise kl"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0, got nan"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; raise temperature"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        AlignmentConfig(**settings)


def test_the_kl_term_is_on_by_default(tmp_path):
    """TRL's own default is 0."""
    assert AlignmentConfig().kl > 0
    assert grpo_config(AlignmentConfig(), seed=0, out=tmp_path).beta == AlignmentConfig().kl


def test_a_step_is_all_its_completions(tmp_path):
    """4 prompts x 6 completions = 24 rows: at once, or 8 at a time and 24 / 8 = 3 times."""
    whole = grpo_config(config(prompts_per_step=4, group_size=6), seed=0, out=tmp_path)
    assert (whole.per_device_train_batch_size, whole.gradient_accumulation_steps) == (24, 1)
    parts = grpo_config(config(prompts_per_step=4, group_size=6, completions_per_device=8), seed=0, out=tmp_path)
    assert (parts.per_device_train_batch_size, parts.gradient_accumulation_steps) == (8, 3)
    assert whole.generation_batch_size == parts.generation_batch_size == 24


def test_several_visible_gpus_change_no_batch(tmp_path, monkeypatch):
    """TRL refuses to train with n_gpu = 2, which transformers' arguments say when left alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert TrainingArguments(str(tmp_path)).n_gpu == 2
    arguments = grpo_config(config(prompts_per_step=4, group_size=6), seed=0, out=tmp_path)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 24)


@pytest.mark.parametrize("target", [r".*\.no_such_layer", "("])
def test_an_adapter_that_fits_nothing(run, target):
    with pytest.raises(RecipeError, match=r"lora\.target_modules = .* fits no adapter to this model"):
        run(config(lora=LoraSettings(rank=2, target_modules=target)))


def test_exact_match_ignores_case_and_the_final_stop():
    completions = [[{"role": "assistant", "content": text}] for text in ("Red.", " red", "dark red", "")]
    assert exact_match_reward([None] * 4, completions, answer=["red"] * 4, question_id=["x"] * 4) == [1, 1, 0, 0]


def test_two_steps(run, llava):
    """At the first step the policy is the reference, so KL is 0; at the second it has moved."""
    policy, records = run()
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert {"loss", "reward", "reward_std", "kl", "entropy", "length", "truncated", "routed"} <= record.keys()
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
        assert not any("time" in name or "second" in name for name in record)
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[1]["kl"] > 0
    assert not torch.equal(flat(policy), flat(load_model(llava)[0]))


def test_a_bfloat16_checkpoint_moves_at_a_small_learning_rate(llava, questions, tmp_path):
    """AdamW's first step is as long as the learning rate; the reference is float32 as well, so the first KL is 0."""
    model, processor = load_model(llava)
    checkpoint = save_model(model.to(torch.bfloat16), processor, tmp_path / "bfloat16")
    records = []
    policy = align(
        *load_model(checkpoint, trainable=True),
        questions,
        lambda prompts, completions, **_: [0.0, 1.0, 2.0] * 2,
        config(steps=1, learning_rate=1e-6),
        seed=0,
        out=tmp_path / "out",
        log=records.append,
    )
    name = "model.language_model.layers.0.self_attn.v_proj.weight"
    step = (policy.state_dict()[name] - model.state_dict()[name].float()).abs()
    assert policy.dtype == torch.float32 and step.median().item() == pytest.approx(1e-6, rel=0.05)
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reward_gets_images_and_columns(run):
    seen = []

    def spy(prompts, completions, completion_ids, answer, question_id, question_type, image, **_):
        seen.append((question_id, answer, [i.size for i in image], [len(ids) for ids in completion_ids]))
        return [0.0, 1.0, 2.0] * 2

    run(config(steps=1), spy)
    ((ids, answers, sizes, lengths),) = seen
    assert len(ids) == 6 and len(set(ids[:3])) == len(set(ids[3:])) == 1
    assert len(set(answers[:3])) == 1 and sizes == [(32, 32)] * 6
    assert all(1 <= length <= 3 for length in lengths)


def test_the_same_seed_gives_the_same_records(run):
    (first, records), (again, same), (_, other) = run(), run(), run(seed=1)
    assert records == same and records != other
    assert torch.equal(flat(first), flat(again))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4)], ids=["full", "lora"])
def test_a_resumed_run_gives_the_same_records(run, tmp_path, lora):
    """Steps 1 to 4 at once, against 1 to 2, killed, and 3 to 4 from the checkpoint of step 2."""
    whole = config(steps=4, save_every=2, lora=lora)
    policy, expected = run(whole)
    _, early = run(whole, callbacks=[StopAfter(2)])
    assert early == expected[:2]
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    resumed, late = run(whole, resume=True)
    assert [record["step"] for record in late] == [3, 4]
    assert late == expected[2:]
    assert torch.equal(flat(resumed), flat(policy))


def test_parts_of_a_step_add_up(run, llava):
    """6 rows at once or 3 at a time: the same completions, so the same rewards, and the same step up to rounding."""
    whole, (at_once,) = run(config(steps=1))
    parts, (in_parts,) = run(config(steps=1, completions_per_device=3))
    assert at_once["reward"] == pytest.approx(in_parts["reward"])
    assert (flat(whole) - flat(parts)).abs().mean() < 0.02 * (flat(whole) - flat(load_model(llava)[0])).abs().mean()


def test_the_curve(run):
    """Every 2 steps and at the last: 2 and 3. Macro = (0.5 + 1) / 2 = 0.75."""
    measured = iter([{"a": 0.5, "b": 1.0}, {"a": 0.0, "b": 1.0}])
    _, records = run(config(steps=3, evaluate_every=2), measure=lambda: next(measured))
    points = [record for record in records if "accuracy" in record]
    assert points == [
        {"step": 2, "accuracy_macro": 0.75, "accuracy": {"a": 0.5, "b": 1.0}},
        {"step": 3, "accuracy_macro": 0.5, "accuracy": {"a": 0.0, "b": 1.0}},
    ]


def test_an_adapter_comes_back_merged(run, llava):
    """An ordinary model of the same class, changed in its language layers only."""
    policy, records = run(config(lora=LoraSettings(rank=2, alpha=4)))
    base = load_model(llava)[0]
    assert type(policy) is type(base) and len(records) == 2 and records[1]["kl"] > 0
    after, before = policy.state_dict(), base.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name and "_proj" in name for name in changed)


def test_a_missing_reward_is_left_out_of_the_mean(run):
    """None among 6 rewards: TRL's own mean over the rest is finite."""
    _, records = run(config(steps=1), lambda prompts, completions, **_: [None, 1.0, 2.0, 1.0, 2.0, 3.0])
    assert math.isfinite(records[0]["reward"])


def test_placeholders_are_muted_while_training_alone(vlm):
    """TRL reads weight and bias of the output layer, generation calls it: both see the bias, no checkpoint does."""
    model, _ = vlm
    head, (token,) = model.get_output_embeddings(), placeholder_tokens(model)
    names = model.state_dict().keys()
    with placeholders_muted(model):
        logits = head(torch.ones(1, head.in_features))
        assert logits[0, token] < -9e3 < logits[0, token + 1]
        assert head.bias.nonzero().tolist() == [[token]] and not head.bias.requires_grad
        assert model.state_dict().keys() == names
    assert head.bias is None and model.state_dict().keys() == names


def test_training_mutes_placeholders(run):
    """Seen from within a step: policy and reference have the bias while they train, and not after."""
    seen = []

    def spy(prompts, completions, **_):
        models = [each for each in gc.get_objects() if type(each).__name__ == "LlavaForConditionalGeneration"]
        seen.append(sum(model.get_output_embeddings().bias is not None for model in models))
        return variety(prompts, completions)

    policy, records = run(reward=spy)
    assert all(count >= 2 for count in seen) and policy.get_output_embeddings().bias is None
    assert [math.isfinite(r["kl"]) and math.isfinite(r["entropy"]) for r in records] == [True, True]


def test_a_head_with_a_bias_gets_it_back(llava):
    """And None, TRL's word for no reference, is passed over."""
    model, _ = load_model(llava)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(head.out_features))
    before = head.bias.detach().clone()
    with placeholders_muted(model, None):
        assert head.bias[placeholder_tokens(model)[0]] == -1e4
    assert torch.equal(head.bias, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_left_out(run, value):
    """A third of the completions; the loss stays finite."""

    def odd(prompts, completions, **_):
        return [value if n % 3 == 0 else float(n) for n in range(len(prompts))]

    with pytest.warns(DataWarning, match=rf"reward function 'odd' returned {value}, which is no reward"):
        _, records = run(reward=odd)
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["reward"]) for r in records)


def test_any_reference_is_right_to_the_ground_truth():
    said = [[{"role": "assistant", "content": text}] for text in ("Red circle.", "circle red", "red circle")]
    references = [["circle red"], ["circle red"], []]
    assert exact_match_reward([], said, ["red circle", "red circle", "circle"], references=references) == [1, 1, 0]
    assert exact_match_reward([], said, ["red circle", "circle", "red circle"]) == [1, 0, 1]
