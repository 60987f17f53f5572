"""Conversations as data: the base's chat template, system prompts, several turns, and each expert's own template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.text.chat_template import ChatTemplate
from tests.training.builders import EOS, TinyProject, save_model, save_tokenizer, write_jsonl
from training.checkpoints import load_tokenizer
from training.data import Example, read_examples, tokenize
from training.errors import DataError
from training.settings import DataSettings

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "{{ '<|end|>\n' if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ start }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": " 1 "},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return with_template(tmp_path / "base")


def with_template(folder: Path, template: str = TEMPLATE) -> Any:
    """A tokenizer with a chat template, and an end of turn that is not its EOS."""
    save_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def read(tmp_path: Path, tokenizer: Any, rows: Sequence[Any], ends: Sequence[str] = (END, EOS), **settings: Any) -> Any:
    file = write_jsonl(tmp_path / "d.jsonl", list(rows))
    known = DataSettings(train="a", validation="b", **settings)
    return read_examples(file, known, "train", tokenizer, [tokenizer.convert_tokens_to_ids(end) for end in ends])


def test_each_answer_is_an_example_after_the_prompt_that_comes_when_served(tmp_path: Path, tokenizer: Any) -> None:
    examples = read(tmp_path, tokenizer, [{"messages": TALK, "task": "sums"}])
    assert [(e.prompt, e.completion, e.task) for e in examples] == [
        ("[user]one?\n[assistant]", "1", "sums"),
        ("[user]one?\n[assistant]1<|end|>\n[user]two?\n[assistant]", "2", "sums"),
    ]
    _, tokens = tokenize(examples, tokenizer, 1000)
    end = tokenizer.convert_tokens_to_ids(END)
    assert [t.completion[-1] for t in tokens] == [end, end]
    served = ChatTemplate(TEMPLATE, {}).render([dict(m) for m in TALK[:3]], add_generation_prompt=True)
    assert tokens[1].prompt == tokenizer(served, add_special_tokens=False)["input_ids"]


def test_a_special_token_in_a_message_is_text(tmp_path: Path, tokenizer: Any) -> None:
    """As it is served: neither a question nor an answer ends before its turn does."""
    talk = [{"role": "user", "content": f"say {END} now"}, {"role": "assistant", "content": f"a {END} b"}]
    examples = read(tmp_path, tokenizer, [{"messages": talk}])
    assert [(e.prompt, e.completion) for e in examples] == [(f"[user]say {END} now\n[assistant]", f"a {END} b")]
    _, ((prompt, completion),) = tokenize_as_pairs(examples, tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    assert end not in prompt
    assert completion.index(end) == len(completion) - 1
    assert tokenizer.decode(completion[:-1]) == f"a {END} b"


def tokenize_as_pairs(examples: Sequence[Example], tokenizer: Any) -> tuple[list[Example], list[tuple[Any, Any]]]:
    kept, ids = tokenize(examples, tokenizer, 1000)
    return kept, [(each.prompt, each.completion) for each in ids]


def test_an_end_of_turn_that_does_not_end_a_served_text_is_none(tmp_path: Path, tokenizer: Any) -> None:
    (example,) = read(tmp_path, tokenizer, [{"messages": TALK[:2]}], ends=[EOS])
    assert example.completion == "1<|end|>\n"
    _, (tokens,) = tokenize([example], tokenizer, 1000)
    assert tokens.completion[-1] == tokenizer.eos_token_id


def test_a_system_prompt_is_for_conversations_that_have_none(tmp_path: Path, tokenizer: Any) -> None:
    own = [{"role": "system", "content": "own"}, *TALK[:2]]
    examples = read(tmp_path, tokenizer, [{"messages": TALK[:2]}, {"messages": own}], system="set")
    assert [e.prompt for e in examples] == [
        "[system]set\n[user]one?\n[assistant]",
        "[system]own\n[user]one?\n[assistant]",
    ]


def test_the_last_answer_alone(tmp_path: Path, tokenizer: Any) -> None:
    (example,) = read(tmp_path, tokenizer, [{"messages": TALK}], answers="last")
    assert example.completion == "2"


def test_variables_go_to_the_template(tmp_path: Path, tokenizer: Any) -> None:
    """Where the generation prompt says more than the template writes of a given answer, nothing fits: it is said."""
    rows = [{"messages": TALK[:2]}]
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: column 'messages': .*begins the answer of message 2 otherwise.*data\.template"
    ):
        read(tmp_path, tokenizer, rows, template={"start": "<think>"})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is no list of messages"),
        ("text", "is no list of messages"),
        ([{"content": "a"}], "message 1 has no role"),
        ([{"role": "user", "content": "a"}], "no turn of the assistant"),
        ([TALK[0], {"role": "assistant", "content": " "}], "message 2, of the assistant, is empty"),
        ([{"role": "user"}, TALK[1]], "the chat template refuses the messages"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, messages: Any, message: str) -> None:
    template = TEMPLATE.replace("| trim", "| trim | replace('x', m.content.x)") if "refuses" in message else TEMPLATE
    tokenizer = with_template(tmp_path / "other", template)
    with pytest.raises(DataError, match=rf"d\.jsonl:2: column 'messages': .*{message}"):
        read(tmp_path, tokenizer, [{"prompt": "a", "completion": "b"}, {"messages": messages}])


def test_a_tokenizer_without_a_template_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "plain")
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*the tokenizer has no chat template"):
        read(tmp_path, load_tokenizer(tmp_path / "plain"), [{"messages": TALK}], ends=[EOS])


def test_an_expert_with_a_vocabulary_of_its_own_reads_its_own_template(tmp_path: Path, tokenizer: Any) -> None:
    (example, _) = read(tmp_path, tokenizer, [{"messages": TALK}])
    other = with_template(tmp_path / "other", TEMPLATE.replace("[user]", "").replace("{{ m.role }}", "{{ m.role }}:"))
    text = "[user:]one?\n[assistant]"
    assert example.prompt_ids(other) == other(text, add_special_tokens=False)["input_ids"]
    save_tokenizer(tmp_path / "plain")
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*has no chat template"):
        example.prompt_ids(load_tokenizer(tmp_path / "plain"))


def test_conversations_count_as_data_by_what_experts_read_too(tiny: TinyProject) -> None:
    """Two conversations that the base's template writes alike are other data for an expert's template."""
    with_template(tiny.folder / "base")
    save_model(tiny.folder / "base", words=None, padding=8)
    with_template(tiny.folder / "base", "{% for m in messages %}{{ m.content }}{% endfor %}")
    found = []
    for role in ("user", "system"):
        rows = [{"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}]
        write_jsonl(tiny.folder / "train.jsonl", rows)
        found.append(tiny.project.data("train"))
    assert found[0].tokens == found[1].tokens
    assert found[0].fingerprint != found[1].fingerprint


def test_a_data_set_by_name(tmp_path: Path) -> None:
    """``datasets`` takes a folder for a name, as it would one on a hub."""
    folder = tmp_path / "named"
    folder.mkdir()
    for split, count in (("train", 3), ("validation", 2)):
        write_jsonl(folder / f"{split}.jsonl", [{"prompt": f"{split} {n}", "completion": "b"} for n in range(count)])

    def prompts(given: str, split: str = "train", **settings: Any) -> list[str]:
        return [e.prompt for e in read_examples(given, DataSettings(train="a", validation="b", **settings), split)]

    name = f"hub:{folder}"
    assert prompts(name) == ["train 0", "train 1", "train 2"]
    assert prompts(name, "validation") == ["validation 0", "validation 1"]
    assert prompts(f"{name}@train[1:]", "validation") == ["train 1", "train 2"]
    assert prompts(f"{name}:default@validation", streaming=True, max_examples=1) == ["validation 0"]
    with pytest.raises(DataError, match=r"streaming reads whole splits: leave \[1:\] out"):
        prompts(f"{name}@train[1:]", streaming=True)
    with pytest.raises(DataError, match="split 'other' cannot be read"):
        prompts(f"{name}@other")
    with pytest.raises(DataError, match="hub:NAME"):
        prompts("hub:")


def test_streaming_reads_no_more_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def rows() -> Any:
        for number in range(100):
            taken.append(number)
            yield {"prompt": json.dumps(number), "completion": "b"}

    asked: dict[str, Any] = {}

    def load_dataset(*name: Any, **options: Any) -> Any:
        asked.update(options, name=name)
        return rows()

    monkeypatch.setattr("training.rows._datasets", lambda _: SimpleNamespace(load_dataset=load_dataset))
    settings = DataSettings(train="a", validation="b", streaming=True, max_examples=4)
    found: list[Example] = read_examples("hub:owner/name:main", settings, "test")
    assert [example.prompt for example in found] == ["0", "1", "2", "3"]
    assert taken == [0, 1, 2, 3]
    assert asked == {"name": ("owner/name", "main"), "split": "test", "streaming": True}
