"""The lessons of published vulnerabilities of this field, each with a test."""

from __future__ import annotations

import ast
import hmac
import ipaddress
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import server.auth
from server.settings import Settings
from server.text.chat_template import ChatTemplate, ChatTemplateError
from server.text.tokenizer import TextTokenizer
from tests.robustness import raw
from tests.robustness.conftest import KEY
from tests.robustness.servers import MODEL, ROOT, FaultServer, serving
from tests.server.fakes import byte_level_tokenizer

OURS = [file for package in ("server", "engine") for file in sorted((ROOT / package).rglob("*.py"))]


# -- between processes ----------------------------------------------------------------------------------------


def _names(file: Path) -> set[str]:
    """Everything that a module imports or calls by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


@pytest.mark.parametrize("file", OURS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_pickle_and_no_evaluation(file: Path) -> None:
    banned = {
        "pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "multiprocessing",
        "send_pyobj", "recv_pyobj", "eval", "exec", "yaml.load", "torch.load", "os.system",
    }  # fmt: skip
    assert not banned & _names(file)


def _addresses(processes: list[psutil.Process]) -> list[tuple[str, str]]:
    """(process, address) of every internet socket that listens or is not connected to loopback."""
    found = []
    for process in processes:
        for connection in process.net_connections(kind="inet"):
            for address in filter(None, (connection.laddr, connection.raddr)):
                found.append((process.name(), address.ip))
    return found


def _only_loopback(processes: list[psutil.Process]) -> None:
    outside = [item for item in _addresses(processes) if not ipaddress.ip_address(item[1]).is_loopback]
    assert not outside


def test_sockets_are_ipc_or_loopback(live: FaultServer) -> None:
    """Ours and vLLM's, of the whole tree of processes, while a request runs."""
    live.check_good()
    tree = live.tree()
    assert len(tree) >= 2
    _only_loopback(tree)
    paths = {connection.laddr for process in tree for connection in process.net_connections(kind="unix")} - {""}
    ours = [Path(path) for path in paths if "collm-" in str(path)]
    assert {path.name for path in ours} == {"requests", "batches"}
    for path in ours:
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, "another user could reach the engine"


@pytest.mark.slow
def test_sockets_of_worker_processes_are_ipc_or_loopback(tmp_path: Path) -> None:
    with serving(tmp_path, experts__executor="mp") as server:
        server.check_good()
        _only_loopback(server.tree())


@pytest.mark.slow
def test_sockets_where_the_machines_name_is_not_loopback(tmp_path: Path) -> None:
    """In a container the machine's name is an outside address: vLLM's sockets must not follow it."""
    outside = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not ipaddress.ip_address(address.address).is_loopback
    ]
    allowed = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0
    if not (outside and allowed):
        pytest.skip("needs an outside address, and the right to mount over /etc/hosts")
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{outside[0]} {socket.gethostname()}\n")
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from tests.robustness.servers import serving
        from tests.robustness.test_security import _only_loopback
        with serving(Path({str(tmp_path)!r})) as server:
            _only_loopback(server.tree())
        """
    )
    command = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
    subprocess.run(
        [*command, sys.executable, "-c", script], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."}
    )


# -- what a client can make the server do ---------------------------------------------------------------------


def test_nothing_is_fetched(live: FaultServer) -> None:
    """An address in a request, wherever it stands, is never called."""
    called = threading.Event()
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(3)

        def listen() -> None:
            try:
                trap.accept()[0].close()
                called.set()
            except TimeoutError:
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        media = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "file", "file": {"file_data": url}},
            {"type": "text", "text": url},
        ]
        with live.http() as http:
            for part in media:
                body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
                status = http.post("/v1/chat/completions", json=body).status_code
                assert status == (200 if part["type"] == "text" else 400)
            for body in ({"model": url}, {"model": MODEL, "prompt": url, "max_tokens": 2}, {"tokenizer": url}):
                http.post("/v1/completions", json=body)
        thread.join()
    assert not called.is_set()
    live.check_good()


def test_templates_of_messages_are_not_evaluated(live: FaultServer) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}"}],
    }
    with live.http() as http:
        response = http.post("/v1/chat/completions", json={**body, "max_tokens": 1, "return_token_ids": True})
        assert response.status_code == 200
        prompt = response.json()["prompt_token_ids"]
        text = http.post("/detokenize", json={"tokens": prompt}).json()["prompt"]
    assert "{{ 7 * 7 }}" in text
    assert "49" not in text


def test_templates_of_checkpoints_are_sandboxed() -> None:
    """A checkpoint's chat template is code of the one who made it: no attributes, no endless loops' worth of text."""
    for template in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for a in range(10**9) %}x{% endfor %}",
    ):
        found = ChatTemplate.find(TextTokenizer(byte_level_tokenizer(), {"chat_template": template}))
        assert found is not None
        with pytest.raises(ChatTemplateError):
            found.render([{"role": "user", "content": "x"}])


def test_special_tokens_in_text(live: FaultServer) -> None:
    """Text that looks like the end-of-sequence token: documented as the tokenizer's own business, and never a crash."""
    assert live.complete("<|endoftext|>" * 20 + "Hello", max_tokens=2).status_code == 200


def test_costly_stop_strings_and_bias_are_bounded(live: FaultServer) -> None:
    """What is allowed at most does not hold up others."""
    body = {
        "model": MODEL, "prompt": "a", "max_tokens": 300, "ignore_eos": True, "temperature": 0, "logprobs": 5,
        "stop": ["a" * 1023 + letter for letter in "bcde"], "logit_bias": {str(token): 1 for token in range(1, 1000)},
        "stop_token_ids": list(range(1, 900)) * 4, "min_tokens": 300,
    }  # fmt: skip
    reply = raw.send(live, raw.post(live, json.dumps(body).encode()))
    assert reply.status == 200, reply.body[:300]
    live.check_good()


# -- keys -----------------------------------------------------------------------------------------------------


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one length, each compared by hmac.compare_digest, all of them whichever fits."""
    compared: list[tuple[int, int]] = []

    def watch(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return hmac.compare_digest(first, second)

    class Hmac:
        compare_digest = staticmethod(watch)

    monkeypatch.setattr(server.auth, "hmac", Hmac)
    keys = server.auth.ApiKeys(lambda *_: None, ["first", "second-and-longer", "third"])  # type: ignore[arg-type]
    for sent, number in ((b"Bearer first", 0), (b"Bearer third", 2), (b"Bearer x", None), (b"Bearer ", None)):
        compared.clear()
        assert keys._number({"headers": [(b"authorization", sent)]}) == number
        assert compared == [(32, 32)] * 3


def test_keys_are_nowhere_to_be_seen(live: FaultServer) -> None:
    """Not in the log, not in a command line, not in what any route says of itself."""
    assert KEY not in live.output()
    for process in live.tree():
        with suppress(psutil.NoSuchProcess):  # one may have ended
            assert KEY not in " ".join(process.cmdline())
    with live.http() as http:
        for path in ("/version", "/metrics", "/openapi.json", "/v1/models", "/"):
            assert KEY not in http.get(path).text


# -- defaults -------------------------------------------------------------------------------------------------


def test_defaults_are_the_careful_ones() -> None:
    defaults = Settings.model_validate({"base": {"model": "x"}})
    assert defaults.server.host == "127.0.0.1"
    assert defaults.server.cors_allow_origins == ()
    assert defaults.base.vllm == {}


def test_no_remote_code_unless_asked_for() -> None:
    """Nothing in our packages turns it on. Of our arguments and vLLM's defaults: tests/oracle/test_vllm_facts.py."""
    for file in OURS:
        assert "trust_remote_code=True" not in file.read_text().replace(" ", "")
