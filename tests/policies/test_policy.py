"""Conditions, the embedding cache and the noise, on a policy without a model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from alignbench.policies.policy import Condition, Policy


class WordPolicy(Policy):
    """Embeds a text as its length; everything else is left out."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.device, self.dtype, self.latent_shape = torch.device("cpu"), dtype, (4, 8, 8)
        self.encoded: list[str] = []

    def encode_text(self, text: str) -> dict[str, Tensor]:
        self.encoded.append(text)
        return {"length": torch.full((1, 3), float(len(text)))}

    def predict(self, latents: Tensor, *arguments: object, **options: object) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def grid(self, steps: int, name: str = "pipeline") -> Tensor:
        raise NotImplementedError

    def flops(self) -> Mapping[str, float]:
        raise NotImplementedError

    def export(self, folder: Path | str, view: str = "evaluation") -> None:
        raise NotImplementedError


def condition() -> Condition:
    return Condition({"prompt": torch.arange(12.0).view(3, 2, 2), "pooled": torch.tensor([[0.0], [1.0], [2.0]])})


def test_condition_index_and_length() -> None:
    assert len(condition()) == 3
    assert condition()[1:].tensors["pooled"].flatten().tolist() == [1, 2]
    picked = condition()[torch.tensor([2, 0, 2, 1])]
    assert len(picked) == 4
    assert picked.tensors["pooled"].flatten().tolist() == [2, 0, 2, 1]
    assert torch.equal(picked.tensors["prompt"][0], torch.tensor([[8.0, 9.0], [10.0, 11.0]]))


def test_condition_repeats_each_sample_in_a_row() -> None:
    assert condition().repeat_interleave(2).tensors["pooled"].flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_condition_cat_and_expand() -> None:
    joined = Condition.cat([condition()[2:].expand(2), condition()])
    assert joined.tensors["pooled"].flatten().tolist() == [2, 2, 0, 1, 2]
    assert joined.tensors["prompt"].shape == (5, 2, 2)


def test_each_distinct_text_is_encoded_once() -> None:
    policy = WordPolicy()
    rows = policy.encode(["abc", "a", "abc", "", "a"]).tensors["length"]
    assert rows[:, 0].tolist() == [3, 1, 3, 0, 1]
    assert rows.shape == (5, 3)
    assert policy.encode(["", "four", "abc"]).tensors["length"][:, 0].tolist() == [0, 4, 3]
    assert policy.encoded == ["abc", "a", "", "four"]


def test_noise_depends_on_its_seed_alone() -> None:
    policy = WordPolicy()
    batch = policy.noise([5, 2**40 + 1, 5])
    assert batch.shape == (3, 4, 8, 8)
    assert torch.equal(batch[1:2], policy.noise([2**40 + 1]))
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)))


def test_noise_is_the_same_in_every_dtype() -> None:
    reference = WordPolicy().noise([1, 2])
    assert reference.dtype == torch.float32
    double = WordPolicy(torch.float64).noise([1, 2])
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), reference)
    assert torch.equal(WordPolicy(torch.bfloat16).noise([1, 2]), reference)
