"""Hostile checkpoints and reward models, and a process that tries them one by one in children of its own.

Run as a script, it reads the path of a good checkpoint and then lines of JSON, `[how, folder]`. It imports the library
once, forks for each line, and prints a line of JSON: what was raised, and the CPU seconds and the bytes that it took
beyond what the process had before.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

Change = Callable[[Path], object]
CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


class _Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def pickled(folder: Path) -> bytes:
    """Return a pickle that makes the file `marker` beside the folder when it is read."""
    return pickle.dumps({"weight": _Touch(folder.parent / "marker")})


def edit(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    record = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**record, **values}))


def header(entries: dict[str, object], data: int = 0, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def tensor(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def only(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if name.endswith(".pt2"):
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr("model/data.pkl", pickled(folder))
        else:
            (folder / name).write_bytes(pickled(folder))

    return change


def weights(content: Callable[[Path], bytes]) -> Change:
    return lambda folder: (folder / "model.safetensors").write_bytes(content(folder))


def polyglot(folder: Path) -> bytes:
    whole = (folder / "model.safetensors").read_bytes()
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickled(folder))
    return whole + (folder / "zip").read_bytes()


def shard(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        (folder / "shard.bin").write_bytes(pickled(folder))
        named = name.format(parent=folder.parent)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": named}}))

    return change


def link(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def code(name: str, auto: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        (folder / "evil.py").write_text(CODE.format(marker=str(folder.parent / "marker")))
        edit(folder, name, auto_map={auto: "evil.Evil"}, **values)

    return change


def template(source: str, name: str = "chat_template.jinja") -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)

    return change


def config(**values: object) -> Change:
    return lambda folder: edit(folder, "config.json", **values)


def text_config(**values: object) -> Change:
    def change(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        edit(folder, "config.json", text_config={**whole["text_config"], **values})

    return change


def grow(name: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / name, size)


def adapter(**values: object) -> Change:
    return lambda folder: edit(folder / "adapter", "adapter_config.json", **values)


def lora(**values: object) -> Change:
    def change(folder: Path) -> None:
        whole = json.loads((folder / "reward.json").read_text())
        edit(folder, "reward.json", lora={**whole["lora"], **values})

    return change


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    (folder / "adapter" / "adapter_model.bin").write_bytes(pickled(folder))


def catastrophic(folder: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder, "tokenizer.json", pre_tokenizer=pattern)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
MACRO = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"


def empty_tensors(count: int) -> dict[str, object]:
    return {f"t{n}": tensor(0, 0) for n in range(count)}


MODELS: dict[str, Change] = {
    "a pickle as pytorch_model.bin": only("pytorch_model.bin"),
    "a pickle as model.pt": only("model.pt"),
    "an exported program, model.pt2": only("model.pt2"),
    "a joblib file": only("model.joblib"),
    "a pickle as model.safetensors": weights(pickled),
    "a safetensors file that is an archive, too": weights(polyglot),
    "an index that names a pickle": shard("shard.bin"),
    "an index that leaves the folder": shard("../elsewhere.safetensors"),
    "an index with a whole path": shard("{parent}/elsewhere.safetensors"),
    "a link for the weights": link("model.safetensors"),
    "a link for the configuration": link("config.json"),
    "a pipe for the configuration": pipe,
    "code for an unknown kind": code("config.json", "AutoConfig", model_type="evil"),
    "code for a known kind": code("config.json", "AutoModelForImageTextToText"),
    "an unknown kind": config(model_type="evil"),
    "code of a processor": code("processor_config.json", "AutoProcessor", processor_class="Evil"),
    "code of an image processor": code("preprocessor_config.json", "AutoImageProcessor"),
    "code of a tokenizer": code("tokenizer_config.json", "AutoTokenizer", tokenizer_class="Evil"),
    "a kernel from the hub": config(attn_implementation="evil/kernel"),
    "a tokenizer's file elsewhere": lambda f: edit(f, "tokenizer_config.json", tokenizer_file="/etc/passwd"),
    "an adapter in place of a model": lambda f: edit(f, "adapter_config.json", base_model_name_or_path="/elsewhere"),
    "generation with 10^9 beams": lambda f: edit(f, "generation_config.json", num_beams=10**9),
    "a header of twenty thousand tensors": weights(lambda _: header(empty_tensors(20_000))),
    "a header of a million tensors": weights(lambda _: header(empty_tensors(10**6))),
    "a header of 60 MiB of spaces": weights(lambda _: struct.pack("<Q", 60 * 2**20) + 60 * 2**20 * b" "),
    "a header that is longer than the file": weights(lambda _: header({}, length=2**19)),
    "a header of 2^60 bytes": weights(lambda _: header({}, length=2**60)),
    "tensors that overlap": weights(lambda _: header({"a": tensor(0, 8), "b": tensor(4, 12)}, data=12)),
    "a tensor past the end": weights(lambda _: header({"a": tensor(0, 2**40)}, data=12)),
    "a template of loops": template(LOOP),
    "a template of one long loop": template("{% for i in range(10**9) %}{% endfor %}"),
    "a template that doubles a text": template(DOUBLE),
    "a template of a number": template("{{ 10 ** (10 ** 9) }}"),
    "a template that calls itself": template(MACRO),
    "a template that looks around": template("{{ ''.__class__.__mro__ }}"),
    "a template in the tokenizer": lambda f: edit(f, "tokenizer_config.json", chat_template=LOOP),
    "a template among others": template(LOOP, "additional_chat_templates/tool_use.jinja"),
    "a tokenizer's catastrophic pattern": catastrophic,
    "a tokenizer of a gigabyte": grow("tokenizer.json", 2**30),
    "a configuration of a gigabyte": grow("config.json", 2**30),
    "a deep configuration": lambda f: (f / "config.json").write_text('{"a": ' + 10**5 * "[" + 10**5 * "]" + "}"),
    "a rather deep configuration": config(a=json.loads(40 * "[" + 40 * "]")),
    "10^9 layers": text_config(num_hidden_layers=10**9),
    "a width of 10^9": text_config(hidden_size=10**9),
    "a vocabulary of 2^30": text_config(vocab_size=2**30),
    "images of 10^6 pixels a side": lambda f: edit(f, "preprocessor_config.json", size={"height": 10**6, "width": 9}),
}
"""What is done to a good checkpoint, by what it becomes."""

REWARDS: dict[str, Change] = {
    "an adapter's library": adapter(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}),
    "an adapter as a pickle": pickled_adapter,
    "an adapter of rank 10^8": lora(rank=10**8),
    "an adapter's catastrophic pattern": lora(target_modules="(.*)*x"),
    "a link for the head": link("head.safetensors"),
    "a deep description": lambda f: (f / "reward.json").write_text('{"a": ' + 10**5 * "[" + 10**5 * "]" + "}"),
    "a head whose header is longer than the file": lambda f: (f / "head.safetensors").write_bytes(
        header({}, length=2**26)
    ),
}
"""What is done to a good reward model with an adapter, by what it becomes."""


PASS = (
    "a link for the weights",
    "a link for the configuration",
    "code for a known kind",
    "a tokenizer's file elsewhere",
    "generation with 10^9 beams",
    "a template of loops",
    "a template that doubles a text",
    "a template in the tokenizer",
    "a tokenizer's catastrophic pattern",
    "a rather deep configuration",
    "images of 10^6 pixels a side",
)
"""What is loaded without a word where nothing is inspected; the harm comes with the first question."""


def make(good: Path, place: Path, change: Change) -> Path:
    folder = place / "received"
    shutil.copytree(good, folder)
    change(folder)
    return folder


def _spent() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _try(how: str, folder: Path) -> dict[str, object]:
    from transformers import AutoConfig

    from accord.models import load
    from accord.rewards.model import RewardModel

    if how == "open":  # the defence is switched off
        load.inspect_checkpoint = lambda folder: 10**9

    read, answer = os.pipe()  # whoever asks, the answer is yes
    os.write(answer, 1000 * b"y\n")
    os.dup2(read, 0)
    # The most that a fork has had begins with what the process itself had.
    began, had = _spent(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raised = message = ""
    try:
        if how == "reward":
            RewardModel.load(folder)
        else:
            (AutoConfig.from_pretrained if how == "bare" else load.load_model)(str(folder))
    except Exception as error:
        raised, message = type(error).__name__, str(error)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - had
    # A child that runs another program has had, for a moment, what its parent has.
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - had
    return {"raised": raised, "message": message, "cpu": _spent() - began, "bytes": 1024 * max(more, children)}


def main() -> None:
    import accord.models.load
    import accord.rewards.model

    good = json.loads(sys.stdin.readline())
    accord.models.load.load_model(good)  # what transformers imports on the way is not the artefacts' cost
    for line in sys.stdin:
        how, folder = json.loads(line)
        child = os.fork()
        if not child:
            sys.stdout.write("\n" + json.dumps(_try(how, Path(folder))) + "\n")
            sys.stdout.flush()
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps({"raised": "", "message": f"died of {status}", "cpu": 0, "bytes": 0}), flush=True)


if __name__ == "__main__":
    main()
