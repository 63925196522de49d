"""Trainable weights and their named views over one base model.

A view is a dict of tensors for the trainable parameters. The module holds one set of parameters, those of `current`;
running another view puts its tensors into the module's parameter slots for the time of the call. So any number of views
share the base, switching costs one dict assignment a tensor, and `requires_grad` and the trainable set never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from alignbench.errors import CheckpointError, ConfigError

MOST_REDUNDANT = 4  # times the largest layer's rank; published settings still work on small stand-ins for a model


class LoraLinear(nn.Linear):
    """A frozen linear layer with a low-rank update: ``W x + b + (alpha / rank) B A x`` (LoRA, arXiv 2106.09685).

    ``lora_A`` [rank, in] is drawn from N(0, 1 / rank^2) ("gaussian" of PEFT and diffusers), ``lora_B`` [out, rank]
    starts at zero. Both are float32 whatever the dtype of the base (float64 on a float64 base). Where they are None the
    layer is the base layer.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        a = torch.empty(rank, self.in_features).normal_(std=1 / rank, generator=generator)
        self.lora_A = nn.Parameter(a.to(base.weight.device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=base.weight.device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        base = F.linear(input, self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return base
        low_rank = F.linear(input, self.lora_A)
        update = torch.addmm(base.flatten(0, -2), low_rank.flatten(0, -2), self.lora_B.t(), alpha=self.scale)
        return update.view(base.shape)


def add_lora(
    module: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Freezes `module` and puts a `LoraLinear` in place of every linear layer whose path ends in a target.

    Args:
        targets: path suffixes of whole components: ``attn.to_q`` hits ``blocks.0.attn.to_q``, not
            ``blocks.0.attn2.to_q``.
        rank: of the update.
        alpha: the update's scale is ``alpha / rank``.
        seed: of the initial A, drawn on the CPU in module order.

    Returns:
        The trainable parameters by name, in module order.

    Raises:
        ConfigError: the rank is not positive or far above every layer's, alpha is not positive, or a target hits no
            linear layer.
    """
    if rank < 1 or alpha <= 0:
        raise ConfigError(f"the LoRA rank and alpha must be positive, got {rank} and {alpha:g}")
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    unused = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linears)]
    if unused or not targets:
        endings = sorted({".".join(name.split(".")[-2:]) for name in linears})
        raise ConfigError(
            f"LoRA targets must each end the path of a linear layer, got {list(targets)}"
            + (f", of which {unused} hit none" if unused else "")
            + f"; layers end in {', '.join(endings)}"
        )
    hit = {name: layer for name, layer in linears.items() if any(f".{name}".endswith(f".{each}") for each in targets)}
    largest = max(min(layer.in_features, layer.out_features) for layer in hit.values())
    if rank > MOST_REDUNDANT * largest:
        raise ConfigError(
            f"the LoRA rank is {rank}, but no layer it is added to has a rank above {largest}, and more adds nothing: "
            f"at most {MOST_REDUNDANT * largest} is accepted"
        )
    module.requires_grad_(False)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, layer in hit.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, LoraLinear(layer, rank, alpha, generator))
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class Weights:
    """Named views of a module's trainable parameters.

    ``current`` are the parameters themselves, the only tensors with a gradient. ``reference`` are the values they had
    when this object was made. Further views are copies, on the same device and in the same dtype.

    Args:
        module: its parameters with ``requires_grad`` are the trainable ones.
        base_is_reference: the module without its trainable parameters is the reference (LoRA layers whose matrices are
            None), so that running the reference skips them instead of adding their zeros.
    """

    def __init__(self, module: nn.Module, *, base_is_reference: bool) -> None:
        self.current: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        self._slots = []
        for name in self.current:
            parent, _, child = name.rpartition(".")
            self._slots.append((module.get_submodule(parent)._parameters, child))
        self._tensors: dict[str, Mapping[str, Tensor]] = {"current": self.current}
        self._check_memory("reference")
        self._tensors["reference"] = self._copy("current")
        self._installed: dict[str, list[Tensor | None]] = {
            "current": list(self.current.values()),
            "reference": [None if base_is_reference else tensor for tensor in self._tensors["reference"].values()],
        }
        self.active = "current"

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views, in the order they were added."""
        return tuple(self._tensors)

    def tensors(self, view: str) -> Mapping[str, Tensor]:
        """The tensors of a view by parameter name; those of ``current`` are the parameters."""
        if view not in self._tensors:
            raise KeyError(f"no view {view!r}; there are {', '.join(self.views)}")
        return self._tensors[view]

    @contextmanager
    def using(self, view: str) -> Iterator[None]:
        """Runs the module with the weights of `view`; on exit it holds what it held before."""
        if view not in self._installed:
            raise KeyError(f"no view {view!r}; there are {', '.join(self.views)}")
        previous = self.active
        if view == previous:
            yield
            return
        try:
            self._install(view)
            yield
        finally:
            self._install(previous)

    def add(self, name: str, copy_of: str = "current") -> None:
        """Adds a view that starts as a copy of another one.

        Raises:
            ValueError: the name is taken.
            ConfigError: the copy does not fit into free memory.
        """
        if name in self._tensors:
            raise ValueError(f"there is a view {name!r} already; views are {', '.join(self.views)}")
        self.tensors(copy_of)
        self._check_memory(name)
        self._register(name, self._copy(copy_of))

    @torch.no_grad()
    def blend(self, name: str, decay: float, source: str = "current") -> None:
        """``name <- decay * name + (1 - decay) * source``, tensor by tensor in the master dtype.

        With LoRA it is A and B that are averaged, not their product, as in the published methods. A decay of 0 is a
        copy, exact.

        Raises:
            ValueError: `name` is ``reference``, or the decay is outside [0, 1].
        """
        if name == "reference":
            raise ValueError("the reference is fixed; blend into a view made by add_view")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        target, origin = list(self.tensors(name).values()), list(self.tensors(source).values())
        if decay == 0.0:
            torch._foreach_copy_(target, origin)
            return
        torch._foreach_mul_(target, decay)
        torch._foreach_add_(target, origin, alpha=1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Every view but ``reference`` as ``view/parameter``, detached but not copied."""
        return {
            f"{view}/{name}": tensor.detach()
            for view, tensors in self._tensors.items()
            if view != "reference"
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the views in place; views that do not exist yet are added.

        Raises:
            CheckpointError: a view of this policy is absent, or a parameter is missing, unknown or of another shape.
        """
        views = dict.fromkeys(key.partition("/")[0] for key in state)
        expected = {
            f"{view}/{name}": parameter.shape
            for view in dict.fromkeys([*self.views, *views])
            if view != "reference"
            for name, parameter in self.current.items()
        }
        for key, shape in expected.items():
            if key not in state:
                raise CheckpointError(
                    f"the checkpoint has no weights for {key!r}; resume with the settings it was made by"
                )
            if state[key].shape != shape:
                raise CheckpointError(
                    f"the checkpoint's {key!r} has shape {list(state[key].shape)}, expected {list(shape)}; "
                    "resume with the model, rank and targets it was made by"
                )
        unknown = sorted(set(state) - set(expected))
        if unknown:
            raise CheckpointError(
                f"the checkpoint has weights this policy does not train, first {unknown[0]!r}; "
                "resume with the model, rank and targets it was made by"
            )
        for view in views:
            if view not in self._tensors:
                self.add(view)
            for name, tensor in self._tensors[view].items():
                tensor.copy_(state[f"{view}/{name}"])

    def _copy(self, view: str) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors[view].items()}

    def _register(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._tensors[name] = tensors
        self._installed[name] = list(tensors.values())

    def _install(self, view: str) -> None:
        for (parameters, name), tensor in zip(self._slots, self._installed[view], strict=True):
            # A plain tensor in a parameter slot works in every forward pass and stays invisible to optimizers.
            parameters[name] = cast("nn.Parameter | None", tensor)
        self.active = view

    def _check_memory(self, name: str) -> None:
        needed = sum(parameter.numel() * parameter.element_size() for parameter in self.current.values())
        first = next(iter(self.current.values()))
        if isinstance(first, FakeTensor):  # an architecture without weights takes no memory
            return
        device = first.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > free:
            raise ConfigError(
                f"the view {name!r} needs {needed / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free; "
                "LoRA instead of full fine-tuning makes views small"
            )
