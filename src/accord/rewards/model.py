"""A reward model: any vision-language or text-only checkpoint with a scalar head on the last token of the answer.

    R(x, y) = w · h_last(image, prompt, y) + b                  a real number per (prompt x, answer y)
    R(x, y) = w · SiLU(V h_last(image, prompt, y) + c) + b      with two layers, V [D, D]

The backbone is what `accord.models.load.load_model` loads, used whole or with a LoRA adapter; its language-modelling
head is not computed.
On disk:

    reward.json          format, mean and deviation of the training scores, rows at once, which backbone and head
    head.safetensors     w [1, D], b [1]: "weight" and "bias"; of two layers "0.weight" to "2.bias"
    backbone/            an ordinary checkpoint with its processor
    adapter/             a PEFT adapter on the backbone                     (LoRA)

The folder needs nothing else and can be moved, but for an adapter on a checkpoint that ships with Accord or is on the
hub: reward.json names that one instead, and `load` refuses another under its name. A backbone that is trained whole is
float32, in memory and on disk: a loaded model scores as the saved one did. Under an adapter it keeps its own type.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast

import msgspec
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import resolve_revision

from accord.data.images import Pictures
from accord.errors import CheckpointError
from accord.models.attention import skip_hidden
from accord.models.inputs import Batch, build_batch, chunks, shared_inputs
from accord.models.inspection import inspect_checkpoint, inspect_weights
from accord.models.load import (
    PREFIX,
    LoraSettings,
    Processor,
    add_lora,
    load_model,
    locate,
    lora_config,
    without_adapter,
)
from accord.runs import replace_folder
from accord.types import Prompt

Head: TypeAlias = Literal["linear", "mlp"]
"""One linear layer, or two with SiLU between them."""


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of a site's raw scores over the chosen and rejected answers that it trained on."""

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, scores: Tensor, epsilon: float = 1e-6) -> Tensor:
        """Return `(R − μ) / (σ + ε)` (MoR, section 3.2)."""
        return (scores - self.mean) / (self.deviation + epsilon)


@dataclass(frozen=True)
class _Manifest:
    format: str
    hidden_size: int
    standardisation: Standardisation
    lora: LoraSettings | None
    base: str | None  # the backbone's name; None where it is in the folder
    fingerprint: str | None = None  # of the backbone's weights, not checked where it is None
    rows_at_once: int = 512
    head: Head = "linear"


_FORMAT = "accord-reward-model-1"

PARTS: Final = ("adapter", "backbone", "head.safetensors", "reward.json")
"""What may stand in a reward model's folder."""


class RewardModel(nn.Module):
    """Score answers with a backbone and a head.

    Args:
        backbone: the model under the head; a `PeftModel` when it is adapted with LoRA.
        processor: the backbone's processor.
        base: name of the checkpoint that a LoRA adapter belongs to; None to save the backbone with the adapter.
        fingerprint: of the weights that `base` had when it was loaded.
        lora: settings of the adapter, if there is one.
        head: of one linear layer, or of two.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        processor: Processor,
        *,
        base: str | None = None,
        fingerprint: str | None = None,
        lora: LoraSettings | None = None,
        head: Head = "linear",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.processor = processor
        self.base, self.fingerprint = base, fingerprint
        self.lora = lora
        self.standardisation = Standardisation()
        self.rows_at_once = 512  # (prompt, completion) rows of one forward pass in `score`
        skip_hidden(self._plain)
        self.features = self._plain.config.get_text_config().hidden_size  # D
        self.kind = head
        last = nn.Linear(self.features, 1, dtype=torch.float32)
        nn.init.normal_(last.weight, std=1 / math.sqrt(self.features + 1))
        nn.init.zeros_(last.bias)
        self.head: nn.Linear | nn.Sequential = last
        if head == "mlp":
            self.head = nn.Sequential(nn.Linear(self.features, self.features, dtype=torch.float32), nn.SiLU(), last)
        self.head.to(self._plain.device)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str, *, lora: LoraSettings | None = None, head: Head = "linear"
    ) -> RewardModel:
        """Put an untrained head on `checkpoint`, with a fresh LoRA adapter if `lora` is given."""
        if lora is None:
            return cls(*load_model(checkpoint, trainable=True), head=head)
        named = checkpoint.startswith(PREFIX) or not Path(locate(checkpoint)).is_dir()
        fingerprint = checkpoint_fingerprint(checkpoint) if named else None
        model, processor = load_model(checkpoint, revision=fingerprint or "main")
        base = checkpoint if named else None
        return cls(add_lora(model, lora), processor, base=base, fingerprint=fingerprint, lora=lora, head=head)

    @property
    def _plain(self) -> PreTrainedModel:
        """The transformers model, with LoRA layers inside it if there are any."""
        return without_adapter(self.backbone)

    @property
    def architecture(self) -> str:
        """The transformers class of the backbone."""
        return type(self._plain).__name__

    def forward(self, batch: Batch) -> Tensor:
        """Return raw scores `[N]` in float32."""
        states = self.last_states(batch)
        with torch.autocast(states.device.type, enabled=False):  # differences of scores are small beside the scores
            return cast(Tensor, self.head(states).squeeze(-1))

    @contextmanager
    def checkpointing(self, wanted: bool) -> Iterator[None]:
        """Compute the backbone's activations again in the backward pass, in place of keeping them."""
        if not wanted:
            yield
            return
        self._plain.activation_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            self._plain.activation_checkpointing_disable()

    def last_states(self, batch: Batch) -> Tensor:
        """Return what the head reads, h_last `[N, D]`, in float32."""
        inner = cast(PreTrainedModel, self._plain.base_model)
        inputs, where = shared_inputs(inner, batch)
        hidden = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # [P · S, D]
        last = where.gather(1, batch.last_token[:, None]).squeeze(1)
        return cast(Tensor, hidden[last].float())

    def score(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """Return one tensor of standardised scores per prompt, `[len(completions[p])]`, in evaluation mode."""
        return [self.standardisation(raw) for raw in self._of_each(self, prompts, images, completions)]

    def states(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]]
    ) -> list[Tensor]:
        """Return what the head reads of every answer, per prompt `[len(completions[p]), D]`, in evaluation mode."""
        return self._of_each(self.last_states, prompts, images, completions)

    @torch.no_grad()
    def _of_each(
        self,
        of: Callable[[Batch], Tensor],
        prompts: Sequence[Prompt],
        images: Sequence[Pictures],
        completions: Sequence[Sequence[str]],
    ) -> list[Tensor]:
        out: list[Tensor] = []
        with _evaluating(self):
            for span in chunks([len(c) for c in completions], self.rows_at_once):
                batch = build_batch(self.processor, prompts[span], images[span], completions[span])
                found = of(batch.to(self._plain.device)).cpu()
                out.extend(found.split([len(c) for c in completions[span]]))
        return out

    def save(self, path: Path) -> None:
        """Write the model to the folder `path`, whole or not at all."""

        def write(folder: Path) -> None:
            weights = None
            if isinstance(self.backbone, PeftModel):
                # By default PEFT looks where the base came from, then on the hub, whether its vocabulary has changed.
                self.backbone.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
                inside = self._plain.state_dict()
                weights = {name.replace(".base_layer", ""): t for name, t in inside.items() if ".lora_" not in name}
            if self.base is None:
                self._plain.save_pretrained(folder / "backbone", state_dict=weights)
                self.processor.save_pretrained(folder / "backbone")
            manifest = _Manifest(
                _FORMAT,
                self.features,
                self.standardisation,
                self.lora,
                self.base,
                self.fingerprint if self.base else checkpoint_fingerprint(str(folder / "backbone")),
                self.rows_at_once,
                self.kind,
            )
            save_file({name: t.cpu() for name, t in self.head.state_dict().items()}, folder / "head.safetensors")
            (folder / "reward.json").write_bytes(msgspec.json.format(msgspec.json.encode(asdict(manifest))))

        replace_folder(path, write)

    @classmethod
    def load(cls, path: Path) -> RewardModel:
        """Load what `save` wrote; the scores are identical.

        Raises:
            CheckpointError: the folder is absent, is not a reward model, its parts do not fit together, or it is
                refused (`accord.models.inspection`).
        """
        try:
            if (path / "reward.json").is_file():
                inspect_checkpoint(path)
        except CheckpointError as error:
            reason = str(error).rpartition("; ")[0]
            raise CheckpointError(f"{reason}; the file is damaged, train the site again") from error
        try:
            manifest = msgspec.json.decode((path / "reward.json").read_bytes(), type=_Manifest)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no reward.json, so this is not a reward model; train one with `accord site train`"
            ) from None
        except (msgspec.MsgspecError, RecursionError) as error:
            raise CheckpointError(
                f"{path / 'reward.json'}: {error}; the file is damaged, train the site again"
            ) from error
        if manifest.format != _FORMAT:
            raise CheckpointError(
                f"{path}: format {manifest.format!r}, this version reads {_FORMAT!r}; train the site again"
            )
        place = manifest.base or str(path / "backbone")
        plain, processor = load_model(place, revision=manifest.fingerprint or "main")
        found = checkpoint_fingerprint(place, manifest.fingerprint)
        if manifest.fingerprint not in (None, found):
            raise CheckpointError(
                f"{path}: {place} is not the backbone that this reward model was trained on: its fingerprint is "
                f"{found!s:.12}…, expected {manifest.fingerprint!s:.12}…; put that one back, or train the site again"
            )
        backbone = _load_adapter(plain, path / "adapter", manifest.lora) if manifest.lora else plain
        base, fingerprint, lora = manifest.base, manifest.fingerprint, manifest.lora
        model = cls(backbone, processor, base=base, fingerprint=fingerprint, lora=lora, head=manifest.head)
        if model.features != manifest.hidden_size:
            raise CheckpointError(
                f"{path}: the head expects {manifest.hidden_size} features, the backbone gives "
                f"{model.features}; the folder mixes parts of two models, train the site again"
            )
        try:
            weights = load_file(path / "head.safetensors")
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise ValueError("it holds a value that is not finite")
            model.head.load_state_dict(weights)
        except Exception as error:  # safetensors raises its own untyped errors on a damaged file
            raise CheckpointError(
                f"{path / 'head.safetensors'}: {error}; the file is damaged, train the site again"
            ) from error
        model.standardisation, model.rows_at_once = manifest.standardisation, manifest.rows_at_once
        return model.eval()


def checkpoint_fingerprint(place: str, revision: str | None = None) -> str | None:
    """Return the SHA-256 over a folder's weight files, or the commit that `revision` is on the hub, None if unknown."""
    folder = Path(locate(place))
    if not folder.is_dir():
        return getattr(resolve_revision(place, revision), "resolved", revision)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _load_adapter(plain: PreTrainedModel, folder: Path, settings: LoraSettings) -> PeftModel:
    """Put a saved adapter on its backbone; what it is, our own description says and not PEFT's, which is not read."""
    try:
        if not (folder / "adapter_model.safetensors").is_file():  # PEFT would look for a pickle, then on the hub
            raise FileNotFoundError("adapter_model.safetensors is missing")
        inspect_checkpoint(folder)
        shapes = inspect_weights(folder / "adapter_model.safetensors")
        if any(shape[0] != settings.rank for name, shape in shapes.items() if "lora_A" in name):
            raise ValueError(f"its rank is not {settings.rank}")  # before so many weights are allocated
        with warnings.catch_warnings():
            # PEFT completes half an adapter with fresh weights and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(plain, str(folder), config=lora_config(settings), trust_remote_code=False)
    except Exception as error:  # PEFT and safetensors raise whatever a damaged folder makes them raise
        raise CheckpointError(
            f"{folder}: cannot load the adapter ({error!s:.200}); the folder is damaged, train the site again"
        ) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
