"""The clipped surrogate of PPO (arXiv 1707.06347, eq. 7)."""

import torch
from torch import Tensor


def ppo(rho: Tensor, advantage: Tensor, clip_range: float, advantage_clip: float = 5.0) -> Tensor:
    """``max(-A rho, -A clip(rho, 1 - c, 1 + c))``, the loss of each sample [B].

    Args:
        rho: probability ratio of the current policy to the sampling one, [B], positive.
        advantage: ``A`` [B], clipped to +- ``advantage_clip`` first.
        clip_range: ``c``.
    """
    advantage = advantage.clamp(-advantage_clip, advantage_clip)
    return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clip_range, 1 + clip_range))


def clip_fraction(rho: Tensor, clip_range: float) -> Tensor:
    """Share [] of the ratios that lie outside ``1 +- c``, in [0, 1]."""
    return ((rho - 1).abs() > clip_range).to(rho.dtype).mean()
