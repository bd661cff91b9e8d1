"""Every family through everything that Accord does with a model, against stock forward passes, one at a time.

What holds of a family is a row of the table in docs/models.md, which the last test compares.
"""

import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForImageTextToText, AutoProcessor

from accord.alignment.dpo import AdapterDpo
from accord.alignment.grpo import AlignmentConfig, align, grpo_config, placeholders_muted, prompt_dataset
from accord.alignment.selector import Comparison, Selector, letter_tokens, selector_prompt
from accord.alignment.trainer import SharedPrefixTrainer
from accord.errors import CheckpointError, DataWarning
from accord.evaluation.likelihood import answer_nll
from accord.models import prefix
from accord.models.attention import skip_hidden, why_alone
from accord.models.encoder import Encoder
from accord.models.finetune import FineTuneConfig, finetune
from accord.models.generate import answer
from accord.models.inputs import accepted, build_batch, completion_text, encode, model_inputs, shared_inputs
from accord.models.load import LoraSettings, load_model, save_model, tokenizer_of, without_adapter
from accord.models.trial import try_checkpoint
from accord.rewards.model import RewardModel
from accord.types import PreferencePair, Question, at_places, vqa_prompt
from families.checkpoints import FAMILIES
from families.conftest import SEES_TORCHVISION, WITHOUT_TORCHVISION

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning"),  # TRL's name of it
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # PaliGemma's processor
    pytest.mark.filterwarnings("ignore:.*is computed with a copy of its prompt, because tokens of its prompt"),
    pytest.mark.filterwarnings("ignore:.*an image is encoded anew for every answer about it"),
    pytest.mark.filterwarnings("ignore:every rollout has a row of its own, because the generation settings say"),
]

REFUSED = {"mllama"}
TEXTS = ["What colour is the square?", "Is it red? yes or no", "how many?"]
CANDIDATES = [["red", "green and blue"], ["no"], ["one", "two", "three circles left"]]
PROMPTS = [vqa_prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three pictures of different shape, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    for n, (colour, size) in enumerate([("red", (64, 64)), ("green", (120, 40)), ("blue", (40, 100))]):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle([size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2], fill=colour)
        image.save(folder / f"{n}.png")
    return [folder / f"{n}.png" for n in range(3)]


@pytest.fixture(scope="module")
def images(files):
    return [Image.open(file).convert("RGB") for file in files]


@pytest.fixture(scope="module")
def questions(files):
    return [Question(str(n), files[n], TEXTS[n], CANDIDATES[n][0], "all", "public") for n in range(3)]


@pytest.fixture
def carried(family, built):
    """The checkpoint of each family that Accord carries."""
    if family in REFUSED:
        pytest.skip("it is refused, see test_a_family_that_is_not_carried_is_refused_by_name")
    return built(family)


def with_image(n, images):
    return [{"type": "image", "image": images[n]}, {"type": "text", "text": TEXTS[n]}]


def stock_prompt(processor, n, images, turns=None):
    turns = turns or [{"role": "user", "content": with_image(n, images)}]
    return processor.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def stock_row(model, processor, n, candidate, images, family, turns=None):
    """One whole row of prompt and answer, as the family's own processor would have it."""
    fields = accepted(model, stock_prompt(processor, n, images, turns))
    return with_answer(processor, fields, PROMPTS[n], candidate, family)


def with_answer(processor, fields, prompt, candidate, family):
    """Put an answer behind a stock prompt; return the row and the answer's length."""
    fields = dict(fields)
    text = completion_text(processor, prompt, candidate)
    end = torch.tensor(tokenizer_of(processor)([text], add_special_tokens=False)["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in fields:  # 0 is text; PaliGemma's suffix is 1
            fields[name] = torch.cat([fields[name], torch.full_like(end, int(family == "paligemma"))], dim=1)
    fields["input_ids"] = torch.cat([fields["input_ids"], end], dim=1)
    fields["attention_mask"] = torch.ones_like(fields["input_ids"])
    return fields, end.shape[1]


def rows():
    return [(n, candidate) for n, those in enumerate(CANDIDATES) for candidate in those]


def test_prompts_are_those_of_the_stock_template(family, built, images):
    """Token for token; so there is one beginning of a sequence at most."""
    _, processor = load_model(built(family))
    mine = encode(processor, PROMPTS, [[image] for image in images])
    begin = tokenizer_of(processor).bos_token_id
    for n, each in enumerate(mine):
        assert each.ids == stock_prompt(processor, n, images)["input_ids"][0].tolist()
        assert "labels" not in each.images
        if begin is not None and family not in ("idefics3", "smolvlm"):  # whose turns begin so
            assert each.ids.count(begin) == 1


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skips"])
def test_states_are_those_of_one_row_at_a_time(carried, family, images, monkeypatch, cells, skips):
    monkeypatch.setattr(prefix, "_worth_skipping", lambda *_: skips)
    model, processor = load_model(carried)
    skip_hidden(model.eval())
    inner = model.base_model
    batch = build_batch(processor, PROMPTS, images, CANDIDATES)
    real = batch.attention_mask.bool()
    with torch.no_grad():
        inputs, where = shared_inputs(inner, batch)
        shared = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[where]
        full = inner(**model_inputs(inner, batch), use_cache=False).last_hidden_state
        for row, (n, candidate) in enumerate(rows()):
            fields, length = stock_row(model, processor, n, candidate, images, family)
            alone = inner(**fields, use_cache=False).last_hidden_state[0]
            assert int((batch.labels[row] != -100).sum()) == length
            torch.testing.assert_close(shared[row][real[row]][-length:], alone[-length:], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(full[row][real[row]], alone, atol=2e-5, rtol=1e-4)
    assert (len(inputs["input_ids"]) == 3) is not bool(why_alone(inner))
    told = cells.setdefault(family, {"class": type(model).__name__})
    told["shared"] = f"no: {why_alone(model)}" if why_alone(model) else "yes"


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["whole", "lora"])
def test_a_reward_model(carried, family, images, tmp_path, cells, lora):
    """A Bradley–Terry step moves it; together is alone; it looks at images; what is loaded again scores the same."""
    model = RewardModel.from_checkpoint(carried, lora=lora)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(weights, lr=0.05)
    batch = build_batch(model.processor, PROMPTS, images, [["red", "blue"]] * 3)
    before = -logsigmoid(torch.sub(*model(batch).view(-1, 2).unbind(1))).mean()
    before.backward()
    optimiser.step()
    after = -logsigmoid(torch.sub(*model(batch).view(-1, 2).unbind(1))).mean()
    assert after < before
    scores = model.score(PROMPTS, images, CANDIDATES)
    alone = [model.score([p], [i], [c])[0] for p, i, c in zip(PROMPTS, images, CANDIDATES, strict=True)]
    torch.testing.assert_close(torch.cat(scores), torch.cat(alone), atol=1e-4, rtol=1e-4)
    blank = model.score(PROMPTS, [Image.new("RGB", image.size) for image in images], CANDIDATES)
    assert (torch.cat(blank) - torch.cat(scores)).abs().max() > 1e-3
    model.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward").score(PROMPTS, images, CANDIDATES)
    assert torch.equal(torch.cat(scores), torch.cat(again))
    cells.setdefault(family, {})["reward"] = "yes"


def test_the_routers_encoder(carried, family, images, cells):
    model, processor = load_model(carried)
    encoder = Encoder(model, processor)
    states, mask = encoder(PROMPTS, images, CANDIDATES)
    assert states.shape[-1] == encoder.features
    for row, (n, candidate) in enumerate(rows()):
        fields, length = stock_row(model, processor, n, candidate, images, family)
        with torch.no_grad():
            alone = model.base_model(**fields, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states[row][mask[row]][-length:], alone[-length:], atol=2e-5, rtol=1e-4)
    cells.setdefault(family, {})["router"] = "yes"


def letters(prompts, completions, **_):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(len(set(text))) + 0.1 * n for n, text in enumerate(texts)]


def config(**changes):
    plain = {"steps": 1, "prompts_per_step": 3, "group_size": 2, "learning_rate": 1e-3, "max_completion_length": 4}
    return AlignmentConfig(**{**plain, "evaluate_every": 0, "save_every": 0, **changes})


def trainer_of(checkpoint, questions, tmp_path, **changes):
    model, processor = load_model(checkpoint, trainable=True)
    torch.manual_seed(0)
    return SharedPrefixTrainer(
        model=model,
        reward_funcs=letters,
        args=grpo_config(config(**changes), seed=0, out=tmp_path / "out"),
        train_dataset=prompt_dataset(questions, 6, random.Random(0)),
        processing_class=processor,
    )


def loss_and_gradient(trainer, batch):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_a_step_of_grpo(carried, family, questions, images, tmp_path, cells):
    """Log-probabilities of the rollouts are those of stock rows, one at a time; gradients do not depend on the way."""
    trainer = trainer_of(carried, questions, tmp_path)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert "prompt_of" in batch and "pixel_values" not in batch
    model, processor = load_model(carried, trainable=True)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    keep = batch["completion_ids"].shape[1]
    trainer._hides, trainer._prompt_of = True, batch["prompt_of"].tolist()
    trainer._prompts["eval"] = trainer._prompts["train"]
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model.eval(), ids, mask, keep)
        trainer.model.train()
        asked = [trainer._given[trainer._first[p]]["prompt"][0]["content"] for p in batch["prompt_of"].tolist()]
        for row, text in enumerate(asked):
            n = TEXTS.index(text)
            fields, length = stock_row(model, processor, n, "red", images, family)
            said = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            start = fields["input_ids"].shape[1] - length
            for name, value in fields.items():
                if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                    more = {"input_ids": said, "attention_mask": torch.ones_like(said)}
                    kinds = torch.full_like(said, int(family == "paligemma"))
                    fields[name] = torch.cat([value[0, :start], more.get(name, kinds)])[None]
            logits = model.eval()(**fields).logits[0, start - 1 : -1]
            alone = logits.float().log_softmax(-1).gather(1, said[:, None])[:, 0]
            torch.testing.assert_close(logps[row, : len(said)], alone, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # away from the reference, so that the KL term has a gradient
        for parameter in trainer.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    loss, gradient = loss_and_gradient(trainer, batch)
    assert gradient.norm() > 1e-4 and trainer._shares is not bool(why_alone(model))
    trainer._shares = False
    full_loss, full = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(full_loss, abs=1e-5)
    assert (gradient - full).norm() < 1e-3 * full.norm()
    cells.setdefault(family, {})["policy"] = "yes"


def test_a_step_of_grpo_about_two_images(carried, family, questions, tmp_path):
    """Beside prompts about one; gradients do not depend on the way, where there are two."""
    two = replace(questions[0], text="is <image> like <image>?", further=(questions[1].image,))
    trainer = trainer_of(carried, [two, *questions[1:]], tmp_path)
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert sorted(trainer._prompts["train"].counts) == [1, 1, 2]
    with torch.no_grad():  # away from the reference, so that the KL term has a gradient
        for parameter in trainer.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    loss, gradient = loss_and_gradient(trainer, batch)
    trainer._shares = False
    if family == "llava_onevision":
        with pytest.raises(
            CheckpointError, match=r"reads batch_num_images of prompts about several images, which TRL's"
        ):
            loss_and_gradient(trainer, batch)
        return
    full_loss, full = loss_and_gradient(trainer, batch)
    assert loss == pytest.approx(full_loss, abs=1e-5)
    assert gradient.norm() > 1e-4 and (gradient - full).norm() < 1e-3 * full.norm()


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["whole", "lora"])
def test_what_is_aligned_loads_in_stock_transformers(carried, questions, tmp_path, lora):
    """Pieces of two completions, too, with checkpointed activations; no weight is missing or left over."""
    model, processor = load_model(carried, trainable=lora is None)
    records = []
    told = config(steps=2, lora=lora, completions_per_device=2, gradient_checkpointing=True)
    trained = align(model, processor, questions, letters, told, seed=0, out=tmp_path / "align", log=records.append)
    assert len(records) == 2
    save_model(trained, processor, tmp_path / "final")
    stock, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    mine = trained.state_dict()
    assert all(torch.equal(weight, mine[name]) for name, weight in stock.state_dict().items())
    assert AutoProcessor.from_pretrained(tmp_path / "final").chat_template == processor.chat_template


def test_fine_tuning_and_evaluation(carried, family, questions, images, tmp_path, cells):
    """The likelihood of the answers is that of stock rows with our labels; training lowers it."""
    model, processor = load_model(carried, trainable=True)
    model.eval()
    total = tokens = 0
    with torch.no_grad():
        for n, question in enumerate(questions):
            fields, length = stock_row(model, processor, n, question.answer, images, family)
            logits = model(**fields).logits[0, -length - 1 : -1]
            total += cross_entropy(logits, fields["input_ids"][0, -length:], reduction="sum").item()
            tokens += length
    before = answer_nll(model, processor, questions)
    assert before == pytest.approx(total / tokens, rel=1e-4)
    said = answer(model, processor, questions, max_new_tokens=4)
    assert said == [answer(model, processor, [question], max_new_tokens=4)[0] for question in questions]
    assert all(len(each) == 2 for each in answer(model, processor, questions, max_new_tokens=4, samples=2))
    told = FineTuneConfig(steps=4, batch_size=3, learning_rate=3e-3, warmup=0, gradient_checkpointing=True)
    loss = finetune(model, processor, questions, told, seed=0, out=tmp_path / "tuned")
    assert loss < before and answer_nll(model, processor, questions) < before
    cells.setdefault(family, {})["finetune"] = "yes"


def test_preferences_by_dpo_and_by_a_selector(carried, family, images, files, tmp_path, cells):
    """The loss of a step of DPO, and a selector's log-odds, are those of stock rows, one at a time."""
    model, processor = load_model(carried)
    answers = [("red", "green and blue"), ("no", "one"), ("two", "three circles left")]
    pairs = [PreferencePair(PROMPTS[n], *answers[n], (files[n],), f"q{n}", "all") for n in range(3)]
    dpo = AdapterDpo(model, processor, LoraSettings(rank=2), beta=0.5, sft=0.5, batch_size=3, out=tmp_path / "dpo")
    dpo.train(pairs, steps=4, learning_rate=0.05, seed=0)

    def log_probabilities(n, text):
        fields, length = stock_row(without_adapter(dpo.model), processor, n, text, images, family)
        logits = dpo.model(**fields).logits[0, -length - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, fields["input_ids"][0, -length:, None]).squeeze(1)

    dpo.model.eval()
    with torch.no_grad(), placeholders_muted(without_adapter(dpo.model)):
        policy = [[log_probabilities(n, text) for text in answers[n]] for n in range(3)]
        with dpo.model.disable_adapter():
            reference = [[log_probabilities(n, text) for text in answers[n]] for n in range(3)]
    ratios = [[(a - b).sum() for a, b in zip(*both, strict=True)] for both in zip(policy, reference, strict=True)]
    margin = -logsigmoid(0.5 * torch.stack([chosen - rejected for chosen, rejected in ratios])).mean()
    expected = margin - 0.5 * torch.cat([chosen for chosen, _ in policy]).mean()
    assert abs(margin - math.log(2)) > 1e-3
    assert dpo.train(pairs, steps=1, learning_rate=1e-4, seed=1) == pytest.approx(expected.item(), rel=1e-4)

    selector = Selector(dpo.model, processor)
    asked = [Comparison(PROMPTS[n], images[n], *answers[n]) for n in range(3)]
    a, b, shared = letter_tokens(processor, PROMPTS[0])
    dpo.model.eval()
    with torch.no_grad():
        together = selector(asked)
        for n, each in enumerate(together.tolist()):
            turns = selector_prompt([{"role": "user", "content": with_image(n, images)}], *answers[n])
            fields, length = stock_row(without_adapter(dpo.model), processor, n, "A", images, family, turns)
            after = dpo.model(**fields).logits[0, -length - 1 + shared].float()
            assert each == pytest.approx((after[a] - after[b]).item(), abs=1e-4)
    cells.setdefault(family, {})["dpo"] = "yes"


def test_the_trial_before_a_run(carried, family, cells):
    """With one image a prompt, and with two."""
    try_checkpoint(carried, several=True)
    cells.setdefault(family, {})["several"] = "yes"


SEVERAL = [[{"role": "user", "content": at_places("is <image> like <image>?", 2)}], PROMPTS[1], PROMPTS[2]]


def test_states_of_prompts_about_two_images_are_those_of_one_row_at_a_time(carried, family, images):
    """Two prompts about one image are beside it."""
    model, processor = load_model(carried)
    skip_hidden(model.eval())
    inner = model.base_model
    shown = [images[:2], images[1], images[2]]
    batch = build_batch(processor, SEVERAL, shown, CANDIDATES)
    with torch.no_grad():
        inputs, where = shared_inputs(inner, batch)
        shared = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[where]
        full = inner(**model_inputs(inner, batch), use_cache=False).last_hidden_state
        content = iter(images)
        turn = [{**b, "image": next(content)} if b["type"] == "image" else b for b in SEVERAL[0][0]["content"]]
        made = processor.apply_chat_template(
            [{"role": "user", "content": turn}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        for row, candidate in enumerate(CANDIDATES[0]):
            fields, length = with_answer(processor, accepted(model, made), SEVERAL[0], candidate, family)
            alone = inner(**fields, use_cache=False).last_hidden_state[0]
            real = batch.attention_mask[row].bool()
            torch.testing.assert_close(shared[row][real][-length:], alone[-length:], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(full[row][real], alone, atol=2e-5, rtol=1e-4)


def test_a_family_that_is_not_carried_is_refused_by_name(built, cells):
    """Before anything is trained, with the reason and what to do."""
    found = r"'mllama': it reads images by cross-attention, .*; name a checkpoint of another family.* docs/models\.md"
    with pytest.raises(CheckpointError, match=found):
        try_checkpoint(built("mllama"))
    cells["mllama"] = {"class": "MllamaForConditionalGeneration"} | dict.fromkeys(COLUMNS[1:], "refused")


@pytest.mark.skipif(SEES_TORCHVISION, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_what_to_install(built, tmp_path):
    """The folder of a Qwen2-VL whose image processor wants the package that is not here."""
    model, processor = load_model(built("llava_next"))
    save_model(model, processor, tmp_path / "seen")
    file = tmp_path / "seen" / "processor_config.json"
    text = file.read_text().replace('"LlavaNextProcessor"', '"Qwen2VLProcessor"')
    file.write_text(re.sub(r"\}\s*$", ', "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}}', text))
    with pytest.raises(CheckpointError, match=r"its processor needs torchvision, .* pip install 'accord\[vlm\]'"):
        load_model(str(tmp_path / "seen"))


def test_a_fallback_is_told_once(built, images):
    from accord.errors import warn_once

    warn_once.cache_clear()
    encoder = Encoder(*load_model(built("gemma3")))
    with pytest.warns(DataWarning, match="gemma3: every completion is computed with a copy of its prompt") as told:
        encoder(PROMPTS[:1], images[:1], CANDIDATES[:1])
        encoder(PROMPTS[:1], images[:1], CANDIDATES[:1])
    assert len(told) == 1


COLUMNS = ("class", "policy", "reward", "router", "finetune", "dpo", "several", "shared")
HEADER = (
    "| family | class in transformers | policy | reward model | router's encoder | fine-tuning, evaluation "
    "| DPO, selectors | several images | shared prefixes | image processor |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


@pytest.mark.skipif(not SEES_TORCHVISION, reason="some families need torchvision; make test-families has it")
def test_the_table_of_the_documentation_is_what_was_found(cells):
    if set(cells) != set(FAMILIES) or any(set(row) != set(COLUMNS) for row in cells.values()):
        pytest.skip("not every family was tried in this session")
    table = HEADER
    for name in FAMILIES:
        needs = "Pillow" if name in WITHOUT_TORCHVISION else "torchvision"
        table += f"| {name} | {' | '.join(cells[name][column] for column in COLUMNS)} | {needs} |\n"
    page = Path(__file__).parents[2] / "docs" / "models.md"
    if table not in page.read_text():
        Path("build").mkdir(exist_ok=True)
        Path("build/models-table.md").write_text(table)
        pytest.fail("the table of docs/models.md is not what these tests find; build/models-table.md is")
