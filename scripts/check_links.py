"""Checks the relative links of Markdown files: the file is there, and the heading that an anchor names.

python scripts/check_links.py FILE...

Links to other hosts are not looked at. Exit status 1 where a link leads nowhere.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[`~]*\s*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
_HOST = re.compile(r"[a-z][a-z+.-]*:|//", re.IGNORECASE)


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).strip().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


@cache
def _anchors_of(path: Path) -> set[str]:
    return anchors(path.read_text("utf-8"))


def broken(path: Path) -> list[str]:
    """The links of a file that lead nowhere, each with its line."""
    text = path.read_text("utf-8")
    # Code keeps its place and its lines, so that the links behind it keep theirs.
    for code in (_FENCE, _CODE):
        text = code.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    problems = []
    for match in _LINK.finditer(text):
        link = match[1]
        if _HOST.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else (path.parent / name)
        line = text.count("\n", 0, match.start()) + 1
        if not target.exists():
            problems.append(f"{path}:{line}: {link}: there is no such file")
        elif anchor and target.suffix == ".md" and anchor not in _anchors_of(target.resolve()):
            problems.append(f"{path}:{line}: {link}: there is no such heading")
    return problems


def main(files: list[str]) -> int:
    """Check files; prints what is broken."""
    problems = [problem for name in files for problem in broken(Path(name))]
    print("\n".join(problems) or f"{len(files)} files: all relative links lead somewhere")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
