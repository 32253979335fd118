"""Independent computations of the evidence. They are slow and plain, and share no code with the package."""

import numpy as np
from scipy.linalg import helmert
from scipy.optimize import minimize
from scipy.stats import Covariance, multivariate_normal
from sklearn.datasets import load_digits
from sklearn.linear_model import BayesianRidge
from sklearn.metrics import accuracy_score, f1_score, r2_score


def log_density(features: np.ndarray, y: np.ndarray, log_alpha: float, log_beta: float) -> float:
    """Return log N(y; 0, β⁻¹ I + α⁻¹ F Fᵀ)."""
    covariance = np.exp(-log_beta) * np.eye(len(y)) + np.exp(-log_alpha) * features @ features.T
    try:
        return float(multivariate_normal(cov=Covariance.from_cholesky(np.linalg.cholesky(covariance))).logpdf(y))
    except np.linalg.LinAlgError:  # The noise is too small for float64.
        return -np.inf


def brute_force(features: np.ndarray, y: np.ndarray) -> float:
    """Return the maximal log evidence per sample: a dense search over both precisions, refined at the best points."""
    features, y = np.asarray(features, float), np.asarray(y, float)
    # The precisions are relative to the scale of the data, so that one grid suits all scales.
    alphas = np.log(np.linalg.norm(features, 2) ** 2 / (y @ y)) + np.linspace(-12, 25, 38)
    betas = np.log(len(y) / (y @ y)) + np.linspace(-2, 22, 25)
    values = {(a, b): log_density(features, y, a, b) for a in alphas for b in betas}
    starts = sorted(values, key=values.__getitem__)[-6:]
    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    results = (
        minimize(lambda p: -log_density(features, y, *p), s, method="Nelder-Mead", options=options) for s in starts
    )
    return max(-result.fun for result in results) / len(y)


def by_singular_values(features: np.ndarray, y: np.ndarray) -> float:
    """Return the maximal log evidence per sample: a dense search over α/β that squares no condition number."""
    features, y = np.asarray(features, float), np.asarray(y, float)
    n = len(features)
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    kept = singular > max(features.shape) * np.finfo(float).eps * singular.max(initial=0)
    eigenvalues, projected = singular[kept] ** 2, left.T[kept] @ y
    x2, residual = projected**2, np.sum((y - left.T[kept].T @ projected) ** 2)
    null = -0.5 * (np.log(2 * np.pi * (y @ y) / n) + 1)
    if not kept.any():
        return float(null)

    def curve(log_t: np.ndarray) -> np.ndarray:
        t = np.exp(log_t)[:, None]
        fit = residual + (x2 * t / (eigenvalues + t)).sum(1)
        return (-n / 2 * (np.log(2 * np.pi * fit / n) + 1) - np.log1p(eigenvalues / t).sum(1) / 2) / n

    grid = np.linspace(np.log(eigenvalues[-1]) - 25, np.log(eigenvalues[0]) + 25, 2001)
    for _ in range(3):
        best, step = grid[curve(grid).argmax()], grid[1] - grid[0]
        grid = np.linspace(best - step, best + step, 201)
    return float(max(curve(grid).max(), null))


def without_mean(matrix: np.ndarray) -> np.ndarray:
    """Return the n − 1 contrasts that remain without the mean."""
    return helmert(len(matrix)) @ matrix


def bayesian_ridge(features: np.ndarray, y: np.ndarray) -> float:
    """Return scikit-learn's maximal log evidence per sample."""
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    model = BayesianRidge(fit_intercept=False, compute_score=True, max_iter=20000, tol=1e-12, **flat)
    return float(model.fit(features, y).scores_[-1]) / len(y)


def papers_fixed_point(features: np.ndarray, y: np.ndarray, rounds: int = 11) -> float:
    """Return the result of algorithm 1 of You et al. (2021), written out for n > D."""
    n, d = features.shape
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    sigma, x2 = s**2, (u.T @ y) ** 2
    outside = y @ y - x2.sum()
    alpha = beta = 1.0
    for _ in range(rounds):
        t = alpha / beta
        gamma = (sigma / (sigma + t)).sum()
        m2 = (sigma * x2 / (t + sigma) ** 2).sum()
        residual = (x2 / (1 + sigma / t) ** 2).sum() + outside
        alpha, beta = gamma / m2, (n - gamma) / residual
        if abs(alpha / beta - t) / t < 1e-3:
            break
    log_evidence = d * np.log(alpha) + n * np.log(beta) - np.log(alpha + beta * sigma).sum()
    log_evidence -= beta * residual + alpha * m2 + n * np.log(2 * np.pi)
    return float(log_evidence / 2 / n)


def metric_of_predictions(predictions: np.ndarray, target: np.ndarray, task: str = "multiclass") -> float:
    """Return the accuracy, the macro F1 at 0.5, or the mean R² of predictions, as computed by scikit-learn."""
    predictions, target = np.asarray(predictions), np.asarray(target)
    if task == "regression":
        return float(r2_score(target, predictions))
    if task == "multilabel":
        return float(f1_score(target, predictions > 0.5, average="macro", zero_division=0))
    return float(accuracy_score(target, predictions.argmax(1)))


def one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.eye(num_classes)[labels]


def digits_features(num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random rectified features of scikit-learn's digits, and the labels."""
    pixels, labels = load_digits(return_X_y=True)
    weights = np.random.default_rng(0).normal(size=(64, num_features)) / 8
    return np.maximum((pixels / 16) @ weights, 0).astype(np.float32), labels


def problem(n: int, d: int, k: int, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return features of k classes, and labels with every class present."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    return rng.normal(size=(k, d))[labels] + noise * rng.normal(size=(n, d)), labels
