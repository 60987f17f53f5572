"""``collm train compose STAGE --config compose.toml``: from an anchor and augmenting models to one served model.

Each stage keeps what it has finished, and goes on from there when it is started again. ``inspect`` shows a composed
checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.command import run_command

STAGES = {
    "train": "train the connections, and the controls that the settings name",
    "evaluate": "answer the test questions with the composition, its members and the controls",
    "pipeline": "both",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="collm train compose", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, text in STAGES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, help="the composition's settings, TOML")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. train.epochs=5"
        )
    text = "show a composed checkpoint: its members, its connections, and what they do with a text"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("checkpoint", type=Path, help="folder of the composed checkpoint")
    command.add_argument("--text", help="a text as the models read it, after any chat template")
    options = parser.parse_args(arguments)
    if options.stage == "inspect":
        return run_command(lambda: inspect_checkpoint(options.checkpoint, options.text))
    return run_command(lambda: run_stage(options.stage, options.config, options.set))


def inspect_checkpoint(folder: Path, text: str | None) -> None:
    """Print what a composed checkpoint is, and what its connections do with a text.

    Raises:
        CollmError: what is wrong, in one line.
    """
    from training.compose.inspection import describe, describe_text

    print(describe(folder))
    if text is not None:
        print()
        print(describe_text(folder, text))


def run_stage(stage: str, config: Path, overrides: Sequence[str]) -> None:
    """Run a stage, or all of them.

    Raises:
        CollmError: what is wrong, in one line.
    """
    from training.compose.settings import ComposeSettings
    from training.settings import read_settings

    settings = read_settings(ComposeSettings, config, overrides)
    # Late: without it, --help and a wrong setting would wait for torch.
    from training.compose import stages

    project = stages.ComposeProject(settings)
    project.check()
    if stage in ("train", "pipeline"):
        stages.train(project)
    if stage == "evaluate" or (stage == "pipeline" and settings.data.test is not None):
        stages.evaluate(project)


if __name__ == "__main__":
    sys.exit(main())
