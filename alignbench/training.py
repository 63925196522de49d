"""One optimizer step: micro-batches, gradients summed over processes, clipping."""

import torch
from torch import Tensor, nn

from alignbench.errors import AlignbenchError
from alignbench.memory import out_of_memory
from alignbench.methods.method import Method, Update
from alignbench.stack import Stack


def optimizer_step(
    stack: Stack, method: Method, update: Update, optimizer: torch.optim.Optimizer, clip: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Accumulate an update's gradient and apply it.

    The losses are sums over rows, divided by the update's global denominator: micro-batch size and number of processes
    do not change the gradient. When memory runs out, the update starts again with half the micro-batch.

    Args:
        clip: largest norm of the gradient; 0 does not clip.

    Returns:
        Metrics averaged over the update, and the maxima over its rows.

    Raises:
        AlignbenchError: the gradient is not finite.
    """
    method.prepare(stack, update)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    while True:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            with stack.ledger.attempt():
                sums, largest = accumulate(stack, method, update)
            break
        except Exception as error:
            if not out_of_memory(error) or stack.micro_batch.size == 1:
                raise
            stack.micro_batch.halve()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    stack.processes.sum(gradients)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else float("inf")))
    if not torch.isfinite(torch.tensor(norm)):
        raise AlignbenchError(
            f"the gradient's norm is {norm}: the run has diverged. A lower method.optimizer.lr or float32 "
            "(model.policy.dtype=float32) usually helps; the last checkpoint holds the weights before"
        )
    optimizer.step()
    return {name: value / update.denominator for name, value in sums.items()} | {"gradient_norm": norm}, largest


def accumulate(stack: Stack, method: Method, update: Update) -> tuple[dict[str, float], dict[str, float]]:
    """Add the gradients of an update's micro-batches; returns sums and maxima of what is logged, over all processes."""
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    start, size = 0, max(1, stack.micro_batch.size // update.rows)
    while start < update.atoms:
        atoms = range(start, min(update.atoms, start + size))
        loss = method.loss(stack, update, update.batch(atoms))
        if loss.total.requires_grad:
            torch.autograd.backward(loss.total / update.denominator)
        for name, value in (loss.metrics | {"loss": loss.total.detach()}).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        for name, value in loss.largest.items():
            largest[name] = torch.maximum(largest.get(name, value), value)
        start = atoms.stop
    join = stack.processes.join
    return (
        join({name: float(value) for name, value in sums.items()}, sum),
        join({name: float(value) for name, value in largest.items()}, max),
    )
