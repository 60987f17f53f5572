"""``collm bench COMMAND``; ``--help`` says which there are and what each measures."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import adapters, blends, compare, composition, context, coordination, device, memory, pacing, prediction
from bench.errors import BenchError
from bench.report import Report, bar_table, environment, environment_line, json_line
from bench.settings import Settings
from bench.shapes import DEMO, NAMES, Pair, get_pair, quick_dtype
from bench.workload import PROMPT_TOKENS, Cell, Deferral, Sampling

COMMANDS = {
    "all": "everything in about ten minutes on two cores: the shares, the comparisons, context, memory",
    "coordination": "the engine alone: which part of its time goes to anything but the models",
    "pacing": "the engine alone: lockstep as it is, with gather, with run-ahead, with both",
    "predict": "the engine alone: what a model of cost says beforehand, what is measured, when a pair is worth it",
    "adapters": "the engine alone: an expert that is an adapter, against a merged copy in a lane of its own",
    "blends": "the engine alone: what combining the members' distributions costs beyond their steps",
    "device": "no engine: how busy a GPU is kept, on a virtual clock at reckoned costs, by scheduler.steps_in_flight",
    "compare": "server, engine, stock vLLM, and the per-token HTTP baseline, side by side",
    "context": "the engine alone: its own time per token as the context grows",
    "composition": "the engine alone: a step of a composed model beside its members' steps",
    "memory": "the server's resident memory over many requests",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the process's exit status: 1 if anything failed, whatever the bars say."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "all")
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    facts = environment()
    try:
        with _workdir(options.workdir) as workdir:
            reports = asyncio.run(_run(options, workdir))
    except (BenchError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted {interrupt}".rstrip(), file=sys.stderr)
        return 130
    bars = [bar for report in reports for bar in report.bars]
    texts = [report.text for report in reports]
    if bars:
        texts.append(f"### Bars\n\n{bar_table(bars)}")
    texts.append(environment_line(facts))
    print("\n\n".join(texts), end="\n\n")
    record = {
        "command": ["bench", *arguments],
        "environment": facts,
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
        "reports": [report.record() for report in reports],
    }
    line = json_line(record)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(line + "\n")
    print(line)
    failures = [failure for report in reports for failure in report.failures]
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


async def _run(options: argparse.Namespace, workdir: Path) -> list[Report]:
    if options.command == "all":
        return await _all(options, workdir)
    if options.command == "device":
        rates = [rate for rate in options.deferral or (0.0, 0.3) if rate != "gate"]
        return [
            device.measure(options.concurrency or (1, 32, 256), rates, options.requests or 2, options.max_tokens or 64)
        ]
    cuda = _cuda(options)
    shape = options.shape or ("1B-8B" if cuda else DEMO if options.command == "coordination" else "tiny")
    pair = _pair(options, shape, workdir)
    return [await _measure(options.command, pair, options, workdir)]


async def _all(options: argparse.Namespace, workdir: Path) -> list[Report]:
    """Every measurement, small. Options that were given hold for all of them, where they have a meaning."""
    reports = []
    large = ["1B-8B"] if _cuda(options) else ["S"]
    shapes = [options.shape] if options.shape else [DEMO, "tiny", *large]
    for shape in shapes:
        pair = _pair(options, shape, workdir)
        reports.append(await _measure("coordination", pair, options, workdir))
        reports.append(await _measure("pacing", pair, options, workdir))
    pair = _pair(options, shapes[0], workdir)
    reports.append(await _measure("predict", pair, options, workdir))
    for shape in shapes if options.shape else ["tiny", *large]:
        pair = _pair(options, shape, workdir)
        reports.append(await _measure("compare", pair, options, workdir))
    pair = _pair(options, options.shape or "tiny", workdir)
    if pair.max_model_len > max(context.CONTEXTS):
        reports.append(await _measure("context", pair, options, workdir))
    reports.append(await _measure("memory", pair, options, workdir))
    return reports


async def _measure(command: str, pair: Pair, options: argparse.Namespace, workdir: Path) -> Report:
    if options.temperature and command not in ("coordination", "compare"):
        raise ValueError(f"--temperature: {command} measures greedy requests; coordination and compare can draw")
    quick = options.command == "all" and not options.full
    cuda = _cuda(options)
    max_tokens = options.max_tokens or pair.max_tokens
    small = pair.name in ("tiny", DEMO)
    rounds = options.rounds or 3
    requests = options.requests or (4 if small else 1)

    def settings(concurrency: int, request_tokens: int) -> Settings:
        return Settings(
            pair,
            max_num_seqs=concurrency,
            request_tokens=request_tokens,
            scheduler=dict(options.scheduler),
            vllm=dict(options.vllm),
            draft_tokens=options.draft_tokens,
            sampling=Sampling(options.temperature, options.top_p),
            two_devices=options.two_devices,
            cuda=cuda,
            log=options.log or workdir / "servers.log",
        )

    def for_cells(cells: list[Cell]) -> Settings:
        concurrency = max(cell.concurrency for cell in cells)
        longest = max(PROMPT_TOKENS[cell.prompt] for cell in cells)
        if longest + max_tokens > pair.max_model_len:
            raise ValueError(
                f"--prompt: {longest} tokens and {max_tokens} written ones do not fit into the context of {pair.name},"
                f" {pair.max_model_len} tokens"
            )
        return settings(concurrency, max(longest, 64) + max_tokens)

    gate: list[Deferral] = ["gate"] if pair.gate is not None else []
    if command == "coordination":
        deferrals = gate or ([0.3] if quick and not small else [0.0, 0.1, 0.3, 1.0])
        cells = _cells(options, [256] if cuda else [coordination.BAR_CONCURRENCY], deferrals, ["short"])
        # What joining two models costs, step by step; what pacing brings on top has a measurement of its own.
        plain = dataclasses.replace(for_cells(cells), scheduler=dict(pacing.LOCKSTEP) | dict(options.scheduler))
        return await coordination.measure(
            plain, cells, rounds=rounds, requests=requests, max_tokens=max_tokens, seed=options.seed
        )
    if command == "pacing":
        cells = _cells(options, [8, 32], gate or [0.1, 0.3], ["short"])
        return await pacing.measure(
            for_cells(cells), cells, rounds=rounds, requests=requests, max_tokens=max_tokens, seed=options.seed
        )
    if command == "adapters":
        cells = _cells(options, [1, 8, 32], [0.1, 0.3, 1.0], ["short"])
        return await adapters.measure(
            for_cells(cells), cells, workdir, rounds=rounds, requests=requests, max_tokens=max_tokens, seed=options.seed
        )
    if command == "blends":
        cells = _cells(options, [32], [1.0], ["short"])
        return await blends.measure(
            for_cells(cells), cells, rounds=rounds, requests=requests, max_tokens=max_tokens, seed=options.seed
        )
    if command == "predict":
        concurrencies = options.concurrency or [1, 8, 32]
        return await prediction.measure(
            for_cells(_cells(options, concurrencies, [0.0], ["short"])),
            concurrencies,
            options.deferral or gate or [0.1, 0.3],
            rounds=rounds,
            requests=requests,
            max_tokens=max_tokens,
            seed=options.seed,
        )
    if command == "compare":
        concurrencies = [1, 8, 32, 256] if cuda else [1, 8, 32]
        prompts = ["short", "long"]
        deferrals = [0.0, 0.1, 0.3, 1.0, *gate]
        if quick:
            concurrencies, prompts, deferrals = concurrencies[-2:], ["short"], [0.0, 0.3, 1.0, *gate]
        cells = _cells(options, concurrencies, deferrals, prompts)
        if quick and not small and not options.deferral:
            # Eight large models' requests at deferral 0 and 1 say nothing that 32 do not.
            cells = [cell for cell in cells if cell.concurrency == concurrencies[-1] or cell.deferral == 0.3]
        return await compare.measure(
            for_cells(cells),
            cells,
            rounds=options.rounds or (3 if small or not quick else 2),
            requests=requests,
            max_tokens=max_tokens,
            seed=options.seed,
            starts=options.starts,
            workdir=workdir,
            names=options.contenders,
        )
    if command == "context":
        concurrency = max(options.concurrency or [8])
        lengths = [length for length in context.CONTEXTS if length + max_tokens < pair.max_model_len]
        return await context.measure(
            settings(concurrency, max(lengths) + max_tokens),
            lengths,
            concurrency=concurrency,
            deferral=(options.deferral or gate or [0.3])[0],
            rounds=rounds,
            max_tokens=max_tokens,
            seed=options.seed,
        )
    if command == "composition":
        concurrency = max(options.concurrency or [32])
        return await composition.measure(
            settings(concurrency, 64 + max_tokens),
            workdir / f"{pair.name}-{pair.dtype}-composed",
            concurrency=concurrency,
            rounds=rounds,
            max_tokens=max_tokens,
            seed=options.seed,
        )
    cell = Cell(
        max(options.concurrency or [32]), (options.deferral or gate or [0.3])[0], (options.prompt or ["short"])[0]
    )
    return await memory.measure(
        for_cells([cell]),
        cell,
        requests=options.requests or (2000 if quick else 10_000),
        max_tokens=options.max_tokens or 8,
        seed=options.seed,
    )


def _cells(
    options: argparse.Namespace, concurrencies: list[int], deferrals: list[Deferral], prompts: list[str]
) -> list[Cell]:
    """The grid that was asked for, or the default one."""
    return [
        Cell(concurrency, deferral, prompt)
        for prompt in options.prompt or prompts
        for concurrency in options.concurrency or concurrencies
        for deferral in options.deferral or deferrals
    ]


def _pair(options: argparse.Namespace, shape: str, workdir: Path) -> Pair:
    gated = options.made_up_gate
    dtype = options.dtype or ("" if _cuda(options) else quick_dtype(shape))
    if options.agreement is None:
        return get_pair(shape, workdir, dtype=dtype, gated=gated)
    return get_pair(shape, workdir, dtype=dtype, gated=gated, agreement=options.agreement)


def _cuda(options: argparse.Namespace) -> bool:
    device: str = options.device
    return device == "cuda" or (device == "auto" and shutil.which("nvidia-smi") is not None)


@contextlib.contextmanager
def _workdir(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="collm-bench-") as directory:
        yield Path(directory)


def _interrupt(number: int, frame: object) -> None:
    # As Ctrl-C: frozen servers are ended on the way out.
    raise KeyboardInterrupt(f"by signal {number}")


def _deferral(text: str) -> Deferral:
    if text == "gate":
        return "gate"
    rate = float(text)
    if not 0.0 <= rate <= 1.0:
        raise argparse.ArgumentTypeError("a deferral rate is between 0 and 1")
    return rate


def _assignment(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--shape", choices=NAMES, help="pair of models; without a default of its own: tiny, on a GPU 1B-8B")
    add("--concurrency", type=int, nargs="+", metavar="N", help="requests in flight")
    add("--deferral", type=_deferral, nargs="+", metavar="RATE", help="forced deferral rates from 0 to 1, or: gate")
    add("--prompt", choices=PROMPT_TOKENS, nargs="+", help=f"prompt lengths in tokens: {PROMPT_TOKENS}")
    add("--rounds", type=int, metavar="N", help="repetitions of everything")
    add("--requests", type=int, metavar="N", help="requests per request in flight; for memory: in all")
    add("--max-tokens", type=int, metavar="N", help="tokens that every request writes")
    add("--seed", type=int, default=1, help="of prompts and forced deferrals")
    add("--agreement", type=float, metavar="SHARE", help="how often synthetic base and expert agree (default 0)")
    add("--made-up-gate", action="store_true", help="synthetic pairs: with a gate; it defers three tokens of ten")
    add("--temperature", type=float, default=0.0, help="coordination, compare: of every request (default 0, greedy)")
    add("--top-p", type=float, default=1.0, help="with --temperature")
    add("--two-devices", action="store_true", help="the engine's base on CUDA device 0, its expert on 1")
    add("--dtype", default="", help="instead of the shape's own, which is float32 on a CPU that is slow at others")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where nvidia-smi is")
    add("--threads", type=int, metavar="N", help="OMP_NUM_THREADS for all; stock servers choose on a CPU")
    add("--scheduler", type=_assignment, action="append", default=[], metavar="NAME=VALUE", help="engine setting")
    add("--vllm", type=_assignment, action="append", default=[], metavar="NAME=VALUE", help="vLLM option, everywhere")
    add("--contenders", nargs="+", choices=compare.NAMES, help="compare: only these")
    add("--draft-tokens", type=int, default=4, metavar="N", help="compare: what the base drafts for a stock expert")
    add(
        "--starts",
        choices=("once", "each-round"),
        default="once",
        help="compare: start servers once and freeze those that are not measured, or start each anew in every round",
    )
    add("--full", action="store_true", help="all: the whole grid, and 10,000 requests for memory (hours on two cores)")
    add("--workdir", type=Path, metavar="FOLDER", help="keeps synthetic models; default: a temporary folder")
    add("--log", type=Path, metavar="FILE", help="what the servers print; default: servers.log in the workdir")
    add("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    parser = argparse.ArgumentParser(prog="collm bench", description="Measure what the engine and the server do.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, parents=[common])
    return parser


if __name__ == "__main__":
    sys.exit(main())
