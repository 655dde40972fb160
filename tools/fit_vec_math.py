"""Derive the coefficients of csrc/common/{cpu/vec_math,cpu/piecewise,cuda/elementary}.h.

    python tools/fit_vec_math.py

Needs numpy and mpmath.

Single precision: weighted minimax polynomials by Lawson's iteration (least squares, reweighted by the error).
Double precision: interpolation at Chebyshev nodes in 40 digits, within a digit of the minimax polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
from numpy.polynomial import chebyshev, polynomial


def log_cdf(a: float) -> float:
    """log of the normal distribution function at -a."""
    return float(mp.log(mp.erfc(a / mp.sqrt(2)) / 2))


def minimax(f: Callable, weight: Callable, low: float, high: float, degree: int) -> tuple[float, np.ndarray]:
    """Largest weighted error and coefficients, lowest order first, of the polynomial for f on [low, high]."""
    nodes = np.cos(np.pi * (np.arange(1000) + 0.5) / 1000)
    x = (low + high) / 2 + (high - low) / 2 * nodes
    y, w = np.array([f(v) for v in x]), np.array([weight(v) for v in x])
    basis, share = chebyshev.chebvander(nodes, degree), np.full(len(x), 1 / len(x))
    best = np.inf, None
    for _ in range(300):
        root = np.sqrt(share) * w
        c = np.linalg.lstsq(basis * root[:, None], y * root, rcond=None)[0]
        error = np.abs((basis @ c - y) * w)
        if error.max() < best[0]:
            best = error.max(), c
        share *= error / error.max() + 1e-6
        share /= share.sum()
    return best[0], substitute(chebyshev.cheb2poly(best[1]), -(low + high) / (high - low), 2 / (high - low))


def substitute(p: np.ndarray, offset: float, slope: float) -> np.ndarray:
    """Coefficients of p(offset + slope * x)."""
    q = np.zeros(1)
    for c in p[::-1]:
        q = polynomial.polyadd(polynomial.polymul(q, [offset, slope]), [c])
    return q


def interpolate(f: Callable, low: float, high: float, degree: int) -> tuple[float, list]:
    """Largest relative error and coefficients of the polynomial through f at Chebyshev nodes, in 40 digits."""
    with mp.workdps(60):
        error_points = [low + (high - low) * mp.mpf(i) / 200 for i in range(201)]
        nodes = [(mp.cos(mp.pi * (k + mp.mpf(1) / 2) / (degree + 1)) * (high - low) + low + high) / 2
                 for k in range(degree + 1)]
        matrix = mp.matrix(degree + 1)
        for i, x in enumerate(nodes):
            for j in range(degree + 1):
                matrix[i, j] = x**j
        c = list(mp.lu_solve(matrix, mp.matrix([f(x) for x in nodes])))
        error = max(abs(mp.polyval(c[::-1], x) / f(x) - 1) for x in error_points)
    return float(error), c


def mills_in_t(t: mp.mpf, k: int = 4) -> mp.mpf:
    """(1 + a) erfc(a / sqrt 2) exp(a^2 / 2) / 2 as a function of t = (a - k) / (a + k)."""
    if t >= 1:
        return 1 / mp.sqrt(2 * mp.pi)
    a = k * (1 + t) / (1 - t)
    if a > 40:  # asymptotic series
        return (1 + a) / a / mp.sqrt(2 * mp.pi) * sum((-1) ** n * mp.fac2(2 * n - 1) / a ** (2 * n) for n in range(16))
    return (1 + a) * mp.erfc(a / mp.sqrt(2)) * mp.exp(a * a / 2) / 2


def cdf(x: float) -> float:
    """The normal distribution function."""
    return math.erfc(-x / math.sqrt(2)) / 2


def tail_table(step: float, degree: int) -> tuple[float, np.ndarray]:
    """Largest error and coefficients [degree + 1, 32] of cdf(-a) around i * step, in powers of the distance."""
    fits = [minimax(lambda t, k=k: cdf(-k * step - t), lambda t: 1, -step / 2, step / 2, degree) for k in range(32)]
    table = np.array([p for _, p in fits]).T
    table[0, -1] = 0  # what lies beyond is cut off
    return max(error for error, _ in fits), table


def step_table(f: Callable, step: float, degree: int) -> tuple[float, np.ndarray]:
    """Largest error and coefficients [degree + 1, 32] of f(x) around k * step, -16 <= k < 16, in powers of x. f rises
    from 0 to 1."""
    table, worst = np.zeros((degree + 1, 32)), 0.0
    table[0, 15] = 1  # 0 before the first interval and 1 after the last
    for k in range(-15, 15):
        error, table[:, k] = minimax(f, lambda x: 1, (k - 0.5) * step, (k + 0.5) * step, degree)
        worst = max(worst, error)
    return worst, table


def show_table(name: str, error: float, table: np.ndarray) -> None:
    print(f"{name}: {error:.2e}")
    for row in table:
        print("    {" + ", ".join(f"{np.float32(c):#.9g}f" for c in row) + "},")


def show(name: str, error: float, coefficients: object, hexadecimal: bool) -> None:
    print(f"{name}: {error:.2e}")
    for c in coefficients:
        print(f"    {float(c).hex() if hexadecimal else f'{np.float32(c):.9g}f'},")


def main() -> None:
    two = minimax(lambda f: np.expm1(f * np.log(2)) / f, lambda f: 2**-f * abs(f), -0.5, 0.5, 5)
    show("(2^f - 1) / f, f32", *two, False)
    show("2^(f - 1/2), f32", *minimax(lambda f: 2 ** (f - 0.5), lambda f: 2 ** (0.5 - f), 0, 1, 6), False)
    exp = minimax(lambda r: np.expm1(r) / r, lambda r: np.exp(-r) * abs(r), -0.34658, 0.34658, 5)
    show("(e^r - 1) / r, f32", *exp, False)
    log2_cdf = minimax(lambda a: log_cdf(a) / np.log(2), lambda a: np.log(2) * np.exp(log_cdf(a)), 0, 14.7, 8)
    show("log2 cdf(-a), f32", *log2_cdf, False)
    # The weight's second term keeps the relative error of gelu(x) for -4 < x < 0 below that of rounding to float16.
    near = minimax(
        lambda a: log_cdf(a) / np.log(2), lambda a: max(a, 0.25) * np.exp(log_cdf(a)) + 0.01 * (a < 4.2), 0, 9, 5
    )
    show("log2 cdf(-a) for 16-bit results, f32", *near, False)
    mills = minimax(
        lambda a: (np.exp(log_cdf(a) + a * a / 2) - 0.5) / a, lambda a: a * np.exp(-a * a / 2), 0, 14.7, 11
    )
    show("(cdf(-a) e^(a^2/2) - 1/2) / a, f32", *mills, False)
    show_table("cdf(-a) on 32 intervals, f32", *tail_table(45 / 256, 4))
    show_table("cdf(x) on 32 intervals, for bfloat16", *step_table(cdf, 9 / 32, 2))
    sigmoid = step_table(lambda x: 1 / (1 + math.exp(-x)), 9 / 16, 2)
    show_table("1 / (1 + e^-x) on 32 intervals, for bfloat16", *sigmoid)
    show("e^r, f64", *interpolate(mp.exp, mp.mpf("-0.34658"), mp.mpf("0.34658"), 11), True)
    show("(1 + a) cdf(-a) e^(a^2/2) in t, f64", *interpolate(mills_in_t, mp.mpf(-1), mp.mpf(1), 24), True)


if __name__ == "__main__":
    main()
