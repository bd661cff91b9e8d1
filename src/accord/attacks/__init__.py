"""Attacks of a federation's own members, for tests, benchmarks and a trial of one's own: scores, pairs, and updates."""
