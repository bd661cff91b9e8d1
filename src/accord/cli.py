"""The command line: every stage of the main job, alone or together.

    accord demo                              the main job with the embedded defaults
    accord run RECIPE                        a whole recipe
    accord provision CONSORTIUM              the start-up kits of a consortium, one for each organisation
    accord server start KIT                  a consortium's server
    accord site check|join KIT FOLDER        see that all is well at a site; answer the server's questions
    accord site status FOLDER                what was asked of the site, and how many bytes left it
    accord watch RUN                         how far a run is, and which sites are there
    accord plan RECIPE                       what would run, and whether it fits; --check reads the data
    accord site train RECIPE NAME            one site's reward model
    accord router train RECIPE               the router, with all sites
    accord pretrain-projector RECIPE         the policy's projector, with all sites
    accord align RECIPE                      GRPO against the federation
    accord evaluate …                        a run's evaluation, or any checkpoint on any questions
    accord report RUN                        the HTML page again
    accord compare RUN…                      several runs in one table
    accord bench RECIPE…                     a grid of methods x seeds, and its table
    accord preferences RECIPE SITE FILE      write a site's preference pairs
    accord pretrain OUT                      make the shipped checkpoints again
    accord judge OUT --recipe RECIPE         train what judges captions in the end
    accord reward train|evaluate|serve       a reward model alone, from a file of preference pairs
    accord annotate FOLDER                   a page at which people say which of two answers is better

An error that Accord foresees is printed in one line without a traceback and ends with status 2; Ctrl-C ends with
status 130, and the same command with --resume goes on.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from accord.annotate_cli import annotate_command
from accord.errors import AccordError, DataError, DataWarning, RunError, printable
from accord.flare.cli import provision_command, server_app
from accord.flare.site_cli import site_check, site_join, site_status
from accord.reward_cli import reward_app
from accord.terminal import CleanFormatter, clean, console, hush, say, show_page, take_any_encoding, tell, warn
from accord.version import VERSION

if TYPE_CHECKING:
    from accord.federation.ranks import Together
    from accord.pipeline import Job
    from accord.recipe import Recipe

DEMO = Path(__file__).parent / "recipes" / "demo.toml"

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)
site_app = typer.Typer(no_args_is_help=True, help="What a site does.")
router_app = typer.Typer(no_args_is_help=True, help="The router.")
app.add_typer(site_app, name="site")
app.add_typer(router_app, name="router")
app.add_typer(server_app, name="server")
app.add_typer(reward_app, name="reward")
app.command("provision")(provision_command)
app.command("annotate")(annotate_command)
site_app.command("check")(site_check)
site_app.command("join")(site_join)
site_app.command("status")(site_status)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"accord {VERSION}")
        raise typer.Exit


@app.callback(help=__doc__.split("\n")[0])
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version, and end")
    ] = False,
) -> None:
    """Take the options that come before a command."""


class EngineName(StrEnum):
    """What `--engine` may say."""

    in_process = "in-process"
    flare = "flare"


RecipeFile = Annotated[Path, typer.Argument(help="the recipe, a TOML file")]
SiteName = Annotated[str, typer.Argument(help="the site's name in the recipe")]
Out = Annotated[Path | None, typer.Option("--out", help="run folder; by default runs/<name of the recipe>")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")]
Seed = Annotated[int | None, typer.Option("--seed", help="use this seed instead of the recipe's")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]


def main() -> None:
    """Run the command line."""
    _prepare()
    rank = os.environ.get("RANK")  # under a launcher of several processes, of which the first takes it away later
    try:
        status = app(standalone_mode=False)  # Typer returns the status of its own exits, Ctrl-C's among them
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise SystemExit(status)
    except (KeyboardInterrupt, typer.Abort):
        if rank is not None:
            if rank == "0":
                console.print("\nstopped; the launcher with the same command and --resume goes on where it was")
            raise SystemExit(130) from None
        again = [*sys.argv]
        if sys.argv[1:2] in (["demo"], ["run"]) and "--resume" not in again:
            again.append("--resume")
        # From any folder: its words may be paths, or names of what lies beside them.
        line = f"cd {shlex.quote(os.getcwd())} && {shlex.join(again)}"
        console.print(f"\nstopped; this goes on where it was: [bold]{escape(printable(line))}[/]")
        raise SystemExit(130) from None
    except AccordError as error:
        tell(str(error), word="error:", style="bold red")
        raise SystemExit(2) from None
    except OSError as error:
        tell(f"{error}; free space on the disk or correct the path", word="error:", style="bold red")
        raise SystemExit(2) from None
    except typer.TyperException as error:  # a wrong option or a missing argument
        if message := error.format_message().removesuffix("."):  # empty after help that was shown for want of a command
            tell(f"{message}; see accord --help", word="error:", style="bold red")
        raise SystemExit(2) from None


def _prepare() -> None:
    """Keep third parties' chatter out of the way, and show our own warnings as lines."""
    take_any_encoding()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(CleanFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, DataWarning):
            warn(str(message))

    def unforeseen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(clean("".join(traceback.format_exception(kind, error, trace))))

    warnings.showwarning, sys.excepthook = show, unforeseen


def _settle(recipe: Recipe) -> None:
    """Silence transformers, and give this process what the recipe says of it."""
    from accord.stages.process import prepare

    hush()
    prepare(recipe)


@contextmanager
def _job(
    recipe_file: Path,
    out: Path | None,
    *,
    resume: bool,
    seed: int | None,
    quiet: bool,
    alone: str = "",
    methods: bool = False,
    kits: tuple[Path, Path | None] | None = None,
    together: Together | None = None,
) -> Iterator[Job]:
    """Open the run of a recipe.

    Args:
        recipe_file: the recipe.
        out: the run folder.
        resume: go on with the run there.
        seed: in place of the recipe's.
        quiet: show no progress.
        alone: the one site that works here.
        methods: whether methods are run; if not, none of another package is imported.
        kits: the server's and the operator's, where the sites are other organisations'.
        together: the processes that a launcher has started with this one.
    """
    from dataclasses import replace

    from accord.recipe_file import dump_recipe, import_methods, load_recipe, renewed
    from accord.runs import Run
    from accord.stages.job import open_job

    recipe = load_recipe(recipe_file)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    _settle(recipe)
    folder = out or Path("runs") / recipe.name
    text = dump_recipe(recipe)  # the same whether or not methods are imported: one folder is for all commands
    if methods:
        recipe = import_methods(recipe)
    run = Run.resume(folder, text, renewed=renewed) if resume else Run.create(folder, text, seed=recipe.seed)
    with ExitStack() as stack:
        engine = None
        if kits is not None:
            from accord.federation.agreement import Agreeing
            from accord.flare.launch import open_engine
            from accord.flare.state import FederationFile
            from accord.stages.agreement import agreement_of

            names, federation = [site.name for site in recipe.sites], FederationFile(folder)

            def tell_both(line: str) -> None:
                federation.tell(line)
                if not quiet:
                    tell(line, style="dim")

            flare = stack.enter_context(open_engine(*kits, names, tell=tell_both))
            engine = Agreeing(flare, agreement_of(recipe), run=run.tag)
            stack.enter_context(federation.follow(flare, engine))
        yield stack.enter_context(open_job(recipe, run, quiet=quiet, alone=alone, engine=engine, together=together))


def _whole(
    recipe: Path,
    out: Path | None,
    resume: bool,
    seed: int | None,
    quiet: bool,
    kits: tuple[Path, Path | None] | None = None,
    *,
    profile: bool = False,
    show: bool = False,
) -> None:
    from accord.evaluation.account import tell
    from accord.evaluation.summary import read_summary
    from accord.evaluation.trace import read_metrics
    from accord.federation.ranks import Together, rank_and_count
    from accord.pipeline import execute
    from accord.stages.profile import check_profiler

    if profile:
        check_profiler()
    together = Together() if rank_and_count()[1] > 1 else None
    if together is not None and together.rank:
        _follow(recipe, out, seed, together)
        return
    with _job(recipe, out, resume=resume, seed=seed, quiet=quiet, methods=True, kits=kits, together=together) as job:
        job.profile = profile
        page = execute(job)
        account = tell(read_summary(job.path / "summary.json"), read_metrics(job.path / "metrics.jsonl"))
    say(account.verdict)
    say(f"report: {page}")
    say(f"aligned checkpoint: {page.parent / 'policy'}")
    if profile:
        say(f"profile: {page.parent / 'profile' / 'stages.md'}")
    if show:
        show_page(page)


def _follow(file: Path, out: Path | None, seed: int | None, together: Together) -> None:
    """Take part, as another rank than 0, in what rank 0 aligns."""
    from dataclasses import replace

    from accord.pipeline.ranks import follow
    from accord.recipe_file import import_methods, load_recipe

    recipe = import_methods(load_recipe(file))
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    _settle(recipe)
    follow(recipe, out or Path("runs") / recipe.name, together)


@app.command()
def demo(
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
    quiet: Quiet = False,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="do not open the report in a browser, where a person sits at the terminal")
    ] = False,
) -> None:
    """Align a small model to three sites on this machine, with the embedded defaults, into runs/demo."""
    _whole(DEMO, out, resume, seed, quiet, show=not no_open)


@app.command()
def run(
    recipe: RecipeFile,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
    quiet: Quiet = False,
    engine: Annotated[
        EngineName, typer.Option("--engine", help="how the sites are reached; flare: they are other organisations'")
    ] = EngineName.in_process,
    kit: Annotated[Path, typer.Option("--kit", help="with flare: the server's start-up kit")] = Path("kits/server"),
    operator: Annotated[
        Path | None, typer.Option("--operator", help="with flare: the operator's kit; by default beside the server's")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="write what each stage's time went to: a table and a flame graph")
    ] = False,
) -> None:
    """Run a whole recipe."""
    kits = (kit, operator) if engine is EngineName.flare else None
    _whole(recipe, out, resume, seed, quiet, kits, profile=profile)


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="a run folder")],
    once: Annotated[bool, typer.Option("--once", help="show it as it is now, and end")] = False,
) -> None:
    """Watch a run: how far it is, its reward, and which sites are there; Ctrl-C ends the view alone."""
    from accord.flare.view import watch as show

    with suppress(KeyboardInterrupt):
        show(folder, Console(highlight=False), once=once)


@app.command()
def plan(
    recipe: RecipeFile,
    gpus: Annotated[
        str, typer.Option("--gpus", help="compare every stage's memory with GPUs, such as 1x80 or 8x80 (GB each)")
    ] = "",
    engine: Annotated[
        EngineName, typer.Option("--engine", help="flare: the sites' models are on other machines")
    ] = EngineName.in_process,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="read all of the data, and say what is wrong with it; status 2 if a run would fail"
        ),
    ] = False,
) -> None:
    """Show what a recipe would run, with memory and bytes; nothing but configurations is downloaded."""
    from accord.footprint import Gpus
    from accord.plan import describe
    from accord.recipe_file import import_methods, load_recipe

    given = Gpus.read(gpus) if gpus else None
    settings = import_methods(load_recipe(recipe))
    say(describe(settings, given, elsewhere=engine is EngineName.flare))
    if check:
        from accord.methods import find_method
        from accord.stages.data_check import check_data

        sites, names = [site.name for site in settings.sites], dict.fromkeys([settings.method, *settings.compare])
        found = check_data(settings, [find_method(name, sites).check_data for name in names])
        say(f"\n{found}")
        if found.problems:
            raise typer.Exit(2)


def _stage(
    recipe: Path,
    out: Path | None,
    seed: int | None,
    quiet: bool,
    stage: Callable[[Job], None],
    *,
    alone: str = "",
    methods: bool = False,
) -> None:
    """Run one stage in the recipe's run folder, made if it is not there."""
    from accord.recipe_file import load_recipe
    from accord.runs import something_done

    folder = out or Path("runs") / load_recipe(recipe).name
    resume = something_done(folder)
    with _job(recipe, out, resume=resume, seed=seed, quiet=quiet, alone=alone, methods=methods) as job:
        stage(job)
    say(f"done: {folder}")


@site_app.command("train")
def site_train(recipe: RecipeFile, name: SiteName, out: Out = None, seed: Seed = None, quiet: Quiet = False) -> None:
    """Train one site's reward model on its private pairs."""
    from accord.pipeline import train_site

    _stage(recipe, out, seed, quiet, lambda job: train_site(job, name), alone=name)


@router_app.command("train")
def router_train(recipe: RecipeFile, out: Out = None, seed: Seed = None, quiet: Quiet = False) -> None:
    """Train the router federatedly with all sites."""
    from accord.pipeline import train_router

    _stage(recipe, out, seed, quiet, train_router)


@app.command("pretrain-projector")
def pretrain_projector_command(recipe: RecipeFile, out: Out = None, seed: Seed = None, quiet: Quiet = False) -> None:
    """Train the policy's projector with all sites, and say how well it lets the policy see before and after."""
    from accord.evaluation.projector import projector_table
    from accord.stages.projector import check_projector, pretrain_projector

    def stage(job: Job) -> None:
        check_projector(job.written or job.recipe, alone=True)
        say(projector_table(pretrain_projector(job)))

    _stage(recipe, out, seed, quiet, stage)


@app.command("align")
def align_command(recipe: RecipeFile, out: Out = None, seed: Seed = None, quiet: Quiet = False) -> None:
    """Align the policy by the recipe's method; an interrupted GRPO goes on from its newest checkpoint."""
    from accord.pipeline import align_policy

    _stage(recipe, out, seed, quiet, align_policy, methods=True)


@app.command("evaluate")
def evaluate_command(
    target: Annotated[str, typer.Argument(help="a recipe, or a checkpoint (folder, hub id or accord/<name>)")],
    out: Out = None,
    data: Annotated[str, typer.Option("--data", help="easy-vqa or a VQA folder; needed for a checkpoint")] = "",
    split: Annotated[str, typer.Option("--split", help="which questions of the data")] = "test",
    questions: Annotated[int, typer.Option("--questions", min=0, help="how many at most; 0 for all")] = 0,
    vqa_accuracy: Annotated[
        bool, typer.Option("--vqa-accuracy", help="of a checkpoint: VQAv2's accuracy, too; a recipe says it itself")
    ] = False,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Measure a run's base and aligned policy, or any checkpoint on any questions."""
    from accord.pipeline.evaluation import evaluate, evaluate_checkpoint

    if target.endswith(".toml"):
        _stage(Path(target), out, seed, quiet, evaluate, methods=True)
    elif not data:
        raise RunError(f"evaluating the checkpoint {target!r} needs questions; add --data easy-vqa or --data FOLDER")
    else:
        hush()
        say(evaluate_checkpoint(target, data, split, limit=questions, quiet=quiet, vqa_accuracy=vqa_accuracy))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write a run's HTML page again."""
    from accord.evaluation.report import write_report

    say(write_report(folder))


@app.command("compare")
def compare_command(folders: Annotated[list[Path], typer.Argument(help="run folders")]) -> None:
    """Print several runs as one Markdown table, seeds of one recipe with their mean and its interval."""
    from accord.evaluation.report import compare_runs

    say(compare_runs(folders))


@app.command("bench")
def bench_command(
    recipes: Annotated[list[Path], typer.Argument(help="recipes, TOML files")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="how many: 0, 1, …")] = 3,
    only: Annotated[
        int | None, typer.Option("--seed-only", min=0, help="this one alone, to share out the work")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="has a folder for each recipe; by default runs/bench")
    ] = None,
    methods: Annotated[str, typer.Option("--methods", help="a,b,c instead of the recipe's `compare`")] = "",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="how many seeds at once")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Measure every method with every seed, and write the table; the same command goes on where it stopped."""
    from accord.pipeline.bench import bench, plan_grid

    names = [name.strip() for name in methods.split(",") if name.strip()]
    chosen = range(seeds) if only is None else [only]
    grid = plan_grid(recipes, seeds=chosen, out=out or Path("runs") / "bench", methods=names)
    _settle(grid[0].recipe)

    def tell_line(line: str) -> None:
        if not quiet:
            tell(line)

    say(bench(grid, jobs=jobs, bars=console.is_terminal and not quiet, tell=tell_line), end="")


@app.command()
def preferences(
    recipe: RecipeFile,
    site: Annotated[str, typer.Argument(help="the site's name")],
    file: Annotated[Path, typer.Argument(help="a .jsonl file; images go beside it")],
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Write the preference pairs that would be constructed for a site, in TRL's form."""
    from accord.recipe_file import load_recipe
    from accord.stages.sites import write_site_preferences

    count = write_site_preferences(load_recipe(recipe), site, file, seed=seed, quiet=quiet)
    say(f"{count} constructed pairs: {file}")


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="folder for the checkpoints")],
    family: Annotated[
        list[str] | None,
        typer.Option("--family", help="only this family, or this name of [[pretrain.fast_vlm]]; may be repeated"),
    ] = None,
    recipe: Annotated[Path, typer.Option("--recipe", help="whose base questions and [pretrain] table to use")] = DEMO,
    quiet: Quiet = False,
) -> None:
    """Make the small checkpoints that ship with Accord again, or others for a recipe's questions."""
    from accord.models.pretrain import pretrain_families
    from accord.recipe_file import load_recipe
    from accord.stages.job import load_questions

    settings = load_recipe(recipe)
    _settle(settings)
    questions = load_questions(settings.questions, needed=()).get("base")
    if not questions:
        raise DataError(
            f"{recipe}: no question has the split 'base', the only one that pre-training reads; "
            "give questions that split, or the source `fractions` such as { base = 0.2, … }"
        )
    for path in pretrain_families(out, questions, settings.pretrain, family or (), quiet=quiet):
        say(path)


@app.command()
def judge(
    out: Annotated[Path, typer.Argument(help="folder for the judge")],
    recipe: Annotated[Path, typer.Option("--recipe", help="whose captions, policy and [evaluation] to use")],
    quiet: Quiet = False,
) -> None:
    """Train what judges captions in the end, on photographs that no site and no server holds."""
    from accord.pipeline.captions import make_judge
    from accord.recipe_file import load_recipe

    settings = load_recipe(recipe)
    _settle(settings)
    for name, share in make_judge(settings, out, quiet=quiet).by_type.items():
        say(f"{name}: {share:.1%} of the pairs kept back")
    say(out)


if __name__ == "__main__":
    main()
