"""A reward model: any vision-language checkpoint with a scalar head on the last token of the answer.

    R(x, y) = w · h_last(image, prompt, y) + b                  a real number per (prompt x, answer y)

The backbone is what `AutoModelForImageTextToText` loads, used whole or with a LoRA adapter; its language-modelling head
is not computed.
On disk:

    reward.json          format, mean and deviation of the training scores, how the backbone is stored
    head.safetensors     w [1, D], b [1]
    backbone/            an ordinary checkpoint with its processor          (full fine-tuning)
    adapter/             a PEFT adapter; the base checkpoint is named in reward.json   (LoRA)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import msgspec
import torch
from peft import PeftModel
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from accord.errors import CheckpointError
from accord.models.inputs import Batch, build_batch, model_inputs
from accord.models.load import LoraSettings, add_lora, load_vlm
from accord.runs import replace_folder
from accord.types import Prompt


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
    base: str | None


_FORMAT = "accord-reward-model-1"


class RewardModel(nn.Module):
    """Score answers with a backbone and a linear head.

    Args:
        backbone: the model under the head; a `PeftModel` when it is adapted with LoRA.
        processor: the backbone's processor.
        base: name or path of the checkpoint that a LoRA adapter belongs to.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        processor: ProcessorMixin,
        *,
        base: str | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.processor = processor
        self.base = base
        self.lora = lora
        self.standardisation = Standardisation()
        size = self._plain.config.get_text_config().hidden_size
        self.head = nn.Linear(size, 1, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(size + 1))
        nn.init.zeros_(self.head.bias)
        self.head.to(self._plain.device)

    @classmethod
    def from_checkpoint(cls, checkpoint: str, *, lora: LoraSettings | None = None) -> RewardModel:
        """Put an untrained head on `checkpoint`, with a fresh LoRA adapter if `lora` is given."""
        model, processor = load_vlm(checkpoint)
        return cls(add_lora(model, lora) if lora else model, processor, base=checkpoint if lora else None, lora=lora)

    @property
    def _plain(self) -> PreTrainedModel:
        """The transformers model, with LoRA layers inside it if there are any."""
        return cast(
            PreTrainedModel, self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone
        )

    @property
    def architecture(self) -> str:
        """The transformers class of the backbone."""
        return type(self._plain).__name__

    def forward(self, batch: Batch) -> Tensor:
        """Return raw scores `[N]` in float32."""
        inner = cast(PreTrainedModel, self._plain.base_model)
        hidden = inner(**model_inputs(inner, batch), use_cache=False).last_hidden_state  # [N, T, D]
        rows = torch.arange(len(hidden), device=hidden.device)
        return cast(Tensor, self.head(hidden[rows, batch.last_token].float()).squeeze(-1))

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Image],
        completions: Sequence[Sequence[str]],
        *,
        batch_rows: int = 512,
    ) -> list[Tensor]:
        """Return one tensor of standardised scores per prompt, `[len(completions[p])]`, in evaluation mode.

        Rows of the same prompt are kept together up to `batch_rows`, so that its image is encoded once.
        """
        out: list[Tensor] = []
        with _evaluating(self):
            for chunk in _chunks([len(c) for c in completions], batch_rows):
                span = slice(chunk.start, chunk.stop)
                batch = build_batch(self.processor, prompts[span], images[span], completions[span])
                raw = self(batch.to(self._plain.device)).cpu()
                out.extend(self.standardisation(raw).split([len(c) for c in completions[span]]))
        return out

    def save(self, path: Path) -> None:
        """Write the model to the folder `path`, whole or not at all."""
        manifest = _Manifest(_FORMAT, self.head.in_features, self.standardisation, self.lora, self.base)

        def write(folder: Path) -> None:
            target = folder / ("adapter" if self.lora else "backbone")
            self.backbone.save_pretrained(str(target))
            if not self.lora:
                self.processor.save_pretrained(target)
            save_file(
                {"weight": self.head.weight.data.cpu(), "bias": self.head.bias.data.cpu()}, folder / "head.safetensors"
            )
            (folder / "reward.json").write_bytes(msgspec.json.format(msgspec.json.encode(asdict(manifest))))

        replace_folder(path, write)

    @classmethod
    def load(cls, path: Path) -> RewardModel:
        """Load what `save` wrote; the scores are identical.

        Raises:
            CheckpointError: the folder is absent, is not a reward model, or its parts do not fit together.
        """
        try:
            manifest = msgspec.json.decode((path / "reward.json").read_bytes(), type=_Manifest)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no reward.json, so this is not a reward model; train one with `accord site train`"
            ) from None
        except msgspec.MsgspecError as error:
            raise CheckpointError(
                f"{path / 'reward.json'}: {error}; the file is damaged, train the site again"
            ) from error
        if manifest.format != _FORMAT:
            raise CheckpointError(
                f"{path}: format {manifest.format!r}, this version reads {_FORMAT!r}; train the site again"
            )
        if manifest.lora:
            plain, processor = load_vlm(manifest.base or "")
            backbone: PreTrainedModel | PeftModel = _load_adapter(plain, path / "adapter")
        else:
            backbone, processor = load_vlm(str(path / "backbone"))
        model = cls(backbone, processor, base=manifest.base, lora=manifest.lora)
        if model.head.in_features != manifest.hidden_size:
            raise CheckpointError(
                f"{path}: the head expects {manifest.hidden_size} features, the backbone gives "
                f"{model.head.in_features}; the folder mixes parts of two models, train the site again"
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
        model.standardisation = manifest.standardisation
        return model.eval()


def _load_adapter(plain: PreTrainedModel, folder: Path) -> PeftModel:
    try:
        if not (folder / "adapter_model.safetensors").is_file():  # PEFT would look for a pickle, then on the hub
            raise FileNotFoundError("adapter_model.safetensors is missing")
        with warnings.catch_warnings():
            # PEFT completes half an adapter with fresh weights and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(plain, str(folder))
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


def _chunks(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Split prompts into consecutive runs of at most `limit` rows (a single larger prompt stays whole)."""
    start, rows = 0, 0
    for p, size in enumerate(sizes):
        if rows and rows + size > limit:
            yield range(start, p)
            start, rows = p, 0
        rows += size
    if start < len(sizes):
        yield range(start, len(sizes))
