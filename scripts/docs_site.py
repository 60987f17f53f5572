"""What MkDocs does to each page before it is rendered; named in mkdocs.yml."""

import re

MARKED = re.compile(r"^(```\w+) (?:run|run error|output)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Take the words off that tell the tests which examples to run: the site's Markdown has another form for such."""
    return MARKED.sub(r"\1", markdown)
