import copy

import pytest
import torch

from distill_app.training import optimizer
from distill_app.training.optimizer import HIGHEST, SplitAdamW, joined, rest_of

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def weights_and_gradients(steps=60, size=300):
    make = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=make).bfloat16()
    return start, [
        (torch.randn(size, generator=make) * 10 ** (2 * torch.rand(1, generator=make) - 2)).bfloat16()
        for _ in range(steps)
    ]


def whole(parameter, adam):
    """Return the float32 value of a split parameter."""
    return joined(parameter.detach(), adam.state[parameter]["rest"])


def split_run(start, gradients, **options):
    parameter = torch.nn.Parameter(start.clone())
    adam = SplitAdamW([parameter], **{**OPTIONS, **options})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        adam.step()
    return parameter, adam


def test_it_moves_weights_as_torch_does_in_float32():
    start, gradients = weights_and_gradients()
    parameter, adam = split_run(start, gradients)
    plain = torch.nn.Parameter(start.float())
    reference = torch.optim.AdamW([plain], **OPTIONS)
    for gradient in gradients:
        plain.grad = gradient.float()
        reference.step()
    moved = (plain - start.float()).abs()
    found = whole(parameter, adam)
    # The first moment's rounding to bfloat16 (2**-9) is all that differs
    assert ((found - plain).abs() <= 0.01 * moved.mean() + 0.01 * moved).all()
    assert torch.equal(parameter, found.bfloat16())


def test_it_equals_a_float64_adamw_whose_first_moment_is_rounded():
    start, gradients = weights_and_gradients()
    parameter, adam = split_run(start, gradients)
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    value, square = start.double(), torch.zeros(len(start), dtype=torch.float64)
    average = torch.zeros_like(square)
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        average = beta1 * average + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * g * g
        value = value * (1 - lr * OPTIONS["weight_decay"])
        value -= lr * (average / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + OPTIONS["eps"])
        average = average.float().bfloat16().double()
    assert torch.allclose(whole(parameter, adam).double(), value, rtol=1e-5, atol=2e-6)
    # On a tie float32 may round the moment to the other neighbour: one in a few hundred
    same = adam.state[parameter]["exp_avg"].double() == average
    assert same.float().mean() > 0.95


def test_updates_too_small_for_bfloat16_add_up_and_are_lost_without_the_rests():
    start = torch.ones(64, dtype=torch.bfloat16)
    gradients = [torch.ones(64, dtype=torch.bfloat16)] * 100
    parameter, adam = split_run(start, gradients, lr=1e-4, weight_decay=0.0)
    assert torch.allclose(whole(parameter, adam), torch.full((64,), 0.99), atol=1e-4)
    assert torch.allclose(parameter.float(), torch.full((64,), 0.99), atol=0.004)
    plain = torch.nn.Parameter(start.clone())
    without = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for gradient in gradients:
        plain.grad = gradient.clone()
        without.step()
    assert torch.equal(plain, start)


def test_weights_are_moved_in_pieces_as_in_one(monkeypatch):
    start, gradients = weights_and_gradients(10)
    one, adam = split_run(start, gradients)
    monkeypatch.setattr(optimizer, "PIECE", 7)
    other, adam_of_pieces = split_run(start.view(20, 15), [g.view(20, 15) for g in gradients])
    assert torch.equal(whole(one, adam).view(20, 15), whole(other, adam_of_pieces))


def test_parameters_without_a_gradient_stay():
    start, gradients = weights_and_gradients(1)
    still = torch.nn.Parameter(start.clone())
    moving = torch.nn.Parameter(start.clone())
    adam = SplitAdamW([still, moving], **OPTIONS)
    moving.grad = gradients[0]
    adam.step()
    assert torch.equal(still, start) and not torch.equal(moving, start)


def halves(bits):
    value = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    rounded = value.bfloat16()
    rest = rest_of(value, rounded)
    assert torch.equal(rest.to(torch.int16).to(torch.int32), rest)
    return value, rounded, joined(rounded, rest.to(torch.int16))


def test_halves_join_to_the_same_bits_for_every_kind_of_number():
    make = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31, (100_000,), generator=make)
    kinds = {
        "any": some.tolist(),
        "zeros": [0, -(2**31)],
        "subnormal": [1, 2, 0x7FFF, 0x8001, 0x007FFFFF, -(2**31) + 1, -(2**31) + 0x8001],
        "huge": [0x7F7FFFFF, 0x7F7F8001, 0x7F7F7FFF, 0xFF7FFFFF - 2**32],  # round to infinity, or nearly
        "negative": [0xBF800001 - 2**32, 0xBFFFFFFF - 2**32],
        "next exponent": [0x3FFFFFFF, 0x3FFF8001],
    }
    for kind, bits in kinds.items():
        number = [b for b in bits if (b & 0x7F800000) != 0x7F800000 and (b & 0xFFFF) != 0x8000]
        value, _, back = halves(number)
        assert torch.equal(value.view(torch.int32), back.view(torch.int32)), kind


def test_of_a_tie_rounded_down_one_last_bit_is_lost():
    value, rounded, back = halves([0x3F808000, 0x3F818000, 0xBF808000 - 2**32])
    assert rounded.view(torch.int16).tolist() == [0x3F80, 0x3F82, 0xBF80 - 2**16]
    bits = (value.view(torch.int32) - back.view(torch.int32)).tolist()
    assert bits == [1, 0, 1]
    assert rest_of(value, rounded).max() == HIGHEST


def test_a_saved_and_loaded_state_goes_on_to_the_bit(tmp_path):
    start, gradients = weights_and_gradients(30)
    unbroken, adam = split_run(start, gradients)
    parameter, first = split_run(start, gradients[:11])
    torch.save({"weights": parameter.detach(), "adam": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = torch.nn.Parameter(saved["weights"])
    second = SplitAdamW([resumed], **OPTIONS)
    second.load_state_dict(saved["adam"])
    for gradient in gradients[11:]:
        resumed.grad = gradient.clone()
        second.step()
    assert torch.equal(unbroken, resumed)
    for key, value in adam.state[unbroken].items():
        assert value.dtype == second.state[resumed][key].dtype
        assert torch.equal(value, second.state[resumed][key])


@pytest.mark.parametrize("kind", ["weight_decay", "lr"])
def test_groups_have_their_own_options(kind):
    start, gradients = weights_and_gradients(3)
    one, two = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    adam = SplitAdamW([{"params": [one]}, {"params": [two], kind: 0.5}], **OPTIONS)
    for gradient in gradients:
        one.grad, two.grad = gradient.clone(), gradient.clone()
        adam.step()
    alone, _ = split_run(start, gradients, **{kind: 0.5})
    assert torch.equal(two, alone) and not torch.equal(one, alone)


def test_it_takes_the_bytes_a_parameter_that_it_says():
    start, gradients = weights_and_gradients(1)
    parameter, adam = split_run(start, gradients)
    state = copy.copy(adam.state[parameter])
    state.pop("step")
    assert sum(tensor.element_size() for tensor in state.values()) == 8  # beside weight and gradient


def many_parameters():
    """Parameters of several shapes, some of which take more steps than others, and gradients of eight steps."""
    make = torch.Generator().manual_seed(0)
    shapes = [(20, 15), (7,), (3, 4), (1,), (64,), (9, 9)]
    start = [torch.randn(shape, generator=make).bfloat16() for shape in shapes]
    return start, [[torch.randn(s, generator=make).bfloat16() for s in shapes] for _ in range(8)]


def moved(start, gradients):
    parameters = [torch.nn.Parameter(one.clone()) for one in start]
    adam = SplitAdamW(
        [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}], **OPTIONS
    )
    for step, given in enumerate(gradients):
        for number, (parameter, gradient) in enumerate(zip(parameters, given, strict=True)):
            parameter.grad = None if number == 3 and step % 2 else gradient.clone()
        adam.step()
    return [(p.detach(), *adam.state[p].values()) for p in parameters]


@pytest.mark.parametrize("group", [2**25, 100, 5])
def test_many_parameters_moved_together_are_moved_as_each_alone(monkeypatch, group):
    start, gradients = many_parameters()
    alone = moved(start, gradients)
    pieces = SplitAdamW._pieces
    monkeypatch.setattr(SplitAdamW, "_pieces", lambda self, those, on_cpu: pieces(self, those, False))
    monkeypatch.setattr(optimizer, "GROUP", group)
    together = moved(start, gradients)
    for (weights, step, rest, *moments), (others, same, others_rest, *others_moments) in zip(
        alone, together, strict=True
    ):
        assert step == same and step >= 4
        # A CPU's vector registers round the end of a tensor otherwise: the last bit of a moment
        assert torch.allclose(joined(weights, rest), joined(others, others_rest), rtol=1e-6, atol=0)
        for one, other in zip(moments, others_moments, strict=True):
            assert torch.allclose(one.float(), other.float(), rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(one[0], first) for one, first in zip(alone, start, strict=True))


def test_a_step_of_a_large_model_is_few_kernels():
    """Qwen2.5-1.5B's shape on a device without numbers: what is launched is counted, nothing computed."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoModelForCausalLM, Qwen2Config

    from benchmarks.shapes import SHAPES

    class Counting(TorchDispatchMode):
        launched = 0

        def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
            if operator is torch.ops.aten._fused_adamw_.default:  # has none for such a device
                Counting.launched += 1
                return None
            found = operator(*args, **(kwargs or {}))
            views = "view" in operator.name() or "split" in operator.name() or "detach" in operator.name()
            Counting.launched += not views
            return found

    config = Qwen2Config(**SHAPES["qwen2.5-1.5b"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adam = SplitAdamW(model.parameters(), **OPTIONS)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with Counting():
        adam.step()
    assert sum(p.numel() for p in model.parameters()) > 1.5e9
    assert 0 < Counting.launched < 2000
