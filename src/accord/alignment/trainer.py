"""`trl.GRPOTrainer` that computes once what the completions of a prompt share.

    a step of the stock trainer, G completions a prompt      here
    processor and image decoder      2 G times a prompt      once
    prefill of the rollout           G rows                  1 row
    decoding                         G rows, G caches        distinct continuations beside each other, 1 cache
    log-probabilities, both models   G rows of L + R         1 row of L + Σ R over distinct completions
    backward pass                    the same G rows         the same 1 row

Nothing is approximated: losses and gradients are those of full rows up to rounding. On its first batch the trainer
compares the log-probabilities of the two ways, and goes back to full rows with a warning if they differ. Rollouts rest
on the same masks and are not compared by themselves. Where a model cannot share a prefix, prompts and images are still
encoded by Accord (`accord.models.inputs`), a row for every completion; a warning says so, once, with the reason.

A reward function may offer `start(prompts, completions, **columns)`, called as soon as both are there. What it begins,
such as a question to distant sites, goes on beside the reference's log-probabilities; the call with the same lists ends
it. Where a router reads what the reference has read, the question waits for the reference instead.

What of TRL this relies on (tested with 1.16): the methods overridden here, with their arguments; that a model given a
fused head takes `shift_labels`; and the keys `prompt_ids`, `completion_ids` and `completion_mask` of a batch.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft import PeftModel
from PIL.Image import Image
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import prepare_multimodal_messages
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from accord.alignment.parking import Parking
from accord.data.images import picture_key
from accord.errors import CheckpointError, DataError, DataWarning, warn_once
from accord.federation.engine import Done
from accord.federation.ranks import Processes
from accord.models.attention import skip_hidden, tell_alone, why_alone
from accord.models.encoder import Encoder, StateKey, last_states, prompt_words, state_key
from accord.models.inputs import Encoded, build_batch, chunks, completion_text, encode, join_images, taken_by
from accord.models.inspection import inspect_checkpoint
from accord.models.load import Processor, without_adapter
from accord.models.prefix import Packed, pack, prefix_positions
from accord.models.rollout import sample_completions, widest_float
from accord.models.tower import is_pinned, pin
from accord.types import Prompt

TOLERANCE = 1e-4
"""In float32: largest difference of a log-probability from that of a full row, in nats."""
COARSE_TOLERANCE = 2e-2
"""In half precision: largest mean difference, since single tokens are rounded by more than that in either way."""

SHARED_GENERATION = {
    *("do_sample", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "suppress_tokens"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    *("max_length", "use_cache", "disable_compile", "transformers_version"),
    *("output_attentions", "output_hidden_states", "_from_model_config"),
}
"""Settings of a rollout that the shared way follows, or that change nothing; any other makes rollouts stock ones."""

_STOCK_FIELDS = set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
"""What the stock log-probabilities take."""

Row = dict[str, Any]


@dataclass(frozen=True)
class _Prompts:
    """The distinct prompts of a batch of rollouts: their tokens, and what the processor made of their images."""

    encoded: list[Encoded]  # on the CPU: the images of all prompts of a step would fill a GPU
    counts: list[int]  # images of each
    device: torch.device

    @cached_property
    def ids(self) -> list[list[int]]:
        """The tokens of each."""
        return [each.ids for each in self.encoded]

    @cached_property
    def token_types(self) -> list[list[int]] | None:
        """Which tokens of each are the image's, for models with positions along several axes."""
        known = [each.kinds.get("mm_token_type_ids") for each in self.encoded]
        return None if None in known else cast(list[list[int]], known)

    def take(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the image tensors of `rows` on the device, a prompt as often as it is named."""
        joined = join_images([self.encoded[p].images for p in rows])
        return {name: tensor.to(self.device) for name, tensor in joined.items()}


class _Read(NamedTuple):
    """What is read of a completion: its tokens, and its text where the encoder would read that alike."""

    ids: tuple[int, ...]
    word: str | None


class Objective(Protocol):
    """A loss in the place of TRL's; a plain function qualifies."""

    def __call__(self, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, groups: Tensor, /) -> Tensor:
        """Return the loss of whole groups.

        Args:
            logps: log π of every token, `[N, T]`.
            old: log π of the policy that drew them, `[N, T]`.
            advantages: of every completion, `[N]`.
            mask: 1 for tokens of the completion, `[N, T]`.
            groups: number of each completion's group, `[N]`.
        """
        ...


class SharedPrefixTrainer(GRPOTrainer):
    """`GRPOTrainer` with shared prefixes, which also resumes the weights of a vision-language model.

    Args:
        *args: as `GRPOTrainer`.
        shared_prefix: False for a full row of every completion.
        encoder: a frozen encoder of the same weights as the reference; it is handed the reference's hidden states.
        parking: leaves out questions on which a step fails; None lets it fail, and so do several processes that
            compute one forward pass together, or have vLLM.
        rollout_rows: completions that are sampled at once; 0 for as many as one forward pass has in training.
        objective: the loss, beside which the KL term to the reference stays; None for TRL's.
        **settings: as `GRPOTrainer`.
    """

    args: GRPOConfig

    def __init__(
        self,
        *args: object,
        shared_prefix: bool = True,
        encoder: Encoder | None = None,
        parking: Parking | None = None,
        rollout_rows: int = 0,
        objective: Objective | None = None,
        **settings: object,
    ) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        told = self.tools or self.environment_factories or self.rollout_func or self.chat_template_kwargs
        self._untold = not told
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # which count every process's forward passes
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        # TRL has loaded the reference by itself; beside LoRA there is none.
        if len(models) > 1 and is_pinned(models[0]):
            pin(models[1])
        policy = without_adapter(models[0])
        alone = why_alone(policy)
        alone = alone or ("the model is spread over several processes" if sharded else "")
        alone = alone or ("tools, environments or template arguments are told" if told else "")
        if shared_prefix and alone:
            tell_alone(policy, alone)
        self._shares = shared_prefix and not alone
        for model in models if self._shares and not self.use_transformers_continuous_batching else ():
            skip_hidden(without_adapter(model))  # continuous batching knows only the names that it knows
        self._encoder, self._alike = encoder, cast(bool | None, None)
        # Then processes speak to each other within a forward pass, or a rollout, where none could fail alone.
        joined = self.accelerator.num_processes > 1 and (sharded or self.use_vllm)
        self._parking = None if joined else parking
        self._trying: Processes | None = None  # those that do a step which may fail, as long as they do
        self._rollout_rows, self._objective = rollout_rows, objective
        self._hides = False  # whether the images of the batch at hand are with us and not with TRL
        self._checked: set[int] = set()  # the policy and the reference, once either was compared
        self._prompts: dict[str, _Prompts] = {}  # by mode: an evaluation may come between two updates on one batch
        self._given: list[Row] = []  # the rows of the batch as they came
        self._bare: list[Row] = []  # and with their images in their prompts
        self._first: list[int] = []  # of every distinct prompt, its first row
        self._prompt_of: list[int] = []  # of every row, its distinct prompt

    @property
    def _mode(self) -> str:
        return "train" if cast(nn.Module, self.model).training else "eval"

    # ------------------------------------------------------------------------------------------------------------------
    # Rollouts: the images are taken out of the rows before TRL sees them, and kept once per prompt.

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        if self._parking is None or self._mode != "train":
            return self._completions(inputs)
        told, processes = copy.deepcopy(self._metrics), self._parking.processes

        def step(rows: list[Row]) -> dict[str, Any]:
            self._metrics = copy.deepcopy(told)  # what failed, or was tried by itself, leaves nothing there
            self._trying = processes
            try:
                return self._completions(rows)
            finally:
                self._trying = None

        done = self._parking.do(inputs, cast(int, self.num_generations), step)
        if self._parking.failures:
            self._metrics["train"]["failed"].append(len(self._parking.failures))
            self._metrics["train"]["parked"].append(len(self._parking.parked))
        return done

    def _by_itself(self, work: Callable[[], Done]) -> Done:
        """Do what each process does by itself between what all do together; if it fails in one, it does in all."""
        return work() if self._trying is None else self._trying.agree(work)

    def _completions(self, inputs: list[Row]) -> dict[str, Any]:
        stock: Callable[..., dict[str, Any]] = super()._generate_and_score_completions
        self._hides, self._given = self._untold, inputs
        if self._encoder is not None:
            self._encoder.remember({}, [])
        if not self._hides:
            return stock(inputs)
        self._bare, self._prompt_of = self._by_itself(lambda: _distinct(inputs))
        self._first = [self._prompt_of.index(p) for p in range(max(self._prompt_of) + 1)]
        output = stock(self._bare)
        if self._hides:
            output["prompt_of"] = torch.tensor(self._prompt_of, device=self.accelerator.device)
        if self._objective is not None:
            output["group_of"] = torch.arange(len(inputs), device=self.accelerator.device) // cast(
                int, self.num_generations
            )
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], list[Any] | None, dict[str, Any]]:
        stock: Callable[..., tuple[list[list[int]], Any, dict[str, Any]]] = super()._tokenize_prompts
        if not self._hides:
            return stock(prompts)
        return self._by_itself(lambda: self._encoded(stock, prompts))

    def _encoded(self, stock: Callable[..., Any], prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        distinct = [prompts[first] for first in self._first]
        if isinstance(distinct[0], str):  # no conversation: without a template, and without an image
            encoded = [Encoded(list(ids)) for ids in stock(distinct)[0]]
            pictures: list[list[Image]] = [[] for _ in distinct]
        else:
            processor = cast(Processor, self.processing_class)
            sees = not isinstance(processor, PreTrainedTokenizerBase)
            turns = [prepare_multimodal_messages(prompt) if sees else prompt for prompt in distinct]
            pictures = [_images({"prompt": prompt}) for prompt in turns]
            encoded = encode(processor, turns, pictures)
        model = self.accelerator.unwrap_model(self.model)
        names = taken_by(model)
        encoded = [each.only(names) for each in encoded]
        self._prompts[self._mode] = _Prompts(encoded, [len(own) for own in pictures], self.accelerator.device)
        return [encoded[p].ids for p in self._prompt_of], None, {}

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list[Any] | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], Any]:
        stock: Callable[..., tuple[list[list[int]], Any]] = super()._generate_single_turn
        if not self._hides:
            return stock(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        prompts = self._prompts[self._mode]
        sampling = None
        if self._shares and not self.use_vllm and not self.use_transformers_continuous_batching:
            sampling = self._sampling()
        if sampling is None:
            pictures = [_images(row) or None for row in self._given]
            fields: dict[str, Any] = prompts.take(self._prompt_of)
            for name in prompts.encoded[0].kinds:
                fields[name] = [prompts.encoded[p].kinds[name] for p in self._prompt_of]
            given = (prompt_ids, pictures if any(pictures) else None, fields, num_generations)
            return self._by_itself(lambda: stock(*given))
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=cast(dict[str, Any] | None, self.args.gradient_checkpointing_kwargs),
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            noise = self._noise(len(self._prompt_of), cast(int, sampling.max_new_tokens), model.device)
            said = self._by_itself(lambda: self._sample(without_adapter(model), prompts, sampling, noise))
        return said, None

    def _sample(
        self, model: PreTrainedModel, prompts: _Prompts, sampling: GenerationConfig, noise: Tensor
    ) -> list[list[int]]:
        """Sample a completion for every row, `rollout_rows` at once, by its row of uniform numbers."""
        at_once = self._rollout_rows or self.args.per_device_train_batch_size
        rows: list[list[int]] = [[] for _ in prompts.ids]
        for row, p in enumerate(self._prompt_of):
            rows[p].append(row)
        said: dict[int, list[int]] = {}
        for span in chunks([len(those) for those in rows], at_once):
            asked = range(len(rows))[span]
            types = None if prompts.token_types is None else prompts.token_types[span]
            order = [(p, row) for p in asked for row in rows[p]]
            drawn = sample_completions(
                model,
                prompts.ids[span],
                prompts.take(asked),
                [p - asked.start for p, _ in order],
                sampling,
                noise[[row for _, row in order]],
                types,
            )
            said |= {row: ids for (_, row), ids in zip(order, drawn, strict=True)}
        return [said[row] for row in range(len(self._prompt_of))]

    def _noise(self, rows: int, length: int, device: torch.device) -> Tensor:
        """Return uniform numbers `[rows, length]`: of several processes each its share of what one would draw."""
        count, own = self.accelerator.num_processes, self.accelerator.process_index
        noise = torch.rand(count * rows, length, dtype=widest_float(device), device=device)
        if count > 1:
            torch.distributed.broadcast(noise, src=0)
        return noise[own * rows : (own + 1) * rows]

    def _sampling(self) -> GenerationConfig | None:
        """Return what the rollouts are told, by TRL and by the model itself; None if the shared way cannot follow."""
        model = cast(Any, without_adapter(self.accelerator.unwrap_model(self.model)))
        told, _ = model._prepare_generation_config(self.generation_config)
        neutral = GenerationConfig._get_default_generation_params()
        asked = {name for name, value in told.to_dict().items() if value is not None and value != neutral.get(name)}
        if told.do_sample and asked <= SHARED_GENERATION:
            return cast(GenerationConfig, told)
        wanted = ", ".join(sorted(asked - SHARED_GENERATION)) or "do_sample = false"
        warn_once(f"every rollout has a row of its own, because the generation settings say {wanted}; more work")
        return None

    def _generate(self, prompts: list[Any]) -> Any:
        made = super()._generate(prompts)
        if self._untold and not self._reference_comes_first():
            columns = {name: [row[name] for row in self._given] for name in self._given[0] if name != "prompt"}
            for reward in self.reward_funcs:
                start = getattr(inspect.unwrap(cast(Callable[..., object], reward)), "start", None)
                if callable(start):
                    start(prompts=prompts, completions=made[3], **columns)
        return made

    def _reference_comes_first(self) -> bool:
        """Return whether the router is to read what the reference reads of this batch."""
        return self._hides and self._shares and self.beta != 0 and self.ref_model is not None and self._reads_alike()

    def _calculate_rewards(self, inputs: list[Row], prompts: Any, completions: Any, ids: Any) -> Tensor:
        stock: Callable[..., Tensor] = super()._calculate_rewards
        return stock(self._given, prompts, completions, ids)  # with their image columns, which `inputs` may have lost

    # ------------------------------------------------------------------------------------------------------------------
    # Updates: rows are regrouped by prompt wherever TRL asks for log-probabilities.

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        parts = cast(int, self.args.steps_per_generation)
        every = parts * self.num_iterations
        fresh = self._mode == "train" and (self._step % every == 0 or self._buffered_inputs is None)
        inputs = super()._prepare_inputs(generation_batch)
        if self._hides and fresh and parts > 1:  # TRL shuffled rows over the micro-batches: bring prompts together
            whole = _by_prompt(cast(Any, self._buffered_inputs), parts)
            self._buffered_inputs = cast(Any, whole)
            inputs = whole[self._step % parts]
        return inputs

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._hides = "prompt_of" in inputs
        if self._hides:
            self._prompt_of = inputs["prompt_of"].tolist()
        stock: Callable[..., Tensor] = super()._compute_loss
        return stock(model, inputs) if self._objective is None else self._own_loss(self._objective, model, inputs)

    def _own_loss(self, objective: Objective, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the objective's loss with the KL term, and note what TRL notes of its own: kl and entropy."""
        mask = inputs["completion_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.shape[1],
            compute_entropy=True,
        )
        old = inputs.get("old_per_token_logps")
        old = logps.detach() if old is None else old
        loss = objective(logps, old, inputs["advantages"], mask, inputs["group_of"])
        noted = {"entropy": entropies}
        if self.beta != 0.0:
            apart = inputs["ref_per_token_logps"] - logps
            noted["kl"] = kl = apart.exp() - apart - 1
            loss = loss + self.beta * ((kl * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
        for name, values in noted.items():
            assert values is not None
            sums = torch.stack([(values.detach() * mask).sum(), mask.sum()])
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
            self._metrics[self._mode][name].append(total / max(count, 1))
        return loss / (self.current_gradient_accumulation_steps if self._mode == "train" else 1)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        stock = super()._get_per_token_logps_and_entropies
        told = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        rows = (input_ids, attention_mask, logits_to_keep)
        if self._hides:
            if self._shares and id(model) not in self._checked:
                self._check(model, *rows, batch_size)
            if self._shares and not compute_aux_loss:
                packed = functools.partial(self._packed, model, *rows, batch_size, entropy=compute_entropy)
                return (*self._by_itself(packed), None)
            images = {**images, **self._full_rows(self._prompts[self._mode], input_ids, logits_to_keep)}
        full = functools.partial(stock, model, *rows, batch_size=batch_size, **told, **images)
        return cast(tuple[Tensor, Tensor | None, Tensor | None], self._by_itself(full))

    def _full_rows(self, prompts: _Prompts, input_ids: Tensor, keep: int) -> dict[str, Any]:
        """Return the image arguments of the stock method, an image for every row."""
        rows = [prompts.encoded[p] for p in self._prompt_of]
        images: dict[str, Any] = prompts.take(self._prompt_of)
        if images:
            images["num_images"] = [prompts.counts[p] for p in self._prompt_of]
            if "image_grid_thw" not in images:  # what a row's pixels count, be it images or tiles
                images["num_tiles"] = [len(row.images["pixel_values"]) for row in rows]
        end = input_ids.shape[1] - keep
        for name in rows[0].kinds:
            images[name] = types = torch.zeros_like(input_ids)
            for n, row in enumerate(rows):
                types[n, end - len(row.ids) : end] = torch.tensor(row.kinds[name])
                types[n, end:] = row.answers
        if left_out := self._left_out(prompts):
            family = without_adapter(self.accelerator.unwrap_model(self.model)).config.model_type
            raise CheckpointError(
                f"{family} reads {', '.join(left_out)} of prompts about several images, which TRL's full rows do not "
                "hand over; leave alignment.shared_prefix true, or give every prompt one image"
            )
        return {name: value for name, value in images.items() if name in _STOCK_FIELDS}

    def _left_out(self, prompts: _Prompts) -> list[str]:
        """Return what the model reads of several images and the stock log-probabilities do not take.

        It says how many images a prompt has; where all have one, it says nothing.
        """
        read = {name for each in prompts.encoded if each.count > 1 for name in each.images}
        return sorted(read - _STOCK_FIELDS)

    def _packed(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        *,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities and entropies `[B, R]` of completions, computed once per prompt and distinct text.

        A completion is packed as the prefix's last token and all but its own last one, so that every token is predicted
        in its own column: `[prefix without its end | end, c_0 … c_{R-2} | end, c'_0 … ]`.
        """
        prompts, plain = self._prompts[self._mode], without_adapter(self.accelerator.unwrap_model(model))
        shown = attention_mask[:, -logits_to_keep:].bool()
        lengths = shown.sum(dim=1).tolist()  # 0 for a truncated completion that is masked out
        columns = input_ids[:, -logits_to_keep:].tolist()
        texts = [tuple(ids[:length]) for ids, length in zip(columns, lengths, strict=True)]
        said: dict[int, dict[tuple[int, ...], int]] = {p: {} for p in sorted(set(self._prompt_of))}
        for p, text in zip(self._prompt_of, texts, strict=True):
            said[p][text] = 0  # and later, where its values begin
        logps, entropies, size = [], [], 0
        states: dict[StateKey, Tensor] = {}
        keep = self.ref_model is not None and model is self.ref_model and self._reads_alike()
        lines = [(p, list(those)) for p, those in said.items()]
        for span in chunks([len(those) for _, those in lines], batch_size or len(texts)):
            chunk, parts = [p for p, _ in lines[span]], [those for _, those in lines[span]]
            prefixes = [prompts.ids[p] for p in chunk]
            types = None if prompts.token_types is None else [prompts.token_types[p] for p in chunk]
            images = prompts.take(chunk)
            read = self._read(chunk, parts) if keep else None
            known = prefix_positions(plain, prefixes, types, images)
            packed = pack(
                plain,
                [prefix[:-1] for prefix in prefixes],
                [
                    [
                        [prefix[-1], *ids]
                        for ids in ((each.ids for each in read[n]) if read else (t[:-1] for t in those))
                    ]
                    for n, (those, prefix) in enumerate(zip(parts, prefixes, strict=True))
                ],
                None if known is None else [each[..., :-1] for each in known],
                pad=self._tokenizer.pad_token_id,
            )
            labels = torch.full(packed.input_ids.shape, -100)
            for row, (p, those) in enumerate(lines[span]):
                for start, text in zip(packed.starts[row], those, strict=True):
                    labels[row, start : start + len(text)] = torch.tensor(text, dtype=torch.long)
                    said[p][text] = size + row * labels.shape[1] + start
            with self.accelerator.autocast(), last_states(plain) as seen:
                out = model(**packed.model_inputs(), **images, shift_labels=labels.to(plain.device), fused_lm_head=True)
            if read:
                states |= self._states(chunk, packed, read, seen[-1])
            logps.append(out.log_probs.flatten())
            entropies.append(out.entropy.flatten() if entropy else out.log_probs.new_zeros(0))
            size += labels.numel()
        if keep and self._encoder is not None:
            self._encoder.remember(states, [image for row in self._bare for image in _images(row)])
        begins = torch.tensor([said[p][text] for p, text in zip(self._prompt_of, texts, strict=True)])
        where = begins[:, None] + torch.arange(logits_to_keep)
        where = where.clamp(max=size - 1).to(shown.device)

        def rows(values: list[Tensor]) -> Tensor:
            return torch.cat(values)[where].masked_fill(~shown, 0.0)

        return rows(logps), rows(entropies) if entropy else None

    def _reads_alike(self) -> bool:
        """Return whether the router's encoder would read the same tokens, in the same precision, as the reference."""
        if self._encoder is None or self.accelerator.mixed_precision != "no":
            return False
        if self._alike is None:
            row, processor = self._bare[self._first[0]], cast(Processor, self.processing_class)
            prompt, images = _turns(row["prompt"]), _images(row)
            read = build_batch(processor, [prompt], [images], [[" x "]])
            ids = self._prompts[self._mode].ids[0]
            end = completion_text(processor, prompt, "")
            self._alike = (
                read.input_ids[0, : len(ids)].tolist() == ids
                and int((read.labels[0] != -100).int().argmax()) == len(ids)
                and completion_text(processor, prompt, " x ") == f" x {end}"  # templates may trim
            )
        return self._alike

    def _read(self, chunk: Sequence[int], texts: Sequence[Sequence[tuple[int, ...]]]) -> list[list[_Read]]:
        """Return what the reference reads of each completion: what the encoder would of its text, if it begins so.

        The text of a completion that was cut off is read with an end, which no token before it sees.
        """
        processor = cast(Processor, self.processing_class)
        words = self._tokenizer.batch_decode([ids for those in texts for ids in those], skip_special_tokens=True)
        end = completion_text(processor, _turns(self._bare[self._first[chunk[0]]]["prompt"]), "")
        again = self._tokenizer([word + end for word in words], add_special_tokens=False)["input_ids"]
        said = iter(zip(words, again, strict=True))

        def read(ids: tuple[int, ...]) -> _Read:
            word, tokens = next(said)
            alike = tuple(tokens[: len(ids)]) == ids
            return _Read(tuple(tokens) if alike else ids, word if alike else None)

        return [[read(ids) for ids in those] for those in texts]

    def _states(
        self, chunk: Sequence[int], packed: Packed, read: Sequence[Sequence[_Read]], hidden: Tensor
    ) -> dict[StateKey, Tensor]:
        """Return the states of each prompt with each completion that the encoder would read alike."""
        states: dict[StateKey, Tensor] = {}
        for row, p in enumerate(chunk):
            first = self._bare[self._first[p]]
            prefix = hidden[row, : len(self._prompts[self._mode].ids[p]) - 1]
            for start, (ids, word) in zip(packed.starts[row], read[row], strict=True):
                if word is not None:
                    key = state_key(_turns(first["prompt"]), _images(first), word)
                    states[key] = torch.cat([prefix, hidden[row, start : start + 1 + len(ids)]])
        return states

    def _check(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int, size: int | None) -> None:
        """Compare with full rows on the first batch; share no longer if a log-probability differs."""
        left_out = torch.tensor([float(bool(self._left_out(self._prompts[self._mode])))], device=input_ids.device)
        if self.accelerator.gather(left_out).any():
            self._checked.add(id(model))
            return  # there are no full rows; what is computed was compared with stock transformers before the run
        training = model.training
        mode, prompts = self._mode, self._prompts
        model.eval()  # dropout would make any two passes differ
        self._prompts = {"train": prompts[mode], "eval": prompts[mode]}
        stock = super()._get_per_token_logps_and_entropies

        def both() -> tuple[Tensor, Tensor]:
            images = self._full_rows(prompts[mode], input_ids, keep)
            full, _, _ = stock(model, input_ids, attention_mask, keep, batch_size=size, **images)
            return full, self._packed(model, input_ids, attention_mask, keep, size, entropy=False)[0]

        try:
            with torch.no_grad():
                full, shared = self._by_itself(both)
        finally:
            self._prompts = prompts
            model.train(training)
        shown = attention_mask[:, -keep:]
        exact = self.accelerator.mixed_precision == "no"
        exact &= without_adapter(self.accelerator.unwrap_model(model)).dtype == torch.float32
        apart = ((full - shared).abs() * shown).float()
        mine = apart.max() if exact else apart.sum() / shown.sum().clamp(min=1)
        found = self.accelerator.gather(mine.reshape(1)).max().item()  # every process decides alike
        if self.accelerator.gather(shown.sum().reshape(1)).sum():  # else nothing was compared
            self._checked.add(id(model))
        allowed = TOLERANCE if exact else COARSE_TOLERANCE
        if not found <= allowed:
            if self._encoder is not None:
                self._encoder.remember({}, [])
            self._shares = False
            warnings.warn(
                f"log-probabilities behind a shared prefix differ from those of full rows by {found:.2g} (allowed "
                f"{allowed:g}), so this model is trained with full rows, as stock TRL does; shared_prefix = false in "
                "the recipe's [alignment] does so from the start",
                DataWarning,
                stacklevel=2,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint.

        Vision-language models are saved under their original weight names, which `from_pretrained` alone translates
        back. The stock trainer finds none of its own names in the file, warns, and goes on from the base weights.
        """
        policy = self.accelerator.unwrap_model(model or self.model)
        if isinstance(policy, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            inspect_checkpoint(Path(resume_from_checkpoint))
            saved = type(policy).from_pretrained(
                resume_from_checkpoint, dtype=policy.dtype, use_safetensors=True, trust_remote_code=False
            )
            policy.load_state_dict(saved.state_dict())


def _turns(prompt: Any) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else cast(Prompt, prompt)


def _images(row: Mapping[str, Any]) -> list[Image]:
    """Return the images of a row: from its columns, or from its prompt's blocks.

    Raises:
        DataError: one cannot be read; the data set hands over why, in its place.
    """
    for column in ("image", "images"):
        if isinstance(error := row.get(column), DataError):
            raise error
    if row.get("images") is not None:
        return list(row["images"])
    if row.get("image") is not None:
        return [row["image"]]
    contents = [turn["content"] for turn in row["prompt"] if isinstance(turn, Mapping)]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return [block["image"] for block in blocks if block.get("image") is not None]


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """Put every row's images into its prompt; return the rows without image columns, and which are one prompt.

    Rows with the same conversation and the same pictures share one prompt object.
    """
    pictures: dict[int, tuple[object, ...]] = {}  # by identity, which repeated rows usually share
    prompts: dict[object, tuple[int, Any]] = {}
    bare, number = [], []
    for row in rows:
        images = _images(row)
        for image in images:
            if id(image) not in pictures:
                pictures[id(image)] = picture_key(image) if isinstance(image, Image) else (image,)
        key = (prompt_words(_turns(row["prompt"])), tuple(pictures[id(image)] for image in images))
        if key not in prompts:
            prompt = row["prompt"]
            own_columns = row.get("images") is not None or row.get("image") is not None
            prompts[key] = (len(prompts), prepare_multimodal_messages(prompt, images) if own_columns else prompt)
        n, prompt = prompts[key]
        number.append(n)
        bare.append({**{name: row[name] for name in row if name not in ("image", "images")}, "prompt": prompt})
    return bare, number


def _by_prompt(parts: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Deal rows out to the micro-batches anew, prompt after prompt."""
    rows = torch.cat([part["prompt_of"] for part in parts])
    if "group_of" in parts[0]:  # a prompt that was drawn twice has two groups
        rows = rows * len(rows) + torch.cat([part["group_of"] for part in parts])
    order = rows.argsort(stable=True)
    merged = {
        name: torch.cat([part[name] for part in parts])[order] if value.ndim else value
        for name, value in parts[0].items()
    }
    return cast(list[dict[str, Any]], split_tensor_dict(merged, count))
