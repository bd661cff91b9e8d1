"""A plan is made from headers, configurations and names: no connection is opened and no weights are loaded."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accord.attacks.scores import Attack
from accord.federation.projector import ProjectorConfig
from accord.footprint import Gpus, Size, footprint, size_of
from accord.methods import METHODS
from accord.models.load import LoraSettings
from accord.plan import PHOTOGRAPH, _amount, _bytes, describe, peaks
from accord.recipe import EncoderConfig, Policy, Recipe, SiteConfig
from accord.recipe_file import load_recipe
from accord.rewards.private import Privacy
from published_configs import PUBLISHED

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.toml"))


@pytest.fixture(autouse=True)
def forbidden(monkeypatch):
    """Neither the network nor weights."""

    def refuse(*_, **__):
        raise AssertionError("a plan downloads and loads nothing")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    footprint.cache_clear()
    yield
    footprint.cache_clear()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """The configurations of the paper's models, as the hub has them."""
    for name, config in PUBLISHED.items():
        (tmp_path / name).mkdir(parents=True)
        config.save_pretrained(tmp_path / name)
    monkeypatch.setattr("accord.footprint.hf_hub_download", lambda name, file: str(tmp_path / name / file))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path, monkeypatch, capsys):
    from accord.cli import main

    recipe = load_recipe(path)
    monkeypatch.setattr("sys.argv", ["accord", "plan", str(path)])
    main()
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"plan of {recipe.name}, seed {recipe.seed}\n")
    for site in recipe.sites:
        assert f"site {site.name} " in out and site.checkpoint in out
    for arm in recipe.compare:
        assert arm in out
    assert f"{recipe.alignment.steps} steps of {recipe.alignment.prompts_per_step} prompts" in out
    assert "stays at each site" in out


def test_sizes_are_counted_from_configurations(published):
    """The published models' own numbers: 8.29 B, 3.75 B, 2.21 B and 0.89 B, where names say 7, 3, 2 and 0.5."""
    counted = [size_of(name) for name in PUBLISHED]
    assert [round(size.parameters / 1e7) for size in counted] == [829, 375, 221, 89]
    assert {size.known for size in counted} == {"by its configuration"}


@pytest.mark.parametrize(("name", "gpus"), [("qwen2.5-vl-7b", "1x80"), ("qwen2.5-vl-7b-8gpu", "8x80")])
def test_both_forms_of_the_large_recipe_fit(name, gpus, published):
    (path,) = (path for path in RECIPES if path.stem == name)
    recipe, given = load_recipe(path), Gpus.read(gpus)
    assert recipe.name == name
    for peak in peaks(recipe, given):
        assert 0 < peak.total <= given.each, peak
    out = describe(recipe, given)
    assert out.count("DOES NOT FIT") == 0 and "every stage fits" in out


def test_what_does_not_fit_says_what_to_change(published):
    """The 7B policy trained whole: 8.29 B parameters of which the frozen tower's 0.68 B have 4 bytes, the rest 18."""
    (path,) = (path for path in RECIPES if path.stem == "qwen2.5-vl-7b")
    recipe = load_recipe(path)
    whole = replace(recipe, alignment=replace(recipe.alignment, lora=None))
    out = describe(whole, Gpus.read("1x80"))
    assert "policy and optimiser 139." in out and "reference 33.2 GB" in out
    (line,) = (line for line in out.splitlines() if "DOES NOT FIT" in line)
    assert "alignment.lora = { rank = 16 }" in line
    there = {peak.stage: peak.total for peak in peaks(recipe)}
    elsewhere = {peak.stage: peak.total for peak in peaks(recipe, elsewhere=True)}
    assert elsewhere["align"] < there["align"] and not any(stage.startswith("site") for stage in elsewhere)


def test_a_plan_says_who_lies_by_the_recipe():
    """Whoever reads it must not take the trial for an honest federation."""
    honest, liar = SiteConfig("a", "accord/idefics3"), SiteConfig("b", "accord/idefics3", attack=Attack())
    assert "a trial: site b lies by the recipe's attack, flip\n" in describe(Recipe("trial", sites=(honest, liar)))
    backdoor = replace(liar, attack=Attack("target", target="circle", trigger="zebra"))
    assert "attack, target, where a question has 'zebra'\n" in describe(Recipe("trial", sites=(honest, backdoor)))
    assert "a trial" not in describe(Recipe("trial", sites=(honest,)))


def test_a_private_site_is_planned_as_it_trains():
    """A head on frozen features takes neither gradients of the backbone nor an optimiser's two moments."""
    whole, private = (
        describe(Recipe("trial", sites=(SiteConfig("a", "accord/idefics3", finetune=None, privacy=privacy),)))
        for privacy in (None, Privacy(unit="person", epsilon=3, steps=50, sampling=0.1))
    )
    assert "Bradley–Terry" in whole and "Bradley–Terry" not in private
    assert "ε = 3 a person, 50 steps of DP-SGD, each of 10% of the persons" in private
    weights = size_of("accord/idefics3").parameters * 4
    assert f"{_amount(weights)}, a head on frozen features" in private


def test_a_private_sites_peak_is_counted_by_hand():
    """Gradients of 32 answers over the adapter's parameters in float32, and no reward training beside them."""
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
    recipe = Recipe("x", (SiteConfig("a", "accord/idefics3", finetune=None, lora=lora, privacy=Privacy()),))
    adapter = footprint("accord/idefics3", 64 * 64, 0).adapter(lora)
    (peak,) = (peak for peak in peaks(recipe) if peak.stage.startswith("site a"))
    assert peak.parts["gradients of single answers"] == 4 * 32 * adapter > 0
    head = replace(recipe, sites=(replace(recipe.sites[0], lora=None),))
    (peak,) = (peak for peak in peaks(head) if peak.stage.startswith("site a"))
    assert peak.parts["weights"] == size_of("accord/idefics3").parameters * 4 and peak.parts["activations"] > 0


def test_sites_that_are_trained_at_once_share_a_gpu():
    sites = tuple(SiteConfig(name, "accord/idefics3", finetune=None) for name in "abc")
    one, two = (
        next(peak for peak in peaks(Recipe("x", sites, processes=n, threads=1)) if peak.stage == "site b: reward")
        for n in (1, 2)
    )
    assert two.total == 2 * one.total and two.remedy[0] == "processes"


def test_many_gpus_share_a_policy_only_where_the_method_lets_them(published):
    """MoR learns its router on the way, and of a step's completions each GPU has at least one."""
    (path,) = (path for path in RECIPES if path.stem == "qwen2.5-vl-7b-8gpu")
    shared = load_recipe(path)
    alone = replace(shared, method="mor")
    totals = {
        (name, count): next(peak.parts for peak in peaks(recipe, Gpus.read(f"{count}x80")) if peak.stage == "align")
        for name, recipe in (("shared", shared), ("alone", alone))
        for count in (1, 8, 100_000)
    }
    held = {key: parts["policy and optimiser"] for key, parts in totals.items()}
    assert held["shared", 8] == held["shared", 1] / 8 and held["alone", 8] == held["alone", 1]
    few, many = (totals["shared", count]["activations"] for count in (8, 100_000))
    assert few >= many > 0


def test_the_base_under_an_adapter_counts_once_where_it_is_the_encoder_too(published):
    """The 7B policy in bfloat16 is 16.6 GB; beside vLLM, or in the stock way, the encoder is another copy."""
    (path,) = (path for path in RECIPES if path.stem == "qwen2.5-vl-7b")
    recipe = load_recipe(path)

    def aligning(**changes):
        changed = replace(recipe, alignment=replace(recipe.alignment, **changes))
        return next(peak.parts for peak in peaks(changed) if peak.stage == "align")

    assert "encoder" not in aligning()
    frozen = footprint(recipe.policy.checkpoint, PHOTOGRAPH, recipe.max_pixels).frozen()
    assert frozen == pytest.approx(16.6e9, rel=0.01)
    for changes in ({"lora": None}, {"shared_prefix": False}, {"vllm": "server"}):
        assert aligning(**changes)["encoder"] == frozen


def test_sizes_come_from_names_where_nothing_else_is_there():
    """And say so. 7 B parameters trained whole are 112 GB, and the reference 28."""
    recipe = Recipe("x", (SiteConfig("a", "q/small-500m"),), policy=Policy("q/seven-7B"))
    out = describe(recipe)
    assert "7.00 B (by its name, may be low)" in out and "112.0 GB + reference 28.0 GB" in out
    assert "frozen encoder                       14.0 GB, at every site too" in out
    assert "500.00 M (by its name" in out and "8.0 GB" in out


def test_a_projectors_bytes_are_in_the_plan():
    """llava-clip-llama's: counted on the model itself; 10 rounds of 3 sites in 4 bytes a number."""
    sites = tuple(SiteConfig(name, "accord/idefics3") for name in "abc")
    out = describe(Recipe("x", sites, projector=ProjectorConfig()))
    from safetensors import safe_open

    from accord.models.load import locate

    with safe_open(f"{locate('accord/llava-clip-llama')}/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "multi_modal_projector" in name]  # noqa: SIM118
        moved = 4 * sum(file.get_tensor(name).numel() for name in names)
    assert moved and f"{moved / 1000:.0f} kB to and from every site in each round" in out
    assert f"in all {_bytes(moved * 30)} down, {_bytes(moved * 30)} up" in out


def test_a_size_that_no_name_tells_is_unknown():
    assert size_of("somebody/a-fine-model") == Size(0.0, "unknown, to be downloaded")
    recipe = Recipe("x", (SiteConfig("a", "somebody/a-fine-model"),), policy=Policy("accord/none"))
    out = describe(recipe)
    assert "? (unknown, to be downloaded)" in out and "? (not there)" in out


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 7e9),
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.5e9),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", 256e6),
        ("somebody/v2-beta", 0.0),
    ],
)
def test_sizes_by_name(name, parameters):
    assert size_of(name).parameters == parameters


def test_a_local_checkpoint_is_counted(tmp_path):
    """2 · 3 + 5 in one file and 7 in another: 18."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(7)}, tmp_path / "model-2.safetensors")
    assert size_of(str(tmp_path)) == Size(18.0, "counted")


def test_the_shipped_checkpoints_are_counted():
    for name in ("llava-clip-llama", "llava-siglip-qwen2", "idefics3"):
        size = size_of(f"accord/{name}")
        assert size.known == "counted" and 2e5 < size.parameters < 5e5


def test_the_bytes_of_a_step_by_hand():
    """2 prompts · 4 completions of at most 4 · 4 bytes, images of 300 bytes, 3 sites of which one is asked:

    least 2 (300 + 64) = 728 B, most 2 (900 + 64) = 1928 B, back 2 · 4 · 9 = 72 B; 10 steps 19 kB down and 720 B up.
    """
    sites = tuple(SiteConfig(name, "accord/idefics3") for name in "abc")
    recipe = Recipe("x", sites)
    small = replace(recipe.alignment, steps=10, prompts_per_step=2, group_size=4, max_completion_length=4)
    out = describe(replace(recipe, alignment=small))
    assert "to the sites, per GRPO step: 728 B to 2 kB" in out
    assert "from the sites, per GRPO step: 72 B of scores; in all 10 steps: at most 19 kB down, 720 B up" in out


def test_two_experts_are_twice_as_many_bytes():
    """As above, but two of three sites are asked: least 2 (600 + 128) = 1456, most 2 (900 + 128) = 2056, back 144 B."""
    sites = tuple(SiteConfig(name, "accord/idefics3", answers=True) for name in "abc")
    recipe = Recipe("x", sites, method="fedgrpo")
    small = replace(recipe.alignment, steps=10, prompts_per_step=2, group_size=4, max_completion_length=4)
    out = describe(replace(recipe, alignment=small))
    assert "to the sites, per GRPO step: 1 kB to 2 kB" in out
    assert "from the sites, per GRPO step: 144 B of scores" in out


@pytest.mark.parametrize(
    ("method", "sites", "router", "said"),
    [
        ("routed", True, True, "per GRPO step"),
        ("mor", True, True, "per GRPO step"),
        ("fedgrpo", True, False, "per GRPO step"),
        ("average", True, False, "per GRPO step"),
        ("fedit-fedavg", False, False, "at the sites: 40 rounds of 5 local steps of the policy's adapter"),
        ("fedbis", False, False, "at the sites: 35 rounds of 5 local steps of one selector"),
        ("server-alone", False, False, "no site is asked to judge an answer while the policy is aligned"),
        ("ground-truth", False, False, "no site is asked to judge an answer while the policy is aligned"),
    ],
)
def test_a_plan_has_what_its_method_needs(method, sites, router, said):
    """And what the compared ones need, too."""
    recipe = Recipe("x", (SiteConfig("a", "accord/idefics3", answers=True),), method=method)
    out = describe(recipe)
    assert f"by {method}: {METHODS[method].about}" in out and said in out
    assert (("\nsite a " in out), ("\nrouter " in out)) == (sites, router)
    assert ("per GRPO step" in out) is (METHODS[method].asks(recipe) > 0)
    more = describe(replace(recipe, compare=("routed",)))
    assert "\nsite a " in more and "\nrouter " in more and f"compare                {'routed':<40}" in more


@pytest.mark.parametrize(
    ("method", "grpo", "memory", "said"),
    [
        ("routed", "KL weight 0.02,", "112.0 GB + reference 28.0 GB", "per GRPO step"),
        ("routed-kl-0", "KL weight 0.0,", "112.0 GB", "per GRPO step"),
        ("routed-kl-0.005", "KL weight 0.005,", "112.0 GB + reference 28.0 GB", "per GRPO step"),
        ("ground-truth", "KL weight 0.02,", "112.0 GB + reference 28.0 GB", "no site is asked to judge an answer"),
        (
            "pooled",
            "KL weight 0.02,",
            "112.0 GB + reference 28.0 GB",
            "pairs are in one place, which no federation may",
        ),
        ("local a", "KL weight 0.02,", "112.0 GB + reference 28.0 GB", "nothing is sent while the policy is aligned"),
        (
            "fedavg-reward",
            "KL weight 0.02,",
            "112.0 GB + reference 28.0 GB",
            "at the sites: 20 rounds of 5 local steps of its backbone, then 20 rounds of 10 local steps of one reward",
        ),
        ("fedit-scaffold", None, "14.8 GB", "averaged, by SCAFFOLD"),
        ("feddpo", None, "14.8 GB", "at the sites: 40 rounds of 5 local steps of DPO of the policy's adapter"),
        ("fedbiscuit", None, "14.8 GB", "3 selectors; at the server: 150 steps of DPO"),
        ("server-alone", None, "112.0 GB", "at the server: 200 steps on 200 questions"),
    ],
)
def test_a_plan_says_what_the_stage_does(method, grpo, memory, said):
    """GRPO's own KL weight where it is GRPO, and no reference where it is not.

    7 B parameters trained whole: 112 GB, and 28 of reference. With an adapter of rank 16 14 GB, and 16 bytes each of
    16 · 22 d parameters a layer; by size alone 33 layers are guessed of d = 128 · 33: 0.8 GB.
    """
    recipe = Recipe("x", (SiteConfig("a", "accord/idefics3"),), policy=Policy("q/seven-7B"), method=method)
    out = describe(recipe)
    line = next(line for line in out.splitlines() if line.startswith("align "))
    assert line.endswith(f" {memory}") and said in out
    steps = [line.partition("completions, ")[2] for line in out.splitlines() if " completions, " in line]
    assert [step.startswith(grpo) for step in steps] == [True] if grpo else steps == []


def test_the_router_reads_the_encoder_that_the_recipe_names():
    """1 B in place of the policy's 7: 2 GB frozen."""
    recipe = Recipe("x", (SiteConfig("a", "accord/idefics3"),), policy=Policy("q/seven-7B"))
    assert "14.0 GB, at every site too" in describe(recipe)
    out = describe(replace(recipe, encoder=EncoderConfig("q/small-1B")))
    assert "q/small-1B" in out and "2.0 GB, at every site too" in out and "112.0 GB + reference" in out
