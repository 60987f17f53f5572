from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import EngineConfig
from server import cli
from server.cli import ConfigurationError, load_settings
from tests.server.fakes import byte_level_tokenizer

TOML = """
served_model_name = "from-file"

[base]
model = "models/base"
vllm = { dtype = "float32", max_model_len = 512 }

[[experts]]
name = "codes"
model = "models/codes"

[gate]
path = "models/gate"

[server]
port = 9000
host = "0.0.0.0"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(TOML)
    return path


def test_a_file(config: Path) -> None:
    settings = load_settings(["--config", str(config)])
    assert settings.served_model_name == "from-file"
    assert (settings.server.host, settings.server.port) == ("0.0.0.0", 9000)
    assert isinstance(settings.engine, EngineConfig)
    assert settings.engine.lane_names == ("base", "codes")
    assert settings.engine.base.vllm == {"dtype": "float32", "max_model_len": 512}
    assert settings.tokenizer_location == "models/base"


def test_environment_beats_the_file_and_the_command_line_beats_both(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLM_CONFIG", str(config))
    monkeypatch.setenv("COLLM_SERVER__PORT", "9001")
    monkeypatch.setenv("COLLM_SERVER__API_KEYS", '["k1", "k2"]')
    monkeypatch.setenv("COLLM_SERVED_MODEL_NAME", "from-environment")
    settings = load_settings(["--port", "9002", "--base.model", "other"])
    assert settings.server.port == 9002
    assert settings.server.host == "0.0.0.0"
    assert settings.server.all_keys == ("k1", "k2")
    assert settings.served_model_name == "from-environment"
    assert settings.base.model == "other"
    # What is next to a value that was replaced stays.
    assert settings.base.vllm == {"dtype": "float32", "max_model_len": 512}


def test_without_a_file() -> None:
    experts = '[{"name": "codes", "model": "e", "backend": "bench.standin"}]'
    settings = load_settings(
        ["--base.model", "b", "--base.backend", "bench.standin", "--experts", experts, "--server.port", "1"]
    )
    assert settings.engine.lane_names == ("base", "codes")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (TOML + "prot = 1\n", "server.prot: there is no such option"),
        ("prot = 1\n" + TOML, "prot: there is no such option"),
        (TOML.replace("[gate]", "[gate]\nthresold = 1"), "gate.thresold: there is no such option"),
        (TOML.replace('name = "codes"', 'name = "base"'), "experts.name: 'base' is taken"),
        (TOML.replace("9000", "90000"), "server.port: "),
        (TOML.replace("9000", '"x"'), "server.port: "),
        (TOML.replace('model = "models/base"\n', ""), "base.model: Field required"),
        (TOML.replace("[base]", "[base"), "demo.toml: "),
        ('config = "x"\n' + TOML, "'config' cannot stand in the file itself"),
        (TOML + 'api_keys = ["", "x"]\n', "server.api_keys: a key is empty"),
        (TOML + 'api_keys_file = "nowhere"\n', "server.api_keys_file: nowhere: No such file"),
        (TOML + 'tls_key = "nowhere"\n', "server: tls_certificate and tls_key go together"),
        (TOML + 'root_path = "llm/"\n', "server.root_path: "),
        (TOML.replace("from-file", "a b"), "served_model_name: "),
    ],
)
def test_problems_are_one_clear_line_each(
    config: Path, broken: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(broken)
    assert cli.main(["--config", str(config)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert any(said in line for line in lines), lines
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) <= 2
    assert captured.out == ""


def test_two_problems_are_two_lines(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(TOML + "prot = 1\nmax_headers = 1\n")
    assert cli.main(["--config", str(config)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--no-such-option", "1"],
        ["--port", "x", "--base.model", "b"],
        ["--config", "/nowhere.toml"],
        [],
        ["--experts", "[", "--base.model", "b"],
    ],
)
def test_a_wrong_command_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_an_empty_key_file_does_not_open_the_server(config: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ConfigurationError, match="has no key"):
        load_settings(["--config", str(config), "--server.api_keys_file", str(tmp_path / "keys")])


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option, explained in {
        "--config": "TOML file",
        "--served_model_name": "Name of the joint model",
        "--base.model": "Path of the checkpoint",
        "--gate.threshold": "Default threshold",
        "--scheduler.max_num_seqs": "Most requests in the lanes",
        "--server.max_body_bytes": "Largest request body",
        "--server.drain_timeout_s": "after SIGTERM",
        "--port": "Port to listen on",
    }.items():
        assert option in text
        assert explained in text, explained
    assert "``" not in text


def test_a_port_in_use_is_found_before_anything_is_loaded(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # Neither the models nor the tokenizer of this file exist.
        argv = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        assert cli.main(argv) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(f"127.0.0.1:{port}: Address already in use; --port takes another, 0 any that is free")


def test_an_option_that_does_not_exist_is_told_with_the_way_out(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--config", str(config), "--server.prot", "1"]) == 2
    said = "error: unrecognized arguments: --server.prot 1; collm serve --help lists the options\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "base.model: models/base: no such folder"), (["--tokenizer", "no"], "tokenizer: no: no such")],
)
def test_what_is_missing_is_one_line(config: Path, options: list[str], said: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "server", "--config", str(config), "--host", "127.0.0.1", "--port", "0", *options],
        capture_output=True, text=True, timeout=60, check=False, env={"HF_HUB_OFFLINE": "1", "PATH": ""},
    )  # fmt: skip
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith(f"error: {said}")


def test_what_tls_files_are_worth_is_found_at_once(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "pem").write_text("no certificate")
    argv = ["--config", str(config), "--host", "127.0.0.1", "--port", "0", "--tokenizer", str(tmp_path)]
    argv += ["--server.tls_certificate", str(tmp_path / "pem"), "--server.tls_key", str(tmp_path / "pem")]
    assert cli.main(argv) == 2
    assert "tls_certificate" in capsys.readouterr().err


def test_the_server_imports_neither_torch_nor_vllm_nor_transformers() -> None:
    code = (
        "import sys, server.lifecycle, server.cli, server.app; "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_paths_in_a_file_count_from_its_folder(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is found from anywhere; what is not stays: a hub's name, or a path from the working folder."""
    folder = config.parent
    (folder / "models/base").mkdir(parents=True)
    (folder / "shared/gate").mkdir(parents=True)
    (folder / "keys.txt").write_text("a-key")
    text = TOML.replace("models/gate", "models/../shared/gate") + 'api_keys_file = "keys.txt"\n'
    config.write_text(text)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    settings = load_settings(["--config", "../demo.toml"])
    assert settings.base.model == settings.tokenizer_location == str(folder / "models/base")
    assert settings.experts[0].model == "models/codes"
    assert settings.gate.path == str(folder / "shared/gate")
    assert settings.server.api_keys_file == folder / "keys.txt"
    # Those of the command line count from the working folder, as everywhere.
    assert load_settings(["--config", "../demo.toml", "--base.model", "models/base"]).base.model == "models/base"


def test_a_path_that_leads_nowhere_is_told_whole(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dots at its beginning it can be nothing but a path: a hub's names have none."""
    folder = config.parent
    config.write_text(TOML.replace("models/base", "../missing/base").replace("models/codes", "../there/codes"))
    (folder / "there/codes").mkdir(parents=True)
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    settings = load_settings(["--config", str(config)])
    assert settings.base.model == str(folder.parent / "missing/base")
    # A path from the working folder, as before.
    assert settings.experts[0].model == "../there/codes"


@pytest.mark.parametrize("wrong", ["base = 3", "experts = 3", "experts = [3]", "gate = []", "[base]\nmodel = 3"])
def test_paths_of_a_file_of_another_shape(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(wrong)
    with pytest.raises(ConfigurationError):
        load_settings(["--config", str(path)])
