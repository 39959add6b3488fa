"""The commands `tune` and `cache`: search for configurations, and look after records and built kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .cli_options import (
    Activation,
    ActivationType,
    Context,
    Kv,
    KvType,
    ModelPath,
    OutputText,
    QuantizeTo,
    TargetName,
    Text,
    Threads,
    value,
)  # fmt: skip
from .compiler.errors import EdgeFormerError, UnsupportedError
from .console import print_facts, stderr

if TYPE_CHECKING:
    from .compiler.target import Target
    from .compiler.tuner import Event, Problem
    from .model.tuning import Tuned

cache_app = typer.Typer(
    no_args_is_help=True, help="Look after tuning records and the kernels that were built on this machine."
)


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    app.add_typer(cache_app, name="cache")
    app.command("tune")(tune_command)


def tune_command(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="A GGUF file or a model's folder.", show_default=False),
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for the search: 90s, 10m, 1h.")] = "10m",
    operators: Annotated[
        str, typer.Option(help="decoder_step, quant_matmul, attention, ...; default: what runs.")
    ] = "",
    more: Annotated[bool, typer.Option("--more", help="Also go on where a record is there.")] = False,
    target: TargetName = "auto",
    threads: Threads = None,
    context: Context = None,
    kv: KvType = Kv.bf16,
    quantize: QuantizeTo = None,
    activation: ActivationType = Activation.auto,
    rpc: Annotated[str, typer.Option(help="HOST:PORT[,...] of `device serve`: tune there.")] = "",
    tracker: Annotated[str, typer.Option(help="HOST:PORT of a tracker: every free device.")] = "",
    key: Annotated[str, typer.Option(help="Of the devices of --rpc or --tracker.")] = "",
    output: OutputText = Text.text,
) -> None:
    """Search for faster configurations of a model's kernels on this machine, and keep them.

    Every candidate runs in a process of its own, is compared with the reference, and has to beat what ran
    before by more than the spread. Ctrl-C keeps every trial; the next run goes on from there.
    Without a MODEL, --operators are tuned at the sizes of models of 135M, 1B and 7B parameters.
    --target cuda tunes this machine's GPU kernels; --target gfx1151, sm_90 or another GPU that is not here
    ranks them by their machine code, and the records say so.
    """
    names = [name.strip() for name in operators.split(",") if name.strip()] or None
    bar = TuneProgress()
    options: dict[str, Any] = {
        "context": context, "kv": kv.value, "quantize": value(quantize), "activation": activation.value,
    }  # fmt: skip
    from .compiler.backends.triton_gpu import is_gpu

    for_gpu = is_gpu(target)
    if for_gpu and (model is not None or rpc or tracker):
        raise UnsupportedError(f"--target {target}: GPU kernels are tuned by --operators, without a MODEL")
    if model is None and not names and not for_gpu:
        raise UnsupportedError("tune needs a MODEL, or --operators")
    try:
        with bar:
            if rpc or tracker:
                where = [text.strip() for text in rpc.split(",") if text.strip()]
                found = tune_there(
                    model, names, budget, target, threads, more, bar, (where, tracker, key), options
                )
            elif for_gpu:
                found = tune_gpu(target, names or [], budget, more, bar)
            elif model is None:
                found = tune_sizes(names or [], budget, target, threads, more, bar)
            else:
                from .model.tuning import tune

                found = tune(
                    model, budget=budget, target=target, threads=threads, operators=names, more=more,
                    progress=bar, **options,
                )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"stopped; {bar.trials} trials are kept, the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if output == Text.json:
        typer.echo(json.dumps(facts(found), indent=1))
    else:
        show(found)


def tune_sizes(
    names: list[str], budget: str, target: str, threads: int | None, more: bool, progress: TuneProgress
) -> Tuned:
    """Tune operators by themselves, at the sizes of known models."""
    from .compiler.target import Target, available_cores
    from .model.tuning import Tuned, budget_seconds
    from .runtime.tuning import tune_problems

    resolved = Target.parse(target)
    resolved.require_runnable()
    chosen = known_sizes(names, resolved, threads or available_cores())
    outcomes = tune_problems(chosen, seconds=budget_seconds(budget), more=more, progress=progress)
    return Tuned(tuple(outcomes), {}, {})


def tune_gpu(target: str, names: list[str], budget: str, more: bool, progress: TuneProgress) -> Tuned:
    """Tune the Triton kernels of operators ([]: all): on a GPU that is here, else by their machine code."""
    from .model.tuning import Tuned, budget_seconds
    from .runtime.gpu_tuning import tune

    outcomes = tune(target, names, seconds=budget_seconds(budget), more=more, progress=progress)
    return Tuned(tuple(outcomes), {}, {})


def known_sizes(names: list[str], target: Target, threads: int) -> list[Problem]:
    """Return the problems of operators at the sizes of known models. Raises UnsupportedError for a name."""
    from .bench.tuned import problems

    found = [p for _, p in problems(target, threads) if len(p.space) > 1]
    known = sorted({p.wanted.operator for p in found})
    if unknown := set(names) - set(known):
        raise UnsupportedError(
            f"unknown operators {', '.join(sorted(unknown))}; without a model: {', '.join(known)}"
        )
    return [p for p in found if p.wanted.operator in names]


def tune_there(
    model: Path | None, names: list[str] | None, budget: str, target: str, threads: int | None, more: bool,
    progress: TuneProgress, where: tuple[list[str], str, str], options: dict[str, Any],
) -> Tuned:  # fmt: skip
    """Tune on other devices: kernels are built here, checked and timed there; records stay here."""
    from .compiler.target import Target
    from .model.tuning import Tuned, budget_seconds, planned_problems
    from .runtime.remote import RemoteEvaluator, places
    from .runtime.tuning import tune_problems

    seconds = budget_seconds(budget)
    with RemoteEvaluator(places(*where)) as devices:
        resolved = devices.target() if target == "auto" else Target.parse(target)
        count = threads or resolved.cores
        if model is None:
            found = known_sizes(names or [], resolved, count)
        else:
            found = planned_problems(model, resolved, count, names, **options)
        outcomes = tune_problems(found, seconds=seconds, more=more, progress=progress, evaluator=devices)
    return Tuned(tuple(outcomes), {}, {})


class TuneProgress:
    """A progress bar on stderr: problem, trials, best so far, time left; silent without a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.trials = 0
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")]
        console = stderr()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("loading", total=None, state="")
        self._whole = 0.0

    def __call__(self, event: Event) -> None:
        self.trials += event.kind == "trial"
        self._whole = max(self._whole, event.seconds_left)
        minutes, seconds = divmod(round(event.seconds_left), 60)
        state = f"{event.trials} trials, best {event.best:.2f} of the default, {minutes}:{seconds:02} left"
        name = f"[{event.done + 1}/{event.total}] {event.problem.title[:60]}"
        done = self._whole - event.seconds_left
        self._bar.update(self._task, description=name, total=self._whole, completed=done, state=state)

    def __enter__(self) -> TuneProgress:
        self._bar.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._bar.stop()


def facts(found: Tuned) -> dict[str, Any]:
    """Return what a tuning run did as plain data."""
    rows = []
    for outcome in found.outcomes:
        row: dict[str, Any] = {"problem": outcome.problem.title, "state": outcome.state}
        row |= {"trials": outcome.trials, "note": outcome.note}
        if outcome.record is not None:
            r = outcome.record
            row |= {"default_seconds": r.default_seconds, "seconds": r.seconds, "spread": r.spread}
            row |= {"configuration": r.configuration, "source": r.source}
        rows.append(row)
    return {"problems": rows, "trials": found.trials, "before": found.before, "after": found.after}


def show(found: Tuned) -> None:
    """Print the table before and after."""
    from .compiler.tuner import GOES_ON

    table = Table("problem", "state", "trials", "default", "tuned", "gain", "configuration")
    for outcome in found.outcomes:
        r = outcome.record
        chosen = "" if r is None else " ".join(f"{k}={v}" for k, v in r.configuration.items())
        if r is None or not r.seconds:
            text = f"{chosen} ({outcome.note or r.source})" if r else outcome.note
            table.add_row(outcome.problem.title, outcome.state, str(outcome.trials), "", "", "", text)
            continue
        table.add_row(
            outcome.problem.title, outcome.state, str(outcome.trials), f"{r.default_seconds * 1e6:.1f} us",
            f"{r.seconds * 1e6:.1f} ± {r.spread * 1e6:.1f} us", f"{r.default_seconds / r.seconds:.2f}x",
            chosen,
        )  # fmt: skip
    for name in ("prefill", "decode"):
        before, after = found.before.get(name), found.after.get(name)
        if before and after:
            same = found.before == found.after  # nothing was measured a second time
            table.add_row(
                f"{name} of the model", "", "", f"{before:.1f} tokens/s",
                "the same kernels" if same else f"{after:.1f} tokens/s", f"{after / before:.2f}x",
            )  # fmt: skip
    console = stderr()
    console.file = __import__("sys").stdout
    console.print(table)
    typer.echo(f"{found.trials} trials", err=True)
    if open_ends := sum(GOES_ON in outcome.note for outcome in found.outcomes):
        where = "one problem" if open_ends == 1 else f"{open_ends} problems"
        typer.echo(
            f"the time was over before the search of {where} had ended; --more goes on there", err=True
        )


@cache_app.command("list")
def cache_list(output: OutputText = Text.text) -> None:
    """List tuning records, problems whose search is not finished, and built kernels."""
    from .compiler.artifacts import ArtifactStore
    from .compiler.journal import read_progress
    from .compiler.records import RecordStore

    store = ArtifactStore()
    kernels = [{"folder": str(folder), "key": key} for folder, key in store.entries()]
    records = RecordStore().all()
    unfinished = [p for p in read_progress() if not p.done]
    if output == Text.json:
        data = {
            "kernels": kernels,
            "records": [{"origin": origin, **json.loads(record.text())} for record, origin in records],
            "unfinished": [vars(p) for p in unfinished],
        }
        typer.echo(json.dumps(data, indent=1))
        return
    for record, origin in records:
        sizes = " ".join(f"{name}={size}" for name, size in record.sizes.items())
        gain = f"{record.default_seconds / record.seconds:.2f}x" if record.seconds else record.source
        typer.echo(
            f"record  {origin:8} {record.operator} {record.phase} {sizes}  {gain}  {record.family[:50]}"
        )
    for p in unfinished:
        best = "" if p.best is None else f", best {p.best:.2f} of the default's time"
        typer.echo(f"search  {p.title}: {p.trials} trials{best}")
    for folder, key in store.entries():
        typer.echo(f"kernel  {folder.name}  {key['spec'] if key else 'damaged'}")
    typer.echo(
        f"{len(records)} records, {len(unfinished)} unfinished searches, {len(kernels)} kernels", err=True
    )


@cache_app.command("verify")
def cache_verify() -> None:
    """Check the files of every record and built kernel; exit code 2 when one is damaged."""
    from .compiler.artifacts import ArtifactStore
    from .compiler.records import RecordStore

    problems = [*ArtifactStore().verify(), *RecordStore().problems()]
    for path, problem in problems:
        typer.echo(f"{path}: {problem}")
    if problems:
        raise EdgeFormerError(f"{len(problems)} entries are damaged; they are left out, or built again")
    typer.echo("all records and kernels are sound", err=True)


@cache_app.command("prune")
def cache_prune(
    records: Annotated[bool, typer.Option("--records", help="Records and trials too.")] = False,
) -> None:
    """Delete every built kernel; what is needed is built again. Records stay, unless asked for."""
    from .compiler.artifacts import ArtifactStore
    from .compiler.journal import Journal
    from .compiler.records import RecordStore

    typer.echo(f"{ArtifactStore().prune()} kernels deleted", err=True)
    if records:
        typer.echo(f"{RecordStore().prune()} records deleted", err=True)
        journal = Journal()
        journal.forget()
        journal.close()


@cache_app.command("export")
def cache_export(
    to: Annotated[Path, typer.Option("--to", help="A folder.", show_default=False)],
    operator: Annotated[str, typer.Option(help="Only this operator's.")] = "",
    better: Annotated[
        bool,
        typer.Option("--better", help="Only what beats the default by more than its spread, and neighbours."),
    ] = False,
) -> None:
    """Write your records to FOLDER/<micro-architecture>/<operator>.json, for review and for others."""
    from .compiler.exchange import export

    count, files = export(to, operator, better=better)
    typer.echo(f"{count} records in {files} files under {to}", err=True)


@cache_app.command("import")
def cache_import(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that export wrote, or a folder of them.")
    ],
) -> None:
    """Take records from others: data only, checked, and run against the reference before their first use."""
    from .compiler.exchange import load_records

    count = load_records(source)
    typer.echo(f"{count} records taken; each is checked on this device before its first use", err=True)


@cache_app.command("why")
def cache_why(
    model: ModelPath,
    layer: Annotated[
        str, typer.Argument(help="A layer of the model, such as layers.0.down; default: all.")
    ] = "",
    kv: KvType = Kv.bf16,
    output: OutputText = Text.text,
) -> None:
    """Say for a model's kernels which record or default runs them, and why others do not."""
    from .model.why import explain_model

    rows = explain_model(model, layer, kv.value)
    if not rows:
        raise UnsupportedError(f"{model} has no layer {layer!r}; `edgeformer run MODEL --report` lists them")
    for row in rows:
        if output == Text.json:
            continue
        print_facts(row, False)
        typer.echo()
    if output == Text.json:
        typer.echo(json.dumps(rows, indent=1))
