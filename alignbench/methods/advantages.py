"""Group advantages: how much better an image is than the others of its group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from alignbench.errors import ConfigError

Std = Literal["global", "group", "none"]
TOLERANCE = 1e-6  # of the largest reward's magnitude: what float32 arithmetic leaves between equal rewards


@dataclass(frozen=True)
class Advantages:
    """Advantages of N rewards.

    Attributes:
        values: [N], dtype of the rewards; exactly 0 in a constant group.
        constant: bool [N], True for the members of a constant group.
        nearly: bool [N], True for those of them whose rewards do differ, by rounding.
        groups: integer ids [N].
    """

    values: Tensor
    constant: Tensor
    nearly: Tensor
    groups: Tensor

    def metrics(self) -> dict[str, float]:
        """The share of groups without signal, and of those that only rounding tells apart, each in [0, 1]."""
        names, index = torch.unique(self.groups, return_inverse=True)
        flags = {"constant_groups": self.constant, "nearly_constant_groups": self.nearly}
        return {
            name: members.new_zeros(len(names)).index_put((index,), members).double().mean().item()
            for name, members in flags.items()
        }


def group_advantages(
    rewards: Tensor, groups: Tensor, std: Std = "global", ddof: int = 0, eps: float = 1e-4
) -> Advantages:
    """``A_ij = (R_ij - mean_j R_ij) / (std + eps)`` over images j of group i (GRPO, arXiv 2402.03300).

    A group is constant if its largest and its smallest reward differ by no more than rounding; see ``no_spread``.
    ``A == 0`` would not tell: divided by a standard deviation with a small ``eps``, what rounding left between the
    rewards becomes advantages of full size.

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
    constant = no_spread(largest, smallest, values)

    centred = values - (zeros.index_add(0, index, values) / counts)[index]
    if std == "global":
        variance = (values - values.mean()).square().sum() / (len(values) - ddof)
        centred = centred / (variance.sqrt() + eps)
    elif std == "group":
        variance = zeros.index_add(0, index, centred.square()) / (counts - ddof)
        centred = centred / (variance.sqrt() + eps)[index]
    centred = torch.where(constant[index], 0.0, centred)  # also where a group of one has no sample std
    nearly = constant & (largest > smallest)
    return Advantages(centred.to(rewards.dtype), constant[index], nearly[index], groups)


def no_spread(largest: Tensor, smallest: Tensor, rewards: Tensor) -> Tensor:
    """Whether groups have one reward up to rounding: ``largest - smallest <= 1e-6 max |R|``; bool [groups].

    Args:
        largest, smallest: of each group, [groups].
        rewards: all rewards of the iteration, of any shape; their largest magnitude is the scale of rounding.
    """
    return largest - smallest <= TOLERANCE * rewards.abs().max()


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
    nearly = constant & torch.stack([part.nearly for _, part in parts]).any(0)
    return Advantages(values, constant, nearly, groups)
