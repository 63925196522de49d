"""The evaluation protocol: the same prompts, noises and samplers for every method, seed and checkpoint.

An evaluation has clocks and seeds of its own and restores every global generator, so it cannot disturb training. A
protocol is a named object; its hash stands beside every number.
"""

import io
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.policies.policy import Condition
from alignbench.prompts.prompt import Prompt
from alignbench.records import config_hash
from alignbench.rewards.reward import EmbedsImages, Reward
from alignbench.sampling.rollout import Sampler
from alignbench.seeding import seed_of, seeds_of
from alignbench.settings import between
from alignbench.stack import POLICY, REWARD, Stack

GRID_COLUMNS = 4  # images of a prompt in the sample grid
GRID_ROWS_PER_TAG = 2
MOST_IMAGES_PER_TAG = 100_000
DRIFT_SAMPLES = 64
DRIFT_SIGMAS = (0.9, 0.7, 0.5, 0.3)


@dataclass(frozen=True)
class Protocol:
    """One evaluation protocol.

    Attributes:
        name: ``"preview"``, ``"curve"`` or ``"final"``.
        version: raised whenever the meaning of a number changes.
        split: prompt split that is evaluated.
        images_per_tag: images of each GenEval tag, at least; spread evenly over the tag's prompts.
        steps, solver, grid: of the sampler.
        guidance: scales; the first is the headline's, the others are chosen beforehand.
    """

    name: str
    version: int
    split: str
    images_per_tag: int
    steps: int
    solver: str
    grid: str
    guidance: tuple[float, ...]

    def __post_init__(self) -> None:
        between(self.images_per_tag, 1, MOST_IMAGES_PER_TAG, f"evaluation {self.name}: images_per_tag")
        if not self.guidance:
            raise ConfigError(f"evaluation {self.name}: guidance is empty, give at least one scale, for example [1.0]")
        for guidance in self.guidance:
            self.sampler(guidance)

    def sampler(self, guidance: float) -> Sampler:
        """How this protocol samples at one guidance scale."""
        return Sampler(self.steps, self.solver, self.grid, guidance)

    def describe(
        self, samples: "Samples", scorers: Sequence[str], dtype: str, resolution: Sequence[int]
    ) -> dict[str, Any]:
        """Everything that a number depends on, for the records; its hash is the protocol's hash."""
        return asdict(self) | {
            "guidance": list(self.guidance),
            "prompts": len(samples.prompts),
            "images": len(samples.rows),
            "prompts_hash": samples.prompts_hash,
            "scorers": list(scorers),
            "dtype": dtype,
            "resolution": list(resolution),
            "weights": "evaluation average; current weights beside it at the end",
        }


@dataclass(frozen=True)
class Samples:
    """Which images a protocol looks at.

    Attributes:
        prompts: the prompts, in order.
        rows: (index of the prompt, index of the image within the prompt) of every image, prompt by prompt.
    """

    prompts: list[Prompt]
    rows: list[tuple[int, int]]

    @property
    def prompts_hash(self) -> str:
        """Of the prompts' ids and texts, as it stands in the records."""
        return config_hash({prompt.id: prompt.text for prompt in self.prompts})

    @classmethod
    def choose(cls, prompts: Sequence[Prompt], images_per_tag: int) -> "Samples":
        """Spread ``images_per_tag`` images over each tag's prompts.

        A tag with more prompts than that keeps those whose hashed ids come first, so a small protocol looks at a
        subset of a large one's images.
        """
        tags: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            tags.setdefault(tag_of(prompt), []).append(prompt)
        kept: list[Prompt] = []
        rows: list[tuple[int, int]] = []
        for members in tags.values():
            first = sorted(members, key=lambda prompt: seed_of("evaluated prompt", prompt.id))[:images_per_tag]
            images = math.ceil(images_per_tag / len(first))
            for prompt in sorted(first, key=lambda prompt: prompt.id):
                rows += [(len(kept), image) for image in range(images)]
                kept.append(prompt)
        return cls(kept, rows)


def tag_of(prompt: Prompt) -> str:
    """The GenEval tag of a prompt; ``"prompt"`` for those without one."""
    return str(prompt.metadata.get("tag", "prompt"))


@dataclass
class Evaluation:
    """What one evaluation measured.

    Attributes:
        metrics: by name; a score's name alone is the unweighted mean over tags, ``name/tag`` one tag.
        standard_errors: of the score's means, clustered by prompt.
        scores: per-image values for the records, and the prompts of the grid's rows.
        grid: PNG of a fixed set of prompts and noises, one row per prompt.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    scores: dict[str, Any]
    grid: bytes = field(repr=False)


class Evaluator:
    """Evaluates one policy under named protocols.

    Args:
        stack: the run's stack; evaluation is charged to its own phase.
        prompts: the evaluated prompt set.
        scorers: rewards by metric name, beside the reward that is trained on.
        features: name of the scorer whose image embeddings measure diversity; None leaves it out.
    """

    def __init__(
        self, stack: Stack, prompts: Sequence[Prompt], scorers: Mapping[str, Reward], features: str | None = None
    ) -> None:
        self.stack = stack
        self.prompts = prompts
        self.scorers = dict(scorers)
        self.features = cast(EmbedsImages, self.scorers[features]) if features else None
        self._reference: tuple[Tensor, Tensor, Condition] | None = None

    def __call__(
        self, protocol: Protocol, *, view: str, guidance: float, between: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """Sample every image of the protocol with a view's weights and score it; how far the weights have drifted.

        ``between`` is called by all processes at the same points, one micro-batch apart; what it raises ends the
        evaluation.
        """
        samples = self.samples(protocol)
        result = self.measure(samples, self.sampled(protocol, samples, view=view, guidance=guidance), between)
        result.metrics["drift"] = self.drift(view)
        return result

    def sampled(
        self, protocol: Protocol, samples: Samples, *, view: str, guidance: float
    ) -> Callable[[Sequence[int]], Tensor]:
        """Rows of the samples -> their images ``[rows, 3, height, width]`` in [0, 1], by a view's weights."""
        sampler = protocol.sampler(guidance)

        def draw(rows: Sequence[int]) -> Tensor:
            chosen = [samples.rows[row] for row in rows]
            prompts = [samples.prompts[prompt] for prompt, _ in chosen]
            seeds = [
                seed_of("evaluation noise", prompt.id, image)
                for prompt, (_, image) in zip(prompts, chosen, strict=True)
            ]
            images = self.stack.sample(prompts, sampler, seeds, view=view, keep_images=True, score=False).images
            assert images is not None
            return images

        return draw

    def measure(
        self,
        samples: Samples,
        draw: Callable[[Sequence[int]], Tensor],
        between: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Score the images that ``draw`` gives for rows of the samples.

        Images are scored as soon as a micro-batch of them is there; only those of the grid are kept.
        """
        grid = grid_rows(samples)
        shown = sorted({row for line in grid for row in line})
        local = self.stack.processes.shard(len(samples.rows))

        def chunk(places: range) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
            rows = local[places.start : places.stop]
            prompts = [samples.prompts[samples.rows[row][0]] for row in rows]
            images = draw(rows)
            scores = self._score(images, prompts, rows)
            embeddings = None if self.features is None else self.stack.embed(images, self.features)
            return scores, embeddings, images[[place for place, row in enumerate(rows) if row in shown]].cpu()

        def of_block(places: range) -> list[tuple[dict[str, Tensor], Tensor | None, Tensor]]:
            between()
            return self.stack.micro_batch.chunks(len(places), lambda few: chunk(places[few.start : few.stop]))

        with self.stack.ledger.during("evaluation"), torch.no_grad(), undisturbed():
            gather = self.stack.processes.gather
            blocks = self.stack.processes.rounds(len(samples.rows), self.stack.micro_batch.largest)
            parts = [part for block in blocks for part in of_block(block)]
            scores = {name: gather(torch.cat([part[0][name] for part in parts])).double().cpu() for name in parts[0][0]}
            metrics, errors = summarise(scores, samples)
            embeddings = [part[1] for part in parts if part[1] is not None]
            if embeddings:
                metrics["diversity"] = diversity(gather(torch.cat(embeddings)).cpu(), samples)
            images = gather(torch.cat([part[2] for part in parts]))
        of_row = [samples.prompts[samples.rows[line[0]][0]] for line in grid]
        table = {
            "prompt_ids": [prompt.id for prompt in samples.prompts],
            "tags": [tag_of(prompt) for prompt in samples.prompts],
            "images": np.bincount([prompt for prompt, _ in samples.rows]).tolist(),
            "grid": [{"id": prompt.id, "prompt": prompt.text} for prompt in of_row],
            "metrics": {name: [round(value, 6) for value in values.tolist()] for name, values in scores.items()},
        }
        return Evaluation(metrics, errors, table, picture(dict(zip(shown, images, strict=True)), grid))

    def _score(self, images: Tensor, prompts: Sequence[Prompt], rows: Sequence[int]) -> dict[str, Tensor]:
        """Scores of the trained reward and of all scorers."""
        scores = {"reward": self.stack.score(images, prompts, ids=rows)["reward"]}
        for name, scorer in self.scorers.items():
            for key, values in self.stack.score(images, prompts, reward=scorer, ids=rows).items():
                scores[name if key == "reward" else key] = values
        return scores

    def samples(self, protocol: Protocol) -> Samples:
        """The images that a protocol looks at."""
        return Samples.choose(self.prompts, protocol.images_per_tag)

    def repeat(self, samples: Samples, guidance: float, cost: Mapping[str, int]) -> None:
        """Charge an evaluation that is recorded already as if it were made here, texts included."""
        ledger = self.stack.ledger
        texts = [prompt.text for prompt in samples.prompts]
        with ledger.during("evaluation"):
            if self.stack.processes.main:
                ledger.count(**cost)
            for reader in (POLICY, REWARD, *(scorer.name for scorer in self.scorers.values())):
                ledger.read(reader, texts, 0)  # in the cost already
            if guidance != 1.0:
                ledger.read(POLICY, [""], 0)

    def sample_reference(self) -> None:
        """Draw the base model's samples on which drift is measured; before the first one, on every process."""
        rows = self.stack.processes.shard(DRIFT_SAMPLES)
        prompts = [self.prompts[row % len(self.prompts)] for row in rows]
        with self.stack.ledger.during("evaluation"):
            rollout = self.stack.sample(
                prompts, Sampler(10), seeds_of("drift sample", ids=rows), view="reference", score=False
            )
        noise = self.stack.policy.noise(seeds_of("drift noise", ids=rows))
        self._reference = rollout.latents, noise, rollout.condition

    def drift(self, view: str) -> float:
        """Mean squared velocity difference from the reference on the reference's own, noised samples."""
        assert self._reference is not None, "sample_reference comes first"
        x_0, noise, condition = self._reference

        def chunk(rows: range) -> Tensor:
            part, e, few = x_0[rows.start : rows.stop], noise[rows.start : rows.stop], condition[rows.start : rows.stop]
            squares = []
            for sigma in DRIFT_SIGMAS:
                t = part.new_full((len(part),), sigma)
                x_t = self.stack.policy.path.interpolate(part, e, t)
                v = self.stack.predict(x_t, t, few, view=view)
                v_ref = self.stack.predict(x_t, t, few, view="reference")
                squares.append((v - v_ref).square().flatten(1).mean(1))
            return torch.stack(squares, 1)

        with self.stack.ledger.during("evaluation"), torch.no_grad(), undisturbed():
            squares = torch.cat(self.stack.micro_batch.chunks(len(x_0), chunk))
        return float(self.stack.processes.gather(squares).mean())


def summarise(scores: Mapping[str, Tensor], samples: Samples) -> tuple[dict[str, float], dict[str, float]]:
    """Means by tag and over tags, with standard errors clustered by prompt.

    The overall value is the unweighted mean of the tags, as GenEval's is. Images of one prompt are not independent, so
    the standard error of a tag is that of its prompts' means; a tag with one prompt uses its images.
    """
    prompt_of = np.array([prompt for prompt, _ in samples.rows])
    tags = np.array([tag_of(prompt) for prompt in samples.prompts])
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, tensor in scores.items():
        values = tensor.numpy()
        means, variances = [], []
        for tag in dict.fromkeys(tags):
            members = np.flatnonzero(tags == tag)
            of_tag = values[np.isin(prompt_of, members)]
            clusters = np.array([values[prompt_of == prompt].mean() for prompt in members])
            units = clusters if len(clusters) > 1 else of_tag
            means.append(of_tag.mean())
            variances.append(units.var(ddof=1) / len(units) if len(units) > 1 else 0.0)
            if len(set(tags)) > 1:
                metrics[f"{name}/{tag}"], errors[f"{name}/{tag}"] = float(means[-1]), float(np.sqrt(variances[-1]))
        metrics[name] = float(np.mean(means))
        errors[name] = float(np.sqrt(np.sum(variances)) / len(variances))
    return metrics, errors


def diversity(embeddings: Tensor, samples: Samples) -> float:
    """Mean cosine distance between the images of one prompt, averaged over prompts; in [0, 2]."""
    distances = []
    prompt_of = torch.tensor([prompt for prompt, _ in samples.rows])
    for prompt in range(len(samples.prompts)):
        own = embeddings[prompt_of == prompt].double()
        n = len(own)
        if n > 1:
            distances.append(1 - ((own @ own.T).sum() - own.square().sum()) / (n * (n - 1)))
    return float(torch.stack(distances).mean()) if distances else 0.0


def grid_rows(samples: Samples) -> list[list[int]]:
    """Rows of the images in the sample grid: the first prompts of every tag, ``GRID_COLUMNS`` noises of each.

    A prompt with fewer images shows its last one again.
    """
    shown: dict[str, list[int]] = {}
    for index, record in enumerate(samples.prompts):
        shown.setdefault(tag_of(record), []).append(index)
    first = {of: row for row, (of, image) in enumerate(samples.rows) if image == 0}
    count = np.bincount([prompt for prompt, _ in samples.rows]).tolist()
    return [
        [first[prompt] + min(column, count[prompt] - 1) for column in range(GRID_COLUMNS)]
        for members in shown.values()
        for prompt in members[:GRID_ROWS_PER_TAG]
    ]


def picture(images: Mapping[int, Tensor], grid: Sequence[Sequence[int]]) -> bytes:
    """PNG of images ``[3, height, width]`` in [0, 1] by row of the samples: a line per prompt, a column per noise."""
    lines = [
        torch.cat([torch.nn.functional.pad(images[row], (1, 1, 1, 1), value=1.0) for row in line], dim=2)
        for line in grid
    ]
    pixels = (torch.cat(lines, dim=1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch, whatever a scorer does with them."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a third-party scorer may use the global one
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
