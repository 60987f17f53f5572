"""Engine processes forked from one that has imported vLLM, which takes 14 seconds of a processor each time.

A plugin of pytest. It replaces how :class:`engine.client.EngineClient` starts its process; what runs in the process is
the same. Servers that tests start as a user does (``python -m server``) start their engines as a user's do, and so does
``COLLM_TEST_FORK=0``.

The template (``python -m tests.forking``) is started for the first engine of a pytest process and ends with pytest. It
must never have threads of Python's own or have computed anything in torch, since neither survives a fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from engine import client
from engine.config import EngineConfig
from engine.supervisor import EngineProcess, safe_environment
from engine.vllm_hooks.options import is_cpu_build
from tests.summary import figure

READ_AT_IMPORT = (
    "ATEN_", "CUDA_", "DNNL_", "GOMP_", "HF_", "LD_", "MKL_", "OMP_", "ONEDNN_", "PYTHON", "TORCH", "TRANSFORMERS_",
    "TRITON_", "VLLM_", "XDG_", "HOME",
)  # fmt: skip
"""How names of environment variables begin that libraries may read while they are imported."""
SET_BY_VLLM = frozenset({
    "LD_PRELOAD", "LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS", "TORCHINDUCTOR_COMPILE_THREADS",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "VLLM_DISABLE_SHARED_EXPERTS_STREAM", "VLLM_SSM_CONV_STATE_LAYOUT",
})  # fmt: skip
"""What making an engine's configuration on a CPU leaves in the environment: no setting, where a test did that."""
LONGEST_MESSAGE = 1 << 20
_template: _Template | None = None
_starting = threading.Lock()
_wants_vllm = ContextVar("wants_vllm", default=False)


class ForkedProcess(EngineProcess):
    """An engine's process that the template has forked; see :class:`~engine.supervisor.EngineProcess`."""

    def __init__(self, pid: int, connection: socket.socket, stdin: int) -> None:
        self._pid = pid
        self._handle = os.pidfd_open(pid)
        self._connection = connection
        self._stdin = stdin
        self._status: int | None = None
        self._ending: asyncio.Task[int] | None = None

    @classmethod
    async def start(cls, directory: Path) -> EngineProcess:
        """Fork one, unless the environment is not the template's, or vLLM's build is for GPUs, which bear no forks."""
        if not (_wants_vllm.get() and is_cpu_build()):
            return await EngineProcess.start(directory)
        template = await asyncio.to_thread(_the_template)
        if differences := template.differences():
            figure(f"an engine that was not forked, for what is different in the environment: {', '.join(differences)}")
            return await EngineProcess.start(directory)
        return await asyncio.to_thread(template.fork, directory)

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> int:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        return await asyncio.shield(self._ending)

    async def _end(self) -> int:
        self._connection.setblocking(False)
        said = await asyncio.get_running_loop().sock_recv(self._connection, 64)
        self._connection.close()
        os.close(self._stdin)
        os.close(self._handle)
        self._status = int(said) if said else -signal.SIGKILL  # nobody says so once the template has been killed
        return self._status

    def kill(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                # Not by its id, which another process may have by now: the template has waited for it.
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)


class _Template:
    """The template's process, from the side of pytest. Its environment is that of the first engine."""

    def __init__(self) -> None:
        self._before = _read_at_import(_settings(os.environ))
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.forking", str(theirs.fileno())],
                env=_settings(safe_environment()),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        said = self._orders.recv(LONGEST_MESSAGE)
        assert said, "the process that engines are forked from has ended; its error is above"
        self._after = _read_at_import(json.loads(said))

    def differences(self) -> list[str]:
        """Names of variables in which libraries, had they been imported now, would see something else."""
        now = _read_at_import(_settings(os.environ))
        # Imports set some themselves, in this process too.
        return [
            name
            for name in sorted(now.keys() | self._before.keys())
            if now.get(name) not in (self._before.get(name), self._after.get(name))
        ]

    def fork(self, directory: Path) -> ForkedProcess:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        standard_input, keep = os.pipe()
        order = {"directory": str(directory), "folder": str(Path.cwd()), "environment": _settings(safe_environment())}
        with theirs:
            socket.send_fds(self._orders, [json.dumps(order).encode()], [theirs.fileno(), standard_input, 1, 2])
        os.close(standard_input)
        return ForkedProcess(int(mine.recv(64)), mine, keep)

    def close(self) -> None:
        self._orders.close()
        self._process.wait()


def _the_template() -> _Template:
    global _template
    with _starting:
        _template = _template or _Template()
        return _template


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in SET_BY_VLLM}


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    ours = ("PYTHONPATH", "PYTHONSAFEPATH")
    return {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT) and k not in ours}


def pytest_configure() -> None:
    """Have engines of this process forked."""
    if os.environ.get("COLLM_TEST_FORK") == "0":
        return
    client.EngineProcess = ForkedProcess
    start = client.EngineClient.start

    async def noting(config: EngineConfig, **options: Any) -> client.EngineClient:
        _wants_vllm.set(config.base.backend == "vllm")
        return await start(config, **options)

    client.EngineClient.start = noting


def pytest_unconfigure() -> None:
    if _template is not None:
        _template.close()


def serve(orders: socket.socket) -> None:
    """In the template: fork an engine for each order until the other end closes."""
    import engine.process
    from engine.config import LaneConfig
    from engine.vllm_hooks.options import prepare_environment

    prepare_environment((LaneConfig(model="."),))
    import engine.vllm_hooks.lane
    import engine.vllm_hooks.load
    import engine.vllm_hooks.worker_cpu

    gc.collect()
    gc.freeze()
    orders.send(json.dumps(dict(os.environ)).encode())
    waker, wakened = socket.socketpair()
    wakened.setblocking(False)
    signal.set_wakeup_fd(wakened.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([orders, waker], [], [])
        if waker in ready:
            waker.recv(4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                with children.pop(pid) as connection, contextlib.suppress(OSError):
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        if orders in ready:
            message, handles, _, _ = socket.recv_fds(orders, LONGEST_MESSAGE, 4)
            if not message:
                return
            order = json.loads(message)
            connection = socket.socket(fileno=handles[0])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, handle in enumerate(handles[1:]):
                    os.dup2(handle, number)
                    os.close(handle)
                for each in (orders, waker, wakened, connection, *children.values()):
                    each.close()
                os.setsid()
                os.chdir(order["folder"])
                os.environ.clear()
                os.environ.update(order["environment"])
                sys.argv[1:] = [order["directory"]]
                engine.process.run()
            for handle in handles[1:]:
                os.close(handle)
            connection.send(str(pid).encode())
            children[pid] = connection


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # as the engine's process does, for the same reason
