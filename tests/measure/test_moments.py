"""Moments are the sums over recorded tensors, and what is fitted from them fits those tensors."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from kvsharer_exp.measure.moments import LayerMoments, collect_moments, plan_passes
from kvsharer_exp.model.branch import Branch, find_branches
from kvsharer_exp.model.moments import RIDGES, Moments, affine_fit, constant_fit
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.finite import NotFiniteError
from tests.tiny import NUM_LAYERS, contract_architectures, hooks, tiny_model, tokens

WINDOWS = tokens(batch=8, length=7)
EVERY = range(NUM_LAYERS)


def collect(model: Any, windows: torch.Tensor = WINDOWS, **options: Any) -> LayerMoments:
    layers = attention_layers(model)
    options = {"which": EVERY, "batch_size": 4, **options}
    return collect_moments(model, layers, find_branches(model, layers), windows, **options)


def recorded(model: Any, windows: torch.Tensor, layer: int, place: str) -> tuple[torch.Tensor, ...]:
    """x and y (windows, tokens, features), read beside the block's own code."""
    chosen = attention_layers(model)[layer]
    seen: dict[str, torch.Tensor] = {}

    def attended(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["attention"] = output[0]

    norm = find_branches(model, [chosen])[0].norm
    handles = [chosen.attention.register_forward_hook(attended, with_kwargs=True)]
    if norm is not None:
        handles.append(
            getattr(chosen.block, norm).register_forward_hook(
                lambda module, args, output: seen.__setitem__("branch", output)
            )
        )
    with torch.inference_mode():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["x"].double(), seen[place].double()


def check_sums(moments: Moments, x: torch.Tensor, y: torch.Tensor) -> None:
    """``x`` (tokens, H) and ``y`` (tokens, O), summed by numpy."""
    one, other = x.numpy(), y.numpy()
    assert moments.count == len(one)
    for sums, expected in (
        (moments.inputs, one.sum(0)),
        (moments.outputs, other.sum(0)),
        (moments.squares, one.T @ one),
        (moments.products, one.T @ other),
    ):
        assert sums.dtype == torch.float64
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert moments.output_square == pytest.approx((other**2).sum(), rel=1e-5)


@pytest.mark.parametrize("architecture", contract_architectures())
def test_moments_are_the_sums_over_what_the_layers_compute(architecture: str) -> None:
    model = tiny_model(architecture)
    before = hooks(model)
    found = collect(model)
    assert hooks(model) == before
    branches = find_branches(model, attention_layers(model))
    assert set(found) == {(b.layer, place) for b in branches for place in b.places}
    for layer, place in found:
        if layer not in (0, NUM_LAYERS - 1):
            continue
        x, y = recorded(model, WINDOWS, layer, place)
        fitted, held = found[layer, place]
        check_sums(fitted, x[:6].flatten(0, 1), y[:6].flatten(0, 1))
        check_sums(held, x[6:].flatten(0, 1), y[6:].flatten(0, 1))


@pytest.mark.parametrize(
    ("num_windows", "fraction", "held"), [(8, 0.25, 2), (8, 0.01, 1), (3, 0.99, 2), (2, 0.25, 1)]
)
def test_the_last_windows_are_held_out(num_windows: int, fraction: float, held: int) -> None:
    model = tiny_model("llama")
    windows = WINDOWS[:num_windows]
    fitted, kept = collect(model, windows, which=[2], held_fraction=fraction)[2, "attention"]
    assert (fitted.count, kept.count) == ((num_windows - held) * 7, held * 7)
    x, _ = recorded(model, windows[num_windows - held :], 2, "attention")
    np.testing.assert_allclose(kept.inputs.numpy(), x.sum((0, 1)).numpy(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_less_memory_takes_more_passes_to_the_same_numbers(architecture: str) -> None:
    model = tiny_model(architecture)
    forwards = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: forwards.append(1))
    layers = attention_layers(model)
    branches = find_branches(model, layers)
    runs = []
    for memory in (None, 5 * (1 + len(branches[0].places)) * 16 * 64 * 64, 0):
        forwards.clear()
        found = collect_moments(
            model, layers, branches, WINDOWS, which=EVERY, batch_size=4, memory_bytes=memory
        )
        runs.append((len(forwards), found))
    handle.remove()
    # 6 windows in 2 batches to fit on, and 2 in 1 to hold out; five layers fit, less some bytes.
    assert [count for count, _ in runs] == [3, 2 * 3, NUM_LAYERS * 3]
    for _, found in runs[1:]:
        assert list(found) == list(runs[0][1])
        for place, parts in found.items():
            for part, expected in zip(parts, runs[0][1][place], strict=True):
                assert part.count == expected.count
                assert torch.equal(part.squares, expected.squares)
                assert torch.equal(part.products, expected.products)


def test_passes_hold_the_layers_that_fit() -> None:
    branches = [Branch(0, None), Branch(1, "norm"), Branch(2, None), Branch(3, None)]
    plain, normed = 16 * (10 * 20 + 30), 16 * (10 * 30 + 50)
    assert plan_passes(branches, [0, 2, 3], 10) == [(0, 2, 3)]
    assert plan_passes(branches, [0, 2, 3], 10, 2 * plain) == [(0, 2), (3,)]
    assert plan_passes(branches, [0, 2, 3], 10, 2 * plain - 1) == [(0,), (2,), (3,)]
    assert plan_passes(branches, [0, 1, 2], 10, plain + normed - 1) == [(0,), (1,), (2,)]
    assert plan_passes(branches, [0, 1, 2], 10, plain + normed) == [(0, 1), (2,)]
    assert plan_passes(branches, [1, 1], 10, 1) == [(1,)]
    assert plan_passes(branches, [], 10) == []


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_padding_does_not_enter(architecture: str) -> None:
    """Windows padded at their end give the moments of the windows themselves."""
    model = tiny_model(architecture)
    padded = torch.cat([WINDOWS, torch.full((8, 3), 99)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 7:] = 0
    plain, masked = collect(model), collect(model, padded, attention_mask=mask)
    unmasked = collect(model, padded)
    for place, parts in plain.items():
        for part, other, wrong in zip(parts, masked[place], unmasked[place], strict=True):
            assert part.count == other.count < wrong.count
            torch.testing.assert_close(part.squares, other.squares, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(part.products, other.products, rtol=1e-5, atol=1e-5)


def test_what_overflows_is_refused_and_leaves_no_hook() -> None:
    model = tiny_model("llama")
    layers = attention_layers(model)
    branches = find_branches(model, layers)
    poison = layers[3].attention.o_proj.register_forward_hook(
        lambda module, args, output: output * math.inf
    )
    before = hooks(model)
    with pytest.raises(NotFiniteError, match="layer 3"):
        collect_moments(model, layers, branches, WINDOWS, which=EVERY)
    assert hooks(model) == before
    collect_moments(model, layers, branches, WINDOWS, which=[0, 1, 2])  # which come before
    poison.remove()


def test_bad_input_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="give at least 2"):
        collect(model, WINDOWS[:1])
    with pytest.raises(InputError, match="between 0 and 1"):
        collect(model, held_fraction=1.0)
    with pytest.raises(InputError, match="layer 0 saw no token"):
        collect(model, attention_mask=torch.zeros_like(WINDOWS))


def moments_of(x: torch.Tensor, y: torch.Tensor, batches: int = 1) -> Moments:
    moments = Moments.zeros(x.shape[1], y.shape[1])
    for one, other in zip(x.chunk(batches), y.chunk(batches), strict=True):
        moments.update(one, other)
    return moments


def data(num_tokens: int = 200, seed: int = 0, noise: float = 0.3) -> tuple[torch.Tensor, ...]:
    """x (tokens, 12), correlated and off zero, and y (tokens, 5), affine in x, with noise."""
    fixed = torch.Generator().manual_seed(99)
    mix = torch.randn(12, 12, generator=fixed, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=fixed, dtype=torch.float64)
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 12, generator=drawn, dtype=torch.float64) @ mix + 3
    y = x @ weight.T + 7 + noise * torch.randn(num_tokens, 5, generator=drawn, dtype=torch.float64)
    return x, y


def direct_error(x: torch.Tensor, y: torch.Tensor, weight: Any, bias: torch.Tensor) -> float:
    made = bias if weight is None else x @ weight.T + bias
    return (y - made).square().sum(-1).mean().item()


def test_batches_and_parts_add_up() -> None:
    x, y = data()
    check_sums(moments_of(x, y, batches=3), x, y)
    check_sums(moments_of(x[:50], y[:50]) + moments_of(x[50:], y[50:]), x, y)
    check_sums(moments_of(x, y).select(slice(2, 4)), x, y[:, 2:4])


def test_sums_of_bfloat16_are_exact() -> None:
    """In bfloat16 a sum of 1000 ones would stop at 256."""
    ones = torch.ones(1000, 3, dtype=torch.bfloat16)
    moments = moments_of(ones, ones)
    assert moments.products.tolist() == [[1000.0] * 3] * 3


def test_the_error_is_the_mean_squared_error_of_the_tokens() -> None:
    x, y = data()
    moments = moments_of(x, y)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    for matrix in (weight, None):
        expected = direct_error(x, y, matrix, bias)
        assert moments.error(matrix, bias) == pytest.approx(expected, rel=1e-9)
    assert moments.error(weight.float(), bias.float()) == pytest.approx(
        direct_error(x, y, weight, bias), rel=1e-5
    )


def test_the_constant_is_the_mean_and_leaves_the_variance() -> None:
    x, y = data()
    moments = moments_of(x, y)
    bias = constant_fit(moments)
    np.testing.assert_allclose(bias.numpy(), y.numpy().mean(0))
    assert moments.variance == pytest.approx(y.numpy().var(0).sum(), rel=1e-9)
    assert moments.error(None, bias) == pytest.approx(moments.variance, rel=1e-9)


def test_an_affine_relation_is_recovered() -> None:
    x, y = data(noise=0.0)
    weight, bias, ridge = affine_fit(moments_of(x[:150], y[:150]), moments_of(x[150:], y[150:]))
    assert ridge == min(RIDGES)
    assert direct_error(x, y, weight, bias) < 1e-6 * moments_of(x, y).variance
    weight, bias, _ = affine_fit(moments_of(x[:150], y[:150]), moments_of(x[150:], y[150:]), [0.0])
    torch.testing.assert_close(x @ weight.T + bias, y, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
def test_without_ridge_it_is_the_least_squares_map_of_both_parts(ridge: float) -> None:
    x, y = data()
    weight, bias, _ = affine_fit(
        moments_of(x[:150], y[:150]), moments_of(x[150:], y[150:]), [ridge]
    )
    design = np.column_stack([x.numpy(), np.ones(len(x))])
    expected = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), expected[:-1].T, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), expected[-1], rtol=1e-6)


def ridge_by_hand(x: torch.Tensor, y: torch.Tensor, ridge: float) -> tuple[Any, Any]:
    """The normal equations of tokens that are centred, solved by numpy."""
    one, other = x.numpy(), y.numpy()
    a, b = one - one.mean(0), other - other.mean(0)
    covariance = a.T @ a / len(a)
    damped = covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weight = np.linalg.solve(damped, a.T @ b / len(a)).T
    return torch.tensor(weight), torch.tensor(other.mean(0) - weight @ one.mean(0))


@pytest.mark.parametrize(("noise", "num_tokens"), [(0.3, 200), (3.0, 20), (30.0, 16)])
def test_the_ridge_does_best_on_the_held_out_tokens(noise: float, num_tokens: int) -> None:
    x, y = data(num_tokens, noise=noise)
    other_x, other_y = data(100, seed=1, noise=noise)
    weight, bias, ridge = affine_fit(moments_of(x, y), moments_of(other_x, other_y))
    errors = {r: direct_error(other_x, other_y, *ridge_by_hand(x, y, r)) for r in RIDGES}
    assert ridge == min(RIDGES, key=errors.__getitem__)
    both = torch.cat([x, other_x]), torch.cat([y, other_y])
    expected = ridge_by_hand(*both, ridge)
    torch.testing.assert_close((weight, bias), expected, rtol=1e-6, atol=1e-8)


def test_noise_takes_more_ridge() -> None:
    chosen = []
    for noise, num_tokens in ((0.0, 200), (30.0, 16)):
        parts = [
            moments_of(*data(count, seed, noise)) for seed, count in enumerate((num_tokens, 100))
        ]
        chosen.append(affine_fit(*parts)[2])
    assert chosen[0] < chosen[1]


@pytest.mark.parametrize("ridges", [(0.0,), RIDGES])
@pytest.mark.parametrize("case", ["constant channels", "twins", "few tokens", "nothing varies"])
def test_singular_inputs_are_fitted(case: str, ridges: tuple[float, ...]) -> None:
    x, y = data(noise=0.0)
    if case == "constant channels":
        x[:, 3], x[:, 4] = 1000.0, 0.0
        y = x[:, :5] * 2 + 1
    elif case == "twins":
        x[:, 1] = x[:, 0]
        y = x[:, :5] * 2 + 1
    elif case == "few tokens":
        x, y = x[:8], y[:8]
    else:
        x[:] = 1000.0
        y[:] = 5.0
    half = len(x) // 2
    weight, bias, _ = affine_fit(
        moments_of(x[:half], y[:half]), moments_of(x[half:], y[half:]), ridges
    )
    assert weight.isfinite().all()
    assert weight.abs().max() < 100
    torch.testing.assert_close(x @ weight.T + bias, y, rtol=1e-2, atol=1e-2)


def test_what_cannot_be_fitted_is_refused() -> None:
    x, y = data()
    moments, none = moments_of(x, y), Moments.zeros(12, 5)
    for parts in ((none, moments), (moments, none)):
        with pytest.raises(InputError, match="no tokens"):
            affine_fit(*parts)
    with pytest.raises(InputError, match="no tokens"):
        constant_fit(none)
    for ridges in ((), (-1.0,)):
        with pytest.raises(InputError, match="give one or more"):
            affine_fit(moments, moments, ridges)
