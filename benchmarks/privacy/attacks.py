"""Attack private heads on the features that `price.py` has kept: membership by LiRA, and extraction from raw scores.

    python benchmarks/privacy/attacks.py runs/privacy/radiology-and-rooms-radiology.safetensors

Of 1,000 pairs, 32 shadow heads and 8 targets are each trained on a random half. A surrogate is fitted to the raw scores
of 500 pairs of answers, and compared on the other 500. That is more than a site sends, whose scores are standardised
and brought into a range, and fewer answers than a run asks about; `tests/audit/test_privacy.py` copies a head from what
is sent.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from accord.rewards.accounting import calibrate
from accord.rewards.audit import agreement, lira, surrogate
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, private_head


def main() -> None:
    parser = argparse.ArgumentParser(description="attacks on private heads")
    parser.add_argument("features", type=Path)
    features = load_file(parser.parse_args().features)["features"].double()
    features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:1000]]
    print("| ε | AUC | TPR at 0.1 % | TPR at 1 % | exact | 8 bits | ranks |\n|" + " --- |" * 7)
    for epsilon in (math.inf, 8.0, 3.0, 1.0):
        sigmas = Sigmas(0.0, 0.0, 0.0) if math.isinf(epsilon) else calibrate(Privacy(epsilon=epsilon))

        def train(given: Tensor, number: int, sigmas: Sigmas = sigmas) -> Tensor:
            key = hashlib.sha256(f"{sigmas} {number}".encode()).digest()
            return private_head(given, torch.arange(len(given)), Privacy(), sigmas, SecretNoise(key))

        found = lira(features, train, shadows=32, targets=8, seed=0)
        known, fresh = features[:500], features[500:]
        head = train(known, 40)
        copied = [agreement(surrogate(known, known @ head, kind), head, fresh) for kind in ("exact", "8 bits", "ranks")]
        cells = [f"{found.auc:.3f}", *(f"{100 * each:.1f}" for each in (found.at_001, found.at_01, *copied))]
        print(f"| {'∞' if math.isinf(epsilon) else f'{epsilon:g}'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
