"""What NVIDIA FLARE costs beside asking in one process: round trips, GRPO steps, bytes.

A consortium is provisioned in a scratch folder and runs on loopback: one FLARE server, a FLARE client for every site,
mutual TLS between them, and each site's model in a process of its own.

    trips   one message of 1 KB, 100 KB and 5 MB to every site at once, K sites, against the engine of one process
    step    a GRPO step, federations A (one process) and B (FLARE) in turn: A B A B …
    bytes   of the same steps: images once, against an image with every candidate, and against averaging LoRA weights

    python benchmarks/speed/flare.py trips --sites 3 8
    python benchmarks/speed/flare.py step --rounds 3 --steps 8
    python benchmarks/speed/flare.py bytes --steps 60
"""

from __future__ import annotations

import argparse
import contextlib
import logging as standard_logging
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import msgspec
import psutil
import torch
from transformers.utils import logging

from accord.federation.endpoint import Endpoint
from accord.federation.engine import InProcessEngine
from accord.federation.messages import (
    Card,
    CardRequest,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    encode,
    image_name,
)
from accord.federation.site import ScoreRange, Site
from accord.flare.engine import FlareEngine
from accord.flare.frames import listen, receive_frame, send_frame, site_socket, socket_folder
from accord.flare.kit import kit_of, start_command, start_environment
from accord.flare.launch import Production
from accord.flare.provision import Consortium, Member, Server, provision
from accord.models.load import LoraSettings, add_lora, load_model
from accord.models.tiny import FAMILIES
from accord.rewards.model import RewardModel

sys.path.insert(0, str(Path(__file__).parent))
import federation_step as steps

PAPER_MB = {"MoR": 4456.0, "LoRA": 214.0}
"""Lu et al. 2026, arXiv 2605.03426: total of a run, for K = 3."""


def answer(request):
    """Answer at once: what is timed is the way."""
    if isinstance(request, ScoreRequest):
        return ScoreReply(request.id, [[0.0] * len(item.candidates) for item in request.items])
    return Card(request.id, "none", 0, 0, 0, False, {})


def serve(name: str, path: Path, respond) -> None:
    """Answer for a site, for ever."""
    endpoint, listener = Endpoint(name, respond), listen(path)

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            send_frame(connection, endpoint(receive_frame(connection)))

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=one, args=(connection,), daemon=True).start()


def serve_model(name: str, path: Path) -> None:
    """Answer for a site with the reward model of `federation_step`'s site of that name, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {family: RewardModel.from_checkpoint(f"accord/{family}").eval() for family in FAMILIES}
    serve(name, path, Site(name, models[name], score_range=ScoreRange()).answer)


@contextlib.contextmanager
def consortium(names: list[str], *, models: bool = False) -> Iterator[FlareEngine]:
    """Run a consortium; with `models` each site's service is a process of its own."""
    with tempfile.TemporaryDirectory(prefix="accord-bench-") as scratch, contextlib.ExitStack() as stack:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        kits = Path(scratch) / "kits"
        provision(Consortium("bench", Server("lead", port=port), tuple(Member(n, "org") for n in names)), kits)
        processes = []

        def stop() -> None:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            child.kill()
                process.wait()

        stack.callback(stop)

        def start(command: list[str], environment: dict[str, str], log: str) -> None:
            with (Path(scratch) / log).open("wb") as file:
                environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))

        for name in ["server", *names]:
            kit = kit_of(kits / name)
            start(start_command(kit), start_environment(kit), f"{name}.log")
            if name == "server":
                continue
            path = site_socket(socket_folder(kits / name), name)
            if models:
                start([sys.executable, __file__, "serve", name, str(path)], {}, f"{name}-model.log")
            else:
                threading.Thread(target=serve, args=(name, path, answer), daemon=True).start()
        engine = FlareEngine(names, Production(kits / "operator"), socket_folder(kits / "server"), wait=300.0)
        stack.enter_context(engine)
        yield engine


def ask_until_there(engine: FlareEngine, names: list[str]) -> None:
    """Wait until every site answers."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        replies = engine.ask({name: CardRequest("card") for name in names}, deadline=60)
        if all(isinstance(reply, Card) for reply in replies.values()):
            return
        time.sleep(1)
    raise SystemExit(f"not all of {names} answered")


def trips(options: argparse.Namespace) -> None:
    """Time one message to all sites."""
    print("| sites | size | FLARE, ms | 90th percentile, ms | one process, ms | FLARE's memory a site, MB |")
    print("|---|---|---|---|---|---|")
    for count in options.sites:
        names = [f"site{n}" for n in range(count)]
        with consortium(names) as engine:
            ask_until_there(engine, names)
            here = InProcessEngine(dict.fromkeys(names, answer))
            clients = [p for p in psutil.process_iter(["cmdline"]) if "client" in " ".join(p.info["cmdline"] or [])]
            held = sum(p.memory_info().rss for p in clients if "accord-bench-" in " ".join(p.info["cmdline"]))
            for size in (1_000, 100_000, 5_000_000):
                seconds = {"flare": [], "here": []}
                for repetition in range(options.repetitions):
                    data = os.urandom(size)
                    item = ScoreItem([image_name(data)], [], ["yes", "no"])
                    requests = {name: ScoreRequest(f"s{repetition}", {item.images[0]: data}, [item]) for name in names}
                    for way, asked in (("here", here), ("flare", engine)):
                        if way == "flare":  # the bytes all at once, not names first: what is timed is the size
                            engine._outbox._sent.clear()
                        began = time.perf_counter()
                        replies = asked.ask(requests, deadline=120)
                        seconds[way].append(1000 * (time.perf_counter() - began))
                        assert all(isinstance(reply, ScoreReply) for reply in replies.values()), replies
                flare = sorted(seconds["flare"])
                print(
                    f"| {count} | {size / 1000:g} KB | {median(flare):.1f} | {flare[int(0.9 * len(flare))]:.1f} | "
                    f"{median(seconds['here']):.2f} | {held / count / 1e6:.0f} |",
                    flush=True,
                )


def step(options: argparse.Namespace) -> None:
    """Time GRPO steps, one process and FLARE in turn."""
    names = list(FAMILIES)
    with consortium(names, models=True) as engine:
        ask_until_there(engine, names)
        config = steps.AlignmentConfig(
            **{"steps": options.steps, "prompts_per_step": options.prompts, "group_size": options.group},
            **{"learning_rate": 0.0, "save_every": 0, "evaluate_every": 0},
        )
        clock = steps.Clock()
        reward = steps.federation(None, clock)
        ways = {"one process": reward.engine, "FLARE": engine}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        asking: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, carried in ways.items():
                reward.engine = carried
                inside = steps.Clock()
                plain, carried.ask = carried.ask, inside.around("ask", carried.ask)
                seconds[way] += steps.run_arm(reward, "accord/llava-clip-llama", config, reward.router.encoder)
                carried.ask = plain
                asking[way] += inside.spent["ask"][1:]
        print(f"{platform.machine()}, {psutil.cpu_count()} cores, torch {torch.__version__}; ", end="")
        print(f"P = {options.prompts}, G = {options.group}, K = {len(names)}, n = {len(seconds['FLARE'])} steps each\n")
        print("| | step, s | asking the sites, s |\n|---|---|---|")
        for way in ways:
            print(f"| {way} | {median(seconds[way]):.3f} | {median(asking[way]):.3f} |")
        print(f"| FLARE ÷ one process | {median(seconds['FLARE']) / median(seconds['one process']):.2f} | |")


def count_bytes(options: argparse.Namespace) -> None:
    """Count the bytes of GRPO steps, and of what else might have been sent."""
    reward = steps.federation(None, steps.Clock())
    counted = {"naive": 0, "candidates": 0, "text": 0, "images": 0}
    asked = reward.engine.ask

    def ask(requests, *, deadline=None):
        for request in requests.values():
            for item in request.items:
                counted["candidates"] += len(item.candidates)
                for candidate in item.candidates:
                    alone = msgspec.structs.replace(item, candidates=[candidate])
                    image = request.images[item.images[0]]
                    one = ScoreRequest("0", {item.images[0]: image}, [alone])
                    counted["naive"] += len(encode(one)) + len(encode(ScoreReply("0", [[0.5]])))
                    counted["images"] += len(image)
        return asked(requests, deadline=deadline)

    reward.engine.ask = ask
    config = steps.AlignmentConfig(
        **{"steps": options.steps, "prompts_per_step": options.prompts, "group_size": options.group},
        **{"learning_rate": 0.0, "save_every": 0, "evaluate_every": 0},
    )
    steps.run_arm(reward, "accord/llava-clip-llama", config, reward.router.encoder)
    sent = sum(c.bytes_to_site + c.bytes_from_site for c in reward.engine.traffic.counts.values())
    model, _ = load_model("accord/llava-clip-llama")
    adapted = add_lora(model, LoraSettings(rank=4))
    adapter = sum(p.numel() * 2 for p in adapted.parameters() if p.requires_grad)  # bfloat16, as in the paper
    each = options.steps
    print(f"P = {options.prompts}, G = {options.group}, K = 3, {each} steps, {counted['candidates']} candidates\n")
    print("| | KB a step | to ours |\n|---|---|---|")
    rows = {
        "images once (Accord)": sent,
        "an image with every candidate": counted["naive"],
        "LoRA rank 4, a round of K = 3, both ways": 2 * 3 * adapter * each,
    }
    for name, total in rows.items():
        print(f"| {name} | {total / each / 1000:.1f} | {total / sent:.1f} |")
    text = (counted["naive"] - counted["images"]) / counted["candidates"]
    print(f"\nbytes of a candidate without its image, both ways, sent alone: {text:.0f}\n")
    print("| at the paper's scale, images of 100 KB | MB |\n|---|---|")
    for name, total in PAPER_MB.items():
        print(f"| {name}, as published | {total:.0f} |")
    candidates = PAPER_MB["MoR"] * 1e6 / (100_000 + text)
    for group, passes in ((5, 1), (8, 1), (8, 3), (5, 5), (5, 15)):
        total = candidates * (100_000 / (group * passes) + text) / 1e6
        print(f"| images once, G = {group}, {passes} passes over the prompts | {total:.0f} |")
    print(f"| images that the sites have (`accord site join --images`) | {candidates * text / 1e6:.0f} |")


def main() -> None:
    """Read the command line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard_logging.basicConfig(level=standard_logging.ERROR)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, run in (("trips", trips), ("step", step), ("bytes", count_bytes)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--sites", type=int, nargs="+", default=[3, 8], help="K")
        command.add_argument("--repetitions", type=int, default=20)
        command.add_argument("--rounds", type=int, default=3, help="trainers per arm")
        command.add_argument("--steps", type=int, default=8, help="GRPO steps per trainer, the first not counted")
        command.add_argument("--prompts", type=int, default=36, help="P")
        command.add_argument("--group", type=int, default=8, help="G")
    served = commands.add_parser("serve", help="for the processes of `step`")
    served.add_argument("name")
    served.add_argument("path", type=Path)
    served.set_defaults(run=lambda options: serve_model(options.name, options.path))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
