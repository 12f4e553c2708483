"""The paper's formulas: every published constant, limits, round trips, an independent twin, domains."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from report.theory import OPTIMIZERS, beta_hat, c_squared_from_b, critical_batch_size_bound, degree_of_smoothing


@pytest.mark.parametrize(
    ("optimizer", "b", "published"),
    [
        ("sgd", 512, 1280),
        ("shb", 1024, 25.3187),
        ("nshb", 512, 128),
        ("sgd", 4, 10),  # from here on WideResNet-28-10
        ("shb", 32, 0.79),
        ("nshb", 4, 1.0),
    ],
)
def test_published_c_squared_follows_from_a_power_of_two(optimizer, b, published):
    digits = len(str(published).partition(".")[2]) if isinstance(published, float) else 6
    assert round(float(c_squared_from_b(optimizer, 0.1, b, 0.5, 0.9)), digits) == published


def test_squares_of_the_published_figure():
    c_squared = c_squared_from_b("shb", 0.1, 1024, 0.5, 0.9)
    bounds = critical_batch_size_bound("shb", 0.1, c_squared, np.array([0.5, 0.7, 1.0]), 0.9)
    assert [round(bound) for bound in bounds] == [1024, 522, 256]


def test_published_delta_of_shb_elementwise():
    delta = degree_of_smoothing("shb", 0.1, np.array([8, 256, 1024, 8192]), 25.318, 1.77, 0.9)
    assert np.round(delta, 3).tolist() == [2.278, 1.627, 1.608, 1.603]


def test_floor_of_shb_is_nearly_the_bias_of_momentum():
    floor = degree_of_smoothing("shb", 0.1, 1e300, 25.318, 1.77, 0.9)
    assert floor == pytest.approx(0.1 * math.sqrt(81.9) * 1.77, rel=1e-12)
    assert floor == pytest.approx(0.1 * 0.9 * 1.77 / 0.1, rel=0.01)


@pytest.mark.parametrize("optimizer", ["shb", "nshb", "nshb_v1"])
def test_without_momentum_all_are_sgd(optimizer):
    sgd = degree_of_smoothing("sgd", 0.3, 32, 7.0)
    assert degree_of_smoothing(optimizer, 0.3, 32, 7.0, 2.0, 0.0) == sgd
    assert degree_of_smoothing(optimizer, 0.3, 32, 7.0, 2.0, 1e-9) == pytest.approx(sgd, rel=1e-7)
    assert degree_of_smoothing(optimizer, 0.3, 32, 7.0, 2.0, 0.1) > sgd * 1.01


def twin(name, lr, b, c2, k, beta):
    """Square of δ in exact fractions, β̂ by its other form: β/(1−β)² − β²/(1−β)."""
    hat = beta / (1 - beta) ** 2 - beta * beta / (1 - beta)
    v = c2 / b
    forms = {
        "sgd": v,
        "shb": v + hat * (v + k * k),
        "nshb": v / (1 - beta),
        "nshb_v1": v + (2 * beta) ** 2 * (v + k * k),
    }
    return lr * lr * forms[name]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "nshb_v1"])
def test_delta_against_an_exact_twin(name):
    draw = random.Random(name)
    for _ in range(100):
        lr, c2, k, beta = (Fraction(draw.randint(1, 999), 1000) * s for s in (1, 2000, 9, 1))
        b = draw.randint(1, 10**5)
        ours = degree_of_smoothing(name, float(lr), b, float(c2), float(k), float(beta))
        assert float(ours) ** 2 == pytest.approx(float(twin(name, lr, b, c2, k, beta)), rel=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bound_and_its_inverse_against_an_exact_twin(name):
    draw = random.Random(name)
    for _ in range(100):
        lr, c2, eps, beta = (Fraction(draw.randint(1, 999), 1000) * s for s in (1, 2000, 2, 1))
        # SHB: β̂ / β² is the factor; an identity of the two formulas, not the code's own form.
        hat = beta / (1 - beta) ** 2 - beta * beta / (1 - beta)
        factor = {"sgd": 1, "shb": hat / beta**2, "nshb": 1 / (1 - beta)}[name]
        bound = critical_batch_size_bound(name, float(lr), float(c2), float(eps), float(beta))
        assert float(bound) == pytest.approx(float(lr * c2 * factor / eps**2), rel=1e-12)
        assert c_squared_from_b(name, float(lr), bound, float(eps), float(beta)) == pytest.approx(float(c2), rel=1e-12)


def test_beta_hat():
    assert beta_hat(0.0) == 0
    assert beta_hat(0.5) == pytest.approx(1.5)
    assert beta_hat(0.9) == pytest.approx(81.9)
    assert np.all(np.diff(beta_hat(np.linspace(0, 0.99, 50))) > 0)


GOOD = {"lr": 0.1, "batch_size": 8, "c_squared": 1.0, "k": 1.0, "beta": 0.9, "eps": 0.5}
BAD = [(name, value) for name in GOOD for value in (-1e-9, math.nan, math.inf, -math.inf)]
BAD += [("lr", 0), ("batch_size", 0), ("eps", 0.0), ("beta", 1.0), ("beta", 2), ("batch_size", np.array([8, -1]))]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_outside_its_domain_an_argument_is_named_with_its_value(name, value):
    tried = 0
    for function, names in (
        (degree_of_smoothing, ("lr", "batch_size", "c_squared", "k", "beta")),
        (critical_batch_size_bound, ("lr", "c_squared", "eps", "beta")),
        (c_squared_from_b, ("lr", "batch_size", "eps", "beta")),
    ):
        if name in names:
            with pytest.raises(ValueError, match=f"^{name} is ") as caught:
                function("shb", *({**GOOD, name: value}[n] for n in names))
            assert str(np.asarray(value, dtype=float)) in str(caught.value)
            tried += 1
    assert tried


def test_zero_is_inside_where_it_makes_sense():
    assert degree_of_smoothing("shb", 0.1, 8, 0.0, 0.0, 0.0) == 0
    assert critical_batch_size_bound("nshb", 0.1, 0.0, 0.5, 0.0) == 0


def test_bound_of_shb_is_singular_without_momentum():
    for function in (critical_batch_size_bound, c_squared_from_b):
        with pytest.raises(ValueError, match=r"beta is 0\.0; SHB's bound"):
            function("shb", 0.1, 8.0, 0.5, 0.0)
        assert np.isfinite(function("nshb", 0.1, 8.0, 0.5, 0.0))


def test_unknown_optimizers_are_named():
    with pytest.raises(ValueError, match="optimizer is 'adam'"):
        degree_of_smoothing("adam", 0.1, 8, 1.0)
    for function in (critical_batch_size_bound, c_squared_from_b):
        with pytest.raises(ValueError, match="optimizer is 'nshb_v1'"):
            function("nshb_v1", 0.1, 8.0, 0.5, 0.9)
