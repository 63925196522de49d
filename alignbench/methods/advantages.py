"""Group advantages: how much better an image is than the others of its group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from alignbench.errors import ConfigError

Std = Literal["global", "group", "none"]


@dataclass(frozen=True)
class Advantages:
    """Advantages of N rewards.

    Attributes:
        values: [N], dtype of the rewards; exactly 0 in a constant group.
        constant: bool [N], True for the members of a constant group.
        constant_share: share of the groups that are constant, in [0, 1].
    """

    values: Tensor
    constant: Tensor
    constant_share: float


def group_advantages(
    rewards: Tensor, groups: Tensor, std: Std = "global", ddof: int = 0, eps: float = 1e-4
) -> Advantages:
    """``A_ij = (R_ij - mean_j R_ij) / (std + eps)`` over images j of group i (GRPO, arXiv 2402.03300).

    A group is constant if its largest reward equals its smallest. ``A == 0`` would not tell: rounding of the mean
    leaves residues, which a small ``eps`` can blow up.

    Args:
        rewards: [N].
        groups: integer ids [N], in any order.
        std: "global" over all N rewards (Flow-GRPO, NFT), "group" over each group (TempFlow, DanceGRPO, MixGRPO),
            "none" divides by nothing.
        ddof: 0 population, 1 sample standard deviation.
        eps: added to the standard deviation.

    Raises:
        ConfigError: unknown ``std`` or ``ddof``.
    """
    if std not in get_args(Std):
        raise ConfigError(f"Expected std to be one of {', '.join(get_args(Std))}, got {std!r}.")
    if ddof not in (0, 1):
        raise ConfigError(f"Expected ddof 0 (population) or 1 (sample standard deviation), got {ddof}.")

    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    values = rewards.double()
    zeros = values.new_zeros(len(counts))
    largest = zeros.scatter_reduce(0, index, values, "amax", include_self=False)
    smallest = zeros.scatter_reduce(0, index, values, "amin", include_self=False)
    constant = largest == smallest

    centred = values - (zeros.index_add(0, index, values) / counts)[index]
    if std == "global":
        variance = (values - values.mean()).square().sum() / (len(values) - ddof)
        centred = centred / (variance.sqrt() + eps)
    elif std == "group":
        variance = zeros.index_add(0, index, centred.square()) / (counts - ddof)
        centred = centred / (variance.sqrt() + eps)[index]
    centred = torch.where(constant[index], 0.0, centred)  # also where a group of one has no sample std
    return Advantages(centred.to(rewards.dtype), constant[index], constant.double().mean().item())


def add_advantages(parts: Sequence[tuple[float, Advantages]], groups: Tensor) -> Advantages:
    """``A = sum_k w_k A_k``, so that no reward's scale drowns another's (MixGRPO, arXiv 2507.21802).

    Args:
        parts: weight and advantages of each reward, over the same images.
        groups: integer ids [N], as those advantages were made with.

    Returns:
        Advantages whose group is constant where it is for every reward.
    """
    values = torch.stack([weight * part.values for weight, part in parts]).sum(0)
    constant = torch.stack([part.constant for _, part in parts]).all(0)
    names, index = torch.unique(groups, return_inverse=True)
    of_groups = torch.empty(len(names), dtype=torch.bool).index_put((index,), constant)
    return Advantages(values, constant, of_groups.double().mean().item())
