import numpy as np
import pytest
import torch
from scipy import stats

from measure import shape as module
from measure.shape import inverse_hill, normality, shape

M = 64


def vectors(values):
    return list(torch.from_numpy(np.asarray(values, np.float32)))


def whole(values, full=None, **options):
    full = torch.zeros(values.shape[1]) if full is None else full
    return shape(vectors(values), full, **options)["all"]


def within(estimates, truth, sigmas=4):
    """Whether the mean of independent estimates is the truth, within so many standard errors."""
    estimates = np.asarray(estimates)
    return abs(estimates.mean() - truth) < sigmas * estimates.std(ddof=1) / np.sqrt(len(estimates)) + 1e-9


LAWS = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "t5": lambda rng, size: rng.standard_t(5, size) * np.sqrt(3 / 5),
    "common factor": lambda rng, size: np.sqrt(rng.gamma(2, 0.5, (size[0], 1))) * rng.standard_normal(size),
}
SPECTRA = {
    "power law": 1.0 / np.arange(1, 201),
    "three directions": np.r_[np.full(3, 5.0), np.zeros(197)],
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_known_spectra_are_found_again_whatever_the_mean_and_the_law(spectrum, law):
    """The ratio of two unbiased estimates is biased a little: up to 5 % at 32 pairs."""
    eigenvalues, rng = SPECTRA[spectrum], np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.standard_normal((200, 200)))
    found = []
    for _ in range(40):
        z = LAWS[law](rng, (M, 200))
        found.append(whole((z * np.sqrt(eigenvalues)) @ turn.T + 3.0))
    trace, square = eigenvalues.sum(), (eigenvalues**2).sum()
    assert within([row["noise_trace"] for row in found], trace)
    isotropy, truth = np.array([row["isotropy"] for row in found]), 200 * square / trace**2
    assert abs(isotropy.mean() - truth) < 0.05 * truth + 4 * isotropy.std() / np.sqrt(40)
    assert [200 / row["effective_rank"] for row in found] == pytest.approx(list(isotropy))


def test_a_length_common_to_all_coordinates_does_not_pass_for_isotropy():
    """Draws of very unequal length: (mean ‖e‖²)² alone would be too large, and U half of what it is."""
    rng = np.random.default_rng(10)
    lengths = np.exp(rng.standard_normal((60, M, 1)))
    found = [whole(length * rng.standard_normal((M, 500)))["isotropy"] for length in lengths]
    assert within(found, 1)


def test_a_normal_is_rejected_at_the_stated_level_and_others_more_often():
    """5.7 % at M = 64: K² is not quite χ². Student-t and a factor common to all coordinates stand out."""
    rng = np.random.default_rng(3)
    scales = np.exp(rng.standard_normal(30_000))
    normal = whole(rng.standard_normal((M, 30_000)) * scales + scales)
    assert normal["non_normal_share"] == pytest.approx(0.057, abs=4 * np.sqrt(0.057 / 30_000))
    assert abs(normal["coordinate_kurtosis"]) < 4 * np.sqrt(24 / M / 30_000) * 1.3
    student = whole(rng.standard_t(5, (M, 5000)))
    assert student["non_normal_share"] > 0.4 and student["coordinate_kurtosis"] > 1.5
    common = whole(np.exp(rng.standard_normal((M, 1))) * rng.standard_normal((M, 5000)))
    assert common["non_normal_share"] > 0.9


def test_components_keep_their_level():
    """120 normal samples of a spectrum with leading components: 5.7 % are rejected."""
    rng, scales = np.random.default_rng(4), np.r_[np.full(5, 6.0), np.ones(45)]
    found = [whole(rng.standard_normal((M, 50)) * scales)["components_rejected"] for _ in range(120)]
    assert np.mean(found) == pytest.approx(0.057, abs=4 * np.std(found) / np.sqrt(120))


def test_heavy_tails_along_a_fixed_direction_are_seen_there_alone():
    rng = np.random.default_rng(4)
    values = rng.standard_normal((M, 50))
    values[:, 0] = 6 * rng.standard_t(1.5, M)
    found = whole(values, torch.eye(50)[0], directions={"memory": torch.eye(50)[1]})
    assert found["gradient_kurtosis"] > 2 and abs(found["memory_kurtosis"]) < 4 * np.sqrt(24 / M)
    expected = stats.kurtosis(np.float32(values[:, 1]), bias=False)
    assert found["memory_kurtosis"] == pytest.approx(expected, rel=1e-5)


def test_components_are_those_of_the_first_half_and_tested_on_the_second():
    """The slow twin: centre the first half, its singular vectors, project the second half."""
    rng = np.random.default_rng(5)
    values = rng.standard_t(4, (M, 30)) * np.linspace(4, 1, 30) + 2
    first = values[:32] - values[:32].mean(axis=0)
    _, _, rows = np.linalg.svd(first, full_matrices=False)
    projected = values[32:] @ rows[:5].T
    found = whole(values)
    assert found["components_kurtosis"] == pytest.approx(stats.kurtosis(projected, bias=False).mean(), abs=1e-4)
    assert found["components_rejected"] == np.mean(stats.normaltest(projected).pvalue < 0.05)


def test_unequal_scales_alone_make_a_normal_vector_look_heavy_tailed():
    rng = np.random.default_rng(6)
    scales = np.exp(rng.standard_normal(20_000) * 0.7)
    truth = 3 * (scales**4).mean() / (scales**2).mean() ** 2 - 3
    normal = whole(rng.standard_normal((M, 20_000)) * scales)
    assert truth > 10 and normal["scales_kurtosis"] == pytest.approx(truth, rel=0.05)
    assert normal["pooled_kurtosis"] == pytest.approx(truth, rel=0.1)
    student = whole(rng.standard_t(6, (M, 20_000)))  # excess kurtosis 3, equal scales
    assert abs(student["scales_kurtosis"]) < 0.1 and student["pooled_kurtosis"] == pytest.approx(3, abs=0.5)
    common = whole(np.exp(rng.standard_normal((M, 1))) * rng.standard_normal((M, 20_000)))
    assert abs(common["scales_kurtosis"]) < 0.1 and abs(common["pooled_kurtosis"]) < 0.1


def test_every_number_equals_a_plain_computation():
    rng = np.random.default_rng(7)
    values = rng.standard_t(5, (21, 40)).astype(np.float32)
    values[:, 3] = 0.25
    full = torch.linspace(-1, 1, 40)
    found = whole(values, full)
    omega = (torch.from_numpy(values) - full).double().numpy()
    moving = np.delete(omega, 3, axis=1)
    pairs = [(omega[i] - omega[i + 1]) / np.sqrt(2) for i in range(0, 20, 2)]
    apart = [(a, b) for i, a in enumerate(pairs) for j, b in enumerate(pairs) if i != j]
    square = np.mean([(a @ b) ** 2 for a, b in apart])
    one, two = omega[:10].var(axis=0, ddof=1), omega[10:].var(axis=0, ddof=1)
    expected = {
        "entries": 40,
        "moving": 39,
        "noise_trace": np.mean([e @ e for e in pairs]),
        "isotropy": 40 * square / np.mean([(a @ a) * (b @ b) for a, b in apart]),
        "coordinate_kurtosis": np.mean([stats.kurtosis(column, bias=False) for column in moving.T]),
        "non_normal_share": np.mean([stats.normaltest(column).pvalue < 0.05 for column in moving.T]),
        "pooled_kurtosis": np.mean([stats.kurtosis(row) for row in omega]),
        "scales_kurtosis": 3 * (one * two).mean() / (one.mean() * two.mean()) - 3,
        "gradient_kurtosis": stats.kurtosis(omega @ full.numpy(), bias=False),
    }
    inverse = []
    for column in moving.T:
        distances = sorted(abs(column - column.mean()))
        inverse.append(np.mean(np.log(distances[-2:])) - np.log(distances[-3]))
    expected["hill"] = 1 / np.mean(inverse)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert found["effective_rank"] == pytest.approx(40 / found["isotropy"])
    assert np.isnan(found["components_rejected"])  # halves of ten are too few to test


def test_layers_and_blocks_add_up(monkeypatch):
    rng = np.random.default_rng(8)
    values = rng.standard_normal((M, 50)) * np.linspace(1, 3, 50)
    once = whole(values)
    monkeypatch.setattr(module, "BLOCK", 7)
    calls = []
    layers = {"first": 20, "second": 1, "third": 29}
    options = {"layers": layers, "between": calls.append}
    found = shape(vectors(values), torch.zeros(50), **options)
    assert list(found) == ["all", *layers] and calls == [0] * (3 + 1 + 5)
    assert found["all"] == pytest.approx(once, rel=1e-9, nan_ok=True)
    alone = whole(values[:, 21:])
    assert found["third"] == pytest.approx(alone, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_hill_finds_the_index_of_pareto_tails(alpha):
    """1/α is the mean over columns; twice as far out with the sign at random, so that the mean is zero."""
    rng = np.random.default_rng(9)
    values = (rng.pareto(alpha, (400, 3000)) + 1) * rng.choice([-1, 1], (400, 3000))
    assert 1 / inverse_hill(values).mean() == pytest.approx(alpha, rel=0.1)
    found = whole(rng.standard_normal((M, 5000)))
    assert found["hill"] == pytest.approx(found["hill_normal"], rel=0.03)
    assert whole(rng.standard_t(2, (M, 5000)))["hill"] < 0.7 * found["hill_normal"]


def test_what_does_not_move_has_no_shape_and_makes_no_noise():
    with np.errstate(all="raise"):
        found = whole(np.full((M, 5), 0.1, np.float32))
    assert found["moving"] == 0 and found["noise_trace"] == 0
    unknown = {key for key, value in found.items() if np.isnan(value)}
    assert unknown >= {"coordinate_kurtosis", "non_normal_share", "isotropy", "hill", "scales_kurtosis"}
    kurtosis, p = normality(np.c_[np.ones(30), np.arange(30.0)])
    assert np.isnan(kurtosis[0]) and np.isnan(p[0]) and np.isfinite(kurtosis[1] + p[1])
    diverged = np.ones((M, 5))
    diverged[3, 2] = np.inf
    assert np.isnan(whole(diverged)["components_kurtosis"])


@pytest.mark.parametrize(
    ("draws", "options", "message"),
    [
        (3, {}, "at least 4 draws, got 3"),
        (4, {"layers": {"a": 2, "b": 2}}, "as many entries as the full gradient, 5"),
        (4, {"directions": {"m": torch.zeros(4)}}, "as many entries as the full gradient, 5"),
    ],
)
def test_what_does_not_fit_is_refused(draws, options, message):
    with pytest.raises(ValueError, match=message):
        shape([torch.zeros(5)] * draws, torch.zeros(5), **options)


def test_measuring_the_shape_touches_neither_the_draws_nor_the_random_state():
    draws = vectors(np.random.default_rng(0).standard_normal((M, 30)))
    copies, state, torch_state = [g.clone() for g in draws], np.random.get_state()[1].copy(), torch.get_rng_state()
    assert shape(draws, torch.ones(30)) == shape(draws, torch.ones(30))
    assert all(map(torch.equal, draws, copies)) and np.array_equal(state, np.random.get_state()[1])
    assert torch.equal(torch_state, torch.get_rng_state())
