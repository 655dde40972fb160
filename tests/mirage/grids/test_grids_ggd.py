"""The golden values of the GGD, its fits and distances, and what holds of any of them."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from mirage.grids import GGD, fit_ggd, fit_values, kl_divergence, mean_ggd, similarity
from mirage.grids.ggd import clip_outliers
from mirage.grids.pca import centred_gram, gram_scores, pca_scores

# alpha and sigma of the first, and of the second; their KL divergence and S, as far as they were printed
DIVERGENCES = [
    ((2, 1), (2, 2), "0.3181471806", "4.50264173"),
    ((2, 2), (2, 1), "0.8068528194", "4.90679970"),
    ((1, 1), (1, 2), "0.1931471806", "4.28591086"),
    ((1, 1), (2, 1), "0.0723649429", "3.85958823"),
    ((2, 1), (1, 1), "0.0560142242", "3.74837585"),
    ((0.5, 1), (1.5, 0.8), "0.2636823025", "4.42109745"),
    ((0.687, 2.718), (0.596, 2.333), "0.0211430582", "3.32537317"),
    ((0.687, 2.718), (0.466, 2.007), "0.11759818", "4.070438"),
]

# SRGA, Figure 3: clean, blur 2, blur 5, and S of clean against the other two
PUBLISHED = [
    ((0.687, 2.718), (0.596, 2.333), (0.466, 2.007), "3.325373", "4.070438"),
    ((0.691, 2.866), (0.683, 2.795), (0.526, 2.299), "1.563127", "3.771430"),
    ((0.668, 4.278), (0.690, 3.849), (0.529, 2.465), "2.471974", "4.210011"),
    ((0.762, 8.921), (0.749, 8.531), (0.701, 7.695), "2.039246", "3.147022"),
]

TOY = [GGD(0.687, 2.718), GGD(0.596, 2.333), GGD(0.466, 2.007), GGD(0.75, 4.0), GGD(0.70, 3.0)]
TOY_S = [
    "0 3.325373 4.070438 3.799129 2.608904",
    "3.325146 0 3.616129 4.166667 3.621996",
    "4.087180 3.631890 0 4.509327 4.212241",
    "3.853630 4.212038 4.524943 0 3.598669",
    "2.623125 3.632674 4.202735 3.558487 0",
]


def printed(text):
    """The number that was printed so: within half a unit of its last digit, and never better than 1e-9."""
    digits = len(text.partition(".")[2])
    return pytest.approx(float(text), abs=max(1e-9, 0.5000001 * 10**-digits), rel=0)


@pytest.mark.parametrize(("p", "q", "kl", "s"), DIVERGENCES)
def test_divergences_are_the_golden_ones(p, q, kl, s):
    assert kl_divergence(GGD(*p), GGD(*q)) == printed(kl)
    assert similarity(GGD(*p), GGD(*q)) == printed(s)


@pytest.mark.parametrize(("p", "q"), [case[:2] for case in DIVERGENCES])
def test_divergences_are_those_of_numerical_integration(p, q):
    first, second = GGD(*p), GGD(*q)

    def integrand(t):  # over x = t^4, so that the cusp of small alpha at 0 is smooth
        x = t**4
        return 2 * first.pdf(x) * (first.log_pdf(x) - second.log_pdf(x)) * 4 * t**3

    end = (first.scale * 60 ** (1 / first.alpha)) ** 0.25  # where the density is exp(-60) of that at 0
    found, _ = integrate.quad(integrand, 0, end, epsabs=1e-13, epsrel=1e-13, limit=500)
    assert kl_divergence(first, second) == pytest.approx(found, abs=1e-9)
    assert similarity(first, second) == pytest.approx(math.log10(found + 1e-5) + 5, abs=1e-8)


@pytest.mark.parametrize(("clean", "mild", "strong", "s_mild", "s_strong"), PUBLISHED)
def test_published_descriptors(clean, mild, strong, s_mild, s_strong):
    assert similarity(GGD(*clean), GGD(*mild)) == printed(s_mild)
    assert similarity(GGD(*clean), GGD(*strong)) == printed(s_strong)


def test_rows_of_the_toy_ranking():
    for p, row in zip(TOY, TOY_S, strict=True):
        for q, value in zip(TOY, row.split(), strict=True):
            assert similarity(p, q) == printed(value)


@pytest.mark.parametrize("alpha", [0.3, 0.687, 1.0, 2.0, 7.5])
def test_the_density_is_that_of_scipy(alpha):
    g = GGD(alpha, 1.7)
    x = np.linspace(-6, 6, 41)
    np.testing.assert_allclose(g.pdf(x), stats.gennorm.pdf(x, alpha, scale=g.scale), rtol=1e-12)
    assert stats.gennorm.std(alpha, scale=g.scale) == pytest.approx(1.7, rel=1e-12)
    assert g.pdf(0.0) == pytest.approx(alpha / (2 * g.scale * math.gamma(1 / alpha)), rel=1e-12)


def quantiles(alpha, sigma):
    return stats.gennorm.ppf((np.arange(100_000) + 0.5) / 100_000, alpha, scale=GGD(alpha, sigma).scale)


@pytest.mark.parametrize(
    ("given", "sigma", "alpha"),
    [
        ((0.5, 1), "0.999508", 0.500),
        ((0.687, 2.718), "2.717578", 0.687),
        ((1, 1), "0.999955", 1.000),
        ((1.3, 0.7), "0.699986", 1.300),
        ((2, 1), "0.999993", 2.000),
        ((4, 3), "2.999995", 4.000),
    ],
)
def test_fits_without_clipping(given, sigma, alpha):
    found = fit_values(quantiles(*given), clip=None)
    assert found.sigma == printed(sigma)
    assert found.alpha == pytest.approx(alpha, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "dropped", "sigma", "alpha"),
    [
        ((0.5, 1), 514, "0.866699", 0.596),
        ((0.687, 2.718), 300, "2.554298", 0.759),
        ((1.3, 0.7), 18, "0.698183", 1.310),
    ],
)
def test_fits_with_clipping(given, dropped, sigma, alpha):
    x = quantiles(*given)
    assert x.size - clip_outliers(x).size == dropped
    found = fit_values(x)
    assert found.sigma == printed(sigma)
    assert found.alpha == pytest.approx(alpha, abs=1e-12)


def test_values_on_the_bounds_of_clipping_go_and_it_is_done_once():
    x = np.zeros(52)
    x[0], x[1] = 1.0, -1.0
    bound = 1 / np.std(x)
    assert clip_outliers(x, bound).tolist() == [0.0] * 50
    assert clip_outliers(x, bound * (1 + 1e-12)).size == 52
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(10_000), [6.0, 300.0]])
    assert clip_outliers(x).max() == 6.0  # which a second pass, without 300, would take too


def gaussian_features():
    return np.random.RandomState(0).standard_normal((64, 512)) / np.sqrt(1 + np.arange(512))


def heavy_features():
    return np.random.RandomState(0).standard_t(2.5, (200, 300))


@pytest.mark.parametrize(
    ("features", "components", "power", "clipped", "sigma", "alpha"),
    [
        (gaussian_features, 16, "290.29463394", 1, "0.52407762", 1.334),
        (heavy_features, 50, "139767.966747", 12, "3.60124957", 1.3555),
    ],
)
def test_features_to_ggd(features, components, power, clipped, sigma, alpha):
    scores = pca_scores(features(), components)
    assert np.square(scores).sum() == printed(power)
    assert scores.size - clip_outliers(scores.ravel()).size == clipped
    found = fit_ggd(features(), components)
    assert found.sigma == printed(sigma)
    assert found.alpha == pytest.approx(alpha, abs=0.002)


def test_scores_are_those_of_the_decomposition_whichever_way_they_are_found():
    for features in (gaussian_features(), heavy_features()[:, :150]):  # more features than patches, and fewer
        centred = features - features.mean(0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        expected = (u * s)[:, :40]
        for found in (pca_scores(features, 40), gram_scores(centred_gram([torch.from_numpy(features)]), 40)):
            signs = np.sign((found * expected).sum(0))
            np.testing.assert_allclose(found * signs, expected, atol=1e-10 * s[0])
            assert (found[np.abs(found).argmax(0), np.arange(40)] > 0).all()


def test_the_gram_matrix_is_a_sum_over_blocks_and_float32_of_it_is_summed_in_float64():
    features = torch.randn(20, 9000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 50
    expected = (features - features.mean(0)) @ (features - features.mean(0)).T
    for widths in ([9000], [1, 4097, 4902], [3000, 3000, 3000]):
        np.testing.assert_allclose(centred_gram(features.split(widths, 1)), expected, rtol=1e-10, atol=1e-8)
        found = centred_gram(part.float() for part in features.split(widths, 1))
        # beside values of 50, whose float32 has steps of 4e-6, the spread is 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * float(expected.diagonal().max()))


GRID = [(a, s) for a in (0.25, 0.6, 1.0, 2.0, 9.0) for s in (0.1, 1.0, 30.0)]


def test_a_divergence_is_0_of_equal_ones_alone_and_knows_no_scale():
    for p in GRID:
        assert kl_divergence(GGD(*p), GGD(*p)) == 0
        assert similarity(GGD(*p), GGD(*p)) == 0
        for q in GRID:
            kl = kl_divergence(GGD(*p), GGD(*q))
            assert kl > 0 or p == q
            scaled = kl_divergence(GGD(p[0], 3 * p[1]), GGD(q[0], 3 * q[1]))
            assert scaled == pytest.approx(kl, rel=1e-9, abs=1e-12)


def test_similarity_grows_with_the_divergence():
    p = GGD(0.7, 1.0)
    pairs = sorted((kl_divergence(p, GGD(*q)), similarity(p, GGD(*q))) for q in GRID)
    values = [s for _, s in pairs]
    assert values == sorted(values)
    assert len(set(values)) == len(values)


def test_a_divergence_beyond_float64_is_infinite():
    assert kl_divergence(GGD(0.2, 1e60), GGD(9.999, 1e-60)) == math.inf
    assert similarity(GGD(0.2, 1e60), GGD(9.999, 1e-60)) == math.inf


def test_scaled_features_have_the_same_alpha_and_a_scaled_sigma():
    features = heavy_features()
    one = fit_ggd(features, 50)
    for factor in (1e-6, 0.25, 1e6):
        found = fit_ggd(factor * features, 50)
        assert found.alpha == one.alpha
        assert found.sigma == pytest.approx(factor * one.sigma, rel=1e-10)


def test_the_order_of_patches_and_of_features_does_not_matter():
    features = heavy_features()
    one = fit_ggd(features, 50)
    rng = np.random.default_rng(0)
    for other in (features[rng.permutation(200)], features[:, rng.permutation(300)]):
        found = fit_ggd(other, 50)
        assert found.alpha == one.alpha
        assert found.sigma == pytest.approx(one.sigma, rel=1e-10)


def test_arrays_and_tensors_of_any_floating_point_give_the_same():
    features = gaussian_features().astype(np.float32)
    one = fit_ggd(features.astype(np.float64), 16)
    for given in (features, torch.from_numpy(features).requires_grad_(), torch.from_numpy(features.T.copy()).T):
        found = fit_ggd(given, 16)
        assert (found.alpha, found.sigma) == (one.alpha, pytest.approx(one.sigma, rel=1e-10))


def test_refined_shapes_solve_the_equation_and_lie_beside_the_grid():
    x = quantiles(1.3, 0.7)
    grid, refined = fit_values(x), fit_values(x, refine=True)
    assert 0 < abs(refined.alpha - grid.alpha) <= 0.0005001
    kept = clip_outliers(x)
    rho = np.square(kept).mean() / np.abs(kept - kept.mean()).mean() ** 2
    g, a = math.gamma, refined.alpha
    assert g(1 / a) * g(3 / a) / g(2 / a) ** 2 == pytest.approx(rho, rel=1e-12)
    assert refined.sigma == grid.sigma


def test_shapes_end_where_the_grid_does():
    two = np.array([-1.0, 1.0] * 50)  # as flat as can be: rho is 1
    sparse = np.zeros(10_000)
    sparse[:2] = 1.0, -1.0
    for refine in (False, True):
        assert fit_values(two, refine=refine).alpha == pytest.approx(9.999, abs=1e-9)
        assert fit_values(sparse, clip=None, refine=refine).alpha == pytest.approx(0.2, abs=1e-9)


def test_features_with_exact_zeros_are_fitted():
    """A quarter of zeros, on which `scipy.stats.gennorm.fit` collapses."""
    rng = np.random.default_rng(0)
    x = rng.laplace(size=40_000)
    x[rng.random(x.size) < 0.25] = 0
    found = fit_values(x, clip=None)
    assert found.sigma == pytest.approx(math.sqrt(2 * 0.75), rel=0.02)
    g = math.gamma  # of the mixture mean(x^2) is 2 * 0.75 and mean(|x|) 0.75
    alpha = optimize.brentq(lambda a: g(1 / a) * g(3 / a) / g(2 / a) ** 2 - 2 / 0.75, 0.4, 2)
    assert found.alpha == pytest.approx(alpha, abs=0.02)


def test_parameters_of_a_group_are_plain_means():
    for members, alpha, sigma in ((TOY[:3], 0.583, 7.058 / 3), (TOY[3:], 0.725, 3.5), (TOY[1:2], 0.596, 2.333)):
        found = mean_ggd(members)
        assert (found.alpha, found.sigma) == (pytest.approx(alpha, rel=1e-12), pytest.approx(sigma, rel=1e-12))
    with pytest.raises(ValueError, match="members: expected at least one distribution"):
        mean_ggd([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GGD(0, 1), "alpha: expected a positive, finite number, got 0"),
        (lambda: GGD(1, math.nan), "sigma: expected a positive, finite number, got nan"),
        (lambda: fit_ggd(np.zeros((300, 400))), "300 of them need at least 301 patches, got 300"),
        (lambda: fit_ggd(np.ones((20, 30)), 5), "expected patches that differ, got the same features of all"),
        (lambda: fit_ggd(np.ones((20, 10)), 5), "expected patches that differ, got the same features of all"),
        (lambda: fit_ggd(np.random.rand(20, 4), 5), "expected at most as many as features, 4, got 5"),
        (lambda: fit_ggd(np.random.rand(20, 4), 0), "components: expected at least 1, got 0"),
        (lambda: fit_ggd(np.random.rand(20), 5), r"expected floating point .*, got torch.float64 \[20\]"),
        (lambda: fit_ggd(np.ones((20, 30), int), 5), "expected floating point .* got torch.int64"),
        (lambda: fit_values([]), "values: expected at least one number, got none"),
        (lambda: fit_values([1.0, math.inf, 2.0]), "expected finite numbers, got 1 that are not, of 3"),
        (lambda: fit_values([3.0] * 9), "values: expected numbers that differ, got the same everywhere"),
        (lambda: fit_values([0.0] * 9), "values: expected numbers that differ, got the same everywhere"),
        (lambda: fit_values([0.0, 1.0], clip=0), "clip: expected a positive number of standard deviations, got 0"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(20, 30), (20, 10)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused_by_their_patch(shape, value):
    features = np.random.default_rng(0).standard_normal(shape)
    features[7, 3] = features[9, 3] = value
    with pytest.raises(ValueError, match="got others in 2 of 20 patches, the first of them patch 7"):
        fit_ggd(features, 5)


def test_rounding_errors_are_no_structure():
    """The same image in batches of different sizes: float32 features that differ in the last digits."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal(500)
    features = (row * (1 + 3e-7 * rng.standard_normal((20, 500)))).astype(np.float32)
    with pytest.raises(ValueError, match="expected patches that differ"):
        fit_ggd(features, 5)
    assert fit_ggd((row * (1 + 1e-3 * rng.standard_normal((20, 500)))).astype(np.float32), 5).sigma > 0
