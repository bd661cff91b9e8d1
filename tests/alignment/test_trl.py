"""What the shared-prefix trainer relies on in TRL, so that a release that changes it is met by words."""

import inspect

import pytest
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_tokenize_prompts": ["self", "prompts"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "_get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
}


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_overridden_methods_take_what_they_took(method):
    found = getattr(GRPOTrainer, method, None)
    assert found is not None, (
        f"TRL has no GRPOTrainer.{method} any more: accord.alignment.trainer overrides it, and TRL will not call it. "
        "Find where its work went, or set alignment.shared_prefix = false and pin the TRL before"
    )
    names = list(inspect.signature(inspect.unwrap(found)).parameters)
    assert names[: len(OVERRIDDEN[method])] == OVERRIDDEN[method], (
        f"TRL changed the arguments of GRPOTrainer.{method} from {OVERRIDDEN[method]} to {names}: "
        "accord.alignment.trainer passes the old ones on"
    )


def test_a_fused_head_takes_shifted_labels():
    source = inspect.getsource(add_fused_lm_head)
    assert "shift_labels" in source and "original_forward" in source, (
        "TRL's fused head no longer takes shift_labels: a packed row predicts one token per column, which plain labels "
        "cannot say, since the columns of a row are not one text"
    )
    assert {"log_probs", "entropy"} <= set(FusedCausalLMOutput.__dataclass_fields__), (
        "TRL's fused head no longer returns log_probs and entropy, from which accord.alignment.trainer takes its rows"
    )


def test_a_batch_is_a_flat_dictionary_of_rows():
    source = inspect.getsource(inspect.unwrap(GRPOTrainer._compute_loss))
    for key in ("prompt_ids", "completion_ids", "completion_mask", "advantages"):
        assert f'"{key}"' in source, (
            f"TRL's batch has no {key!r} any more: accord.alignment.trainer adds 'prompt_of' beside it, and regroups "
            "rows by the first dimension of every tensor"
        )
    assert 'inputs.get("pixel_values")' in source, (
        "TRL's loss now needs pixel_values in the batch, from which accord.alignment.trainer takes them out"
    )
