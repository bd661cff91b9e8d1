from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import modeling_utils

from accord.alignment.grpo import AlignmentConfig
from accord.errors import DataWarning, RunError
from accord.federation.engine import InProcessEngine
from accord.models.load import LoraSettings, load_model, save_model
from accord.recipe import Policy, Recipe, Routing
from accord.runs import read_lines
from accord.runs.failures import failures_of
from accord.stages import alignment
from accord.stages.alignment import federated_reward, greedy, remembered, run_grpo
from accord.stages.routing import constant_router
from accord.types import vqa_prompt


@pytest.mark.parametrize(
    ("lora", "trained"), [(None, torch.float32), (LoraSettings(rank=2, alpha=4), torch.bfloat16)], ids=["full", "lora"]
)
def test_a_policy_comes_back_in_the_type_of_its_checkpoint(job, ask, llava, tmp_path, monkeypatch, lora, trained):
    """A bfloat16 checkpoint is trained in float32 if all of it is trained, and is bfloat16 again on disk."""
    model, processor = load_model(llava)
    base = save_model(model.to(torch.bfloat16), processor, tmp_path / "base")
    job.recipe = replace(job.recipe, policy=Policy(base), alignment=replace(job.recipe.alignment, lora=lora))
    job.questions = {"dev": [ask(0)], "public": [ask(1)]}
    seen = []

    def align(model, *_, **__):
        seen.append(model.dtype)
        return model

    monkeypatch.setattr(alignment, "align", align)
    with job.run.doing("align"):
        policy, processor = run_grpo(job, "align", lambda prompts, completions, **_: [])
    saved, _ = load_model(save_model(policy, processor, tmp_path / "policy"))
    assert (seen, saved.dtype) == ([trained], torch.bfloat16)
    assert all(torch.equal(saved.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_encoder_and_reference_are_one_base_under_an_adapter(job, ask, llava, monkeypatch):
    """One load in place of two, and the same policy to the bit as beside a copy; the job's own base is another then."""
    settings = AlignmentConfig(
        steps=3, prompts_per_step=2, group_size=2, max_completion_length=2, evaluate_every=0, learning_rate=1e-2, kl=0.1
    )
    settings = replace(settings, lora=LoraSettings(rank=2, alpha=4))
    job.recipe = replace(job.recipe, policy=Policy(llava), alignment=settings)
    job.questions = {"dev": [ask(0)], "public": [ask(1), ask(2, "blue")]}
    loaded, load = [], alignment.load_model
    monkeypatch.setattr(alignment, "load_model", lambda *given, **how: loaded.append(given) or load(*given, **how))

    def aligned(stage):
        """A reward that reads: the mean state of a prompt and its answer, and again what the reference hands over."""
        encoder, read = job.encoder, []

        def reward(prompts, completions, image, **_):
            encoder.remember({}, [])  # the encoder is to compute it
            turns = [vqa_prompt(prompt[-1]["content"][-1]["text"]) for prompt in prompts]
            states, mask = encoder(turns, image, [[each[-1]["content"]] for each in completions])
            read.append((states * mask[..., None]).sum(dim=1).mean(dim=1))
            return read[-1].tolist()

        with job.doing(stage):
            policy, _ = run_grpo(job, stage, reward, encoder=encoder)
        assert len(read) == 3
        return policy.state_dict(), torch.cat(read), policy is encoder.model

    weights, read, same = aligned("align")
    assert same and not loaded and job.policy[0] is job.encoder.model
    base = load(llava)[0].state_dict()
    assert all(torch.equal(job.policy[0].state_dict()[name], weight) for name, weight in base.items())
    assert any(not torch.equal(weights[name], weight) for name, weight in base.items())
    monkeypatch.setattr(Recipe, "one_base", False)
    apart, alone, same = aligned("compare")
    assert not same and loaded == [(llava,)]
    assert torch.equal(read, alone)
    assert weights.keys() == apart.keys() and all(torch.equal(weights[name], apart[name]) for name in weights)


def full_from(monkeypatch, step, module, name, error):
    """Let a library's function raise what it raises on a full disk once it writes into checkpoint `step`."""
    plain = getattr(module, name)

    def write(data, file, **settings):
        if f"checkpoint-{step}" in str(file):
            Path(file).write_bytes(b"half")
            raise error
        return plain(data, file, **settings)

    monkeypatch.setattr(module, name, write)


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")),
        (modeling_utils, "safe_save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        (modeling_utils, "safe_save_file", SafetensorError("I/O error: Disk quota exceeded (os error 122)")),
    ],
    ids=["torch", "safetensors", "quota"],
)
def test_a_full_disk_leaves_whole_checkpoints_only(job, ask, llava, monkeypatch, module, name, error):
    """Two steps, each saved: the disk is full at the second; with room again, the alignment goes on from the first."""
    settings = AlignmentConfig(
        steps=2, prompts_per_step=1, group_size=2, max_completion_length=2, evaluate_every=0, save_every=1
    )
    job.recipe = replace(job.recipe, policy=Policy(llava), alignment=settings)
    job.questions = {"dev": [ask(0)], "public": [ask(1)]}
    out = job.path / "checkpoints" / "align"

    def align():
        with job.run.doing("align"):
            run_grpo(job, "align", lambda prompts, completions, **_: [float(len(c[0]["content"])) for c in completions])

    with monkeypatch.context() as patch:
        full_from(patch, 2, module, name, error)
        with (
            pytest.raises(RunError, match=r"align cannot be written: the disk is full .* continue with --resume"),
            pytest.warns(DataWarning, match="checkpoint-2 is incomplete"),
        ):
            align()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    align()
    assert job.run.done("align")
    steps = [record["step"] for record in read_lines(job.path / "metrics.jsonl") if "reward" in record]
    assert steps == [1, 2]


def test_the_policy_answers_as_many_questions_at_once_as_the_recipe_says(job, ask, monkeypatch):
    """5 questions, 2 at once."""
    sizes = []

    def canned(model, processor, questions, *, batch_size, **_):
        sizes.append((len(questions), batch_size))
        return [["red"]] * len(questions)

    monkeypatch.setattr(alignment, "answer", canned)
    recipe = replace(job.recipe, alignment=replace(job.recipe.alignment, questions_at_once=2))
    assert greedy(None, None, [ask(n) for n in range(5)], recipe) == ["red"] * 5
    assert sizes == [(5, 2)]


def test_a_run_waits_as_its_recipe_says_and_tells_it_on_standard_error(job, ask, llava, capsys):
    job.recipe = replace(job.recipe, policy=Policy(llava), routing=Routing(quorum=0.7))
    job.questions = {"public": [ask(1)]}
    reward = federated_reward(job, constant_router([1.0]), engine=InProcessEngine({}))
    capsys.readouterr()  # the encoder's loading
    reward.waiting.tell("waiting for [b]")
    assert reward.waiting.quorum == 0.7 and capsys.readouterr() == ("", "waiting for [b]\n")


def test_a_run_folder_is_one_processs(job, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"this is one of 2; start a whole recipe by `accord run`, or train"):
        run_grpo(job, "align", lambda prompts, completions, **_: [])


class Counter:
    """A reward that remembers how often it was asked, and pays by length."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **_):
        self.calls += 1
        return [float(len(c[0]["content"])) for c in completions]

    def state_dict(self):
        return {"calls": torch.tensor([self.calls])}

    def load_state_dict(self, state, /):
        self.calls = int(state["calls"])


@pytest.mark.filterwarnings("ignore:prompt:accord.errors.DataWarning")
def test_a_prompt_on_which_the_reward_fails_does_not_end_a_run(job, ask, llava):
    """Of four questions one has a reward that raises: three failures later it is parked, and all steps are done."""
    settings = AlignmentConfig(steps=8, prompts_per_step=2, group_size=2, max_completion_length=2, evaluate_every=0)
    job.recipe = replace(job.recipe, policy=Policy(llava), alignment=settings)
    poison = ask(9, text="poison?")
    job.questions = {"dev": [ask(0)], "public": [*(ask(n) for n in range(1, 4)), poison]}

    def reward(prompts, completions, **_):
        if any("poison" in str(prompt) for prompt in prompts):
            raise ValueError("no such word")
        return [float(len(c[0]["content"])) for c in completions]

    with job.doing("align"):
        run_grpo(job, "align", reward)
    assert [record["step"] for record in read_lines(job.path / "metrics.jsonl") if "reward" in record] == [*range(1, 9)]
    assert set(failures_of(job.path)) == {poison.id} and failures_of(job.path)[poison.id].parked


def test_what_a_reward_has_learnt_is_kept_in_the_end(job, ask, llava):
    """Two steps of one group are two calls. Another stage's is none; once the router is trained anew, it is gone."""
    settings = AlignmentConfig(steps=2, prompts_per_step=1, group_size=2, max_completion_length=2, evaluate_every=0)
    job.recipe = replace(job.recipe, policy=Policy(llava), alignment=settings)
    job.questions = {"dev": [ask(0)], "public": [ask(1)]}
    reward = Counter()
    assert remembered(job.path, "align") is None
    with job.doing("align"):
        run_grpo(job, "align", reward, memory=reward)
    assert reward.calls == 2 and remembered(job.path, "align")["calls"].tolist() == [2]
    assert remembered(job.path, "compare my_package.mine:LARGEST") is None
    with job.doing("router"):
        pass
    assert remembered(job.path, "align") is None
