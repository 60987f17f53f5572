"""Bad input gets one clear line, before any long work."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.training.builders import EOS, TinyProject, save_model, write_jsonl
from training import scoring
from training.__main__ import main
from training.checkpoints import load_tokenizer
from training.data import Example, read_examples, spread, tokenize
from training.errors import DataError, SettingsError
from training.files import write_tensors
from training.settings import DataSettings, Settings, load_settings

DATA = DataSettings(train="a", validation="b")
GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a"}'], r":1: no column 'completion' \(it has: prompt\)"),
        ([json.dumps(GOOD), '{"prompt": "a", "completion": "  "}'], r":2: column 'completion' is empty"),
        (['{"prompt": "", "completion": "b"}'], r":1: column 'prompt' is empty"),
        (['{"prompt": 3, "completion": "b"}'], r":1: column 'prompt' is not text"),
        (['{"prompt": "a", "completion": " \\ud800 b"}'], r":1: column 'completion' has half a character"),
        (['{"messages": [{"role": "user", "content": "\\udc00"}]}'], r":1: column 'messages' has half a character"),
        (['{"prompt": "a", "completion": "b", "complete": 1}'], r":1: column 'complete' is neither true nor false"),
        (["[]"], r":1: is not an object"),
        (["", "{"], r":2: is not JSON"),
        ([""], r"holds no examples"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        read_examples(file, DATA)


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"q": "a", "a": "b", "complete": False}])
    (example,) = read_examples(file, DATA.model_copy(update={"prompt": "q", "completion": "a"}))
    assert (example.prompt, example.completion, example.complete) == ("a", "b", False)


def test_a_folder_of_datasets_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([GOOD, GOOD]).save_to_disk(str(tmp_path / "d"))
    assert len(read_examples(tmp_path / "d", DATA)) == 2
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(DataError, match=r"several splits \(train\)"):
        read_examples(tmp_path / "several", DATA)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="is no folder that datasets saved"):
        read_examples(tmp_path / "other", DATA)


def test_the_end_is_learned_where_the_completion_is_complete(tiny: TinyProject) -> None:
    tokenizer = load_tokenizer(tiny.folder / "base")
    file = write_jsonl(tiny.folder / "d.jsonl", [GOOD, GOOD | {"complete": False}, GOOD | {"prompt": "long" * 9}])
    kept, ids = tokenize(read_examples(file, DATA), tokenizer, max_tokens=10)
    assert [len(example.completion) for example in ids] == [2, 1]
    assert ids[0].completion[-1] == tokenizer.eos_token_id
    assert len(kept) == 2
    with pytest.raises(DataError, match=r"d\.jsonl:1: like every other example, is longer than data\.max_tokens, 2"):
        tokenize(kept[:1], tokenizer, max_tokens=2)


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    """U+2028, U+2029 and U+0085 may stand in a string of JSON as they are."""
    file = tmp_path / "data.jsonl"
    text = "one\u2028two\u2029three\u0085four"
    line = json.dumps({"prompt": text, "completion": "b"}, ensure_ascii=False)
    file.write_bytes(f"{line}\r\n\r\n{line}\n".encode())
    found = read_examples(file, DATA)
    assert [(example.prompt, example.where) for example in found] == [(text, f"{file}:1"), (text, f"{file}:3")]


class NoTokens:
    """A tokenizer that makes no token of "b"."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [] if text == "b" else [1]}


def test_a_text_without_tokens_is_named_with_its_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "a"}, GOOD])
    with pytest.raises(DataError, match=r"d\.jsonl:2: the tokenizer makes no token of 'b'"):
        tokenize(read_examples(file, DATA), NoTokens(), max_tokens=10)


def test_limits_spread_over_everything() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread(range(3), None) == spread(range(3), 9) == [0, 1, 2]


def test_settings_name_every_wrong_key(tiny: TinyProject) -> None:
    tiny.content["train"]["lerning_rate"] = 1
    del tiny.content["base"]
    with pytest.raises(SettingsError) as error:
        load_settings(tiny.write())
    assert "base: Field required" in str(error.value)
    assert "train.lerning_rate: no such setting" in str(error.value)


def test_overrides(tiny: TinyProject) -> None:
    settings = load_settings(tiny.write(), ["train.mode=joint", "seeds=[3, 4]", "train.joint.lora.rank=2"])
    assert (settings.train.mode, settings.seeds) == ("joint", (3, 4))
    assert settings.train.joint.lora is not None
    for wrong in ("seeds", "base.model.x=1"):
        with pytest.raises(SettingsError, match="--set"):
            load_settings(tiny.write(), [wrong])
    with pytest.raises(SettingsError, match=r"train\.mode: Input should be 'gate' or 'joint'"):
        load_settings(tiny.write(), ["train.mode=all"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 1]}, "one is there twice"),
        ({"calibrate": {"rates": [2.0]}}, "rates are from 0 to 1"),
        ({"experts": [{"name": "base", "model": "m"}]}, "'base' is taken"),
    ],
)
def test_impossible_settings(tiny: TinyProject, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.model_validate(tiny.content | change)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_an_expert_with_another_tokenizer_is_refused(tiny: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny.folder / "expert1", words=[EOS, "x", "y"])
    assert main(["score", "--config", str(tiny.write())]) == 1
    error = one_line(capsys)
    assert "expert e1 does not share the base's vocabulary: 256 entries differ" in error
    assert "'x' is" in error or "'!' is 1 in the base and absent in the expert" in error
    assert not (tiny.folder / "out").exists()


@pytest.mark.parametrize(("folder", "label"), [("base", "base"), ("expert1", "expert e1")])
def test_a_model_that_cannot_write_every_token_is_refused(
    tiny: TinyProject, capsys: pytest.CaptureFixture[str], folder: str, label: str
) -> None:
    save_model(tiny.folder / folder, padding=-7)
    assert main(["score", "--config", str(tiny.write())]) == 1
    assert f"{label} has 250 outputs (vocab_size in config.json), but the tokenizer has ids up to 256" in one_line(
        capsys
    )


def test_commands_say_errors_in_one_line(tiny: TinyProject, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tiny.write())
    assert main(["train", "--config", str(tiny.folder / "absent.toml")]) == 1
    assert "absent.toml: cannot be read" in one_line(capsys)
    assert main(["calibrate", "--config", config]) == 1
    assert "run collm train train first" in one_line(capsys)
    assert main(["score", "--config", config, "--set", f"base.model={tiny.folder / 'nothing'}"]) == 1
    assert re.search(r"base\.model: .*nothing: no such folder", one_line(capsys))
    for file in (tiny.folder / "base").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert main(["score", "--config", config]) == 1
    assert "no safetensors weights" in one_line(capsys)


def test_a_loss_that_is_not_a_number_keeps_what_was_finished(
    tiny: TinyProject, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny.write())
    assert main(["init", "--config", config]) == 0
    capsys.readouterr()
    diverging = ["train", "--config", config, "--set", "train.mode=joint", "--set", "train.joint.learning_rate=1e30"]
    assert main([*diverging, "--set", "train.joint.clip=1e30"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: train collm, seed 0: the loss is ")
    assert error.endswith("lower the learning rate, with which this training starts from its beginning")
    assert (tiny.folder / "out" / "init" / "seed-0" / "done.json").exists()
    assert main(["train", "--config", config, "--set", "train.mode=joint"]) == 0


def test_an_interrupted_command_goes_on(
    tiny: TinyProject, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT after the first shard: one line, status 130; the shard is kept, and used by the next command."""
    config = str(tiny.write())

    def write_and_stop(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(file, tensors)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "write_tensors", write_and_stop)
        assert main(["score", "--config", config]) == 130
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.rstrip().splitlines()[-1].startswith("error: interrupted; what was finished is kept")
    folder = tiny.folder / "out" / "score" / "train" / "e1"
    (first,) = folder.glob("shard-*")
    stamp = first.stat().st_mtime_ns
    assert not (folder / "done.json").exists()
    assert main(["score", "--config", config]) == 0
    assert len(list(folder.glob("shard-*"))) == 3
    assert (folder / "done.json").exists()
    assert first.stat().st_mtime_ns == stamp


class WithBos:
    """A tokenizer of code points that adds a BOS, "<"; ">" is its EOS."""

    bos_token_id, eos_token_id = ord("<"), ord(">")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id] * add_special_tokens + [ord(letter) for letter in text]}


def test_a_prompt_has_one_bos_whether_a_template_put_it_there_or_not() -> None:
    _, found = tokenize([Example("ab", "c"), Example("<ab", "c")], WithBos(), 10)
    assert [tokens.prompt for tokens in found] == [[ord(letter) for letter in "<ab"]] * 2
