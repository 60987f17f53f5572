"""``collm check``: what a start would say, without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.live import serving
from tests.packaging.sources import ROOT

DEMO = ROOT / "models" / "demo"


def _check(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.commands", "check", str(config)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def _page_config(page: str, directory: Path) -> Path:
    """The configuration that docs/models.md shows, its paths as seen from the repository."""
    block = page.split("```toml\n")[1].split("```")[0].replace("models/demo", str(DEMO))
    file = directory / "pair.toml"
    file.write_text(block)
    return file


def test_the_pair_of_the_documentation_fits(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    result = _check(_page_config(page, tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "base", "codes", "vocabulary", "ends of text", "gate", "the pair fits",
    ]  # fmt: skip
    assert "1024 tokens, 1024 outputs, LM head reads 128" in lines[0]
    assert lines[3] == "ends of text: 0 '<|endoftext|>'"


@pytest.mark.slow  # starts two engines
def test_the_pair_of_the_documentation_is_served_without_a_gate(tmp_path: Path) -> None:
    """The page's two commands, the second one with a port of its own; then who wrote what, and the playground."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    commands = page.split("```bash\n")[1].split("```")[0].splitlines()
    assert commands == ["collm check pair.toml", "collm serve --config pair.toml"]
    config = _page_config(page, tmp_path)
    assert _check(config).returncode == 0
    prompt = "Question: What is the alpha-3 code of Liberia?\nAnswer:"
    body = {"model": "pair", "prompt": prompt, "temperature": 0, "max_tokens": 24, "collaboration": {"report": True}}
    with serving(config, tmp_path) as server:
        assert "pair" in {model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert httpx.get(f"{server.url}/", follow_redirects=True).headers["content-type"].startswith("text/html")
        (choice,) = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert set(choice["collaboration"]["sources"]) == {"base", "codes"}
    assert choice["text"].strip()


def test_a_pair_that_does_not_fit(tmp_path: Path) -> None:
    shutil.copytree(DEMO / "codes", tmp_path / "codes")
    file = tmp_path / "codes" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    # Such a vocabulary is another one, and served as one of its own, if it is known what its tokens are as bytes.
    file.write_text(json.dumps(content | {"decoder": None}))
    config = tmp_path / "pair.toml"
    config.write_text(
        f'[base]\nmodel = "{DEMO / "base"}"\n[[experts]]\nname = "codes"\nmodel = "{tmp_path / "codes"}"\n'
    )
    result = _check(config)
    assert result.returncode == 1
    assert "error: experts.codes.model: base and expert do not share a vocabulary; 2 entries differ: " in result.stderr
    assert "Traceback" not in result.stderr
