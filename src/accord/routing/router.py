"""The learned router of MoR: whose judgement counts for this image, prompt and answer?

    h = Enc(x, y) ∈ R^{T×D}     last hidden states of a frozen VLM over image, prompt and completion
    z = g_φ(h) ∈ R^K            four pre-norm Transformer layers, the last token, a linear head
    α = softmax(z)              the weight of each site

Source: Lu et al. 2026, arXiv 2605.03426, section 3.3. Differs: the paper names neither the encoder, the width nor
the pooling; ours are the base policy, a width in the recipe, and the last token (the mean over tokens, most of them
the image's, learns more slowly).

Where `prior_correction` is on, the weights forget how many pairs a site has:

    α_k ∝ σ(z_k) / p_k,    p_k = n_k / Σ_j n_j      so α_k ∝ f_k(h), the density of site k's answers at h

At the optimum of the one-against-all loss σ(z_k) = p_k f_k / Σ_j p_j f_j: a big site wins because it is big. Source:
FedDRM (2025, arXiv 2509.23049), which learns such a head too. Differs: its head is a softmax, where the ratio is
exp(z_k) / p_k; with sigmoids that would not be a density ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from accord.data.images import Pictures
from accord.errors import CheckpointError, RecipeError, check_least
from accord.federation.aggregation import Aggregation
from accord.federation.weights import read_weights
from accord.models.encoder import Encoder
from accord.models.inputs import chunks
from accord.runs import replace_folder, write_atomic
from accord.types import Prompt


class Router(Protocol):
    """Says whose judgement counts: weights `[N, K]`, non-negative, rows summing to 1; a plain function qualifies."""

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return one row per completion, in the order of the prompts, `N = sum(len(c) for c in completions)`."""
        ...


@dataclass(frozen=True)
class RouterConfig:
    """Size of the router and its federated training."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    rounds: int = 23
    local_steps: int = 3
    pairs_per_batch: int = 64
    pairs_per_site: int = 500  # drawn once: features are kept, and no site's size drowns the others
    learning_rate: float = 0.1  # of the sites' SGD, at first; times K/3 beyond three sites
    rows_at_once: int = 512  # (prompt, completion) rows that the encoder takes in one forward pass
    prior_correction: bool = False  # whether the choice forgets how many pairs a site has
    audit: int = 16  # labelled questions of each kind by which the server judges the sites' updates; 0 for none
    leave_out: bool = False  # whether a site that this audit names is left out of the average
    aggregation: Aggregation = Aggregation(
        "fedadam", learning_rate=3e-3, momentum=0.8, second_momentum=0.95, adaptivity=1e-5, bits=16
    )

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train, and a width that the heads cannot share."""
        check_least(self, layers=1, rounds=1, local_steps=1, pairs_per_batch=1, pairs_per_site=1, learning_rate=0)
        check_least(self, rows_at_once=1, audit=0)
        if self.heads < 1 or self.width % self.heads:
            raise RecipeError(
                f"width must be a multiple of heads, got {self.width} and {self.heads}; "
                "change router.width or router.heads"
            )


class RouterNetwork(nn.Module):
    """g_φ: hidden states `[N, T, D]` → logits `[N, K]`.

    Attributes:
        examples: n_k `[K]`, the pairs that each site trained it on, added up over the rounds; empty: all alike.
    """

    def __init__(self, features: int, sites: int, config: RouterConfig) -> None:
        super().__init__()
        self.shape = (features, sites)
        self.config = config
        self.examples: tuple[int, ...] = ()
        self.enter = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, sites)
        # Beyond three sites an output starts lower, near the share of its targets that are 1: from σ(z) = ½ the K − 1
        # sites that push it down drown the one that pulls it up.
        with torch.no_grad():
            self.head.bias.sub_(math.log(max(1.0, (sites - 1) / 2)))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits z `[N, K]` for hidden states `[N, T, D]` and their mask `[N, T]`."""
        return cast(Tensor, self.head(self.penultimate(hidden, mask)))

    def weights(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return α `[N, K]`, rows summing to 1, for hidden states `[N, T, D]` and their mask `[N, T]`."""
        logits = self(hidden, mask)
        if self.config.prior_correction:
            logits = without_prior(logits, self.examples or (1,) * self.shape[1])
        return cast(Tensor, logits.softmax(dim=-1))

    def penultimate(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the linear head reads, `[N, width]`."""
        tokens = self.body(self.enter(hidden), src_key_padding_mask=~mask)
        last = tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(dim=1) - 1]
        return cast(Tensor, self.norm(last))

    def to_bytes(self) -> bytes:
        """Return the weights as safetensors bytes, as they travel."""
        return save({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()})

    def from_bytes(self, data: bytes) -> None:
        """Take weights that travelled.

        Raises:
            CheckpointError: names, shapes or types do not match, or a value is not finite.
        """
        self.load_state_dict(read_weights(data, self.state_dict()))


class LearnedRouter:
    """Encoder and network together, on the encoder's device: a `Router`."""

    def __init__(self, encoder: Encoder, network: RouterNetwork) -> None:
        self.encoder = encoder
        self.network = network.eval().to(encoder.model.device)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return α of `Enc(x, y)`, `[N, K]`."""
        weights = []
        for span in chunks([len(c) for c in completions], self.network.config.rows_at_once):
            weights.append(self.network.weights(*self.encoder(prompts[span], images[span], completions[span])).cpu())
        return torch.cat(weights)


def client_id_loss(logits: Tensor, site: int) -> Tensor:
    """Return the mean over rows and outputs of BCE between `logits` `[N, K]` and the one-hot target of `site`.

    The rows hold chosen and rejected answers in equal number, so the mean is the paper's half sum.
    """
    target = torch.zeros_like(logits)
    target[:, site] = 1.0
    return binary_cross_entropy_with_logits(logits, target)


def without_prior(logits: Tensor, examples: Sequence[int]) -> Tensor:
    """Return `log σ(z_k) − log p_k`, the log density ratio log f_k / Σ_j p_j f_j, `[N, K]`.

    A site without examples has taught the router nothing of itself: it gets −∞.

    Args:
        logits: z `[N, K]` of a head that was trained one against all.
        examples: n_k `[K]`, not all 0.
    """
    n = torch.tensor(examples, dtype=logits.dtype, device=logits.device)
    return torch.where(n > 0, logsigmoid(logits) - (n / n.sum()).log(), -torch.inf)


def save_router(path: Path, network: RouterNetwork) -> None:
    """Write the network to the folder `path`, whole or not at all."""

    def write(folder: Path) -> None:
        write_atomic(folder / "router.safetensors", network.to_bytes())
        described = {
            "features": network.shape[0],
            "sites": network.shape[1],
            "config": msgspec.to_builtins(network.config),
            "examples": network.examples,
        }
        write_atomic(folder / "router.json", msgspec.json.format(msgspec.json.encode(described)))

    replace_folder(path, write)


class _Described(msgspec.Struct, forbid_unknown_fields=True):
    features: int
    sites: int
    config: RouterConfig
    examples: tuple[int, ...] = ()


def load_router(path: Path) -> RouterNetwork:
    """Load what `save_router` wrote.

    Raises:
        CheckpointError: the folder is absent, damaged or of another kind.
    """
    try:
        described = msgspec.json.decode((path / "router.json").read_bytes(), type=_Described)
        weights = (path / "router.safetensors").read_bytes()
        network = RouterNetwork(described.features, described.sites, described.config)
    except (OSError, RuntimeError, msgspec.MsgspecError, RecipeError) as error:
        raise CheckpointError(f"{path}: not a router ({error}); train one with `accord router train`") from error
    counts = described.examples
    if counts and (len(counts) != described.sites or min(counts) < 0 or max(counts) == 0):
        raise CheckpointError(
            f"{path}: examples are {counts!s:.60}, expected a count for each of {described.sites} sites, not all 0; "
            "train the router again with `accord router train`"
        )
    network.examples = counts
    network.from_bytes(weights)
    return network.eval()
