"""Methods on the forward process: they keep clean latents only and noise each of them anew at some of the grid's times.

An atom is one image at one time. Its noise is seeded by the image's id and the time, so that every view of the weights,
any micro-batch and any number of processes see the same noised latent.
"""

from collections.abc import Iterator, Sequence

import torch

from alignbench.errors import ConfigError
from alignbench.methods.method import Batch, BatchSize, Clock, Experience, Method, Update
from alignbench.sampling.rollout import Sampler
from alignbench.seeding import generator, seed_of
from alignbench.stack import Stack


class ForwardProcess(Method):
    """What they share: ``collect`` leaves the term ``x_0``, and ``loss`` finds ``noise``, ``t`` and ``x_t`` too.

    Args:
        times: training times per image, between 1 and the sampler's steps.
    """

    def __init__(self, *, times: int, sampler: Sampler, batch: BatchSize, seed: int) -> None:
        super().__init__(sampler=sampler, batch=batch, seed=seed)
        if not 1 <= times <= sampler.steps:
            raise ConfigError(
                f"method.algorithm.times is {times}; choose 1 to {sampler.steps}, the rollout's steps: an image is "
                "trained at times of the rollout's grid"
            )
        self.times = times

    def training_steps(self, sample: int, clock: Clock) -> list[int]:
        """The grid's steps that an image is trained at: ``times`` of them, drawn per image without repetition."""
        order = generator("time", self.seed, clock.iteration, sample).permutation(self.sampler.steps)
        return sorted(order[: self.times].tolist())

    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        grid = stack.policy.grid(self.sampler.steps, self.sampler.grid)

        for rows, images in self.parts(experience, clock):
            atoms = [(row, step) for row in rows for step in self.training_steps(experience.ids[row], clock)]

            def batch(chosen: Sequence[int], atoms: list[tuple[int, int]] = atoms) -> Batch:
                picked = [atoms[index] for index in chosen]
                rows = torch.as_tensor([row for row, _ in picked])
                seeds = [
                    seed_of("noise", self.seed, clock.iteration, experience.ids[row], step) for row, step in picked
                ]
                terms = {name: value[rows] for name, value in experience.terms.items()}
                terms["noise"] = stack.policy.noise(seeds)
                terms["t"] = grid[[step for _, step in picked]].to(stack.policy.device)
                terms["x_t"] = stack.policy.path.interpolate(terms["x_0"], terms["noise"], terms["t"])
                return Batch(terms, experience.condition[rows], [experience.prompts[row] for row in rows], chosen)

            yield Update(len(atoms), images * self.times, batch)
