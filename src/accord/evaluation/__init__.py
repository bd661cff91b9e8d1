"""Measure a policy and show the evidence: accuracies with intervals, figures, one page for each run."""
