"""Makes base/prometheusrule.yaml from deploy/prometheus/rules: ``python deploy/kubernetes/generate.py``.

Plain Python, no dependencies: the rules are taken over as text. ``--check`` writes nothing and fails if the file is not
what would be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
OUTPUT = HERE / "base" / "prometheusrule.yaml"
HEAD = """\
# Made by deploy/kubernetes/generate.py from deploy/prometheus/rules; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: collm
spec:
  groups:
"""


def render() -> str:
    """The file's content: the groups of every rule file, two columns further in.

    Raises:
        ValueError: a file of rules does not have its groups as a block at its end.
    """
    parts = [HEAD]
    for path in sorted(RULES.glob("*.yml")):
        _, found, groups = path.read_text("utf-8").partition("\ngroups:\n")
        if not found:
            raise ValueError(f"{path.name} has no groups")
        parts += [f"  {line}\n" if line else "\n" for line in groups.splitlines()]
    return "".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Write the file, or check it; returns the exit status."""
    if list(arguments) not in ([], ["--check"]):
        print("usage: generate.py [--check]", file=sys.stderr)
        return 2
    if arguments:
        if OUTPUT.is_file() and OUTPUT.read_text("utf-8") == render():
            return 0
        print(f"{OUTPUT.name} is not what generate.py makes: run it without --check", file=sys.stderr)
        return 1
    OUTPUT.write_text(render(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
