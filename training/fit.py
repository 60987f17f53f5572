"""The loop that all training shares: seeded, resumable, and it stops at a loss or gradient that is not a number.

Several processes may go through it together, each with its part of a step's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from training import sharded
from training.errors import DivergedError
from training.files import write_tensors
from training.processes import ALONE, Processes
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
    processes: Processes = ALONE,
) -> None:
    """Train the groups' parameters in place with AdamW, going on from the checkpoint in ``folder`` if there is one.

    Args:
        loss_parts: gives this process's parts of a step's loss, to be summed. It must depend on the step's number and
            the parameters alone, so that going on from a checkpoint repeats what would have happened without one.
        ends: asked before each step, with its number, whether training has come to its end.
        processes: those that train together. Their checkpoint can be gone on from by another number of them.

    Raises:
        DivergedError: the loss or a gradient is not finite; names the step. The last checkpoint stays, and is of a
            step whose loss and gradients were finite.
    """
    named = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters.values()), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups]
    )
    warm_up = max(1, round(plan.steps * plan.warm_up))
    done = _load(folder, named, optimizer, processes)
    bar = tqdm(
        range(done, plan.steps), desc=label, unit="step", mininterval=1, initial=done, total=plan.steps,
        disable=not processes.main,
    )  # fmt: skip
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
        loss = processes.sum(loss)
        processes.sum_gradients(named.values())
        if not math.isfinite(loss):
            raise _diverged(f"{label}: the loss is {loss} at step {step}", folder)
        norms = [_gradient_norm(settings) for settings in groups]
        for norm in norms:
            if not math.isfinite(norm):
                raise _diverged(f"{label}: the gradient's norm is {norm:g} at step {step}", folder)
        if step % plan.checkpoint_every == 0 and step > done:
            # Only now: what the last step made of the parameters has proved to be usable.
            _save(folder, step, named, optimizer, processes)
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
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _diverged(what: str, folder: Path) -> DivergedError:
    step = last_step(folder)
    kept = "there is no checkpoint yet" if step is None else f"the checkpoint of step {step} is kept"
    return DivergedError(f"{what}; {kept}: lower the learning rate, with which this training starts from its beginning")


def last_step(folder: Path) -> int | None:
    """The step of the checkpoint to go on from, of one process or of several; None if there is none."""
    steps = [sharded.latest(folder), _step_of(folder / CHECKPOINT)]
    return max((step for step in steps if step is not None), default=None)


def remove_checkpoint(folder: Path) -> None:
    """Remove what nobody will go on from."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    sharded.remove(folder)


def _state(
    named: Mapping[str, torch.nn.Parameter], states: Mapping[torch.Tensor, Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Parameters and what the optimizer knows of them, by the names in a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        tensors[f"parameter {name}"] = parameter.detach()
        for key, value in states[parameter].items():
            tensors[f"{key} {name}"] = value
    return tensors


def _save(
    folder: Path,
    step: int,
    named: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> None:
    tensors = _state(named, optimizer.state)
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        sharded.save(folder, step, tensors, processes)
        if processes.main:
            (folder / CHECKPOINT).unlink(missing_ok=True)
    else:
        write_tensors(folder / CHECKPOINT, {"step": torch.tensor(step)} | tensors)
        sharded.remove(folder)


def _load(
    folder: Path, named: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, processes: Processes
) -> int:
    """Put everything back as ``_save`` found it; the number of steps done."""
    # Asked once: over a network, a folder need not look alike to all processes.
    step = processes.from_main(last_step(folder) or 0)
    if step == 0:
        return 0
    states: dict[torch.Tensor, dict[str, Any]] = {
        parameter: {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
        for parameter in named.values()
    }
    tensors = _state(named, states)
    whole = processes.from_main(int(_step_of(folder / CHECKPOINT) == step))
    if whole:
        with safe_open(str(folder / CHECKPOINT), "pt") as found:
            for name, tensor in tensors.items():
                sharded.take(tensor, found.get_tensor(name).to(tensor.device))
    else:
        sharded.load(folder, step, tensors)
    optimizer.state.update(states)
    return step


def _step_of(file: Path) -> int | None:
    if not file.exists():
        return None
    with safe_open(str(file), "pt") as found:
        return int(found.get_tensor("step"))
