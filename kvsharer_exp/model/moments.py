"""Second moments of a layer's attention, and the stand-ins that they determine.

The best constant and the best affine map from the attention's input x to its output y depend on
sums over tokens only. So text is read once, by `measure.moments`, and whoever needs a stand-in fits
it here in closed form and knows its error without reading the text again.

All sums are float64. The affine map is the ridge regression of NBL,
https://arxiv.org/abs/2505.21077.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvsharer_exp.values.errors import InputError

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(slots=True)
class Centred:
    """Means and covariances of ``Moments``, divided by the number of tokens.

    ``input_mean`` (H,), ``output_mean`` (O,), ``covariance`` of the inputs (H, H), and
    ``cross_covariance`` of inputs and outputs (H, O).
    """

    input_mean: torch.Tensor
    output_mean: torch.Tensor
    covariance: torch.Tensor
    cross_covariance: torch.Tensor


@dataclass(slots=True)
class Moments:
    """Sums over ``count`` tokens of inputs x with H features and outputs y with O features.

    ``inputs`` Σx (H,), ``outputs`` Σy (O,), ``squares`` Σx xᵀ (H, H), ``products`` Σx yᵀ (H, O) and
    ``output_squares`` Σy² (O,), all float64 on one device.
    """

    count: int
    inputs: torch.Tensor
    outputs: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor
    output_squares: torch.Tensor

    @classmethod
    def zeros(
        cls, num_inputs: int, num_outputs: int, device: torch.device | str | None = None
    ) -> Moments:
        """The moments of no tokens."""
        shapes = [
            (num_inputs,),
            (num_outputs,),
            (num_inputs, num_inputs),
            (num_inputs, num_outputs),
            (num_outputs,),
        ]
        return cls(0, *(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    @property
    def output_square(self) -> float:
        """Σ‖y‖²."""
        return self.output_squares.sum().item()

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the tokens of ``x`` (tokens, H) and ``y`` (tokens, O), in any dtype."""
        x = x.to(self.inputs)
        y = y.to(self.inputs)
        self.count += len(x)
        self.inputs += x.sum(0)
        self.outputs += y.sum(0)
        self.squares.addmm_(x.T, x)
        self.products.addmm_(x.T, y)
        self.output_squares += y.square().sum(0)

    def __add__(self, other: Moments) -> Moments:
        """The moments of the tokens of both."""
        return Moments(
            self.count + other.count,
            self.inputs + other.inputs,
            self.outputs + other.outputs,
            self.squares + other.squares,
            self.products + other.products,
            self.output_squares + other.output_squares,
        )

    def select(self, outputs: slice) -> Moments:
        """The moments of the same inputs and some of the outputs; both share memory."""
        return Moments(
            self.count,
            self.inputs,
            self.outputs[outputs],
            self.squares,
            self.products[:, outputs],
            self.output_squares[outputs],
        )

    def is_finite(self) -> bool:
        """Whether no value overflowed, neither a token's nor a sum's."""
        sums = (self.inputs, self.outputs, self.squares, self.products, self.output_squares)
        return all(bool(total.isfinite().all()) for total in sums)

    def centred(self) -> Centred:
        """Means and covariances.

        Raises:
            InputError: there are no tokens.
        """
        if not self.count:
            raise InputError("there are no tokens to fit a stand-in on: give more text")
        input_mean = self.inputs / self.count
        output_mean = self.outputs / self.count
        return Centred(
            input_mean,
            output_mean,
            self.squares / self.count - torch.outer(input_mean, input_mean),
            self.products / self.count - torch.outer(input_mean, output_mean),
        )

    @property
    def variance(self) -> float:
        """Mean over tokens of ‖y - mean of y‖², the error of the best constant."""
        mean = constant_fit(self)
        return max(0.0, (self.output_squares / self.count - mean.square()).sum().item())

    def error(self, weight: torch.Tensor | None, bias: torch.Tensor) -> float:
        """Mean over tokens of ‖y - (weight x + bias)‖².

        ``weight`` is (O, H), or None for a constant; ``bias`` is (O,).
        """
        centred = self.centred()
        offset = centred.output_mean - bias.to(self.inputs)
        total = self.variance
        if weight is not None:
            weight = weight.to(self.inputs)
            offset = offset - weight @ centred.input_mean
            explained = weight @ centred.covariance - 2 * centred.cross_covariance.T
            total += (explained * weight).sum().item()
        return max(0.0, total + offset.square().sum().item())


def constant_fit(moments: Moments) -> torch.Tensor:
    """The constant (O,) of least squared error: the mean output.

    Raises:
        InputError: there are no tokens.
    """
    if not moments.count:
        raise InputError("there are no tokens to fit a stand-in on: give more text")
    return moments.outputs / moments.count


def affine_fit(
    fitted: Moments, held: Moments, ridges: Sequence[float] = RIDGES
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Fit the affine map whose ridge does best on held-out tokens.

    Every one of ``ridges`` is solved on ``fitted``, and the one of the least error on ``held`` is
    solved again on both. A ridge is a multiple of the mean variance of an input feature; 0 gives
    the least-squares map of least norm.

    Returns the weight (O, H), the bias (O,), both float64, and the ridge.

    Raises:
        InputError: one of the parts has no tokens, or there are no ridges or negative ones.
    """
    if not ridges or min(ridges) < 0:
        raise InputError(f"ridges {tuple(ridges)} cannot be fitted: give one or more, 0 or above")
    solver = _RidgeSolver(fitted)
    errors = [held.error(*solver.solve(ridge)) for ridge in ridges]
    ridge = ridges[errors.index(min(errors))]
    weight, bias = _RidgeSolver(fitted + held).solve(ridge)
    return weight, bias, ridge


class _RidgeSolver:
    """Solves ridge regressions on the same moments; one eigendecomposition serves all ridges.

    Where the covariance is singular (a feature that never varies, fewer tokens than features), the
    directions that never vary get weight 0.
    """

    def __init__(self, moments: Moments) -> None:
        centred = moments.centred()
        self.input_mean, self.output_mean = centred.input_mean, centred.output_mean
        values, self.vectors = torch.linalg.eigh(centred.covariance)
        self.values = values.clamp(min=0)
        # Where the moments cancel, eigenvalues are noise of the uncentred squares.
        largest = moments.squares.diagonal().max() / moments.count
        self.noise = largest * len(values) * torch.finfo(values.dtype).eps
        self.projected = self.vectors.T @ centred.cross_covariance

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight (O, H) and the bias (O,)."""
        damped = self.values + ridge * self.values.mean()
        inverse = torch.where(damped > self.noise, 1 / damped, 0.0)
        weight = (self.vectors @ (inverse[:, None] * self.projected)).T
        return weight, self.output_mean - weight @ self.input_mean
