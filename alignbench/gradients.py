"""``python -m alignbench.gradients method=... reward=...``: how much of an iteration's gradient is signal.

Several iterations are collected from the base weights, and the gradient of each is kept instead of applied. What the
gradients of independent iterations share is signal, the rest is noise; from both follows how much compute one must
average over before the update points where the method wants to go.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from alignbench import arguments, assembly
from alignbench.assembly import Parts
from alignbench.command import command_line
from alignbench.configuration import composed, reward_name
from alignbench.errors import AlignbenchError, ConfigError
from alignbench.ledger import METHOD_PHASES
from alignbench.methods.method import Clock
from alignbench.prompts.sets import draw
from alignbench.records import atomic_write
from alignbench.training import accumulate


@dataclass(frozen=True)
class Signal:
    """What the gradients of n independent iterations share.

    Attributes:
        ratio: squared norm of the mean gradient over the trace of one iteration's covariance, both unbiased; the number
            of iterations whose mean is half signal is its inverse. At or below 0 nothing was found.
        error: its standard error, by leaving out one iteration at a time (jackknife).
        cosine: mean cosine between the gradients of two iterations.
        n: iterations.
    """

    ratio: float
    error: float
    cosine: float
    n: int


def signal(gradients: Tensor) -> Signal:
    """The signal in gradients ``[n, parameters]`` of n independent iterations.

    For gradients m + e with independent e of mean 0, the mean of g_i . g_j over i != j estimates |m|^2, and the mean of
    |g_i|^2 minus it the trace of e's covariance.

    Raises:
        ValueError: fewer than 3 gradients: none could be left out.
    """
    n = len(gradients)
    if n < 3:
        raise ValueError(f"{n} gradients: at least 3 are needed")
    products = gradients.double() @ gradients.double().T
    norms = products.diagonal().sqrt()
    apart = ~torch.eye(n, dtype=torch.bool)
    left_out = torch.stack([_ratio(products[kept][:, kept]) for kept in apart])
    error = ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt()
    cosine = (products / norms.clamp(min=1e-30).outer(norms.clamp(min=1e-30)))[apart].mean()
    return Signal(float(_ratio(products)), float(error), float(cosine), n)


def _ratio(products: Tensor) -> Tensor:
    n = len(products)
    own = products.diagonal().sum()
    shared = (products.sum() - own) / (n * (n - 1))
    return shared / (own / n - shared)


def collected(parts: Parts, config: DictConfig, iterations: int) -> Tensor:
    """The gradients ``[iterations, parameters]`` of as many iterations, all from the weights as they are.

    An iteration of several updates counts as the mean of their gradients.
    """
    parameters = [parameter for group in parts.optimizer.param_groups for parameter in group["params"]]
    rows = []
    for iteration in range(iterations):
        clock = Clock(iteration=iteration)
        wanted = parts.method.prompts_wanted(clock)
        prompts = draw(parts.prompts, wanted, config.seed, iteration, config.prompts.balance)
        with parts.ledger.during("rollout"):
            experience = parts.method.collect(parts.stack, prompts, clock)
        total, updates = torch.zeros(sum(parameter.numel() for parameter in parameters)), 0
        with parts.ledger.during("training"):
            for update in parts.method.updates(experience, parts.stack, clock):
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                parts.method.prepare(parts.stack, update)
                accumulate(parts.stack, parts.method, update)
                total += torch.cat([parameter.grad.flatten().float().cpu() for parameter in parameters])
                updates += 1
        if updates:  # a method may drop every group
            rows.append(total / updates)
    return torch.stack(rows) if rows else torch.zeros(0, 0)


def measure(config: DictConfig, iterations: int) -> dict[str, Any]:
    """Signal and cost of a configuration, as a record.

    Raises:
        AlignbenchError: the configuration cannot be run, or fewer than 3 iterations had a gradient.
    """
    parts = assembly.assemble(config)
    gradients = collected(parts, config, iterations)
    if len(gradients) < 3:
        raise AlignbenchError(
            f"{len(gradients)} of {iterations} iterations had a gradient (every other group of images had one reward "
            "throughout): at least 3 are needed, take more --iterations or larger groups"
        )
    found = signal(gradients)
    phases = parts.ledger.phases
    flops = sum(phases[phase].flops for phase in METHOD_PHASES) / iterations
    return {
        "method": config.method.name,
        "reward": reward_name(config),
        "seed": config.seed,
        **asdict(found),
        "tflop_per_iteration": flops / 1e12,
        "tflop_to_half_signal": flops / 1e12 / found.ratio if found.ratio > 0 else None,
    }


def main() -> None:
    """Measure what the command line composes, print it, and append it to a file of records."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.gradients", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for python -m alignbench: method=... reward=... ...")
    parser.add_argument("--iterations", type=int, default=16, help="independent iterations (at least 3)")
    parser.add_argument("--output", type=Path, help="JSON lines file to append the record to")
    options = parser.parse_args()
    if options.iterations < 3:
        raise ConfigError(f"--iterations {options.iterations}: at least 3 are needed")
    arguments.check_overrides(options.overrides)
    config = composed(options.overrides)
    record = json.dumps(measure(config, options.iterations))
    print(record)
    if options.output is not None:
        before = options.output.read_text() if options.output.exists() else ""
        atomic_write(options.output, before + record + "\n")


if __name__ == "__main__":
    command_line(main, "alignbench.gradients")
