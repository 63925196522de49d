"""The one door to a reward, which is a user's own code, or somebody else's: the first thing that people write.

Whatever a reward raises leaves here as one sentence with its name and the prompt, and whatever it returns leaves as
named tensors of one number an image, or not at all. A reward gets a copy of the images: what it does to them in place,
through NumPy as well, changes nothing for the scorer that comes next, the other parts of a sum or the pictures that are
kept. A copy costs one batch of images for the time of the call; torch counts changes of a tensor, but not those that
are made through the NumPy array that shares its memory.
"""

import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import numpy as np
import torch
from torch import Tensor

from alignbench.errors import AlignbenchError, RewardError, RewardMemoryError
from alignbench.memory import out_of_memory
from alignbench.prompts.prompt import Prompt

if TYPE_CHECKING:
    from alignbench.rewards.reward import EmbedsImages, Reward

LONGEST_QUOTE = 200  # characters of an error or a prompt that a message quotes


@contextmanager
def guarded(doing: str, module: str = "") -> Iterator[None]:
    """Turn whatever a reward raises inside into one sentence; its own errors of this package go through.

    Args:
        doing: who does what, as the sentence begins.
        module: the reward's, to name the line in it.

    Raises:
        RewardMemoryError: memory ran out; fewer images at once may do.
        RewardError: anything else. The exception itself is the cause.
    """
    try:
        # A reward that changes the working directory, or switches gradients off, does so for itself alone.
        with chdir(os.getcwd()), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    except AlignbenchError:
        raise
    # The only place that catches everything: the code is not ours, so it may raise anything, and none of it should cost
    # the user the run. A reward's sys.exit is a failure too, not a signal to stop; Ctrl-C goes through.
    except (Exception, SystemExit) as error:
        kind = RewardMemoryError if out_of_memory(error) else RewardError
        raise kind(
            f"{doing} raised {_quoted(error)}{_line(error, module)}; once that is corrected, the same command continues"
        ) from error


def check(reward: "Reward", prompts: Sequence[Prompt]) -> None:
    """``Reward.check`` behind the door.

    Raises:
        DataError: prompts that cannot be scored.
        RewardError: the reward raised something else.
    """
    with guarded(f"reward {reward.name}, checking {len(prompts)} prompts,", type(reward).__module__):
        reward.check(prompts)


def encode(reward: "Reward", prompts: Sequence[Prompt]) -> None:
    """``Reward.encode`` behind the door; errors as ``score``."""
    with guarded(_doing(reward, "encoding", "text", prompts), type(reward).__module__):
        reward.encode(list(prompts))


def score(reward: "Reward", images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """``Reward.score`` behind the door.

    Tensors, NumPy arrays and lists of one real number an image are taken, named or alone; alone they are the reward.

    Args:
        images: float ``[batch, 3, height, width]`` in [0, 1]; the reward gets a copy.
        prompts: one record per image.

    Returns:
        Named tensors ``[batch]`` on the images' device and in their dtype, ``reward`` first; with a gradient where
        gradients are recorded and the images carry one.

    Raises:
        RewardMemoryError: memory ran out.
        RewardError: the reward raised something, returned something else, or returned no gradient where one is taken.
    """
    doing = _doing(reward, "scoring", "image", prompts)
    copy = images.clone()
    source = copy.grad_fn
    with guarded(doing, type(reward).__module__):
        returned: Any = reward.score(copy, list(prompts))
        named = {"reward": returned} if isinstance(returned, Tensor | np.ndarray | list | tuple) else returned
        if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
            _refuse(doing, _kind(returned), "named tensors, {'reward': ...}")
        if "reward" not in named:
            _refuse(doing, f"scores named {', '.join(named) or 'nothing'}", "one named 'reward' among them")
        scores = {name: _numbers(named[name], images, f"{doing} as {name!r}") for name in {"reward": 0} | dict(named)}
    if source is None:
        return {name: values.detach() for name, values in scores.items()}
    if not _reaches(scores["reward"].grad_fn, source):
        raise RewardError(
            f"{doing} gave a reward without a gradient with respect to the images, but the method takes one: compute "
            "it from them in torch, without detach(), NumPy or torch.no_grad()"
        )
    return scores


def embed(scorer: "EmbedsImages", images: Tensor) -> Tensor:
    """``EmbedsImages.embed_images`` behind the door; ``[batch, features]``, finite.

    Raises:
        RewardMemoryError, RewardError: as ``score``.
    """
    doing = f"scorer {getattr(scorer, 'name', type(scorer).__name__)}, embedding {len(images)} images,"
    with guarded(doing, type(scorer).__module__):
        vectors: Any = scorer.embed_images(images.clone())
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(images):
            _refuse(doing, _kind(vectors), f"a tensor of shape [{len(images)}, features]")
        if not bool(vectors.isfinite().all()):
            _refuse(doing, "vectors that are not finite", "unit vectors")
    return vectors


def _numbers(values: Any, images: Tensor, doing: str) -> Tensor:
    """One real number an image, as a tensor of its own beside the images."""
    wanted = f"a tensor, an array or a list of {len(images)} real numbers, one an image"
    given = _kind(values)
    if isinstance(values, list | tuple):
        try:
            of_tensors = bool(values) and all(isinstance(each, Tensor) for each in values)
            values = torch.stack(list(values)) if of_tensors else np.array(values)
        except (ValueError, TypeError, RuntimeError):  # uneven, or not of numbers
            _refuse(doing, given, wanted)
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biuf":
            _refuse(doing, f"{given} of {values.dtype}", wanted)
        values = torch.from_numpy(values.astype(np.float64))
    if not isinstance(values, Tensor) or values.is_complex() or values.shape != (len(images),):
        _refuse(doing, given, wanted)
    return values.to_dense().to(images.device, images.dtype).clone()


def _reaches(node: Any, source: Any) -> bool:
    """Whether a gradient flows from one node of the autograd graph to another."""
    seen, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        if each is source:
            return True
        following = {after for after, _ in each.next_functions if after is not None} if each is not None else set()
        waiting += following - seen
        seen |= following
    return False


def _refuse(doing: str, gave: str, wanted: str) -> Never:
    raise RewardError(f"{doing} gave {gave}: expected {wanted}; once that is corrected, the same command continues")


def _doing(reward: "Reward", verb: str, what: str, prompts: Sequence[Prompt]) -> str:
    """How a sentence about a call begins: the reward's name, how much it was given, and the first prompt."""
    if not prompts:
        return f"reward {reward.name}, {verb} no {what},"
    first = f"prompt {prompts[0].id} ({prompts[0].text[:LONGEST_QUOTE]!r})"
    if len(prompts) == 1:
        return f"reward {reward.name}, {verb} 1 {what} of {first},"
    return f"reward {reward.name}, {verb} {len(prompts)} {what}s from {first} on,"


def _kind(value: Any) -> str:
    """What something is, for a message."""
    if value is None:
        return "None (is a return missing?)"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _quoted(error: BaseException) -> str:
    """An exception in one line, whatever its own text is like."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _line(error: BaseException, module: str) -> str:
    """Where in a module an exception came from; empty if it did not pass through it."""
    file = getattr(sys.modules.get(module), "__file__", None)
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == file]
    return f" ({Path(str(file)).name}, line {lines[-1]})" if lines else ""
