"""What a model costs, found out from its architecture alone: tensors have shapes, and neither values nor memory.

Inside ``abstract()`` a policy is built and run as ever, by the same code, and a meter follows its operations. So FLOPs
are those that a run would be charged, and memory is what its tensors would hold. Not seen: what an allocator loses,
what libraries take for themselves, and operations that another device would fuse or store in another way.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from alignbench.policies.diffusers_policy import DiffusersPolicy


def abstract() -> FakeTensorMode:
    """A context in which tensors have shapes and no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the operations inside.

    Attributes:
        flops: of all of them, by torch's formulas; a multiply-add is two.
        held: bytes of the tensors that were made inside and are still there.
        peak: the largest ``held`` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.held = self.peak = 0
        self._known: dict[int, int] = {}  # bytes by storage; 0 for those that came from outside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for each in tree_iter((args, kwargs)):
            self._meet(each, made_here=False)
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for each in tree_iter(result):
            self._meet(each, made_here=True)
        return result

    def _meet(self, value: object, *, made_here: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes() if made_here else 0
            self.held += self._known[storage._cdata]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, storage: int) -> None:
        self.held -= self._known.pop(storage, 0)


@dataclass(frozen=True)
class Costs:
    """What a model and one sample cost.

    Attributes:
        flops: of one pass: ``denoiser``, ``denoiser_backward``, ``decode``.
        weights: bytes of the models that stay on the device, by component.
        trained: bytes of the trained weights, once.
        sample: bytes that a sample adds to the peak of a prediction with gradient and its backward pass.
        call: bytes of that peak that do not depend on the samples, such as the copies that autocast makes of weights.
        decode: bytes that decoding one image holds at its peak.
        decode_gradient: the same with its backward pass.
    """

    flops: Mapping[str, int]
    weights: Mapping[str, int]
    trained: int
    sample: int
    call: int
    decode: int
    decode_gradient: int


def costs(policy: DiffusersPolicy) -> Costs:
    """Measure a policy that was built inside ``abstract()``, in there."""
    parameters = policy.trainable_parameters().values()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # as in a run, where it is there before
    forward, backward, one = _prediction(policy, 1)
    _, _, two = _prediction(policy, 2)
    latents = policy.noise([0])
    with torch.no_grad(), Meter() as decode:
        policy.decode(latents)
    with torch.enable_grad(), Meter() as decode_gradient:
        torch.autograd.backward(policy.decode(latents.detach().requires_grad_()).sum())
    return Costs(
        flops={"denoiser": forward, "denoiser_backward": backward, "decode": decode.flops},
        weights=policy.weight_bytes(),
        trained=sum(each.numel() * each.element_size() for each in parameters),
        sample=two - one,
        call=max(0, 2 * one - two),
        decode=decode.peak,
        decode_gradient=decode_gradient.peak,
    )


def _prediction(policy: DiffusersPolicy, samples: int) -> tuple[int, int, int]:
    """FLOPs of a prediction, those of its backward pass, and the bytes that both hold at their peak."""
    latents, condition = policy.noise(range(samples)), policy.encode([""] * samples)
    with torch.enable_grad(), Meter() as meter:
        output = policy.predict(latents, latents.new_full((samples,), 0.5), condition)
        forward = meter.flops
        torch.autograd.backward(output.sum())
    return forward, meter.flops - forward, meter.peak
