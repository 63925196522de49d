"""``python -m alignbench.speed``: what the harness costs beside the model's own passes.

Every figure is a ratio of two things timed alternately in one process, so a busy machine disturbs both alike: the
median over pairs with a 95% interval from its order statistics.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy.stats import binom

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.configuration import composed
from alignbench.methods.diffusion_nft import DiffusionNFT
from alignbench.methods.method import Clock, Experience, Update
from alignbench.prompts.sets import draw
from alignbench.sampling.rollout import Sampler
from alignbench.terminal import lasting
from alignbench.training import optimizer_step

STEPS = 10


def parts_for(dtype: str, threads: int, *overrides: str) -> Parts:
    """The embedded default, ready to run."""
    common = [f"model.policy.dtype={dtype}", f"threads={threads}", "device=cpu"]
    return assembly.assemble(composed([*common, *overrides]))


def bare_pass(parts: Parts, latents: torch.Tensor, sigma: torch.Tensor, condition: Any) -> torch.Tensor:
    """The transformer called directly."""
    policy: Any = parts.policy
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.dtype == torch.bfloat16):
        velocity: torch.Tensor = policy.transformer(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=condition.tensors["prompt"],
            pooled_projections=condition.tensors["pooled"],
            return_dict=False,
        )[0]
    return velocity


@torch.no_grad()
def bare_rollout(parts: Parts, condition: Any, batch: int) -> None:
    """As many transformer calls as a rollout of this batch makes, and one call of the autoencoder."""
    policy: Any = parts.policy
    latents = torch.randn(batch, *policy.latent_shape)
    sigma = torch.full((batch,), 0.5)
    for _ in range(STEPS):
        bare_pass(parts, latents, sigma, condition)
    policy.vae.decode(latents, return_dict=False)


def rollout_pair(parts: Parts, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A bare and a complete rollout of the same work: prompts, noise, Euler steps, decoding."""
    prompts = draw(parts.prompts, min(batch, len(parts.prompts)), 0, 0)
    condition = parts.stack.encode(prompts)
    sampler = Sampler(STEPS)
    seeds = range(batch)
    return (
        lambda: bare_rollout(parts, condition, batch),
        lambda: parts.stack.sample(prompts, sampler, seeds, score=False, keep_images=True),
    )


def update_pair(parts: Parts) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The bare passes of an update of DiffusionNFT (old without gradient, current with) and the update."""
    experience, update = one_update(parts)
    assert isinstance(parts.method, DiffusionNFT)
    views = ("old", "reference") if parts.method.kl > 0 else ("old",)
    parts.stack.micro_batch.size = 64

    def bare() -> None:
        for start in range(0, update.atoms, 64):
            size = min(64, update.atoms - start)
            latents, sigma = torch.randn(size, *parts.policy.latent_shape), torch.full((size,), 0.5)
            condition = experience.condition[torch.arange(size) % len(experience.condition)]
            with torch.no_grad():
                for view in views:
                    with parts.policy.weights.using(view):
                        bare_pass(parts, latents, sigma, condition)
            torch.autograd.backward(bare_pass(parts, latents, sigma, condition).square().mean())

    return bare, lambda: optimizer_step(parts.stack, parts.method, update, parts.optimizer, clip=1.0)


def one_update(parts: Parts) -> tuple[Experience, Update]:
    """A collected iteration and its first update."""
    prompts = draw(parts.prompts, parts.method.batch.prompts, 0, 0)
    experience = parts.method.collect(parts.stack, prompts, Clock())
    return experience, next(parts.method.updates(experience, parts.stack, Clock()))


def ratios(bare: Callable[[], Any], ours: Callable[[], Any], pairs: int) -> list[float]:
    """Time of the bare work over ours, alternating which one goes first."""
    bare(), ours()
    result = []
    for pair in range(pairs):
        seconds = {}
        for name, call in (("bare", bare), ("ours", ours))[:: 1 if pair % 2 else -1]:
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
        result.append(seconds["bare"] / seconds["ours"])
    return result


def overhead(parts: Parts, iterations: int) -> list[float]:
    """Share of an iteration spent outside denoiser, decoder, reward, backward passes and optimizer."""
    inside = [0.0]
    depth = [0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            depth[0] += 1
            try:
                return call(*arguments, **options)
            finally:
                depth[0] -= 1
                inside[0] += 0.0 if depth[0] else time.perf_counter() - start

        return wrapped

    shares = []
    with replaced(
        [(parts.policy, "predict"), (parts.policy, "decode"), (parts.stack.reward, "score"),
         (torch.autograd, "backward"), (parts.optimizer, "step")], timed
    ):  # fmt: skip
        for iteration in range(iterations + 1):
            inside[0], start = 0.0, time.perf_counter()
            clock = Clock(iteration)
            prompts = draw(parts.prompts, parts.method.batch.prompts, 0, iteration)
            experience = parts.method.collect(parts.stack, prompts, clock)
            for update in parts.method.updates(experience, parts.stack, clock):
                optimizer_step(parts.stack, parts.method, update, parts.optimizer, clip=1.0)
            parts.method.after_iteration(parts.policy, clock)
            parts.policy.blend("evaluation", 0.9)
            shares.append(1 - inside[0] / (time.perf_counter() - start))
    return shares[1:]  # the first one encodes prompts


@contextmanager
def replaced(places: Sequence[tuple[Any, str]], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]):  # type: ignore[no-untyped-def]
    """Wrap attributes for a while."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, original in originals:
            setattr(owner, name, wrap(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and the order statistics that cover it in at least 95% of samples (exact, from the binomial)."""
    ordered = sorted(values)
    n = len(ordered)
    below = int(binom.ppf(0.025, n, 0.5))
    low = ordered[max(0, below - 1)]
    high = ordered[min(n - 1, n - below)]
    return float(torch.tensor(ordered).quantile(0.5)), low, high


def show(name: str, values: Sequence[float]) -> None:
    """One line of the table."""
    middle, low, high = median_with_interval(values)
    print(f"  {name:<58} {middle:6.3f}  [{low:.3f}, {high:.3f}]  n = {len(values)}", flush=True)


@lasting()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.speed", description=__doc__)
    parser.add_argument("--pairs", type=int, default=21, help="alternating pairs for each ratio (at least 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    if options.pairs < 15:
        parser.error(f"--pairs {options.pairs}: at least 15")
    print("bare model passes / harness, median with 95% interval (1 = no overhead)")
    parts = parts_for("float32", options.threads)
    for batch in (64, 8):
        show(f"rollout, batch {batch}, float32", ratios(*rollout_pair(parts, batch), options.pairs))
    show("update (DiffusionNFT), float32", ratios(*update_pair(parts), options.pairs))
    print("share of an iteration outside denoiser, decoder, reward, backward and optimizer")
    for method in ("diffusion_nft", "flow_grpo"):
        show(method, overhead(parts_for("float32", options.threads, f"method={method}"), options.pairs))
    print("time in float32 / time in bfloat16 autocast (above 1: bfloat16 is faster)")
    half = parts_for("bfloat16", options.threads)
    show("rollout, batch 64", ratios(rollout_pair(parts, 64)[1], rollout_pair(half, 64)[1], options.pairs))
    show("update (DiffusionNFT)", ratios(update_pair(parts)[1], update_pair(half)[1], options.pairs))


if __name__ == "__main__":
    main()
