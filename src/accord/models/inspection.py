"""Look at a checkpoint folder before anything else reads it: a folder from elsewhere is data, and hostile until shown.

transformers and PEFT believe a folder. They offer to run its code (`auto_map`), follow its links and paths, read any
file that an index names (a pickle, too), build whatever model a configuration describes, and render its chat template
without a limit. So a folder is refused here, in a second and within 256 MB, where it

- has a link out of the folder, or what is no ordinary file, where a file is read
- names code, another checkpoint in its place, a kernel, or a file that lies elsewhere
- has a configuration that is too long, too deep, or of sizes that no model has
- has weights whose header is too long, or not that of a safetensors file
- has a chat template or a tokenizer's pattern that does not end (tried in a process of its own, `accord.models.probe`)

Not seen: a template that loops only over a conversation that was not tried, and what weights have learnt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules import module

from accord.errors import CheckpointError

MAX_CONFIG = 8 * 2**20
"""Bytes of a configuration or an index."""

MAX_VOCABULARY = 64 * 2**20
"""Bytes of a file of a tokenizer."""

MAX_TEMPLATE = 256 * 2**10
"""Bytes of a chat template."""

MAX_HEADER = 2**20
"""Bytes of the header of a safetensors file."""

MAX_TENSORS = 10_000
"""Tensors in one safetensors file."""

MAX_DEPTH = 32
"""Tables and lists within each other, in a configuration."""

VALUES_PER_BYTE = 8
"""Values that a configuration's model may have for each byte of the folder's weights; packed weights have a few."""

_LIMITS = (
    (r"(layers?|depths?|heads|experts|blocks|stages)$", 4096),
    (r"(beams|beam_groups|return_sequences)$", 64),
    (r"(seq_len|seq_length|image_tokens)$", 2**16),
    (r"(height|width)$", 2**14),
    (r"", 2**31),
)
"""The largest whole number under a key, by the first pattern that its end matches; a tokenizer's have no limit."""

_CONFIG = re.compile(r".*config.*\.json|.*\.index\.json|(special_tokens_map|added_tokens|chat_template)\.json")
_VOCABULARY = re.compile(r"(tokenizer.*|vocab|reward)\.json|.*\.(txt|model|spm)")


def inspect_checkpoint(folder: Path) -> int:
    """Refuse a folder that transformers, PEFT or safetensors should not read; see the module's docstring.

    Args:
        folder: a checkpoint's, an adapter's or a reward model's; folders within it are not looked at, but for
            `additional_chat_templates`.

    Returns:
        The bytes of its weights.

    Raises:
        CheckpointError: names the file, what is wrong with it, and what to do.
    """
    weights, templates, patterns = 0, list[str](), list[str]()
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        _refuse_link(folder, file)
        if file.suffix == ".safetensors":
            inspect_weights(file)
            weights += file.stat().st_size
        elif file.suffix == ".jinja":
            templates.append(_text(file, MAX_TEMPLATE))
        elif _VOCABULARY.fullmatch(file.name) and not _CONFIG.fullmatch(file.name):
            content = _read(file, MAX_VOCABULARY)
            if re.fullmatch(r"tokenizer.*\.json", file.name):
                patterns += _patterns(file, content)
        elif _CONFIG.fullmatch(file.name):
            record = _parsed(file)
            _inspect_record(folder, file, record)
            templates += _templates_in(record)
    _probe(folder, frozenset(templates) - _shipped_templates(), frozenset(patterns))
    return weights


def inspect_weights(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the header of a safetensors file, and return the shapes of its tensors.

    Raises:
        CheckpointError: the header is too long, names too many tensors, or is not that of a safetensors file.
    """
    _refuse_special(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER:
            raise _refused(file, f"its header has {length:,} bytes, at most {MAX_HEADER:,} are read")
        count = stream.read(length).count(b'"dtype"')
    if count > MAX_TENSORS:
        raise _refused(file, f"it names {count:,} tensors, at most {MAX_TENSORS:,} are read; split the file")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error


@contextmanager
def no_larger_than(checkpoint: str, values: int) -> Iterator[None]:
    """Stop the building of a model that has more values than its weights can fill; transformers draws the rest.

    Counted are the parameters and buffers on the device `meta`, on which transformers builds before it allocates.

    Raises:
        CheckpointError: the model has more than `values`.
    """
    built = 0

    def count(_module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal built
        if tensor is not None and tensor.is_meta:
            built += tensor.numel()
            if built > values:
                raise CheckpointError(
                    f"{checkpoint}: config.json describes a model of more than {values:,} values ({name} is one part "
                    "too many), which the folder's weights cannot fill; correct its sizes, or save the weights again"
                )

    hooks = (
        module.register_module_parameter_registration_hook(count),
        module.register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refused(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file}: {reason}; do not use this checkpoint unless you know where it comes from")


def _damaged(file: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{file}: cannot load the checkpoint ({reason}); check that the folder is complete")


def _refuse_link(folder: Path, file: Path) -> None:
    """Refuse a link out of the folder; the hub's cache links its files to those of its own folder `blobs`."""
    if file.is_symlink():
        root = folder.resolve()
        within = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
        if not any(file.resolve().is_relative_to(place) for place in within):
            raise _refused(file, "it is a link out of the folder; put the file itself there")


def _refuse_special(file: Path) -> None:
    if not file.is_file():
        raise _refused(file, "it is no ordinary file")


def _read(file: Path, limit: int) -> bytes:
    _refuse_special(file)
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise _refused(file, f"it is longer than {limit:,} bytes")
    return content


def _text(file: Path, limit: int) -> str:
    try:
        return _read(file, limit).decode()
    except UnicodeDecodeError as error:
        raise _damaged(file, error) from error


def _parsed(file: Path) -> Mapping[str, object]:
    text = _text(file, MAX_CONFIG)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _damaged(file, f"it must hold a JSON object, got {text[:40]!r}")
    return record


def _inspect_record(folder: Path, file: Path, record: Mapping[str, object]) -> None:
    if file.name.endswith(".index.json"):
        shards = record.get("weight_map")
        for shard in set(shards.values()) if isinstance(shards, Mapping) else [shards]:
            if not (isinstance(shard, str) and re.fullmatch(r"[^/\\]+\.safetensors", shard)):
                raise _refused(file, f"it names {shard!r} as a file of weights, which must be a .safetensors beside it")
        return
    seen: list[tuple[str, object, int]] = [("", record, 0)]
    while seen:
        key, value, depth = seen.pop()
        if depth > MAX_DEPTH:
            raise _refused(file, f"its tables and lists are more than {MAX_DEPTH} deep")
        if reason := _wrong_value(folder, file, key, value):
            raise _refused(file, reason)
        if isinstance(value, Mapping):
            seen += [(str(name), item, depth + 1) for name, item in value.items()]
        elif isinstance(value, list):
            seen += [(key, item, depth + 1) for item in value]


def _wrong_value(folder: Path, file: Path, key: str, value: object) -> str:
    """Return why a value in a configuration is refused; empty where it is not."""
    if key == "auto_map" and value:
        return (
            "`auto_map` names code of its own, which is never run; remove the key if transformers has this kind of "
            "model built in"
        )
    if key == "parent_library" and not re.match(r"(transformers|accord)\.", str(value)):
        return f"{key} {value!r} is code outside transformers, which is not imported"
    if key.endswith("_implementation") and "/" in json.dumps(value):
        return f"{key} {value!r} is a kernel that would be fetched and run"
    if key.endswith("_file") and isinstance(value, str):
        named = (folder / value).resolve()
        if key != "special_tokens_map_file" and named.exists() and named.parent != folder.resolve():
            return f"{key} is {value!r}, a file outside the folder"
    if isinstance(value, int) and not re.match(r"tokenizer|special_tokens|added_tokens", file.name):
        limit = next(limit for pattern, limit in _LIMITS if re.search(pattern, key))
        if abs(value) > limit:
            return f"{key} is {value:,}, at most {limit:,} is believed" if abs(value) < 10**30 else f"{key} is absurd"
    return ""


def _templates_in(record: Mapping[str, object]) -> Iterator[str]:
    """Name the chat templates in a configuration: one text, or several with names."""
    found = record.get("chat_template")
    for each in found if isinstance(found, list) else [found]:
        template = each.get("template") if isinstance(each, Mapping) else each
        if isinstance(template, str):
            yield template


class _Tokenizer(msgspec.Struct):
    """The parts of a tokenizer.json that may hold patterns; its vocabulary is passed over."""

    normalizer: object = None
    pre_tokenizer: object = None
    post_processor: object = None
    decoder: object = None


def _patterns(file: Path, content: bytes) -> set[str]:
    try:
        parts = msgspec.structs.asdict(msgspec.json.decode(content, type=_Tokenizer))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _damaged(file, error) from error
    found, seen = set[str](), [*parts.values()]
    while seen:
        value = seen.pop()
        if isinstance(value, dict):
            if isinstance(pattern := value.get("Regex"), str):
                found.add(pattern)
            seen += value.values()
        elif isinstance(value, list):
            seen += value
    return found


@cache
def _shipped_templates() -> frozenset[str]:
    return frozenset(file.read_text() for file in Path(__file__).parent.glob("checkpoints/*/chat_template.jinja"))


def _probe(folder: Path, templates: frozenset[str], patterns: frozenset[str]) -> None:
    if (templates or patterns) and (reason := _tried(templates, patterns)):
        raise _refused(folder, f"its chat template or tokenizer {reason}")


@cache
def _tried(templates: frozenset[str], patterns: frozenset[str]) -> str:
    """Return why templates or patterns are refused; empty where they are not. A process costs half a second."""
    given = json.dumps({"templates": sorted(templates), "patterns": sorted(patterns)})
    script = Path(__file__).with_name("probe.py")
    try:
        ended = subprocess.run(
            [sys.executable, "-I", str(script)], input=given, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return "did not end in a minute"
    if ended.returncode:
        return f"takes more than a second, or more memory than it may (status {ended.returncode})"
    return str(json.loads(ended.stdout))
