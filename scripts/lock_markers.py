"""Filters a resolved requirements file (stdin to stdout) down to the machines that are supported.

A line whose marker holds on none of them goes; a marker that holds on all of them is taken off.
"""

import itertools
import sys

from packaging.requirements import Requirement

MACHINES = [
    {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    for machine, python in itertools.product(("x86_64", "aarch64"), ("3.11", "3.12", "3.13", "3.14"))
]

for line in sys.stdin:
    if not line.strip() or line.startswith("#"):
        continue
    requirement = Requirement(line.strip())
    marker = requirement.marker
    holds = [marker is None or marker.evaluate(machine) for machine in MACHINES]
    if not any(holds):
        continue
    if all(holds):
        requirement.marker = None
    print(str(requirement).replace("; ", " ; "))
