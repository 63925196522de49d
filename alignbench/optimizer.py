"""AdamW over a policy's trainable weights, and its state by the names of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from alignbench.policies.policy import Policy


def adamw(policy: Policy, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over ``current``."""
    weights = policy.trainable_parameters().values()
    return torch.optim.AdamW(weights, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def state_of(optimizer: torch.optim.Optimizer, policy: Policy) -> dict[str, Tensor]:
    """The optimizer's state by ``parameter/quantity``; empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in policy.trainable_parameters().items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(optimizer: torch.optim.Optimizer, policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Take up what ``state_of`` returned."""
    for name, parameter in policy.trainable_parameters().items():
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
            }
