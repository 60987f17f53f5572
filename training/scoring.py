"""Teacher-forced scores of gold completions, one model at a time, cached on disk in shards.

Shapes: B examples, T tokens, V vocabulary, d hidden size, N completion tokens, K experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel

from engine.gates import FEATURES, distribution_features
from training.checkpoints import forward
from training.data import TokenExample
from training.errors import DataError
from training.files import write_tensors
from training.mapped import Table
from training.settings import ScoreSettings

_E = TypeVar("_E")

CHUNK = 1 << 16
"""Tokens whose hidden states are in memory at once where all are looked at, one after the other."""
HIDDEN, HIDDEN_FILE = "hidden", "hidden.bin"


@dataclass(frozen=True)
class ModelScores:
    """What one model says of N gold tokens, example after example.

    Attributes:
        logp_N: log P(gold), float32.
        top_N: the model's argmax; with a vocabulary of its own the gold token where it goes on like the text, else -1.
        hidden_ND: the LM head's input, memory-mapped, in the precision of ``score.hidden``; None for an expert.
        features_NF: ``engine.gates.FEATURES`` of its distribution, float32; None for an expert.
        aligned_N: whether an expert with a vocabulary of its own may be asked there; None for others, which may always.
    """

    logp_N: torch.Tensor
    top_N: torch.Tensor
    hidden_ND: torch.Tensor | None
    features_NF: torch.Tensor | None = None
    aligned_N: torch.Tensor | None = None

    def rows(self, rows: torch.Tensor | slice) -> ModelScores:
        """What it says of some of the tokens."""
        hidden_ND = None if self.hidden_ND is None else self.hidden_ND[rows]
        features_NF = None if self.features_NF is None else self.features_NF[rows]
        aligned_N = None if self.aligned_N is None else self.aligned_N[rows]
        return ModelScores(self.logp_N[rows], self.top_N[rows], hidden_ND, features_NF, aligned_N)

    def inputs(self, features: Sequence[str], rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """What a gate reads [N, d + F] of some of the tokens, float32: the hidden state and these features."""
        assert self.hidden_ND is not None
        hidden_ND = self.hidden_ND[rows].float()
        if not features:
            return hidden_ND
        assert self.features_NF is not None
        columns = [FEATURES.index(name) for name in features]
        return torch.cat([hidden_ND, self.features_NF[rows][:, columns]], dim=1)

    def chunks(self, features: Sequence[str]) -> Iterator[torch.Tensor]:
        """``inputs`` of all tokens, a part at a time."""
        for start in range(0, len(self.logp_N), CHUNK):
            yield self.inputs(features, slice(start, start + CHUNK))


@dataclass(frozen=True)
class PairScores:
    """The scores of a base and its experts on the same examples.

    Attributes:
        gold_N: the gold tokens.
        starts: first row of each example, and N at the end.
    """

    gold_N: torch.Tensor
    starts: list[int]
    base: ModelScores
    experts: tuple[ModelScores, ...]

    @property
    def expert_logp_NK(self) -> torch.Tensor:
        """log P_k(gold)."""
        return torch.stack([expert.logp_N for expert in self.experts], dim=1)

    @property
    def aligned_NK(self) -> torch.Tensor | None:
        """Whether expert k may be asked there; None if all may everywhere."""
        if all(expert.aligned_N is None for expert in self.experts):
            return None
        everywhere_N = torch.ones(len(self.gold_N), dtype=torch.bool)
        found = [everywhere_N if expert.aligned_N is None else expert.aligned_N for expert in self.experts]
        return torch.stack(found, dim=1)

    @property
    def hidden_ND(self) -> torch.Tensor:
        """The base's hidden states."""
        assert self.base.hidden_ND is not None
        return self.base.hidden_ND

    def of_examples(self, numbers: Sequence[int]) -> PairScores:
        """The scores of some of the examples, in this order."""
        if list(numbers) == list(range(len(self.starts) - 1)):
            return self
        rows = torch.cat([torch.arange(self.starts[n], self.starts[n + 1]) for n in numbers])
        starts = [0, *itertools.accumulate(self.starts[n + 1] - self.starts[n] for n in numbers)]
        return PairScores(self.gold_N[rows], starts, self.base.rows(rows), tuple(e.rows(rows) for e in self.experts))

    def weak_labels(self) -> torch.Tensor:
        """[N]: k where expert k's argmax is the gold token and the base's is not, else 0.

        Where several experts are right, the one that is surest of it.
        """
        right_NK = torch.stack([expert.top_N == self.gold_N for expert in self.experts], dim=1)
        surest_N = self.expert_logp_NK.masked_fill(~right_NK, -torch.inf).argmax(dim=1) + 1
        needed_N = right_NK.any(dim=1) & (self.base.top_N != self.gold_N)
        return torch.where(needed_N, surest_N, 0)


def gold_tokens(examples: Sequence[TokenExample]) -> tuple[torch.Tensor, list[int]]:
    """The gold tokens [N] and the first row of each example, with N at the end."""
    starts = [0]
    for example in examples:
        starts.append(starts[-1] + len(example.completion))
    return torch.tensor([token for example in examples for token in example.completion]), starts


def padded(batch: Sequence[TokenExample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and a mask [B, T] of the positions from which a completion token is predicted.

    Padding stands on the right, where a causal model does not see it.
    """
    longest = max(len(e.prompt) + len(e.completion) for e in batch)
    tokens_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    predicting_BT = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids = example.prompt + example.completion
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        predicting_BT[row, len(example.prompt) - 1 : len(ids) - 1] = True
    return tokens_BT, predicting_BT


def gold_logp(
    logits_BTV: torch.Tensor, tokens_BT: torch.Tensor, where_BT: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """log P(gold) [N] in float32, over the first ``vocabulary`` outputs only (heads are often padded)."""
    logits_NV = logits_BTV[where_BT][:, :vocabulary].float()
    gold_N = tokens_BT.roll(-1, dims=1)[where_BT]
    return -torch.nn.functional.cross_entropy(logits_NV, gold_N, reduction="none")


@torch.no_grad()
def score_shard(
    model: PreTrainedModel, examples: Sequence[TokenExample], batch_size: int, vocabulary: int, hidden: bool
) -> dict[str, torch.Tensor]:
    """Score one shard: "logp", "top" and, with ``hidden``, "hidden" and "features", in the order of the examples."""
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].completion))
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for start in range(0, len(by_length), batch_size):
        numbers = by_length[start : start + batch_size]
        batch = [examples[number] for number in numbers]
        tokens_BT, where_BT = (tensor.to(model.device) for tensor in padded(batch))
        hidden_BTD, logits_BTV = forward(model, tokens_BT)
        found = {
            "logp": gold_logp(logits_BTV, tokens_BT, where_BT, vocabulary),
            "top": logits_BTV[where_BT][:, :vocabulary].argmax(-1),
        }
        if hidden:
            found["hidden"] = hidden_BTD[where_BT].float()
            found["features"] = distribution_features(FEATURES, logits_BTV[where_BT][:, :vocabulary])
        sizes = [len(example.completion) for example in batch]
        split = {name: torch.split(tensor.cpu(), sizes) for name, tensor in found.items()}
        for row, number in enumerate(numbers):
            parts[number] = {name: tensors[row] for name, tensors in split.items()}
    return {name: torch.cat([parts[number][name] for number in range(len(examples))]) for name in parts[0]}


def shard_files(folder: Path, examples: int, settings: ScoreSettings) -> list[Path]:
    """The files of a model's scores."""
    count = -(-examples // settings.shard)
    return [folder / f"shard-{number:05d}.safetensors" for number in range(count)]


def score_model(
    score: Callable[[Sequence[_E]], dict[str, torch.Tensor]],
    examples: Sequence[_E],
    folder: Path,
    settings: ScoreSettings,
    label: str,
    hidden: tuple[Table, Sequence[int]] | None = None,
) -> None:
    """Write the scores that ``folder`` lacks.

    Args:
        score: of a shard, e.g. :func:`score_shard`.
        hidden: where the hidden states go, and the first row of each example.

    Raises:
        DataError: a score is not a number, or too great for the precision of ``score.hidden``.
    """
    files = shard_files(folder, len(examples), settings)
    missing = [number for number, file in enumerate(files) if not file.exists()]
    bar = tqdm(total=len(examples), desc=label, unit="example", mininterval=1)
    bar.update(len(examples) - sum(len(_shard(examples, number, settings)) for number in missing))
    with bar:
        for number in missing:
            shard = _shard(examples, number, settings)
            tensors = score(shard)
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and tensor.isnan().any():
                    raise DataError(f"{label}: {name} is not a number for an example of shard {number}: try float32")
            if hidden is not None:
                tensors = _put_hidden(*hidden, tensors, number * settings.shard, label)
            write_tensors(files[number], tensors)
            bar.update(len(shard))


def _put_hidden(
    table: Table, starts: Sequence[int], tensors: Mapping[str, torch.Tensor], first: int, label: str
) -> dict[str, torch.Tensor]:
    """Write the hidden states of examples from number ``first`` on to the table; the other tensors."""
    others = dict(tensors)
    hidden_ND = others.pop(HIDDEN).to(table.dtype)
    if not hidden_ND.isfinite().all():
        raise DataError(f'{label}: hidden states are too great for {table.dtype}: set score.hidden = "bfloat16"')
    table.opened(to_write=True)[starts[first] : starts[first] + len(hidden_ND)] = hidden_ND
    return others


def _shard(examples: Sequence[_E], number: int, settings: ScoreSettings) -> Sequence[_E]:
    return examples[number * settings.shard : (number + 1) * settings.shard]


def load_scores(folder: Path, examples: int, settings: ScoreSettings, hidden: Table | None = None) -> ModelScores:
    """What ``score_model`` wrote; hidden states are mapped, not read."""
    shards = [load_file(str(file)) for file in shard_files(folder, examples, settings)]
    columns = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    hidden_ND = None if hidden is None else hidden.opened()
    return ModelScores(columns["logp"], columns["top"], hidden_ND, columns.get("features"), columns.get("aligned"))
