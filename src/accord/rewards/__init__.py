"""Reward models: train with Bradley–Terry, score standardised."""
