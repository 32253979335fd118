"""The logarithm of maximum evidence: Bayesian linear regression with both precisions at their best values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_logme.scores.calibration import fit_temperature
from lightning_logme.scores.leave_one_out import predict_without_each
from lightning_logme.scores.maximum import Maximum, maximise
from lightning_logme.scores.moments import Moments, Rows
from lightning_logme.scores.spectrum import Spectrum
from lightning_logme.utilities.checks import EXCLUSIVE, Task

# Rounding may affect eigenvalues below this many times the resolution.
_COARSER = 10
# If the score changes by more nats than this without those eigenvalues, there is a warning.
_LOST = 1e-3


@dataclass(frozen=True, eq=False)
class Evidence:
    """The maximised evidence of K outputs, and the Bayesian linear head that belongs to it.

    All tensors are float64. An output has no evidence if its class is absent or its target is zero everywhere. Then its
    ``per_output``, ``null``, ``alpha``, ``beta`` and ``effective_dim`` are NaN, its ``weight`` is zero, and the means
    leave it out.

    Attributes:
        score: scalar, LogME: the mean of ``per_output`` in nats per sample. Comparable only for the same samples and
            labels.
        per_output: (K,) maximised log evidence of each output, divided by the number of samples (minus 1 with an
            intercept).
        null: (K,) the same for features that explain nothing.
        gain: scalar, mean of ``per_output − null`` ≥ 0: nats per sample that the features explain. Zero means useless.
        alpha: (K,) precision of the prior of the weights; infinite if the gain is zero.
        beta: (K,) precision of the noise; infinite if the features interpolate the target.
        effective_dim: (K,) γ, the number of directions of feature space that are used.
        weight: (K, D) posterior mean of the weights.
        num_samples: n.
        saturated: (K,) bool, True if the fit is perfect with fewer directions than samples. Then the evidence grows
            without bound as the noise goes to zero, and the float64 resolution of the Gram matrix sets its value. Check
            for leaked labels.
        bias: (K,) posterior mean of the intercept; None without one.
        spectrum: (R,) non-zero eigenvalues of the Gram matrix (centred if there is an intercept), descending.
        decomposition: the spectrum with its eigenvectors, which :meth:`leave_one_out` needs. None in the evidence of
            callbacks, rankings and metrics, because it is as large as the Gram matrix (or as the features, if n < D).
        temperature: what the outputs of the head are divided by to become calibrated logits: see
            :func:`~lightning_logme.scores.calibration.fit_temperature`. None in regression, or if it is not known yet.
        sample: some of the samples, from which :meth:`head` computes the temperature if it is not known yet; or None.
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
    decomposition: Spectrum | None = None
    temperature: float | None = None
    sample: Rows | None = None

    @classmethod
    def of(cls, rows: Rows, num_outputs: int, task: Task, fit_intercept: bool = False) -> Evidence:
        """Return the maximised evidence of rows: :meth:`from_rows` if n < D, else :meth:`from_moments`."""
        n, d = rows.features.shape
        if n < d:
            return cls.from_rows(rows, num_outputs, task, fit_intercept)
        moments = Moments.zeros(d, num_outputs, rows.features.device).accumulate(rows)
        return cls.from_moments(moments, task, fit_intercept)

    @classmethod
    def from_moments(cls, moments: Moments, task: Task, fit_intercept: bool = False) -> Evidence:
        """Return the maximised evidence, computed from additive moments.

        Without evidence, the result is NaN and one warning names the cause. No error is raised.

        Args:
            moments: the sums over all samples.
            task: decides whether at least two classes are needed.
            fit_intercept: centre features and targets first. The score is then the log evidence of the remaining n − 1
                degrees of freedom, divided by n − 1.
        """
        evidence, spectrum = maximise_moments(moments, task, fit_intercept)
        return replace(evidence, decomposition=spectrum)

    @classmethod
    def from_rows(cls, rows: Rows, num_outputs: int, task: Task, fit_intercept: bool = False) -> Evidence:
        """Return the maximised evidence, computed from all samples: far cheaper than from moments if n < D."""
        evidence, spectrum = maximise_rows(rows, num_outputs, task, fit_intercept)
        return replace(evidence, decomposition=spectrum)

    def leave_one_out(self, features: Tensor, target: Tensor) -> Tensor:
        """Return a prediction for each sample, by the head fitted without that sample.

        See :func:`lightning_logme.functional.leave_one_out`.

        Args:
            features: (m, D) floating point: some or all of the samples behind the evidence, in any order.
            target: (m,) int64 class labels, or (m, K) numbers.

        Returns:
            (m, K) float64, NaN if there is no evidence.

        Raises:
            ValueError: a shape does not fit, or the evidence comes without its decomposition.
        """
        num_outputs, num_features = self.weight.shape
        if features.ndim != 2 or features.shape[1] != num_features or len(target) != len(features):
            raise ValueError(
                f"features must have shape (m, {num_features}) and target length m, got {tuple(features.shape)} and "
                f"{tuple(target.shape)}."
            )
        if self.score.isnan():
            return self.weight.new_full((len(features), num_outputs), math.nan)
        if self.decomposition is None:
            raise ValueError(
                "decomposition: the evidence of a callback, a ranking or a metric is kept without its eigenvectors; "
                "call lightning_logme.functional.leave_one_out(features, target)."
            )
        return predict_without_each(Rows(features.detach(), target), self.decomposition, self.alpha / self.beta)

    def predict(self, features: Tensor) -> Tensor:
        """Return the outputs (m, K) of the head, float64, for features (m, D) of samples that are not in the fit."""
        outputs = features.detach().double() @ self.weight.T
        return outputs if self.bias is None else outputs + self.bias

    def head(self, dtype: torch.dtype | None = None, *, calibrated: bool = False) -> torch.nn.Linear:
        """Return the posterior mean as a linear layer, a warm start for a classifier.

        Its outputs estimate the targets (0/1 per class). The largest output is the predicted class.

        Args:
            dtype: the dtype of the parameters; None takes torch's default.
            calibrated: subtract ½ from the outputs, and divide them by the temperature. They are then calibrated
                logits, for a softmax over the classes, or for a sigmoid of each label in "multilabel". The calibration
                ignores classes that do not occur.

        Returns:
            A ``torch.nn.Linear`` with D inputs and K outputs, on the device of the evidence. It has a bias if the
            intercept was fitted, or if it is calibrated.

        Raises:
            ValueError: the score is NaN, so there is no posterior; or ``calibrated`` without a temperature.

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
                "the evidence is NaN, so there is no posterior to make a linear layer from; the warning that came with "
                "the evidence names the cause."
            )
        weight, bias = self.weight, self.bias
        if calibrated:
            temperature = self._known_temperature()
            bias = (weight.new_zeros(len(weight)) if bias is None else bias) - 0.5
            weight, bias = weight / temperature, bias / temperature
        outputs, inputs = weight.shape
        options = {"bias": bias is not None, "device": weight.device, "dtype": dtype or torch.get_default_dtype()}
        linear: torch.nn.Linear = torch.nn.utils.skip_init(torch.nn.Linear, inputs, outputs, **options)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        return linear

    def _known_temperature(self) -> float:
        """Return the temperature. If it is not known yet, compute it from the leave-one-out predictions of a sample."""
        if self.temperature is not None:
            return self.temperature
        if self.sample is None:
            raise ValueError(
                "calibrated: this evidence has no temperature, because it is of a regression or was made without its "
                "samples or with accuracy=False; use head(), or functional.evidence(features, target) for classes."
            )
        task: Task = "multiclass" if self.sample.target.ndim == 1 else "multilabel"
        predictions = self.leave_one_out(self.sample.features, self.sample.target)
        return fit_temperature(predictions, self.sample.target, task, ~self.per_output.isnan())

    def to(self, device: torch.device | str) -> Evidence:
        """Return the same evidence on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, (Tensor, Spectrum, Rows))
        }
        return replace(self, **moved)


@torch.no_grad()
def maximise_moments(moments: Moments, task: Task, fit_intercept: bool) -> tuple[Evidence, Spectrum | None]:
    """Return the evidence of additive moments, and the spectrum, which is None if it could not be computed."""
    n = int(moments.count)
    squares = moments.gram.diagonal(), moments.target_square
    cause = _cause_of_nan(n, *squares, task, fit_intercept)
    return _decompose_and_maximise(lambda: Spectrum.from_moments(moments, fit_intercept), n, *squares, cause)


@torch.no_grad()
def maximise_rows(rows: Rows, num_outputs: int, task: Task, fit_intercept: bool) -> tuple[Evidence, Spectrum | None]:
    """Return the same as :func:`maximise_moments`, computed from all samples."""
    rows = Rows(rows.features.double(), rows.target)
    squares = rows.features.square().sum(0), rows.dense_target(num_outputs).square().sum(0)
    cause = _cause_of_nan(len(rows), *squares, task, fit_intercept)
    return _decompose_and_maximise(
        lambda: Spectrum.from_rows(rows, num_outputs, fit_intercept), len(rows), *squares, cause
    )


def _decompose_and_maximise(
    decompose: Callable[[], Spectrum], n: int, features: Tensor, square: Tensor, cause: str | None
) -> tuple[Evidence, Spectrum | None]:
    """Return the evidence and the spectrum. If ``cause`` says why there is no evidence, return NaN and None."""
    if cause is None:
        try:
            spectrum = decompose()
            return _evidence_of(spectrum, n), spectrum
        except torch.linalg.LinAlgError as error:
            cause = f"the eigenvalues of the Gram matrix could not be computed ({error})"
    return _undefined(cause, n, (len(square), len(features)), square.device), None


def _cause_of_nan(n: int, features: Tensor, square: Tensor, task: Task, fit_intercept: bool) -> str | None:
    """Return why there is no evidence, or None, given the sums of the squared features and of the squared targets.

    Any NaN or Inf propagates to these sums.
    """
    if n == 0:
        return "there are no samples (n = 0); check that the loader is not empty, and that not all labels are ignored"
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
    """Warn if the score depends on eigenvalues that are hardly larger than rounding errors.

    Outputs with a perfect fit do not count: their evidence has no maximum, and ``saturated`` marks them.
    """
    is_any_small = bool((spectrum.eigenvalues <= _COARSER * spectrum.resolution).any())
    if spectrum.unseen == math.inf or (spectrum.unseen > _COARSER * spectrum.resolution and not is_any_small):
        size = "by any amount"  # Without small eigenvalues, the loss cannot be estimated.
    elif is_any_small:
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
    warnings.warn(f"LogME has lost digits: the score may be wrong {size}, because {cause} the features.", stacklevel=5)


def _undefined(cause: str, n: int, shape: tuple[int, ...], device: torch.device) -> Evidence:
    """Return an evidence that is NaN, and warn of its cause."""
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


def _evidence_of(spectrum: Spectrum, n: int) -> Evidence:
    """Return the evidence of n samples with this spectrum."""
    eigenvalues, dof = spectrum.eigenvalues, spectrum.dof
    if not bool((spectrum.square > 0).any()):
        shape = len(spectrum.square), len(spectrum.basis[0])
        value = "zero" if spectrum.centre is None else "constant"
        return _undefined(
            f"every target is {value} in {n} samples (or too small to square), so there is nothing to explain",
            n,
            shape,
            spectrum.square.device,
        )
    found = maximise(spectrum)
    if len(eigenvalues) > 0:
        _check_digits(spectrum, found)
    else:
        warnings.warn(
            "LogME: the features are all zero or too small to square (or constant, where an intercept is fitted), so "
            "the gain is 0.",
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
    # α = t β = n t / Q, written with Q/t = r₀/t + Σ x²/(λ+t), which is valid at both ends, t → 0 and t → ∞.
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
