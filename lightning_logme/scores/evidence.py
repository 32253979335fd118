"""The log of maximum evidence: Bayesian linear regression with both precisions at their best values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_logme.scores.maximum import Maximum, maximise
from lightning_logme.scores.moments import Moments, Rows
from lightning_logme.scores.spectrum import Spectrum
from lightning_logme.utilities.checks import EXCLUSIVE, Task

_COARSER = 10  # times the resolution: directions below it are next to rounding
_LOST = 1e-3  # nats: a score that changes by more without those directions deserves a warning


@dataclass(frozen=True, eq=False)
class Evidence:
    """The maximised evidence of K outputs, and the Bayesian linear head that goes with it.

    All tensors are float64. An output without evidence (a class that is absent, a target that is zero everywhere) has
    NaN in ``per_output``, ``null``, ``alpha``, ``beta`` and ``effective_dim``, a zero ``weight``, and no part in the
    means.

    Attributes:
        score: scalar, LogME: the mean of ``per_output`` in nats per sample. Comparable only for the same samples and
            labels.
        per_output: (K,) maximised log evidence of each output, divided by the number of samples.
        null: (K,) the same for features that explain nothing.
        gain: scalar, mean of ``per_output − null`` ≥ 0: nats per sample that the features explain. Zero means useless.
        alpha: (K,) precision of the weights' prior; infinite where the gain is zero.
        beta: (K,) precision of the noise; infinite where the features interpolate the target.
        effective_dim: (K,) γ, the number of directions of feature space that are put to use.
        weight: (K, D) posterior mean of the weights.
        num_samples: n.
        saturated: (K,) bool, True where the fit is perfect with fewer directions than samples: the evidence grows
            without bound as the noise goes to zero, and the value is what the float64 resolution of the Gram matrix
            admits. Look for leaked labels.
        bias: (K,) posterior mean of the intercept; None without one.
        spectrum: (R,) non-zero eigenvalues of the Gram matrix (centred where there is an intercept), descending.
    """

    score: Tensor
    per_output: Tensor
    null: Tensor
    gain: Tensor
    alpha: Tensor
    beta: Tensor
    effective_dim: Tensor
    weight: Tensor
    num_samples: int
    saturated: Tensor
    bias: Tensor | None
    spectrum: Tensor

    @classmethod
    def of(cls, rows: Rows, num_outputs: int, task: Task, fit_intercept: bool = False) -> Evidence:
        """Maximise the evidence of rows, by the cheaper of the two ways: :meth:`from_rows` only where n < D."""
        n, d = rows.features.shape
        if n < d:
            return cls.from_rows(rows, num_outputs, task, fit_intercept)
        moments = Moments.zeros(d, num_outputs, rows.features.device).accumulate(rows)
        return cls.from_moments(moments, task, fit_intercept)

    @classmethod
    def from_moments(cls, moments: Moments, task: Task, fit_intercept: bool = False) -> Evidence:
        """Maximise the evidence given additive moments.

        Never raises for lack of evidence: the result is NaN and one warning names the cause.

        Args:
            moments: the sums over all samples.
            task: tells whether the outputs are classes that exclude each other.
            fit_intercept: centre features and targets first; the evidence is then that of the n − 1 degrees of freedom
                that are left, per degree of freedom.
        """
        return maximise_moments(moments, task, fit_intercept)[0]

    @classmethod
    def from_rows(cls, rows: Rows, num_outputs: int, task: Task, fit_intercept: bool = False) -> Evidence:
        """Maximise the evidence given all samples: far cheaper than by their moments where n < D."""
        return maximise_rows(rows, num_outputs, task, fit_intercept)[0]

    def head(self, dtype: torch.dtype | None = None) -> torch.nn.Linear:
        """The posterior mean as a linear layer, a warm start for a classifier.

        Its outputs estimate the targets (0/1 per class), not logits: the largest is the predicted class.

        Args:
            dtype: of its parameters; torch's default dtype if None.

        Returns:
            A ``torch.nn.Linear`` of D inputs and K outputs, with a bias where the intercept was fitted, on the device
            of the evidence.

        Raises:
            ValueError: there is no evidence (the score is NaN), so there is no posterior.

        Example:
            >>> import torch
            >>> from lightning_logme.functional import evidence
            >>> features = torch.eye(4).repeat(5, 1)
            >>> head = evidence(features, torch.arange(4).repeat(5)).head()
            >>> head
            Linear(in_features=4, out_features=4, bias=False)
            >>> head(features[:4]).argmax(1)
            tensor([0, 1, 2, 3])
        """
        if not torch.isfinite(self.weight).all():
            raise ValueError(
                "the evidence is NaN, so there is no posterior to make a linear layer of; see the warning given with "
                "it."
            )
        outputs, inputs = self.weight.shape
        dtype = dtype or torch.get_default_dtype()
        linear = torch.nn.Linear(inputs, outputs, bias=self.bias is not None, device=self.weight.device, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def to(self, device: torch.device | str) -> Evidence:
        """Return the same evidence on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@torch.no_grad()
def maximise_moments(moments: Moments, task: Task, fit_intercept: bool) -> tuple[Evidence, Spectrum | None]:
    """Return the evidence given additive moments, and the spectrum; None where the evidence is NaN for lack of one."""
    n = int(moments.count)
    squares = moments.gram.diagonal(), moments.target_square
    cause = _cause_of_nan(n, *squares, task, fit_intercept)
    return _decompose_and_maximise(lambda: Spectrum.from_moments(moments, fit_intercept), n, *squares, cause)


@torch.no_grad()
def maximise_rows(rows: Rows, num_outputs: int, task: Task, fit_intercept: bool) -> tuple[Evidence, Spectrum | None]:
    """Return the same as :func:`maximise_moments`, given all samples."""
    rows = Rows(rows.features.double(), rows.target)
    squares = rows.features.square().sum(0), rows.dense_target(num_outputs).square().sum(0)
    cause = _cause_of_nan(len(rows), *squares, task, fit_intercept)
    return _decompose_and_maximise(
        lambda: Spectrum.from_rows(rows, num_outputs, fit_intercept), len(rows), *squares, cause
    )


def _decompose_and_maximise(
    decompose: Callable[[], Spectrum], n: int, features: Tensor, square: Tensor, cause: str | None
) -> tuple[Evidence, Spectrum | None]:
    """Return the evidence and the spectrum; NaN and None where there is a cause for it."""
    if cause is None:
        try:
            spectrum = decompose()
            return _maximise(spectrum, n), spectrum
        except torch.linalg.LinAlgError as error:
            cause = f"the eigenvalues of the Gram matrix could not be computed ({error})"
    return _undefined(cause, n, (len(square), len(features)), square.device), None


def _cause_of_nan(n: int, features: Tensor, square: Tensor, task: Task, fit_intercept: bool) -> str | None:
    """Return why there can be no evidence, or None, given the sums of squares of the features and of the targets.

    A NaN or Inf anywhere reaches these sums.
    """
    if n == 0:
        return "there are no samples (n = 0; is the loader empty, or every label ignore_index?)"
    if not bool(torch.isfinite(features).all()):
        return "the features contain NaN or Inf, or numbers too large to square"
    if not bool(torch.isfinite(square).all()):
        return "the targets contain NaN or Inf, or numbers too large to square"
    if int((square > 0).sum()) < 2 and task in EXCLUSIVE:
        return f"only one class is present in {n} samples, and at least two are needed"
    if fit_intercept and n < 2:
        return "an intercept needs at least two samples (n = 1)"
    return None


def _check_digits(spectrum: Spectrum, found: Maximum) -> None:
    """Warn where the score depends on directions that the Gram matrix can hardly tell from rounding.

    The evidence of a perfect fit has no maximum, and its output says so itself.
    """
    beside = bool((spectrum.eigenvalues <= _COARSER * spectrum.resolution).any())
    if spectrum.unseen == math.inf or (spectrum.unseen > _COARSER * spectrum.resolution and not beside):
        size = "by any amount"  # no direction next to rounding shows what those below it are worth
    elif beside:
        change = maximise(spectrum.coarser(_COARSER)).log_evidence - found.log_evidence
        perfect = found.saturated & (spectrum.residual == 0)
        lost = float((change / spectrum.dof)[~perfect].abs().nanmean())
        if not lost > _LOST:
            return
        size = f"by {lost:.0e} nats or more"
    else:
        return
    cause = "the features are of very different sizes, or nearly collinear; normalise"
    if spectrum.has_large_mean:
        constant = "the features are constant, or their mean is far above their spread"
        large = f"the mean of the features is about {spectrum.ratio:.0e} times their spread"
        cause = f"{constant if spectrum.ratio == math.inf else large}; centre or normalise"
    warnings.warn(f"LogME has lost digits: the score may be wrong {size}, as {cause} the features.", stacklevel=5)


def _undefined(cause: str, n: int, shape: tuple[int, ...], device: torch.device) -> Evidence:
    warnings.warn(f"LogME is NaN: {cause}.", stacklevel=4)
    weight = torch.full(shape, math.nan, dtype=torch.float64, device=device)
    outputs = weight.new_full(shape[:1], math.nan)
    return Evidence(
        score=outputs.new_tensor(math.nan),
        per_output=outputs,
        null=outputs,
        gain=outputs.new_tensor(math.nan),
        alpha=outputs,
        beta=outputs,
        effective_dim=outputs,
        weight=weight,
        num_samples=n,
        saturated=torch.zeros_like(outputs, dtype=torch.bool),
        bias=None,
        spectrum=outputs[:0],
    )


def _maximise(spectrum: Spectrum, n: int) -> Evidence:
    eigenvalues, dof = spectrum.eigenvalues, spectrum.dof
    if not bool((spectrum.square > 0).any()):
        shape = len(spectrum.square), len(spectrum.basis[0])
        still = "zero" if spectrum.centre is None else "constant"
        return _undefined(
            f"every target is {still} in {n} samples (or too small to square), so there is nothing to explain",
            n,
            shape,
            spectrum.square.device,
        )
    found = maximise(spectrum)
    if len(eigenvalues) > 0:
        _check_digits(spectrum, found)
    else:
        warnings.warn(
            "the features are all zero or too small to square (or constant, where an intercept is fitted): gain 0.",
            stacklevel=3,
        )
    log_evidence, log_t, saturated, null = found
    per_output, null = log_evidence / dof, null / dof
    defined = ~per_output.isnan()

    offset = eigenvalues.log() - log_t[:, None]
    used, unused = offset.sigmoid(), (-offset).sigmoid()  # λ/(λ+t) and t/(λ+t), (K, R)
    x2 = spectrum.coordinates.square()
    fit = spectrum.residual + (x2 * unused).sum(1)
    beta = dof / fit
    # α = t β = n t / Q, in a form that stands both ends: Q/t = r₀/t + Σ x²/(λ+t).
    t = log_t.exp()
    per_t = torch.where(spectrum.residual > 0, spectrum.residual / t, 0.0) + (x2 * used / eigenvalues).sum(1)
    alpha = torch.where(log_t == math.inf, math.inf, dof / per_t)
    weight = spectrum.to_features(spectrum.coordinates * used / eigenvalues.sqrt())
    weight = torch.where(defined[:, None], weight, 0.0)
    bias = None
    if spectrum.centre is not None:
        feature_mean, target_mean = spectrum.centre
        bias = target_mean - weight @ feature_mean
    return Evidence(
        score=per_output.nanmean(),
        per_output=per_output,
        null=null,
        gain=(per_output - null).nanmean(),
        alpha=alpha,
        beta=torch.where(defined, beta, math.nan),
        effective_dim=used.sum(1),
        weight=weight,
        num_samples=n,
        saturated=saturated,
        bias=bias,
        spectrum=eigenvalues,
    )
