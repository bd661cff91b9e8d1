"""A policy whose base is in 4 bits under its adapter: QLoRA."""

import importlib.util

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForImageTextToText

from accord.alignment import grpo
from accord.alignment.grpo import AlignmentConfig, align, is_reference
from accord.errors import RecipeError
from accord.footprint import footprint
from accord.footprint import grpo as planned
from accord.models import load
from accord.models.encoder import Encoder
from accord.models.load import LoraSettings, load_model, save_model, without_adapter

LORA = LoraSettings(rank=2, alpha=4)
SETTINGS = AlignmentConfig(
    steps=3,
    prompts_per_step=2,
    group_size=4,
    learning_rate=1e-2,
    max_completion_length=4,
    lora=LORA,
    quantize="nf4",
    evaluate_every=0,
    save_every=0,
)

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs accord[quantized]")


def letters(prompts, completions, **_):
    return [float(len(set(c[-1]["content"]))) for c in completions]


def test_without_the_package_the_error_says_what_to_install(llava, monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs bitsandbytes, .* pip install 'accord\[quantized\]'"):
        load_model(llava, quantize="nf4")


@pytest.mark.parametrize("changes", [{"lora": None}, {"vllm": "colocate"}])
def test_it_wants_an_adapter_and_no_vllm(changes):
    with pytest.raises(RecipeError, match=r"a base in 4 bits is trained by an adapter, and vLLM cannot be handed it"):
        AlignmentConfig(**{"lora": LORA, "quantize": "nf4", **changes})


def test_the_plan_counts_4_bits_of_the_layers_that_the_adapter_goes_onto():
    """llava-clip-llama: in each of 4 layers 4 of 64 × 64 weights and 3 of 64 × 192; 0.5 + 1/64 + 1/4096 bytes each."""
    foot = footprint("accord/llava-clip-llama", 64 * 64, 0)
    weights = foot.text.count * (4 * 64 * 64 + 3 * 64 * 192)
    saved = weights * (foot.bytes_each - (0.5 + 1 / 64 + 1 / 4096))
    assert foot.frozen() - foot.quantized() == pytest.approx(saved)
    plain = AlignmentConfig(**{**vars(SETTINGS), "quantize": ""})
    difference = sum(planned(foot, plain, LORA, gpu=True).values()) - sum(
        planned(foot, SETTINGS, LORA, gpu=True).values()
    )
    assert difference == pytest.approx(saved)


@installed
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_policy_is_aligned_and_is_an_ordinary_checkpoint(family, checkpoints, ask, tmp_path, monkeypatch):
    """What comes back answers as what was trained, has its base's type, and loads in stock transformers."""
    base, _ = load_model(checkpoints[family])
    model, processor = load_model(checkpoints[family], quantize="nf4")
    assert not is_reference(Encoder(base, processor), model)  # which has other weights
    stored = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert stored and not any("vision" in name or "projector" in name or "head" in name for name in stored)
    records, seen, merge = [], {}, grpo._dequantized

    def spy(trained, lora):
        adapters = [p for n, p in trained.named_parameters() if "lora_" in n]
        assert adapters and all(p.dtype == torch.float32 for p in adapters)
        ids = torch.tensor([[5, 6, 7, 8]])
        trained.eval()
        with torch.no_grad():
            seen["trained"] = without_adapter(trained)(input_ids=ids).logits
        again = merge(trained, lora)
        assert any(isinstance(module, LoraLayer) for module in again.modules())
        return again

    monkeypatch.setattr(grpo, "_dequantized", spy)
    questions = [ask(0), ask(1, "blue")]
    policy = align(model, processor, questions, letters, SETTINGS, seed=0, out=tmp_path / "out", log=records.append)
    assert len(records) == 3 and records[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is in 4 bits, too
    assert records[-1]["kl"] > 1e-6
    save_model(policy, processor, tmp_path / "policy")
    stock, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert "quantization_config" not in (tmp_path / "policy" / "config.json").read_text()
    assert {w.dtype for w in stock.state_dict().values()} == {w.dtype for w in base.state_dict().values()}
    with torch.no_grad():
        after = stock.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
        before = base.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    torch.testing.assert_close(after, seen["trained"], atol=1e-4, rtol=1e-4)
    assert (before - after).abs().max() > 1e-3
