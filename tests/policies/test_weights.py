"""Views and LoRA layers against float64 arithmetic written here."""

import pytest
import torch
from torch import Tensor, nn

from alignbench.errors import CheckpointError, ConfigError
from alignbench.policies.weights import LoraLinear, Weights, add_lora


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(5, 3), "to_k": nn.Linear(5, 3, bias=False)})
        self.attn2 = nn.ModuleDict({"to_q": nn.Linear(5, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.attn["to_q"](x) + self.attn["to_k"](x) + self.attn2["to_q"](x)


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def lora_block(rank: int = 2, alpha: float = 6.0) -> Block:
    module = block()
    add_lora(module, ["attn.to_q", "attn.to_k"], rank, alpha)
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    return module


def test_lora_layer_is_the_formula() -> None:
    base = nn.Linear(5, 3)
    layer = LoraLinear(base, rank=2, alpha=6.0, generator=torch.Generator().manual_seed(0))
    layer.lora_B.data.normal_()
    x = torch.randn(4, 7, 5)
    weight = base.weight.double() + 6.0 / 2 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T + base.bias.double(), rtol=0, atol=1e-5)


def test_lora_starts_as_the_base_with_gaussian_a() -> None:
    base = nn.Linear(400, 3)
    layer = LoraLinear(base, rank=32, alpha=64.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 400)
    assert torch.equal(layer(x), base(x))
    assert layer.lora_A.std().item() == pytest.approx(1 / 32, rel=0.02)  # 12,800 draws: standard error 0.6%


def test_lora_hits_whole_components_of_the_path_only() -> None:
    module = block()
    trainable = add_lora(module, ["attn.to_q", "to_k"], rank=2, alpha=4)
    assert list(trainable) == [
        "attn.to_q.lora_A", "attn.to_q.lora_B", "attn.to_k.lora_A", "attn.to_k.lora_B",
    ]  # fmt: skip
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == set(trainable)


def test_lora_seed_decides_the_initial_values() -> None:
    first, again, other = (add_lora(block(1), ["to_q"], 2, 4, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["attn.to_q.lora_A"], other["attn.to_q.lora_A"])


@pytest.mark.parametrize("targets", [["attn.to_q", "attn.to_w"], []])
def test_lora_target_without_a_layer_is_an_error(targets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"attn\.to_k, attn\.to_q"):
        add_lora(block(), targets, 2, 4)


def test_lora_rank_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="got 0"):
        add_lora(block(), ["to_q"], 0, 4)
    with pytest.raises(ConfigError, match="got 2 and 0"):
        add_lora(block(), ["to_q"], 2, 0)


@pytest.mark.parametrize("lora", [True, False])
def test_each_view_computes_with_its_own_weights(lora: bool) -> None:
    module = lora_block() if lora else block()
    weights = Weights(module, base_is_reference=lora)
    x = torch.randn(4, 5)
    before = module(x).detach()
    weights.add("old")
    for parameter in weights.current.values():
        parameter.data.add_(0.5)
    after = module(x).detach()
    assert not torch.allclose(before, after)
    with weights.using("old"):
        assert torch.equal(module(x), before)
    assert torch.equal(module(x), after)


def test_lora_reference_is_the_base() -> None:
    x = torch.randn(4, 5)
    expected = block()(x)
    module = lora_block()
    weights = Weights(module, base_is_reference=True)
    assert not torch.allclose(module(x), expected)
    with weights.using("reference"):
        assert torch.equal(module(x), expected)


def test_full_reference_is_the_start() -> None:
    module, x = block(), torch.randn(4, 5)
    expected = module(x).detach()
    weights = Weights(module, base_is_reference=False)
    weights.current["attn.to_q.weight"].data.zero_()
    with weights.using("reference"):
        assert torch.equal(module(x), expected)


def test_a_view_leaves_trainable_set_and_parameters_alone() -> None:
    module = lora_block()
    weights = Weights(module, base_is_reference=True)
    weights.add("old")
    before = {name: (parameter, parameter.requires_grad) for name, parameter in module.named_parameters()}
    values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for view in weights.views:
        with weights.using(view):
            with weights.using("reference"):
                module(torch.randn(2, 5))
            assert weights.active == view
        with pytest.raises(RuntimeError, match="shapes"), weights.using(view):
            module(torch.randn(2, 4))
    after = dict(module.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, requires_grad) in before.items():
        assert after[name] is parameter
        assert parameter.requires_grad == requires_grad
        assert torch.equal(parameter, values[name])


def test_only_current_has_a_gradient() -> None:
    module = lora_block()
    weights = Weights(module, base_is_reference=True)
    weights.add("old")
    for view in ("old", "reference"):
        with weights.using(view):
            assert not module(torch.randn(2, 5)).requires_grad
    module(torch.randn(2, 5)).sum().backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == set(weights.current)


def test_blend_against_float64() -> None:
    module = lora_block()
    weights = Weights(module, base_is_reference=True)
    weights.add("average")
    expected = {name: tensor.double() for name, tensor in weights.tensors("average").items()}
    for step, decay in enumerate([0.9, 0.25, 0.999, 0.5]):
        for parameter in weights.current.values():
            parameter.data.add_(torch.randn_like(parameter) * (step + 1))
        weights.blend("average", decay)
        expected = {
            name: decay * expected[name] + (1 - decay) * weights.current[name].detach().double() for name in expected
        }
    for name, tensor in weights.tensors("average").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert not tensor.requires_grad


def test_blend_ends_are_exact() -> None:
    weights = Weights(lora_block(), base_is_reference=True)
    weights.add("old")
    weights.add("kept")
    start = {name: tensor.clone() for name, tensor in weights.tensors("old").items()}
    for parameter in weights.current.values():
        parameter.data.normal_()
    weights.blend("old", 0.0)
    weights.blend("kept", 1.0)
    for name, parameter in weights.current.items():
        assert torch.equal(weights.tensors("old")[name], parameter)
        assert weights.tensors("old")[name] is not parameter
        assert torch.equal(weights.tensors("kept")[name], start[name])


def test_blend_from_another_view() -> None:
    weights = Weights(block(), base_is_reference=False)
    weights.add("sampling")
    for parameter in weights.current.values():
        parameter.data.fill_(4.0)
    weights.add("old")
    weights.blend("sampling", 0.0, source="reference")
    weights.blend("old", 0.75, source="sampling")
    for name, tensor in weights.tensors("old").items():
        torch.testing.assert_close(tensor, 3.0 + 0.25 * weights.tensors("reference")[name])


def test_misuse_of_views_is_an_error() -> None:
    weights = Weights(block(), base_is_reference=False)
    with pytest.raises(ValueError, match="reference is fixed"):
        weights.blend("reference", 0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        weights.blend("current", 1.5)
    with pytest.raises(ValueError, match="already"):
        weights.add("current")
    with pytest.raises(KeyError, match="current, reference"):
        weights.blend("old", 0.5)
    with pytest.raises(KeyError, match="current, reference"), weights.using("old"):
        pass


def test_a_view_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(block(), base_is_reference=False)

    class Memory:
        available = 4 * (18 + 15 + 18) - 1  # one byte less than the float32 parameters of the block

    monkeypatch.setattr("alignbench.policies.weights.psutil.virtual_memory", Memory)
    with pytest.raises(ConfigError, match="the view 'old' needs"):
        weights.add("old")
    assert weights.views == ("current", "reference")


def test_state_dict_round_trip_restores_views_in_place() -> None:
    weights = Weights(lora_block(), base_is_reference=True)
    weights.add("old")
    for parameter in weights.current.values():
        parameter.data.normal_()
    state = {name: tensor.clone() for name, tensor in weights.state_dict().items()}
    assert {name.partition("/")[0] for name in state} == {"current", "old"}

    fresh = Weights(lora_block(), base_is_reference=True)
    parameters = dict(fresh.current)
    fresh.load_state_dict(state)
    assert fresh.views == ("current", "reference", "old")
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    assert all(fresh.current[name] is parameter and parameter.requires_grad for name, parameter in parameters.items())


def test_state_dict_of_other_weights_is_refused() -> None:
    weights = Weights(lora_block(rank=2), base_is_reference=True)
    weights.add("old")
    state = weights.state_dict()
    with pytest.raises(CheckpointError, match=r"shape \[2, 5\], expected \[3, 5\]"):
        Weights(lora_block(rank=3), base_is_reference=True).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"no weights for 'old/attn.to_k.lora_B'"):
        weights.load_state_dict({name: tensor for name, tensor in state.items() if name != "old/attn.to_k.lora_B"})
    with pytest.raises(CheckpointError, match="no weights for 'old/"):
        weights.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith("current")})
    with pytest.raises(CheckpointError, match=r"does not train, first 'current/head\.weight'"):
        weights.load_state_dict({**state, "current/head.weight": torch.zeros(1)})
