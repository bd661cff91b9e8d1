"""GRPO against a federation, which to the trainer is one reward function."""
