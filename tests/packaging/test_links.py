"""The check of the documents' links finds what leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.packaging.sources import ROOT

PAGE = """# One `two`, three!

## Twice
## Twice

[file](other.md) [heading](other.md#a-b) [own](#one-two-three) [second](#twice-1) [host](https://example.org/x#y)
![picture](picture.png) `[code](nowhere.md)`

```
[code](nowhere.md)
```
"""


def check(path: Path) -> tuple[int, str]:
    command = [sys.executable, "scripts/check_links.py", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return run.returncode, run.stdout


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (tmp_path / "other.md").write_text("# A b\n")
    (tmp_path / "picture.png").write_bytes(b"")
    assert check(page)[0] == 0
    page.write_text(PAGE + "[a](nowhere.md)\n[b](#twice-2)\n[c](other.md#c)\n[see [d]](pictures.png)\n")
    status, out = check(page)
    assert status == 1
    assert [line.partition(".md:")[2] for line in out.splitlines()] == [
        "12: nowhere.md: there is no such file",
        "13: #twice-2: there is no such heading",
        "14: other.md#c: there is no such heading",
        "15: pictures.png: there is no such file",
    ]
