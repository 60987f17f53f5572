"""The engine's own process: ``python -m engine.process SOCKET_DIRECTORY``, started by :mod:`engine.supervisor`.

Receives messages in a thread, runs the step loop in the main thread, sends one batch per pass. Ends when told to,
when a lane fails, or when the process that started it is gone (its end of our standard input closes).
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import zmq

from engine.config import EngineConfig
from engine.errors import CollmError
from engine.grammar.checker import Checked, FormChecker, Templates
from engine.lanes.backend import Backend, Loaded, backend
from engine.lanes.interface import Lane, Refusal
from engine.lanes.shelf import Shelf
from engine.loop import StepLoop
from engine.messages import (
    Abort,
    Batch,
    Dead,
    FromEngine,
    Progress,
    Ready,
    Refused,
    Shutdown,
    Start,
    Submit,
    ToEngine,
)
from engine.scheduler import LaneTerms, Scheduler
from engine.strategies import Strategies
from engine.strategies.characters import Characters
from engine.strategies.deferral.pacing import Pacer
from engine.strategies.scoring import LONGEST_WINDOW, window_of
from engine.types import BASE, EngineInfo, ErrorCode, GenerationRequest, LaneInfo, PolicyName

logger = logging.getLogger(__name__)

REQUESTS_SOCKET = "requests"
BATCHES_SOCKET = "batches"
LINGER_MILLISECONDS = 2000
"""How long a last message may take to leave."""
LONGEST_IPC_PATH = 107
"""In bytes, of a Unix socket on Linux."""
_UUID_LENGTH = 36
SIGN_OF_LIFE_SECONDS = 1.0
"""How often an engine says that it lives while it only waits for forms to be read."""


class EngineProcess:
    """The process's main object.

    Args:
        directory: where the two ipc sockets lie.
    """

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._batches = self._context.socket(zmq.PUSH)
        for socket, name in ((self._requests, REQUESTS_SOCKET), (self._batches, BATCHES_SOCKET)):
            socket.setsockopt(zmq.LINGER, LINGER_MILLISECONDS)
            socket.set_hwm(0)
            socket.connect(f"ipc://{directory / name}")
        # Ends the receiving thread, which owns the requests socket: ZeroMQ sockets are not to be shared.
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.bind("inproc://stop")
        self._receiver = threading.Thread(target=self._receive, name="receive", daemon=True)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        # None only wakes the loop: an overlapped step or a grammar is done. A string: a worker of that lane died.
        self._inbox: queue.SimpleQueue[ToEngine | Checked | str | None] = queue.SimpleQueue()
        self._templates = Templates()
        self._forms: FormChecker | None = None

    def run(self) -> int:
        """Serve until the end; returns the exit status."""
        start = self._decoder.decode(self._requests.recv())
        assert isinstance(start, Start)
        try:
            config = EngineConfig.model_validate_json(start.config)
            scheduler, lanes, info, pacer = build(
                config,
                templates=self._templates,
                on_progress=lambda message: self._send(Progress(message)),
                on_ready=lambda: self._inbox.put(None),
                on_failure=self._inbox.put,
            )
        except CollmError as error:
            self._send(Refused(str(error)))
            return 1
        except Exception as error:
            traceback.print_exc()
            self._send(Refused(f"{type(error).__name__}: {' '.join(str(error).split())}"))
            return 1
        loop = StepLoop(
            scheduler,
            lanes,
            info.coordination,
            pacer,
            step_timeout=config.scheduler.step_timeout_seconds,
            wake=lambda: self._inbox.put(None),
            hosts=config.all_hosts,
            members=len(config.lanes),
        )
        if (setup := lanes[0].form_setup()) is not None:
            self._forms = FormChecker(setup, self._inbox.put)
        self._receiver.start()
        self._send(Ready(info))
        try:
            self._serve(scheduler, loop)
        except Exception as error:
            traceback.print_exc()
            self._send(Dead(f"{type(error).__name__}: {' '.join(str(error).split())}"))
            return 1
        finally:
            if self._forms is not None:
                self._forms.close()
        loop.shutdown()
        return 0

    def close(self) -> None:
        """Send what is left to send, and free the sockets."""
        if self._receiver.is_alive():
            self._stop.send(b"")
            self._receiver.join()
        else:
            self._requests.close()
        self._stop.close()
        self._batches.close()
        self._context.term()

    def _serve(self, scheduler: Scheduler, loop: StepLoop) -> None:
        active = False
        while True:
            # Waits only when a pass found nothing to do; then whatever comes first wakes it.
            block = not active
            while block or not self._inbox.empty():
                try:
                    message = self._inbox.get(timeout=self._patience(loop) if block else None)
                except queue.Empty:
                    break  # a step is overdue, or the client is due a sign of life
                finally:
                    block = False
                match message:
                    case Submit(requests):
                        for request in requests:
                            self._submit(request, scheduler)
                    case Abort(request_ids):
                        for request_id in request_ids:
                            if self._forms is not None:
                                self._forms.abort(request_id)
                            scheduler.abort(request_id)
                    case Checked():
                        self._add_checked(message, scheduler)
                    case Shutdown():
                        return
                    case str(lane):
                        raise RuntimeError(f"a worker process of lane {lane} died")
            was_active = active
            active = loop.step()
            deltas = scheduler.take_deltas()
            for delta in deltas:
                if delta.finish_reason is not None:
                    self._templates.release(delta.request_id)
            if deltas or active or was_active or loop.preparing or self._reading:
                self._send(Batch(deltas, loop.stats()))

    @property
    def _reading(self) -> bool:
        """Whether requests wait for their forms to be read: the engine must not seem dead then."""
        return self._forms is not None and self._forms.pending

    def _patience(self, loop: StepLoop) -> float | None:
        waits = [loop.patience(), SIGN_OF_LIFE_SECONDS if self._reading else None]
        return min((wait for wait in waits if wait is not None), default=None)

    def _submit(self, request: GenerationRequest, scheduler: Scheduler) -> None:
        """Queue a request, after its form, if it has one, has been read elsewhere."""
        if request.sampling.structured_outputs is None or self._forms is None:
            scheduler.add(request)
        elif (checked := self._forms.submit(request)) is not None:
            self._add_checked(checked, scheduler)

    def _add_checked(self, checked: Checked, scheduler: Scheduler) -> None:
        for request in checked.requests:
            if checked.problem is None:
                self._templates.hold(request.request_id, checked.template)
                scheduler.add(request)
            else:
                scheduler.add(request, Refusal(checked.problem, ErrorCode.INVALID_GRAMMAR))

    def _receive(self) -> None:
        with self._context.socket(zmq.PAIR) as stop, self._requests as requests:
            stop.connect("inproc://stop")
            poller = zmq.Poller()
            poller.register(stop, zmq.POLLIN)
            poller.register(requests, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if stop in ready:
                    return
                try:
                    self._inbox.put(self._decoder.decode(requests.recv()))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    logger.exception("a message that cannot be read was dropped")

    def _send(self, message: FromEngine) -> None:
        self._batches.send(self._encoder.encode(message))


def build(
    config: EngineConfig,
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[], None],
    on_failure: Callable[[str], None],
    templates: Templates | None = None,
) -> tuple[Scheduler, list[Lane], EngineInfo, Pacer]:
    """Scheduler, lanes and pacer as configured.

    Raises:
        CollmError: what does not fit, in one line.
    """
    load: Backend
    if config.base.backend == "vllm":
        from engine.vllm_hooks.backend import load
    else:
        load = backend(config.base.backend)
    shelf = Shelf()
    loaded = load(
        config, on_progress=on_progress, on_ready=on_ready, on_failure=on_failure, templates=templates, shelf=shelf
    )
    lanes, gate, shelf = loaded.lanes, loaded.gate, loaded.shelf or shelf
    coordination = config.scheduler.coordination
    if coordination == "auto":
        coordination = "overlapped" if config.on_separate_devices else "lockstep"
    max_model_len = min(lane.info.max_model_len for lane in lanes)
    pacer = Pacer(
        len(lanes),
        gather=config.scheduler.gather,
        max_wait=config.scheduler.gather_max_wait_seconds,
        guests=any(number != host for number, host in enumerate(config.hosts)),
    )
    policy: PolicyName = "confidence" if config.experts else "never"
    policy = gate.policy if gate is not None else config.gate.policy or policy
    strategies = Strategies(
        len(config.lanes),
        guidance=config.scheduler.guidance,
        has_gate=gate is not None,
        policy=policy,
        threshold=gate.threshold if gate is not None else 0.5,
        veto=config.gate.veto,
        hindsight=gate.hindsight if gate is not None else None,
        regret=config.gate.regret,
        expert_failure=config.scheduler.expert_failure,
        run_ahead=config.scheduler.run_ahead,
        drafting=all(lane.info.can_cut for lane in lanes),
        score_window=min(window_of(loaded.vocab_size), shelf.window or LONGEST_WINDOW),
        draft_pays=pacer.draft_pays,
        shelf_has_room=lambda: shelf.has_room,
        # Where vocabularies differ, blends are unions of strings, whose distributions stay in the engine's process.
        blend_obstacle=(
            config.blend_obstacle or loaded.blend_obstacle
            if loaded.vocabularies == "same"
            else config.characters_obstacle
        ),
        characters=_characters(config, lanes, loaded, shelf),
        shelf=shelf,
        **_words(lanes, loaded),
    )
    scheduler = Scheduler(
        lanes=len(lanes),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=max_model_len,
        # An end of text may be one member's alone, beyond what all have.
        vocab_size=max([loaded.vocab_size, *(end + 1 for end in loaded.eos_token_ids)]),
        eos_token_ids=loaded.eos_token_ids,
        strategy=strategies,
        terms=_terms(lanes, loaded) if loaded.vocabularies == "spelled" else None,
        reject_reason=lambda request: _refusal(lanes, config.all_hosts, loaded, request),
    )
    info = EngineInfo(
        _lane_infos(lanes[: len(config.lanes)], loaded),
        loaded.vocab_size,
        max_model_len,
        loaded.eos_token_ids,
        coordination,
        gate,
        loaded.versions,
        policy,
        strategies.deferral.thresholds,
        loaded.vocabularies,
        tuple(strategies.served),
        config.gate.veto,
        config.gate.regret,
    )
    return scheduler, lanes, info, pacer


def _words(lanes: Sequence[Lane], loaded: Loaded) -> dict[str, Any]:
    """What deferral needs where members have vocabularies of their own."""
    if loaded.vocabularies == "same":
        return {}
    base, *experts = loaded.spoken
    return {
        # Lanes that write the same tokens have one speller.
        "spellers": [base.speller, *(None if each.speller is base.speller else each.speller for each in experts)],
        "contexts": [lane.info.max_model_len for lane in lanes],
        "end": base.ends[0] if base.ends else None,
        "words_obstacle": _cannot_cut(lanes[1 : len(loaded.spoken)]),
    }


def _characters(config: EngineConfig, lanes: Sequence[Lane], loaded: Loaded, shelf: Shelf) -> Characters:
    """The strategy, with what is in its way."""
    obstacle = config.characters_obstacle or _cannot_cut(lanes)
    return Characters(
        [spoken.speller for spoken in loaded.spoken],
        [lane.info.max_model_len for lane in lanes],
        shelf,
        obstacle=obstacle,
    )


def _cannot_cut(lanes: Sequence[Lane]) -> str | None:
    """Why these lanes cannot follow a text that others write too; None if nothing is in the way."""
    fixed = next((lane.info.name for lane in lanes if not lane.info.can_cut), None)
    if fixed is None:
        return None
    return f"{fixed} cannot take tokens back, as it must where others write parts of its words"


def _lane_infos(lanes: Sequence[Lane], loaded: Loaded) -> list[LaneInfo]:
    """With what each lane writes."""
    if not loaded.spoken:
        return [
            msgspec.structs.replace(lane.info, vocab_size=loaded.vocab_size, eos_token_ids=loaded.eos_token_ids)
            for lane in lanes
        ]
    return [
        msgspec.structs.replace(
            lane.info, vocab_size=spoken.size, eos_token_ids=list(spoken.ends), tokenizer=spoken.tokenizer
        )
        for lane, spoken in zip(lanes, loaded.spoken, strict=True)
    ]


def _terms(lanes: Sequence[Lane], loaded: Loaded) -> list[LaneTerms]:
    """Of lanes with vocabularies of their own. The base under negative prompts has the base's."""
    terms = []
    for number, lane in enumerate(lanes):
        spoken = loaded.spoken[number if number < len(loaded.spoken) else BASE]
        vocab_size = max([spoken.size, *(end + 1 for end in spoken.ends)])
        terms.append(LaneTerms(lane.info.max_model_len, vocab_size, frozenset(spoken.ends)))
    return terms


def _refusal(lanes: Sequence[Lane], hosts: Sequence[int], loaded: Loaded, request: GenerationRequest) -> Refusal | None:
    """What a lane has against a request; of a member alone with a vocabulary of its own, what this one has."""
    collaboration = request.collaboration
    member = collaboration.member
    asked = lanes if loaded.vocabularies == "same" or member is None else [lanes[hosts[member]]]
    if loaded.vocabularies == "spelled" and member is None:
        given = {BASE, *(lane for lane, _ in collaboration.prompts)}
        experts = range(len(loaded.spoken)) if collaboration.experts is None else collaboration.experts
        taking_part = [lane for lane, _ in collaboration.weights] or experts
        for lane in taking_part:
            if lane not in given and loaded.spoken[lane].speller is not loaded.spoken[BASE].speller:
                return Refusal(f"{lanes[lane].info.name} has no prompt in tokens of its own")
    return next(filter(None, (lane.refusal(request) for lane in asked)), None)


def _keep_sockets_together(directory: str) -> None:
    """Let vLLM put its sockets where the engine's own are: vLLM leaves them behind, the client does not."""
    if len(os.fsencode(directory)) + 1 + _UUID_LENGTH <= LONGEST_IPC_PATH:
        os.environ.setdefault("VLLM_RPC_BASE_PATH", directory)


def _end_with_parent() -> None:
    # Not sys.stdin: its lock, held by a daemon thread, would be in the interpreter's way when it ends.
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> int:
    """Entry point; returns the exit status."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Ctrl-C reaches the whole terminal group; when to end is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    _keep_sockets_together(sys.argv[1])
    process = EngineProcess(Path(sys.argv[1]))
    try:
        return process.run()
    finally:
        process.close()


def run() -> NoReturn:
    """Be the engine's process until it ends."""
    status = main()
    if status == 0:
        # Lanes and sockets are shut down. What is left is taking torch and vLLM apart, object by object, for seconds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(status)


if __name__ == "__main__":
    run()
