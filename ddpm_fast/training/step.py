"""One step of Algorithm 1: the gradients of micro-batches, their sum, and the update.

Gradients are added in one binary tree over the micro-batches of a step, ((0 + 1) + (2 + 3)) + ... Each process adds the
branch of its own micro-batches, and all of them add the branches. The sum is then the same bits for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ..data.degradation import Degradation
from ..data.items import Batch, to_unit_range
from ..data.loader import batches
from ..inference.model import predict
from ..nn import UNet
from ..ops import denoising_loss, q_sample
from ..variational import variational_loss
from .options import TrainOptions
from .state import State
from .task import Task

_OF_BOUND: Final = 0.001  # weight of the variational bound in the loss (Nichol and Dhariwal 2021)
_DRAWN: Final = 4096  # indices that are drawn together, as a call takes longer than an index


def take_step(task: Task, state: State, batch: Batch) -> tuple[Tensor, float]:
    """Take one step.

    Args:
        task: The task.
        state: The state, which is replaced by the next.
        batch: This process's part of the batch.

    Returns:
        The gradient's norm before clipping, 0-d, and the learning rate.
    """
    options, step = task.run.options, state.step
    state.is_whole = not list(state.model.buffers())  # a forward may change them
    loss = _set_gradients(task, state, batch)
    parameters: list[Tensor] = state.trained
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip_grad or math.inf, foreach=True)
    rate = options.lr * lr_factor(step, options)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.is_whole = False  # an error within the update leaves half a step
    state.optimizer.step()
    state.optimizer.zero_grad()
    decay = options.ema_decay
    if options.ema_warmup:
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)
    for average, buffer in zip(state.ema.buffers(), state.model.buffers(), strict=True):
        average.copy_(buffer)
    state.losses.append(loss)
    state.step += 1
    state.is_whole = True
    return grad_norm, rate


def _set_gradients(task: Task, state: State, batch: Batch) -> Tensor:
    """Set each parameter's `grad` to the gradient of the batch's loss. Return the loss, 0-d."""
    parameters = state.trained
    sums = _TreeSum()
    parts = (tensor.split(task.micro_batch_size) for tensor in batch if tensor is not None)
    for micro_batch, *part in zip(task.micro_batches, *parts, strict=True):
        loss = _loss(task, state, micro_batch, *part)
        loss.backward()
        # A network of the user's may have parameters that its forward does not use.
        sums.add([loss.detach(), *(torch.zeros_like(each) if each.grad is None else each.grad for each in parameters)])
        if len(task.micro_batches) > 1:
            state.optimizer.zero_grad()
    loss, *gradients = total = sums.total()
    if task.run.processes.size > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in total])
        flat = task.run.processes.tree_sum(flat) if task.sums_in_tree else task.run.processes.sum_(flat)
        for tensor, summed in zip(total, flat.split([tensor.numel() for tensor in total]), strict=True):
            tensor.copy_(summed.view(tensor.shape))  # in the gradient's memory format, which is the parameter's
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return loss


def _loss(task: Task, state: State, micro_batch: int, images: Tensor, labels: Tensor, *conditions: Tensor) -> Tensor:
    """Return a micro-batch's share of the batch's mean loss, 0-d."""
    options, rng, step = task.run.options, task.run.rng, state.step
    rows = slice(micro_batch * task.micro_batch_size, (micro_batch + 1) * task.micro_batch_size)
    x_0, *condition = (
        to_unit_range(each.to(task.run.device, non_blocking=True)) for each in (images, *conditions)
    )  # [m, C, ...], [m, K, ...]
    if options.flip:
        flipped = rng.is_flipped(step)[rows].to(task.run.device).view(-1, *[1] * (x_0.dim() - 1))
        x_0, *condition = (torch.where(flipped, each.flip(-1), each) for each in (x_0, *condition))
    x_0 = x_0.contiguous(memory_format=task.memory_format)
    if isinstance(task.dataset.info.condition, Degradation):
        condition = [task.dataset.info.condition(x_0, rng.condition_seeds(step)[rows])]
    schedule = task.run.objective.schedule
    t = rng.timesteps(step, schedule.num_timesteps)[rows].to(task.run.device)
    seeds = rng.sample_seeds(step)[rows].to(task.run.device)
    labels = task.labels.dropped(labels, rng.label_is_dropped(step, options.label_dropout)[rows]).to(task.run.device)
    torch.manual_seed(rng.torch_seed(step * task.num_micro_batches + micro_batch))
    x_t = q_sample(x_0, t, schedule, seeds=seeds)
    x_in = torch.cat([x_t, *condition], dim=1).contiguous(memory_format=task.memory_format) if condition else x_t
    dropout = {"dropout_seeds": seeds} if isinstance(task.model, UNet) and task.model.config["dropout"] > 0 else {}
    with torch.autocast(task.run.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        output = predict(partial(state.model, **dropout), x_in, t, labels if task.labels.reads else None)
    output = output.float()
    weight = None if task.run.loss_weights is None else task.run.loss_weights[t]
    loss = denoising_loss(output, x_0, t, task.run.objective, seeds=seeds, weight=weight)
    if task.run.objective.predicts_variance:
        term = variational_loss(output, x_0, t, task.run.objective, seeds=seeds)
        loss = loss + _OF_BOUND * schedule.num_timesteps * term
    return loss / task.num_micro_batches


class _TreeSum:
    """A sum of lists of tensors, added in pairs as they come. It holds one list for each level of the tree."""

    def __init__(self) -> None:
        self._branches: list[tuple[int, list[Tensor]]] = []  # level and sum, the largest first

    def add(self, tensors: list[Tensor]) -> None:
        """Add a list. Its tensors may be changed."""
        level = 0
        while self._branches and self._branches[-1][0] == level:
            _, left = self._branches.pop()
            torch._foreach_add_(left, tensors)
            tensors, level = left, level + 1
        self._branches.append((level, tensors))

    def total(self) -> list[Tensor]:
        """Return the sum."""
        while len(self._branches) > 1:
            _, right = self._branches.pop()
            torch._foreach_add_(self._branches[-1][1], right)
        return self._branches[0][1]


def lr_factor(step: int, options: TrainOptions) -> float:
    """Return the learning rate of a step as a share of `lr`. It rises linearly, stays, and falls over the last steps."""
    rise = min(1.0, (step + 1) / (options.warmup_steps + 1))
    left = min(1.0, (options.steps - step) / (options.lr_decay_steps + 1))  # 1 until the fall begins
    return rise * (left if options.lr_decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def batches_from(task: Task, step: int) -> Generator[Batch, None, None]:
    """Yield this process's part of the batch of each step from `step` on."""
    size, mine, num_images, options = task.micro_batch_size, task.micro_batches, len(task.dataset), task.run.options
    rows = slice(mine.start * size, mine.stop * size)
    together = max(1, _DRAWN // options.batch_size)

    def indices() -> Iterator[Tensor]:
        for first in range(step, options.steps, together):
            drawn = task.run.rng.indices(first, num_images, min(together, options.steps - first))
            yield from (batch[rows] for batch in drawn.split(options.batch_size))

    return batches(task.dataset, indices(), options.num_workers, pin_memory=task.run.device.type == "cuda")
