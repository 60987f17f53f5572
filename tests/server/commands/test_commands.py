"""``collm`` against a live server of stand-in lanes: in a pipe, in a pseudo-terminal, and where things go wrong."""

from __future__ import annotations

import io
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from click.shell_completion import get_completion_class
from rich.console import Console

from server.commands.completion import SHELLS
from server.commands.options import generation_options, request_of
from server.commands.paint import STYLES, visible
from server.commands.top import Scrape, View, drawn, plain
from tests.packaging.sources import ROOT
from tests.server.commands.conftest import Terminal, environment, piped
from tests.server.commands.servers import MODEL
from tests.waiting import eventually

PROMPT = "Hello world"


def asked(url: str, **fields: Any) -> dict[str, Any]:
    """What the API answers to the same request."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    response = httpx.post(f"{url}/v1/completions", json={**body, "collaboration": {"report": True}})
    answer: dict[str, Any] = response.json()["choices"][0]
    return answer


def test_piped_text_is_the_answer_and_nothing_else(url: str) -> None:
    result = piped(["complete", PROMPT, "-n", "12"], url)
    assert (result.status, result.err) == (0, "")
    assert result.out.rstrip("\n") == asked(url)["text"].rstrip("\n")


def test_prompt_from_standard_input(url: str) -> None:
    assert piped(["complete", "-n", "12"], url, stdin=PROMPT).out == piped(["complete", PROMPT, "-n", "12"], url).out


def test_options_reach_the_server(url: str) -> None:
    base = piped(["complete", PROMPT, "-n", "12", "-m", f"{MODEL}/base"], url).out
    assert piped(["complete", PROMPT, "-n", "12", "-p", "never"], url).out == base
    assert piped(["complete", PROMPT, "-n", "12", "-p", "always", "--max-expert-tokens", "0"], url).out == base
    assert piped(["complete", PROMPT, "-n", "12", "-p", "random", "--rate", "0"], url).out == base
    assert piped(["complete", PROMPT, "-n", "12", "-p", "always"], url).out != base


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ((), {"collaboration": {"report": True}}),
        (
            ("-p", "threshold", "-t", "0.3", "--expert", "codes", "--expert", "laws", "--blend", "union"),
            {"collaboration": {"policy": "threshold", "threshold": 0.3, "experts": ["codes", "laws"], "blend": "union",
                               "report": True}},
        ),
        (("--share", "0"), {"collaboration": {"share": 0.0, "report": True}}),
        (("--cost", "0.004"), {"collaboration": {"cost": 0.004, "report": True}}),
        (("--strategy", "characters"), {"collaboration": {"strategy": "characters", "report": True}}),
        (
            ("--top-p", "0.9", "--temperature", "0.7", "--seed", "0", "--stop", ".", "--stop", ";"),
            {"top_p": 0.9, "temperature": 0.7, "seed": 0, "stop": [".", ";"], "collaboration": {"report": True}},
        ),
    ],
)  # fmt: skip
def test_options_are_fields_of_the_request(options: tuple[str, ...], fields: dict[str, Any]) -> None:
    seen: dict[str, Any] = {}
    command = generation_options(click.command(lambda **given: seen.update(given)))
    command.main(list(options), standalone_mode=False)
    seen.pop("color")
    body = request_of(**{**seen, "model": "m"})
    assert body == {"model": "m", "stream": True, "max_tokens": 256, "temperature": 0.0, **fields}


SPAN = re.compile(r"\x1b\[([0-9;]*)m")


def test_terminal_colours_the_experts_tokens(url: str, terminal: type[Terminal]) -> None:
    """Without colours it is the answer; in the style of the expert are its tokens, and only they."""
    result = terminal(["complete", PROMPT, "-n", "12", "-p", "random", "--rate", "0.5", "--seed", "3"], url).end()
    assert result.status == 0
    text, _, summary = result.out.rstrip("\n").rpartition("\n")
    body = {"policy": "random", "rate": 0.5, "report": True}
    response = httpx.post(
        f"{url}/v1/completions",
        json={"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "seed": 3, "collaboration": body},
    )
    report = response.json()["choices"][0]["collaboration"]
    expected = [(visible(text), source) for text, source in zip(report["tokens"], report["sources"], strict=True)]
    assert SPAN.sub("", text) == "".join(token for token, _ in expected)
    in_style = re.findall(r"\x1b\[4(?:;21)?;33m(.*?)\x1b\[0m", text, re.S)
    assert in_style == [token for token, source in expected if source == "codes" and token]
    counts = {source: report["sources"].count(source) for source in ("base", "codes")}
    for source, count in counts.items():
        assert f"{count} {source}" in SPAN.sub("", summary)
    assert "cut at --max-tokens" in summary


def test_no_color_is_obeyed(url: str, terminal: type[Terminal]) -> None:
    result = terminal(["complete", PROMPT, "-n", "12"], url, NO_COLOR="1").end()
    assert "\x1b" not in result.out
    assert result.out.strip() == visible(asked(url)["text"]).strip()


def test_color_can_be_forced_into_a_pipe(url: str) -> None:
    assert "\x1b[4;33m" in piped(["complete", PROMPT, "-n", "12", "-p", "always", "--color", "always"], url).out


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert visible("a\x1b]0;title\x07b\tc\n\x9b2J\x7f") == "a␛]0;title␇b\tc\n\ufffd2J␡"


def test_styles_of_experts_differ_without_colour() -> None:
    assert len({" ".join(style.split()[:-1]) for style in STYLES}) == len(STYLES)


def test_models(url: str, terminal: type[Terminal]) -> None:
    lines = [line.split("\t") for line in piped(["models"], url).out.splitlines()]
    assert lines == [
        [MODEL, "512", "joint"],
        [f"{MODEL}/base", "512", "base alone"],
        [f"{MODEL}/codes", "512", "codes alone"],
    ]
    shown = SPAN.sub("", terminal(["models"], url).end().out)
    assert all(cell in shown for line in lines for cell in line)


def test_top_once(url: str) -> None:
    piped(["complete", PROMPT, "-n", "40", "-p", "random", "--rate", "0.5"], url)
    result = piped(["top", "--once", "-i", "0.2"], url)
    assert result.status == 0
    head, _, table = result.out.partition("\n\n")
    assert {line[:14].strip() for line in head.splitlines()} == {
        "tokens/s", "deferral rate", "running", "waiting", "first token", "request p95", "errors",
    }  # fmt: skip
    assert re.search(r"errors +0.0/s, 0 since start", head)
    assert re.search(r"deferral rate - now, \d+% since start", head)
    rows = [line.split() for line in table.splitlines()]
    assert rows[0][:3] == ["lane", "up", "tokens/s"]
    assert [row[:2] for row in rows[1:]] == [["base", "yes"], ["codes", "yes"]]


def exposition(**values: float) -> str:
    """Metrics of a joint model m with lanes base and law."""
    lanes = "".join(
        f'collm_lane_up{{model_name="m",lane="{lane}"}} 1\n'
        f'collm_tokens_total{{model_name="m",source="{lane}"}} {values[lane]}\n'
        f'collm_lane_step_seconds_count{{model_name="m",lane="{lane}"}} {values["steps"]}\n'
        f'collm_lane_step_seconds_sum{{model_name="m",lane="{lane}"}} {values["seconds"]}\n'
        f'collm_lane_kv_cache_usage_ratio{{model_name="m",lane="{lane}"}} 0.25\n'
        for lane in ("base", "law")
    )
    return (
        lanes + f'collm_tokens_total{{model_name="m/law",source="law"}} {values["alone"]}\n'
        'collm_requests_running{model_name="m"} 3\ncollm_requests_waiting{model_name="m"} 2\n'
    )


class Told:
    """Has the shape of the API: gives the metrics that it was given."""

    url = "http://told"

    def __init__(self, text: str) -> None:
        self.text = text

    def metrics(self) -> str:
        return self.text


def test_top_reckons_rates_between_two_looks() -> None:
    old = Scrape.take(Told(exposition(base=100, law=100, steps=10, seconds=1, alone=0)))  # type: ignore[arg-type]
    new = Scrape.take(Told(exposition(base=160, law=140, steps=20, seconds=1.05, alone=50)))  # type: ignore[arg-type]
    view = View.between(Scrape(10.0, old.samples), Scrape(12.0, new.samples))
    assert view.tokens_per_s == 75
    # What a member wrote alone was not deferred.
    assert view.deferral_rate == pytest.approx(0.4)
    assert view.deferral_rate_ever == pytest.approx(140 / 300)
    assert (view.running, view.waiting) == (3, 2)
    base, law = view.lanes
    assert (base.name, base.tokens_per_s, base.steps_per_s, base.kv_usage) == ("base", 30, 5, 0.25)
    assert base.step_ms == pytest.approx(5)
    assert law.tokens_per_s == 45
    assert "5.0 ms" in plain(view)
    restarted = View.between(Scrape(12.0, new.samples), Scrape(14.0, old.samples))
    assert restarted.tokens_per_s == 100


def test_top_reckons_quantiles_and_errors() -> None:
    def told(counts: tuple[int, ...], errors: int) -> str:
        lines = zip(("0.1", "0.2", "0.4", "+Inf"), counts, strict=True)
        buckets = [f'collm_request_seconds_bucket{{model_name="m",le="{le}"}} {count}' for le, count in lines]
        failed = f'collm_requests_total{{model_name="m",outcome="error"}} {errors}'
        return "\n".join(["# TYPE collm_request_seconds histogram", *buckets, failed, ""])

    old = Scrape.take(Told(told((100, 100, 100, 100), 1)))  # type: ignore[arg-type]
    new = Scrape.take(Told(told((100, 110, 120, 120), 7)))  # type: ignore[arg-type]
    view = View.between(Scrape(10.0, old.samples), Scrape(12.0, new.samples))
    # Of the 20 new ones 10 took up to 0.2 s and 10 up to 0.4: the 19th lies at nine tenths of the latter.
    assert view.request_p95_ms == pytest.approx(380)
    assert view.first_token_p95_ms is None
    assert (view.errors, view.errors_per_s) == (7, 3)
    slow = Scrape.take(Told(told((100, 110, 120, 150), 7)))  # type: ignore[arg-type]
    beyond = View.between(Scrape(10.0, old.samples), Scrape(12.0, slow.samples))
    assert beyond.request_p95_ms == pytest.approx(400)  # all that is known: beyond the last bound


@pytest.mark.parametrize(("width", "complete"), [(60, False), (120, True)])
def test_top_fits_the_terminal(width: int, complete: bool) -> None:
    text = exposition(base=100, law=100, steps=10, seconds=1, alone=0)
    scrape = Scrape.take(Told(text))  # type: ignore[arg-type]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(drawn(View.between(scrape, scrape), "http://" + "a" * 80, None, width))
    shown = console.export_text()
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    assert ("…" in shown.splitlines()[0]) is not complete
    assert ("preempted" in shown) is complete
    for name in ("base", "law", "25%", "q ends"):
        assert name in shown


def test_top_ends_by_q(url: str, terminal: type[Terminal]) -> None:
    screen = terminal(["top", "-i", "5"], url)
    screen.see("waiting for")
    screen.type("q")
    assert screen.end().status == 0


def test_top_waits_for_a_server(terminal: type[Terminal]) -> None:
    screen = terminal(["top", "-i", "0.2"], "http://127.0.0.1:9")
    screen.see("waiting for it")
    screen.type("q")
    assert screen.end().status == 0


def test_chat_confirms_settings_and_refuses_wrong_ones_at_once(url: str, terminal: type[Terminal]) -> None:
    screen = terminal(["chat"], url)
    screen.see("/help lists commands")
    for line, answer in (
        ("/threshold 0.25", "policy threshold, threshold 0.25"),
        ("/threshold 1.5", "a threshold is between 0 and 1, not 1.5"),
        ("/threshold much", "'much' is not a number"),
        ("/policy gate", "this model has no policy 'gate'; it has "),
        ("/policy never", "policy never, which has no threshold"),
        ("/policy", "policy threshold, threshold 0.25"),
        ("/share 2", "a share is between 0 and 1, not 2"),
        ("/share 0.2", "policy threshold, share 0.2"),
        ("/cost -1", "a cost is 0 or more, not -1"),
        ("/cost 1.5", "policy threshold, cost 1.5"),
        ("/threshold", "policy threshold, threshold 0.5"),
        ("/veto 2", "a veto is between 0 and 1, not 2"),
        ("/veto 0.4", "policy threshold, threshold 0.5, veto 0.4"),
        ("/veto", "policy threshold, threshold 0.5"),
        ("/blend half", "this model has no blend 'half'; it has mixture, "),
        ("/blend union", "policy threshold, threshold 0.5, blend union"),
        ("/blend", "policy threshold, threshold 0.5"),
        ("/system Be brief", "a new conversation with the system message 'Be brief'"),
        ("/reset", "a new conversation"),
    ):
        screen.type(f"{line}\n")
        screen.see(answer)


def test_top_lives_until_it_is_interrupted(url: str, terminal: type[Terminal]) -> None:
    screen = terminal(["top", "-i", "0.2"], url)
    screen.see("deferral rate")
    screen.see("codes")
    screen.process.send_signal(signal.SIGINT)
    assert screen.end().status == 0


def test_completion_scripts() -> None:
    for shell in SHELLS:
        result = piped(["completion", shell])
        assert result.status == 0
        assert "_COLLM_COMPLETE" in result.out
        assert get_completion_class(shell) is not None
    assert subprocess.run(["bash", "-n"], input=piped(["completion", "bash"]).out, text=True).returncode == 0


def completions(words: str, position: int, url: str | None) -> list[str]:
    """What bash is told: the lines are TYPE,VALUE."""
    env = {"_COLLM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    return [line.partition(",")[2] for line in piped([], url, **env).out.splitlines()]


def test_commands_options_and_served_models_are_completed(url: str) -> None:
    assert completions("collm com", 1, None) == ["complete", "completion"]
    assert "--threshold" in completions("collm complete --th", 2, None)
    assert completions("collm complete -p al", 3, None) == ["always"]
    assert completions(f"collm complete -m {MODEL}/", 3, url) == [f"{MODEL}/base", f"{MODEL}/codes"]


def one_line(result: Any, *words: str) -> None:
    """The error is one line that says these words, and nothing else was written."""
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


@pytest.mark.parametrize("command", [["complete", "x"], ["models"], ["top", "--once"]])
def test_no_server(command: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        one_line(piped([*command, "--url", address]), "no server at", address, "COLLM_URL")


@pytest.mark.parametrize("address", ["nonsense", "ftp://x", "http://", "http://[x"])
def test_no_address(address: str) -> None:
    one_line(piped(["models", "--url", address]))


def test_another_server(tmp_path: Any) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process, process.stdout as out:
        port = re.findall(r"port (\d+)", out.readline())[0]
        one_line(piped(["models"], f"http://127.0.0.1:{port}"), "404", "not as a Co-LLM server does")
        process.terminate()


def test_unknown_model_names_the_served_ones(url: str) -> None:
    one_line(piped(["complete", "x", "-m", "gpt"], url), "'gpt'", f"{MODEL}, {MODEL}/base, {MODEL}/codes")


def test_refusals_of_the_api_are_told(url: str) -> None:
    one_line(piped(["complete", "x", "-n", "9999"], url), "max_tokens", "context_length_exceeded")
    one_line(piped(["complete", "x", "-m", f"{MODEL}/base", "-p", "always"], url), "collaboration")
    one_line(piped(["complete"], url, stdin=""), "prompt is empty")
    one_line(piped(["chat"], url, stdin="hello\n"), "chat template")


def test_serve_without_options_says_what_to_write() -> None:
    for env in ({}, {"COLLM_URL": "http://127.0.0.1:1"}):
        result = piped(["serve"], **env)
        one_line(result, "collm serve --config FILE", "deploy/config/demo.toml")
    assert "collm serve" not in piped(["serve"], COLLM_CONFIG="nowhere.toml").err


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        (["train"], "usage: collm train [-h] STAGE"),
        (["train", "pipeline"], "usage: collm train pipeline"),
        (["convert"], "usage: collm convert"),
        (["bench"], "usage: collm bench"),
        (["bench", "context"], "usage: collm bench context"),
    ],
)
def test_one_door_to_every_package(command: list[str], usage: str) -> None:
    result = piped([*command, "--help"])
    assert (result.status, result.err) == (0, "")
    assert " ".join(result.out.split()).startswith(usage)
    assert piped([*command, "--nonsense"]).status == 2


def test_a_door_runs_nothing_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text("raise SystemExit('the wrong one')")
    collm = Path(sys.executable).with_name("collm")
    done = subprocess.run([collm, "train", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_to_continue(url: str, terminal: type[Terminal]) -> None:
    result = terminal(["complete"], url).end()
    assert result.status == 1
    assert "collm chat" in result.out


def test_wrong_usage() -> None:
    for wrong in (["complete", "x", "-t", "2"], ["complete", "x", "-p", "maybe"], ["nothing"], ["models", "--nope"]):
        result = piped(wrong)
        assert result.status == 2
        assert "Error:" in result.err


def test_key(locked: str) -> None:
    for wrong in ({}, {"COLLM_API_KEY": "wrong"}):
        one_line(piped(["models"], locked, **wrong), "COLLM_API_KEY")
        one_line(piped(["complete", "x", "-m", MODEL], locked, **wrong), "COLLM_API_KEY")
    assert piped(["models"], locked, COLLM_API_KEY="right").status == 0
    assert piped(["complete", "x", "-n", "4"], f"{locked}/v1", COLLM_API_KEY="right").status == 0
    one_line(piped(["models"], locked, COLLM_API_KEY="ключ"), "COLLM_API_KEY")


def test_an_interrupt_stops_the_server_too(url: str, terminal: type[Terminal]) -> None:
    def running() -> float:
        text = httpx.get(f"{url}/metrics").text
        return float(re.findall(r'^collm_requests_running{model_name="[^"]+"} (\S+)', text, re.M)[0])

    screen = terminal(["complete", PROMPT, "-n", "450"], url)
    eventually(lambda: running() == 1)
    screen.process.send_signal(signal.SIGINT)
    result = screen.end()
    assert result.status == 130
    assert "Traceback" not in result.out
    eventually(lambda: running() == 0)


def test_a_closed_pipe_is_no_error(url: str) -> None:
    command = f"{sys.executable} -m server.commands complete x -n 300 | head -c 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(url), capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_serve_takes_the_servers_options() -> None:
    result = piped(["serve", "--help"])
    assert result.status == 0
    assert "--served_model_name" in result.out
    wrong = piped(["serve", "--port", "0"], COLLM_API_KEY="x", COLLM_URL="http://x")
    assert (wrong.status, wrong.err) == (2, "error: base: Field required\n")
    module = subprocess.run(
        [sys.executable, "-m", "server", "--port", "0"], cwd=ROOT, env=environment(None), capture_output=True, text=True
    )
    assert (module.returncode, module.stderr) == (2, "error: base: Field required\n")


def test_clients_stay_light() -> None:
    code = "import sys, server.commands; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(loaded.split()) & {"torch", "vllm", "transformers", "fastapi", "uvicorn", "tokenizers"} == set()
