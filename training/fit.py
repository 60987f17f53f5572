"""The loop that all training shares: seeded, resumable, and it stops at a loss or gradient that is not a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from training.errors import DivergedError
from training.files import write_tensors
from training.tracking import Log, nothing

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Group:
    """Parameters by name that share a learning rate. ``clip``: largest norm of their gradient; None: any."""

    parameters: Mapping[str, torch.nn.Parameter]
    learning_rate: float
    weight_decay: float
    clip: float | None = None


@dataclass(frozen=True)
class Plan:
    """How long, and how.

    Attributes:
        steps: optimizer steps.
        warm_up: share of them in which the learning rate rises; then it falls to 0 linearly.
        checkpoint_every: steps between checkpoints.
        log: is told of each step: "loss", and of each group its "learning_rate" and "gradient_norm".
    """

    steps: int
    warm_up: float
    checkpoint_every: int
    log: Log = nothing


def fit(
    groups: list[Group],
    loss_parts: Callable[[int], Iterable[torch.Tensor]],
    plan: Plan,
    folder: Path,
    label: str,
    ends: Callable[[int], bool] = lambda step: False,
) -> None:
    """Train the groups' parameters in place with AdamW, going on from the checkpoint in ``folder`` if there is one.

    Args:
        loss_parts: gives the parts of a step's loss, to be summed. It must depend on the step's number and the
            parameters alone, so that going on from a checkpoint repeats what would have happened without one.
        ends: asked before each step, with its number, whether training has come to its end.

    Raises:
        DivergedError: the loss or a gradient is not finite; names the step. The last checkpoint stays, and is of a
            step whose loss and gradients were finite.
    """
    named = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters.values()), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups]
    )
    warm_up = max(1, round(plan.steps * plan.warm_up))
    file = folder / CHECKPOINT
    done = _load(file, named, optimizer) if file.exists() else 0
    bar = tqdm(range(done, plan.steps), desc=label, unit="step", mininterval=1, initial=done, total=plan.steps)
    for step in bar:
        if ends(step):
            break
        factor = min((step + 1) / warm_up, (plan.steps - step) / max(1, plan.steps - warm_up))
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = settings.learning_rate * factor
        optimizer.zero_grad()
        loss = 0.0
        for part in loss_parts(step):
            loss += float(part.detach())
            part.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss):
            raise _diverged(f"{label}: the loss is {loss} at step {step}", file)
        norms = [_gradient_norm(settings) for settings in groups]
        for norm in norms:
            if not math.isfinite(norm):
                raise _diverged(f"{label}: the gradient's norm is {norm:g} at step {step}", file)
        if step % plan.checkpoint_every == 0 and step > done:
            # Only now: what the last step made of the parameters has proved to be usable.
            _save(file, step, named, optimizer)
        for settings, norm in zip(groups, norms, strict=True):
            if settings.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(settings.parameters.values(), settings.clip, norm)
        optimizer.step()
        plan.log(step, {"loss": loss} | _values(optimizer, norms))
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss:.4f}")


def _values(optimizer: torch.optim.Optimizer, norms: list[torch.Tensor]) -> dict[str, float]:
    found: dict[str, float] = {}
    for number, (group, norm) in enumerate(zip(optimizer.param_groups, norms, strict=True)):
        found |= {f"learning_rate/{number}": group["lr"], f"gradient_norm/{number}": float(norm)}
    return found


def _gradient_norm(group: Group) -> torch.Tensor:
    gradients = [parameter.grad for parameter in group.parameters.values() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _diverged(what: str, file: Path) -> DivergedError:
    kept = f"the checkpoint of step {_step_of(file)} is kept" if file.exists() else "there is no checkpoint yet"
    return DivergedError(f"{what}; {kept}: lower the learning rate, with which this training starts from its beginning")


def _save(file: Path, step: int, named: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in named.items():
        tensors[f"parameter {name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key} {name}"] = value
    write_tensors(file, tensors)


def _load(file: Path, named: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put everything back as ``_save`` found it; the number of steps done."""
    tensors = load_file(str(file))
    state: dict[torch.Tensor, dict[str, Any]] = {}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"parameter {name}"])
            state[parameter] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(" ")
        if name and kind != "parameter":
            parameter = named[name]
            state[parameter][kind] = tensor if kind == "step" else tensor.to(parameter.device)
    optimizer.state.update(state)
    return int(tensors["step"])


def _step_of(file: Path) -> int:
    return int(load_file(str(file))["step"])
