"""Averaged copies of the trained weights."""

import pytest
import torch

from align.weights import WeightAverage


def parameter(values) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values))


def test_the_default_decay_warms_up_to_its_limit():
    weight = parameter([0.0])
    average = WeightAverage([weight], decay=0.5)
    expected = torch.zeros(1, dtype=torch.float64)
    for n in range(12):
        with torch.no_grad():
            weight.fill_(float(n * n))
        average.update()
        decay = min((1 + n) / (10 + n), 0.5) if n else 0.0
        assert average.cur_decay_value == pytest.approx(decay)
        expected = decay * expected + (1 - decay) * n * n
        # float32 rounding of each of at most 12 steps
        torch.testing.assert_close(average.shadow_params[0].double(), expected, rtol=1e-5, atol=1e-5)
    # the limit is reached where (1 + n) / (10 + n) = 1/2, so the schedule's two branches were both seen
    assert average.get_decay(9) == 0.5 > average.get_decay(8)  # counted from 1: n = 8 and 7


def test_an_own_schedule_counts_steps_from_zero():
    weight = parameter([1.0])
    asked = []
    average = WeightAverage([weight], decay_of=lambda n: asked.append(n) or 0.25 * n)
    for _ in range(3):
        average.update()
    assert asked == [0, 1, 2]


def test_decay_zero_is_an_exact_copy():
    # s + (p - s) rounds: with values of very different size it is not p
    weight = parameter([1e-8, 1.0, 3.3333333e-5])
    average = WeightAverage([weight], decay_of=lambda n: 0.0)
    with torch.no_grad():
        average.shadow_params[0].copy_(torch.tensor([1e8, -7.7, 1e4]))
    assert average.lags()
    average.update()
    assert torch.equal(average.shadow_params[0], weight)
    assert not average.lags()
    with torch.no_grad():
        weight.add_(1)
    assert average.shadow_params[0][1] == 1.0, "the copy must not share memory with the weights"
    assert average.lags()


def test_applied_swaps_and_restores_bit_for_bit():
    layer = torch.nn.Linear(3, 2, bias=False)
    average = WeightAverage(list(layer.parameters()), decay=0.9)
    live, shadow = layer.weight.detach().clone(), average.shadow_params[0].clone().mul_(2)
    average.shadow_params[0].copy_(shadow)
    x = torch.ones(1, 3)
    with average.applied():
        assert torch.equal(layer(x), x @ shadow.T)
        assert torch.equal(average.shadow_params[0], live)
    assert torch.equal(layer.weight, live)
    assert torch.equal(average.shadow_params[0], shadow)


def test_applied_restores_after_an_error():
    weight = parameter([1.0])
    average = WeightAverage([weight], decay=0.9)
    average.shadow_params[0].fill_(5.0)
    seen = []

    def fail():
        with average.applied():
            seen.append(weight.item())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert seen == [5.0]
    assert (weight.item(), average.shadow_params[0].item()) == (1.0, 5.0)


def test_the_optimiser_keeps_training_the_live_weights_after_a_swap():
    weight = parameter([1.0])
    optimiser = torch.optim.SGD([weight], lr=0.1)
    average = WeightAverage([weight], decay=0.9)
    with average.applied():
        pass
    weight.sum().backward()
    optimiser.step()
    assert weight.item() == pytest.approx(0.9)
    assert average.shadow_params[0].item() == 1.0
