"""Load Hugging Face checkpoints, shipped, local or from the hub, and adapt them with LoRA.

A vision-language model comes with its processor, a text-only one with its tokenizer; both are called alike, and all
else is the same.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from accord.errors import CheckpointError, RecipeError, check_least
from accord.models.inspection import VALUES_PER_BYTE, inspect_checkpoint, no_larger_than
from accord.models.pixels import process_once
from accord.models.tower import pin
from accord.runs import replace_folder

SHIPPED = Path(__file__).parent / "checkpoints"
PREFIX = "accord/"
FETCHED = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
"""What is fetched of a checkpoint on the hub; nothing else is read."""

OPTIONAL = ("torchvision", "num2words")
"""Packages of the extra `vlm`, which the processors of some families need."""

Quantized: TypeAlias = Literal["", "nf4"]
"""How a frozen base is stored: in its checkpoint's type, or in 4 bits."""

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
"""What makes a model's inputs: a processor of images and text, or the tokenizer of a text-only model."""


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter on the linear layers of the language model (Hu et al. 2021); the vision tower stays frozen."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = (
        r".*(language_model|text_model|model\.layers).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )

    def __post_init__(self) -> None:
        """Refuse an adapter without weights or effect, and a dropout that leaves nothing."""
        check_least(self, rank=1, alpha=1, dropout=0)
        if not self.dropout < 1:
            raise RecipeError(f"dropout must be below 1, got {self.dropout}; lower dropout")
        # Python tries every way to match; a few unbounded parts side by side are as many as it can try.
        if re.search(r"\)[*+{]", self.target_modules) or len(re.findall(r"[*+}]", self.target_modules)) > 4:
            raise RecipeError(
                f"target_modules must repeat no group and at most four parts, got {self.target_modules[:80]!r}; "
                "name the modules as .*(one|another)"
            )


def locate(checkpoint: str) -> str:
    """Return where `checkpoint` is: a shipped one (`accord/<name>`), a folder, or an id on the Hugging Face hub.

    Raises:
        CheckpointError: no such shipped checkpoint, or a path-like name without a folder.
    """
    if checkpoint.startswith(PREFIX):
        folder = SHIPPED / checkpoint.removeprefix(PREFIX)
        if not (folder / "config.json").is_file():
            have = (
                ", ".join(sorted(PREFIX + p.name for p in SHIPPED.iterdir() if p.is_dir()))
                if SHIPPED.is_dir()
                else "none"
            )
            raise CheckpointError(f"{checkpoint!r} does not ship with Accord; shipped are: {have}")
        return str(folder)
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: no config.json, so this is not a Hugging Face checkpoint; name the folder that holds one"
            )
        return str(path)
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
        raise CheckpointError(
            f"{checkpoint!r}: there is no such folder; name a checkpoint folder or a Hugging Face model id"
        )
    return checkpoint


def device() -> torch.device:
    """Return where models are put: the accelerator that torch finds (CUDA, MPS, …), otherwise the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def inspected(checkpoint: str, revision: str) -> Iterator[tuple[str, int]]:
    """Give a folder that was inspected, and the bytes of its weights; whatever reading it raises is typed.

    Raises:
        CheckpointError: the checkpoint is absent, incomplete or refused (`accord.models.inspection`).
    """
    place = locate(checkpoint)
    try:
        if not Path(place).is_dir():
            place = snapshot_download(place, revision=revision, allow_patterns=[*FETCHED], ignore_patterns=["*/*"])
        if Path(place, "adapter_config.json").exists():  # transformers would load the model that it names
            raise CheckpointError(f"{checkpoint}: this is an adapter and no model; merge it into its base")
        yield place, inspect_checkpoint(Path(place))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile folder makes transformers raise whatever it meets
        missing = [name for name in OPTIONAL if isinstance(error, ImportError) and name in str(error).lower()]
        if missing:
            raise CheckpointError(
                f"{checkpoint}: its processor needs {' and '.join(missing)}, which comes with an extra; run: pip "
                "install 'accord[vlm]' (torch and torchvision must be releases that belong together)"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{checkpoint}: cannot load the checkpoint ({reason}); check the name and that the folder is complete"
        ) from error


def load_config(checkpoint: str) -> PreTrainedConfig:
    """Load the configuration of a checkpoint.

    Raises:
        CheckpointError: it is absent, damaged or refused.
    """
    with inspected(checkpoint, "main") as (place, _):
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(place, trust_remote_code=False))


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint alone.

    Raises:
        CheckpointError: it is absent, damaged or refused.
    """
    with inspected(checkpoint, "main") as (place, _):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(place, trust_remote_code=False))


def reads_images(checkpoint: str) -> bool:
    """Tell a vision-language checkpoint from a text-only one, by its configuration.

    Raises:
        CheckpointError: it is absent, damaged or refused.
    """
    return type(load_config(checkpoint)) in AutoModelForImageTextToText._model_mapping


def load_model(
    checkpoint: str, *, revision: str = "main", trainable: bool = False, quantize: Quantized = ""
) -> tuple[PreTrainedModel, Processor]:
    """Load a model that answers questions, about images or without any, onto `device()`, and its processor.

    Code from the checkpoint is never run, and its folder is inspected before it is read (`accord.models.inspection`).
    The vision tower is frozen, and stays in evaluation mode through any `model.train()`, unless the checkpoint's
    config.json says `"freeze_vision": false`, as those of models whose tower is trained with the rest do
    (`accord.models.tower`). What is saved from the model says the same.

    Args:
        checkpoint: what `locate` finds.
        revision: a branch, tag or commit of a checkpoint on the hub; a folder has none.
        trainable: load it in float32, as whatever is trained whole must be: a bfloat16 weight has 8 significant bits,
            and an update of 1e-6 is rounded away. A frozen model keeps its checkpoint's type, under an adapter too.
        quantize: "nf4" for the linear layers of the language model that an adapter goes onto in 4 bits (`nf4`).

    Raises:
        RecipeError: it is to be quantized, and bitsandbytes is not installed.
        CheckpointError: it is absent, incomplete, or of another kind (a vision-only model, or one that only reads).
    """
    if quantize:
        check_quantized()
    with inspected(checkpoint, revision) as (place, weights):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        kinds = (AutoModelForImageTextToText, AutoProcessor), (AutoModelForCausalLM, AutoTokenizer)
        kind = next((each for each in kinds if type(config) in each[0]._model_mapping), None)
        if kind is None:
            raise CheckpointError(
                f"{checkpoint}: a {config.model_type!r} model cannot answer questions; "
                "use a checkpoint that AutoModelForImageTextToText or AutoModelForCausalLM loads"
            )
        processor = cast(Processor, kind[1].from_pretrained(place, trust_remote_code=False))
        if isinstance(processor, PreTrainedTokenizerBase) and kind[1] is AutoTokenizer:
            _ready_tokenizer(checkpoint, processor)
        with no_larger_than(checkpoint, VALUES_PER_BYTE * weights):
            loaded = kind[0].from_pretrained(
                place,
                trust_remote_code=False,
                dtype=torch.float32 if trainable else "auto",
                use_safetensors=True,
                output_loading_info=True,
                **(nf4(kind[0], config) if quantize else {}),
            )
        model, found = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    if found["missing_keys"]:  # transformers draws these at random and goes on
        raise CheckpointError(
            f"{checkpoint}: {len(found['missing_keys'])} weights are missing, {min(found['missing_keys'])} first; "
            "the folder is incomplete or mixes two models, save the checkpoint again"
        )
    sees = kind[1] is AutoProcessor
    if sees and (getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None):
        raise CheckpointError(
            f"{checkpoint}: no image processor or no tokenizer; save the processor into the same folder"
        )
    if sees:
        process_once(processor.image_processor)
    tokenizer_of(processor).padding_side = "left"  # generation continues from the last column
    if model.generation_config is not None and not model.generation_config.suppress_tokens:
        model.generation_config.suppress_tokens = placeholder_tokens(model) or None
    if quantize:
        for layer in model.modules():  # on some CPUs evaluation would be in another layout, with coarser scales
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.to(device())  # type: ignore[arg-type]  # the signature of transformers' wrapper has lost `self`
    if getattr(model.config, "freeze_vision", True):
        pin(model)
    return model, processor


def check_quantized() -> None:
    """Refuse a base in 4 bits where nothing can read it.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            'alignment.quantize = "nf4" needs bitsandbytes, which is not installed; run: pip install '
            "'accord[quantized]', or leave it out"
        )


def nf4(kind: type[AutoModelForImageTextToText | AutoModelForCausalLM], config: PreTrainedConfig) -> dict[str, object]:
    """Return what `from_pretrained` takes for a base in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

    Weights are of the type NF4 in blocks of 64 with scales of their own, which are quantized again. They are computed
    with in the checkpoint's type. What is no linear layer of the language model stays as it is.
    """
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    told = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=config.get_text_config().dtype or config.dtype or torch.float32,
        llm_int8_skip_modules=[name for name in layers if not re.fullmatch(LoraSettings().target_modules, name)],
    )
    return {"quantization_config": told, "device_map": {"": device()}}


def _ready_tokenizer(checkpoint: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """See to what the processor of a vision-language model always has: a chat template, and a token to pad with."""
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has no chat template, so that nothing says how a question is put; use a "
            "checkpoint that was tuned on instructions, or save chat_template.jinja into the folder"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, which a text-only model's is itself."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    return cast(PreTrainedTokenizerBase, processor.tokenizer)


def placeholder_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that stand for an image or a video in a prompt, and mean nothing in an answer."""
    ids = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
    return [i for i in ids if i is not None]


def save_model(model: PreTrainedModel, processor: Processor, path: Path) -> str:
    """Write an ordinary Hugging Face checkpoint to the folder `path`, whole or not at all; return the path."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    replace_folder(path, write)
    return str(path)


def lora_config(settings: LoraSettings) -> LoraConfig:
    """Translate our settings into PEFT's."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze `model` and add a trainable adapter to its language layers.

    Raises:
        RecipeError: as `adapter_errors`.
    """
    with adapter_errors(settings):
        return cast(PeftModel, get_peft_model(model, lora_config(settings)))


@contextmanager
def adapter_errors(settings: LoraSettings) -> Iterator[None]:
    """Name the setting where PEFT finds no layer, inside a trainer that adds the adapter too.

    Raises:
        RecipeError: `target_modules` is no regular expression, matches nothing, or a module that takes no adapter.
    """
    try:
        yield
    except (ValueError, re.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, re.error) and "target module" not in reason.lower().replace("_", " "):
            raise
        raise RecipeError(
            f"lora.target_modules = {settings.target_modules!r} fits no adapter to this model ({reason}); give a "
            "regular expression for whole names of linear layers, or leave it out for those of the language model"
        ) from error


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model, with LoRA layers inside it if there are any."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Let a frozen model compute as it did before an adapter came onto its layers and training began, to the bit."""
    adapters = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters]
    training = model.training
    try:
        model.eval()
        for layer in adapters:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in adapters:
            layer.enable_adapters(True)
        model.train(training)


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters `model` has."""
    return sum(parameter.numel() for parameter in model.parameters())


def seeded_adapter(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze `model` and add an adapter to it whose weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return add_lora(model, settings)
