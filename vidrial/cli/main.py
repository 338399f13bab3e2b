"""The command line: `vidrial`, also `python -m vidrial`."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from vidrial import __version__
from vidrial.device import DEFAULT_GPU, Device
from vidrial.errors import ArgumentError, ToolchainError, VidrialError
from vidrial.installation import named_ops
from vidrial.spec.chosen import config_with, parse_choices
from vidrial.spec.op import Op
from vidrial.spec.registry import find_op, make_problem, parse_keywords
from vidrial.tune.search import STRATEGIES

F = TypeVar("F", bound=Callable[..., Any])
CONTEXT = {"help_option_names": ["-h", "--help"]}
# The op's own keywords are not known to click: they are parsed by the op's `example`.
OPEN = CONTEXT | {"ignore_unknown_options": True}
KEYWORDS = "[--KEYWORD VALUE]..."


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 or 2 a mistake, said in one line (`--debug` shows where), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.stdout, sys.stderr = _printable(sys.stdout), _printable(sys.stderr)
    debug = "--debug" in words
    try:
        code = vidrial.main(args=[w for w in words if w != "--debug"], prog_name="vidrial", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("vidrial: interrupted", file=sys.stderr)
        sys.exit(130)
    except VidrialError as error:
        if debug:
            raise
        print("\n".join([f"vidrial: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _printable(stream: TextIO | None) -> TextIO:
    """A stream that takes any text: what its encoding lacks becomes a question mark, and what is closed takes all."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="vidrial")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def vidrial() -> None:
    """GPU kernels described in Python, tuned by measurement.

    OP is a known name (`vidrial env` lists them), module:attribute, path/to/file.py:attribute, or path/to/file.py
    if it has one op. What it is asked comes as the
    keywords of its `example`: --t 10007 --d 64. All commands but the timing of `sweep` work without a GPU.
    """


class Amount(click.FloatRange):
    """A number in a range, which nan is not, although it is neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if found != found:
            self.fail(f"{value} is no number.", param, ctx)
        return found


def op_command(name: str) -> Callable[[F], F]:
    """A command on an op: OP, then any of its keywords among the options."""

    def decorate(function: F) -> F:
        function = click.argument("keywords", nargs=-1, type=click.UNPROCESSED, metavar=KEYWORDS)(function)
        function = click.argument("reference", metavar="OP")(function)
        vidrial.command(name, context_settings=OPEN)(function)
        return function

    return decorate


def target_option(function: F) -> F:
    """`--arch`: a GPU that need not be there."""
    text = "h200, a100, ..., or sm_90a, sm_80, ...  [default: this machine's GPU, else h200]"
    return click.option("--arch", metavar="GPU", help=text)(function)


def config_option(function: F) -> F:
    """`--config`: choices that the config makes, the others as predicted fastest with them."""
    text = "Choices that the config makes, by name: stages=3,mma=sync, part.choice where parts share a name.  [default: predicted fastest]"
    return click.option("--config", "choices", metavar="CHOICE=VALUE,...", help=text)(function)


def config_of(op: Op, problem: Any, device: Device, choices: str | None) -> Any:
    """The config predicted fastest, of those that make what `--config` asks for.

    Raises:
        ArgumentError: a name or a value is not known. ConfigError: no config is legal.
    """
    return op.predicted(problem, device) if choices is None else config_with(op, problem, device, parse_choices(op, choices))


def read(reference: str, keywords: tuple[str, ...]) -> tuple[Op, list[Any]]:
    """The op, and a problem for every combination of the keywords' values."""
    if reference.startswith("-"):
        names = "".join(f"{name}, " for name in named_ops())
        raise ArgumentError(f"{reference!r} stands where OP should; give {names}module:attribute or path/to/file.py:attribute first")
    op = find_op(reference)
    values = parse_keywords(op, keywords)
    return op, [make_problem(op, dict(zip(values, combination, strict=True))) for combination in itertools.product(*values.values())]


def read_one(reference: str, keywords: tuple[str, ...], arch: str | None) -> tuple[Op, Any, Device]:
    """The op, its one problem, and the GPU that `--arch` names, or this machine's, or the H200 of the table.

    Raises:
        ArgumentError: a keyword came twice, or a size is too large for a kernel. ConfigError: the op serves no such problem.
    """
    op, problems = read(reference, keywords)
    if len(problems) > 1:
        raise ArgumentError("a keyword came twice; only sweep and check take several problems")
    device = Device.of(arch) if arch else Device.default()
    op.check_problem(problems[0], device)
    return op, problems[0], device


def first_op() -> str:
    """The name of the first known op.

    Raises:
        ArgumentError: no installed package names one.
    """
    name = next(iter(named_ops()), None)
    if name is None:
        raise ArgumentError("no installed package names an op; give module:attribute or path/to/file.py:attribute")
    return name


@vidrial.command()
def env() -> None:
    """Show versions, GPUs, what is missing and how to install it, the cache, and the rankings in force."""
    from vidrial.cli.tables import make_console, show_environment

    show_environment(make_console())


@op_command("explain")
@target_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Configs, and reasons, to show.")
def explain(reference: str, keywords: tuple[str, ...], arch: str | None, limit: int) -> None:
    """List the legal configs with their predicted times, and the others grouped by the rule that they break."""
    from vidrial.cli.tables import make_console, show_space

    op, problem, device = read_one(reference, keywords, arch)
    if not show_space(make_console(), op, problem, device, limit).legal:
        op.predicted(problem, device)  # refuses, with the rules' reasons


@op_command("compile")
@target_option
@click.option("--top", default=8, show_default=True, type=click.IntRange(1), help="How many of the predicted fastest configs.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: VIDRIAL_JOBS, else one per core]")
@config_option
def compile_(reference: str, keywords: tuple[str, ...], arch: str | None, top: int, jobs: int | None, choices: str | None) -> None:
    """Compile the configs predicted fastest, or the one that --config names, and show what their kernels take."""
    from vidrial.build.nvrtc import Cubin
    from vidrial.cli.tables import compile_best, make_console, show_built

    op, problem, device = read_one(reference, keywords, arch)
    console = make_console()
    config = None if choices is None else config_of(op, problem, device, choices)
    built = compile_best(op, problem, device, top, jobs, config)
    if not built:
        op.predicted(problem, device)  # refuses, with the rules' reasons
    which = f"kernels of the {top} configs predicted fastest" if config is None else f"kernels with {choices}"
    show_built(console, built, f"{op.name}: {which} on {device.name}, for {device.arch}")
    failed = sum(not isinstance(b.result, Cubin) for b in built)
    if failed:
        raise click.exceptions.Exit(1)


@op_command("sweep")
@click.option("--seconds", type=Amount(0, min_open=True), help="Time to take for each problem, about.")
@click.option("--trials", type=click.IntRange(1), help="Configs to try at most.  [default: 64, or as many as --seconds allows]")
@click.option("--exhaustive", is_flag=True, help="Try every legal config.")
@click.option(
    "--resume", is_flag=True, help="Go on with the journals of the same sweeps; what a crash or time-out ended once is tried again."
)
@click.option("--retry", is_flag=True, help="Go on, and try again whatever a crash, a time-out or a launch error ended, however often.")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default=STRATEGIES[0],
    show_default=True,
    help="optuna: for a space too large to enumerate.",
)
@click.option("--gpus", metavar="N|all|I,J", help="How many measure, or which CUDA indices (0,2 or 3,).  [default: 1; a Ray cluster's]")
@click.option("--ray", metavar="ADDRESS", help="A Ray cluster whose CPUs compile and whose GPUs measure: host:port, ray://host:port, auto.")
@click.option("--jobs", type=click.IntRange(1), help="Processes that compile.  [default: VIDRIAL_JOBS, else one per core]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Also write the rankings to OUT/<device>/<op>.json.")
def sweep_(reference: str, keywords: tuple[str, ...], out: Path | None, gpus: str | None, **options: Any) -> None:
    """Measure which configs are fastest, and keep the ranking: calls take it from then on. A keyword given twice makes two problems.

    Every trial is on disk before the next one begins: after Ctrl-C, --resume goes on.
    """
    from vidrial.build.files import check_writable
    from vidrial.cli.tables import facts, make_console, show_winners
    from vidrial.spec.fields import fields
    from vidrial.tune.options import Options
    from vidrial.tune.ranking import publish
    from vidrial.tune.sweeper import sweep, sweep_lengths

    op, problems = read(reference, keywords)
    for problem in problems:
        op.check_problem(problem, Device.default())
    if out is not None:
        check_writable(out)
    chosen = Options(gpus=None if gpus is None else gpus_of(gpus), **options)
    alike = all(fields(p, "static") == fields(problems[0], "static") for p in problems)
    results = sweep_lengths(op, problems, chosen) if alike else [sweep(op, p, chosen) for p in problems]
    for result in results:
        click.echo(f"\n{facts(result.problem)}\n{result.table()}\n{len(result.trials)} trials in {result.journal}")
    if len(results) > 1:
        show_winners(make_console(), results)
    if out is not None:
        for path in publish(op, [r.ranking for r in results], out):
            click.echo(f"ranking in {path}")


def gpus_of(text: str) -> int | tuple[int, ...] | str:
    """`2`: two GPUs; `all`: every one there is; `0,2` or `3,`: those of these CUDA indices.

    Raises:
        ArgumentError: it is none of these.
    """
    if text == "all":
        return text
    words = [word for word in text.split(",") if word]
    if not words or not all(word.isdecimal() for word in words):
        raise ArgumentError(f"--gpus {text!r}: accepted are a count, all, or CUDA indices with commas")
    return int(text) if "," not in text else tuple(int(word) for word in words)


@vidrial.command()
@click.argument("journals", nargs=-1, metavar="[JOURNAL]...", type=click.Path(path_type=Path))
@click.option("--out", default="report.html", show_default=True, type=click.Path(dir_okay=False, path_type=Path), help="The page.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the times as a PNG; needs matplotlib.")
def report(journals: tuple[Path, ...], out: Path, png: Path | None) -> None:
    """Write one HTML page, which needs no network, from the journals of sweeps: files, or folders of them; by default the cache's."""
    from vidrial.build.store import Store
    from vidrial.report.rows import read_journals, rejected_trials, write_report

    own = Store.shared().root / "journals"
    if not journals and not own.is_dir():
        raise ArgumentError(f"no sweep has left a journal in {own}; sweep first (vidrial sweep OP), or name journals")
    trials = read_journals(journals or [own])
    for name in {trial.op for trial in trials} & named_ops().keys():
        try:
            trials += rejected_trials(find_op(name), trials)
        except (ArgumentError, ToolchainError) as error:
            click.echo(f"vidrial: without the configs that rules forbid: {error}", err=True)
    click.echo(write_report(trials, out))
    if png is not None:
        from vidrial.report.plot import write_png

        click.echo(write_png(trials, png))


@op_command("source")
@target_option
@click.option("--stage", help="Only the kernel of this name.")
@config_option
def source(reference: str, keywords: tuple[str, ...], arch: str | None, stage: str | None, choices: str | None) -> None:
    """Print the C++ of the config predicted fastest, or of the one that --config names."""
    op, problem, device = read_one(reference, keywords, arch)
    stages = [s for s in op.stages(problem, config_of(op, problem, device, choices)) if stage in (None, s.kernel.name)]
    if not stages:
        raise ArgumentError(f"--stage {stage!r} is not launched for this problem; its kernels: {', '.join(k.name for k in op.kernels)}")
    for s in stages:
        click.echo(s.kernel.source(s.problem, s.config).text)


@op_command("analyse")
@target_option
@config_option
def analyse(reference: str, keywords: tuple[str, ...], arch: str | None, choices: str | None) -> None:
    """Show what the config predicted fastest, or the one that --config names, does, counted on the host target at a small size: accesses,
    bank conflicts, sectors, FLOP, bytes; and its occupancy and waves at the size that is asked for."""
    from vidrial.cli.analysis import show_analysis
    from vidrial.cli.tables import make_console

    op, problem, device = read_one(reference, keywords, arch)
    show_analysis(make_console(), op, problem, device, config_of(op, problem, device, choices))


@op_command("check")
@target_option
@config_option
@click.option("--configs", type=click.IntRange(1), help="At most so many unlike configs.  [default: until every choice was made]")
@click.option("--minutes", type=Amount(0), help="Begin nothing new after so many.  [default: 3, for pairs of choices 0.75]")
@click.option("--quick", is_flag=True, help="Values only, no sanitizers.")
def check_(
    reference: str,
    keywords: tuple[str, ...],
    arch: str | None,
    choices: str | None,
    configs: int | None,
    minutes: float | None,
    quick: bool,
) -> None:
    """Run the kernels on the CPU at aligned and odd sizes: values, races, memory errors. No GPU is needed.

    Sizes that no keyword gives are aligned and odd ones; a keyword given twice makes two problems. Large problems are cut to what is quick to
    check. First comes the config that a call would take, then others, until every choice was made once, then pairs of choices.
    """
    from vidrial.cli.tables import make_console, show_report
    from vidrial.host.check import SANITIZERS, check
    from vidrial.host.cover import cases
    from vidrial.progress import Lines, reporting
    from vidrial.tune.pick import choose_config

    op = find_op(reference)
    # Kernels run on the CPU: which GPU is here makes no difference unless it is asked for.
    device = Device.of(arch or DEFAULT_GPU)
    values, fixed = parse_keywords(op, keywords), None if choices is None else parse_choices(op, choices)
    combinations = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    asked = list({case.run: case for combination in combinations for case in cases(op, combination, device)}.values())
    with reporting(None, Lines) as progress:
        report = check(
            op,
            asked,
            configs,
            SANITIZERS[:1] if quick else SANITIZERS,
            progress,
            minutes=minutes,
            config=lambda p: choose_config(op, p, device).config if fixed is None else config_with(op, p, device, fixed),
            only=fixed is not None,
            device=device,
        )
    show_report(make_console(), report, [case for case in asked if case.asked != case.run])
    if not report.ok:
        raise click.exceptions.Exit(1)


@op_command("draw")
@target_option
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the SVG files.  [default: <op>_pictures, here]")
@config_option
def draw(reference: str, keywords: tuple[str, ...], arch: str | None, out: Path | None, choices: str | None) -> None:
    """Draw the layouts, tiles, copies, MMAs, rings and epilogues of the config predicted fastest, or of the one that --config names, as SVG."""
    from vidrial.build.files import writing
    from vidrial.layout.copies import TiledCopy
    from vidrial.layout.drawing import Part
    from vidrial.layout.drawing import draw as svg
    from vidrial.layout.epilogue import Epilogue
    from vidrial.layout.mma import TiledMma
    from vidrial.layout.smem import Pipeline, SmemLayout
    from vidrial.layout.wgmma import WarpgroupMma
    from vidrial.spec.chosen import describe_taken

    op, problem, device = read_one(reference, keywords, arch)
    config = config_of(op, problem, device, choices)
    click.echo(f"{op.name}: {describe_taken(op, problem, config)}")
    pictures: dict[str, str] = {}
    for stage in op.stages(problem, config):
        for name, member in stage.kernel.resolve(stage.problem, stage.config).members.items():
            if isinstance(member, (TiledMma, WarpgroupMma)):
                parts: tuple[Part, ...] = ("A", "B", "C")
                pictures.update({f"{stage.kernel.name}.{name}.{part}.svg": svg(member, part) for part in parts})
            elif isinstance(member, (SmemLayout, TiledCopy, Epilogue, Pipeline)):
                pictures[f"{stage.kernel.name}.{name}.svg"] = svg(member)
    out = out or Path(f"{op.name}_pictures")
    if not pictures:
        click.echo("its tiles are plain numbers: nothing to draw")
    for name, text in pictures.items():
        with writing(out / name, "--out"):
            (out / name).write_text(text, encoding="utf-8")
        click.echo(out / name)


@vidrial.command()
@click.argument("model")
@click.option(
    "--t", "lengths", multiple=True, default=("1k..1M",), show_default=True, metavar="LENGTH", help="1000, 8k, or 1k..1M; several."
)
@click.option("--mixer", "mixers", multiple=True, metavar="MIXER", help="Beside attention.  [default: window:1024, power:2, degree1]")
@click.option("--head", is_flag=True, help="Count the weights of the logits, too.")
@click.option("--json", "to_json", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table as JSON.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it as a PNG; needs matplotlib.")
def flops(model: str, lengths: tuple[str, ...], mixers: tuple[str, ...], head: bool, to_json: Path | None, png: Path | None) -> None:
    """Show what a model's weights and its state take per token. MODEL is a config.json, its folder, or a known name: gpt2, starcoder2-3b, ...

    MIXER is attention, window:1024, latent:512[,rope=64,absorbed=0], power:2[,tile=16,chunk=1024], degree1[,chunk=1024] or
    lstm[:768,vectors=1], of the model's shape. k is 1024. Counted: forward, a multiply-add as 2.
    """
    from vidrial.cli.models import lengths_of, show_balance, write_balance
    from vidrial.cli.tables import make_console
    from vidrial.flops import Model, parse_mixer

    shape = Model.of(model)
    asked = dict.fromkeys(parse_mixer(text, shape) for text in ("attention", *(mixers or ("window:1024", "power:2", "degree1"))))
    rows = show_balance(make_console(), shape, list(asked), lengths_of(lengths), head)
    if to_json is not None:
        click.echo(write_balance(shape, rows, head, to_json))
    if png is not None:
        from vidrial.report.models import write_balance_png

        click.echo(write_balance_png(shape, rows, png))


@vidrial.command()
@click.argument("losses", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Another model's, of the same tokens: show the excess over it.")
@click.option("--low", type=Amount(0), help="Tokens of context that the table and the fits begin at.")
@click.option("--high", type=Amount(0), help="Tokens of context that they end at.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the curves as a PNG; needs matplotlib.")
def icl(losses: Path, against: Path | None, low: float | None, high: float | None, png: Path | None) -> None:
    """Show what context is worth: loss by context, its slope per doubling with its error, and its knee, if there is one.

    LOSSES is an .npz: what vidrial.icl's by_context or losses saved, or an array `losses` [windows, length].
    """
    from vidrial.cli.models import show_curve
    from vidrial.cli.tables import make_console

    curves = show_curve(make_console(), losses, against, low, high)
    if png is not None:
        from vidrial.report.models import write_curves_png

        click.echo(write_curves_png(curves, png))


@vidrial.group(context_settings=CONTEXT)
def cache() -> None:
    """Show or clean the cache of compiled kernels."""


@cache.command("show")
def cache_show() -> None:
    """Where it is and what it holds."""
    from vidrial.build.store import Store

    store = Store.lasting()
    count, size = store.usage()
    click.echo(f"{store.root}: {count} binaries, {size / 2**20:.1f} of at most {store.max_bytes >> 20} MB")


@cache.command("verify")
def cache_verify() -> None:
    """Read every binary and set the damaged ones aside."""
    from vidrial.build.store import Store

    store = Store.lasting()
    count, damaged = store.usage()[0], store.verify()
    click.echo(f"{count} binaries read, {len(damaged)} damaged and set aside")
    for key in damaged:
        click.echo(key)


@cache.command("prune")
@click.option("--max-mb", type=click.IntRange(0), help="Size to prune to.  [default: VIDRIAL_CACHE_MAX_MB]")
def cache_prune(max_mb: int | None) -> None:
    """Remove the least recently used binaries beyond the size limit."""
    from vidrial.build.store import Store

    removed = Store.lasting().prune(None if max_mb is None else max_mb << 20)
    click.echo(f"{removed} binaries removed")


@cache.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
def cache_clear(yes: bool) -> None:
    """Remove everything: binaries, local rankings, sources that did not compile."""
    from vidrial.build.store import Store

    store = Store.lasting()
    if not yes:
        click.confirm(f"remove everything in {store.root}, local rankings included?", abort=True)
    store.clear()
    click.echo(f"{store.root} is empty")


@vidrial.command()
@click.argument("reference", metavar="[OP]", required=False)
def demo(reference: str | None) -> None:
    """Show what Vidrial does with OP, by default the first one that `vidrial env` lists, on this machine, in a few minutes."""
    from vidrial.cli.demo import run_demo
    from vidrial.cli.tables import make_console

    run_demo(make_console(), reference or first_op())


@vidrial.command()
@click.argument("name")
@click.option("--folder", default=".", type=click.Path(file_okay=False, path_type=Path), help="Where to.  [default: here]")
def new(name: str, folder: Path) -> None:
    """Write a kernel NAME to begin with: NAME.py, NAME.cu.j2, test_NAME.py and sweep_NAME.py. Existing files are never touched."""
    from vidrial.cli.new import next_steps, write_kernel

    paths = write_kernel(name, folder)
    # A source tree that is not installed has no command of its own.
    program = "python -m vidrial" if Path(sys.argv[0]).name == "__main__.py" else "vidrial"
    click.echo("\n".join(["wrote", *(f"  {path}" for path in paths), "next", *(f"  {line}" for line in next_steps(name, folder, program))]))
