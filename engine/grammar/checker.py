"""Forms are read and compiled here, away from the thread in which steps run, and under bounds.

Each of a few worker processes (:mod:`engine.grammar.worker`) reads one form at a time. One that takes too long is
killed, and so is one that nobody waits for any more. Clients take turns, and none holds all workers. What has passed is
compiled once for all lanes and all requests that have the same form, in the thread that waited for the worker: the back
end releases the interpreter while it compiles, and what it costs is known to be within bounds.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from engine.grammar.worker import Setup, Verdict, parser_limits, read_frame, tokenizer_of, write_frame
from engine.types import GenerationRequest, StructuredOutputs

WORKERS = 2
KNOWN = 64
"""Forms that are remembered, compiled or refused."""

TOO_LONG = "the form takes too long to compile, or too much memory"


class Checked(msgspec.Struct, frozen=True):
    """Requests whose form has been read; ``problem`` is what is wrong with it."""

    requests: list[GenerationRequest]
    template: Any = None
    problem: str | None = None


class Templates:
    """Compiled forms of the requests in flight, shared by the lanes."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def hold(self, request_id: str, template: Any) -> None:
        """Keep a request's form until it ends."""
        self._held[request_id] = template

    def release(self, request_id: str) -> None:
        """The request has ended, or never had a form."""
        self._held.pop(request_id, None)

    def matcher(self, request_id: str) -> Any:
        """A matcher of its own for one lane, at the beginning of the answer."""
        return self._held[request_id].deep_copy()


class _Job:
    def __init__(self, form: StructuredOutputs, client: str) -> None:
        self.form = form
        self.client = client
        self.requests: dict[str, GenerationRequest] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.killed = False

    def kill(self) -> None:
        """End the worker that reads the form, if one does. With the checker's lock held."""
        if self.process is not None:
            self.killed = True
            self.process.kill()


class FormChecker:
    """Reads the forms of requests, some at a time. Its methods are called from one thread.

    Args:
        setup: what the workers get.
        on_checked: called from another thread with every result.
        workers: processes; a client holds all but one at most.
        environment: of the worker processes.
    """

    def __init__(
        self,
        setup: Setup,
        on_checked: Callable[[Checked], None],
        *,
        workers: int = WORKERS,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._setup = setup
        self._on_checked = on_checked
        self._environment = environment
        self._tokenizer, self._limits = tokenizer_of(setup), parser_limits()
        self._lock = threading.Condition()
        self._waiting: OrderedDict[StructuredOutputs, _Job] = OrderedDict()
        self._running: dict[StructuredOutputs, _Job] = {}
        self._known: OrderedDict[StructuredOutputs, tuple[Any, str | None]] = OrderedDict()
        self._served: OrderedDict[str, None] = OrderedDict()
        self._closed = False
        self._most = max(1, workers - 1)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._threads = [threading.Thread(target=self._work, name="forms", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> bool:
        """Whether a request waits for its form."""
        return bool(self._waiting or self._running)

    def submit(self, request: GenerationRequest) -> Checked | None:
        """Have a request's form read. A known one is answered at once."""
        form = request.sampling.structured_outputs
        assert form is not None
        with self._lock:
            known = self._known.get(form)
            if known is not None:
                self._known.move_to_end(form)
                return Checked([request], *known)
            job = self._running.get(form) or self._waiting.get(form)
            if job is None:
                job = self._waiting[form] = _Job(form, request.client)
            job.requests[request.request_id] = request
            self._lock.notify_all()
        return None

    def abort(self, request_id: str) -> None:
        """A request is gone; a form that nobody else waits for is dropped, wherever it is."""
        with self._lock:
            for jobs in (self._waiting, self._running):
                for form, job in list(jobs.items()):
                    if job.requests.pop(request_id, None) is None or job.requests:
                        continue
                    del jobs[form]
                    job.kill()

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
            self._waiting.clear()
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    # -- in the workers' threads ------------------------------------------------------------------------------

    def _work(self) -> None:
        process = self._start()
        while True:
            with self._lock:
                while (job := None if self._closed else self._next()) is None and not self._closed:
                    self._lock.wait()
            if job is None:
                self._end(process)
                return
            if process.poll() is not None:  # ended while it had nothing to do: no fault of this form
                process = self._restarted(process)
            verdict = self._ask(process, job)
            if verdict is None:
                process = self._restarted(process)
            template: Any = None
            problem: str | None = TOO_LONG
            if verdict is not None:
                problem = verdict.problem
                if verdict.grammar is not None and job.requests:
                    template, problem = self._compile(verdict.grammar)
            self._finish(job, template, problem)

    def _next(self) -> _Job | None:
        """The next form, of a client that has not all workers but one already, the longest unserved first."""
        held = [job.client for job in self._running.values()]
        order = {client: number for number, client in enumerate(self._served, 1)}
        best: _Job | None = None
        for job in self._waiting.values():
            if held.count(job.client) >= self._most:
                continue
            if best is None or order.get(job.client, 0) < order.get(best.client, 0):
                best = job
        if best is not None:
            del self._waiting[best.form]
            self._running[best.form] = best
            self._served.pop(best.client, None)
            self._served[best.client] = None
            if len(self._served) > 1024:
                self._served.popitem(last=False)
        return best

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.grammar.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        with self._lock:
            self._processes.add(process)
            if self._closed:
                process.kill()
        assert process.stdin is not None
        try:
            write_frame(process.stdin, msgspec.msgpack.encode(self._setup))
        except OSError:
            return process  # it has ended; asking it will tell
        assert process.stdout is not None
        read_frame(process.stdout)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        # Also closes the pipes.
        with contextlib.suppress(BrokenPipeError):
            process.communicate()
        with self._lock:
            self._processes.discard(process)

    def _restarted(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        self._end(process)
        return self._start()

    def _ask(self, process: subprocess.Popen[bytes], job: _Job) -> Verdict | None:
        """The worker's verdict; None if it has ended or been told to. Nothing ends it for this job afterwards."""
        assert process.stdin is not None
        assert process.stdout is not None
        with self._lock:
            if self._running.get(job.form) is not job:
                return None
            job.process = process
        # The system ends it by its processor time; this is for one that does not get any.
        watch = threading.Timer(4 * (self._setup.seconds + 1), self._kill, [job])
        watch.start()
        body: bytes | None = None
        with contextlib.suppress(OSError):
            write_frame(process.stdin, msgspec.msgpack.encode(job.form))
            body = read_frame(process.stdout)
        watch.cancel()
        with self._lock:
            job.process = None
        return None if body is None or job.killed else msgspec.msgpack.decode(body, type=Verdict)

    def _kill(self, job: _Job) -> None:
        with self._lock:
            job.kill()

    def _compile(self, grammar: str) -> tuple[Any, str | None]:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        return (None, "the form cannot be compiled") if matcher.is_error() else (matcher, None)

    def _finish(self, job: _Job, template: Any, problem: str | None) -> None:
        with self._lock:
            abandoned = self._running.get(job.form) is not job
            if not abandoned:
                del self._running[job.form]
                self._known[job.form] = (template, problem)
                if len(self._known) > KNOWN:
                    self._known.popitem(last=False)
            requests = list(job.requests.values())
            self._lock.notify_all()
        if requests and not abandoned:
            self._on_checked(Checked(requests, template, problem))
