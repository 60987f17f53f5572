"""``collm train STAGE --config project.toml``: from a base, experts and data to a gate that the server loads.

Each stage keeps what it has finished, and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from training.command import run_command
from training.errors import SettingsError
from training.graph import STAGES
from training.launcher import world_size

if TYPE_CHECKING:
    from training.project import Project

STATUS = "what is done, what is stale and why, and what waits"
PUSH = "write the model card of the pair, and upload it to a hub"
RECALIBRATE = "measure the curve of a gate that is there anew, on this machine"
PIPELINE = "all of these, and the pair to be served"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["convert"]:
        from training.convert import main as convert

        return convert(given[1:])
    if given[:1] == ["compose"]:
        from training.compose.__main__ import main as compose

        return compose(given[1:])
    parser = argparse.ArgumentParser(prog="collm train", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    commands_of = {name: stage.help for name, stage in STAGES.items()} | {"pipeline": PIPELINE}
    for name, text in commands_of.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, help="the project's settings, TOML")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. train.gate.epochs=5"
        )
    for name, text in (("status", STATUS), ("push", PUSH), ("recalibrate", RECALIBRATE)):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, help="the project's settings, TOML")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
        if name == "push":
            command.add_argument("--to", metavar="OWNER/NAME", help="where; without it the card alone is written")
            command.add_argument("--private", action="store_true", help="make what is uploaded private")
        elif name == "recalibrate":
            command.add_argument("--gate", type=Path, required=True, help="folder of the gate")
            command.add_argument("--to", type=Path, help="folder that gets it with its new curve; without it, the same")
            command.add_argument(
                "--times", type=_positive, default=3, help="decode each threshold so often, the least cost counts (3)"
            )
    commands.add_parser("convert", help="base and gate to and from the reference format")
    commands.add_parser("compose", help="compose checkpoints by cross-attention (CALM): collm train compose --help")
    options = parser.parse_args(given)
    if options.stage == "status":
        return run_command(lambda: _status(options.config, options.set))
    if options.stage == "push":
        return run_command(lambda: _push(options.config, options.set, options.to, private=options.private))
    if options.stage == "recalibrate":
        return run_command(lambda: _recalibrate(options.config, options.set, options.gate, options.to, options.times))
    return run_command(lambda: run_stage(options.stage, options.config, options.set))


def run_stage(stage: str, config: Path, overrides: Sequence[str]) -> None:
    """Run a stage, or all of them.

    Raises:
        CollmError: what is wrong, in one line.
    """
    several = world_size() > 1
    if several and stage != "train":
        raise SettingsError(f"{stage} is one process's work: start it without a launcher; of several, train runs")
    project = _project(config, overrides)
    settings = project.settings
    if several:
        _train_together(project)
        return
    project.check()
    names = [stage]
    if stage == "pipeline":
        names = [name for name in STAGES if name != "evaluate" or settings.data.test is not None]
    elif stage in ("calibrate", "regret"):
        names = [stage, "export"]
    for name in names:
        STAGES[name].run(project)


def _train_together(project: Project) -> None:
    from training.processes import start_processes
    from training.stages import train

    processes = start_processes(project.device)
    with nullcontext() if processes.main else redirect_stdout(io.StringIO()):
        if processes.main:
            project.check()
        processes.wait()
        train.run(project, processes)


def _project(config: Path, overrides: Sequence[str]) -> Project:
    from training.settings import load_settings

    settings = load_settings(config, overrides)
    # Late: without it, --help and a wrong setting would wait for torch.
    from training.project import Project

    return Project(settings)


def _status(config: Path, overrides: Sequence[str]) -> None:
    from training.status import print_status

    print_status(_project(config, overrides))


def _push(config: Path, overrides: Sequence[str], to: str | None, *, private: bool) -> None:
    from training.push import push

    push(_project(config, overrides), to, private=private)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _recalibrate(config: Path, overrides: Sequence[str], gate: Path, to: Path | None, times: int) -> None:
    project = _project(config, overrides)
    project.check()
    from training.recalibrate import recalibrate

    recalibrate(project, gate, to or gate, times)


if __name__ == "__main__":
    sys.exit(main())
