"""report/details.py: the entries of one ω and the history of one run's gradient norms."""

import numpy as np
import pytest
from report_helpers import command, critical, edit, gaussian, measured, sampling, table
from scipy import stats

from report import details


def omegas_read(made):
    return {r["batch_size"]: r["name"] for r in made["omega"].dropna(subset="beyond_6_std").to_dict("records")}


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY nonsense", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", None])
def test_omega_of_another_batch_size_is_drawn_where_the_middle_one_is_damaged(tmp_path, damage):
    for b in (16, 64, 256):
        folder = sampling(tmp_path, "sgd", b, 0, 0.5, gaussian(b))
        if b == 64 and damage is not None:
            (folder / "omega.npy").write_bytes(damage)
        if b == 64 and damage is None:
            np.save(folder / "omega.npy", gaussian())  # float64
    assert list(omegas_read(measured(tmp_path)[1])) == [16]


def test_omegas_are_of_one_batch_size_that_all_optimizers_sampled(tmp_path):
    for optimizer, sizes in (("sgd", (8, 16, 32, 64, 128)), ("shb", (64, 128, 256, 512)), ("nshb", (128, 256, 64))):
        for b in sizes:
            for seed in (1, 0):
                sampling(tmp_path, optimizer, b, seed, 0.5, gaussian(b))
    made = measured(tmp_path)[1]
    assert omegas_read(made) == {128: "sampling-shb-b128-seed0"}
    shown = list(made["omega_histogram"]["name"].unique())
    assert shown == [f"sampling-{optimizer}-b128-seed0" for optimizer in ("sgd", "shb", "nshb")]


def test_a_damaged_omega_gives_way_to_one_of_another_common_batch_size(tmp_path):
    for optimizer, sizes in (("sgd", (8, 32, 64, 128)), ("shb", (8, 64))):
        for b in sizes:
            folder = sampling(tmp_path, optimizer, b, 0, 0.5, gaussian(b))
            if (optimizer, b) == ("sgd", 64):
                (folder / "omega.npy").unlink()
    shown = measured(tmp_path)[1]["omega_histogram"]["name"].unique()
    assert list(shown) == ["sampling-sgd-b8-seed0", "sampling-shb-b64-seed0"]


def test_without_a_common_batch_size_each_optimizer_shows_its_own_middle_one(tmp_path):
    for optimizer, sizes in (("sgd", (8, 16, 32)), ("shb", (64, 128, 256))):
        for b in sizes:
            sampling(tmp_path, optimizer, b, 0, 0.5, gaussian(b))
    assert list(omegas_read(measured(tmp_path)[1])) == [16, 128]


def test_envelope_against_a_plain_loop():
    norms = np.random.default_rng(0).random(5000).astype("<f4")
    bins = details.envelope(norms, bins=50)
    first, last = bins["first_step"].to_numpy(), bins["last_step"].to_numpy()
    assert first[0] == 1 and last[-1] == 5000 and np.array_equal(first[1:], last[:-1] + 1) and len(first) <= 50
    for a, z, lo, hi, m in bins.itertuples(index=False):
        part = norms[a - 1 : z]
        assert (lo, hi) == (part.min(), part.max())
        assert m == pytest.approx(norms[:z].astype(float).sum() / z, rel=1e-12)
    assert len(details.envelope(norms[:1])) == 1


def test_histories_are_of_the_first_middle_and_last_batch_size_and_the_lowest_sound_seed(tmp_path):
    for b in (8, 16, 32, 64, 128):
        for seed in (1, 0):
            folder = critical(tmp_path, "sgd", b, seed, {"0.5": None}, steps=20, status="not_reached")
            if (b, seed) != (32, 0):
                np.ones(20, "<f4").tofile(folder / "gradient_norms.f32")
    bins, unsound = details.gradients(measured(tmp_path)[0].runs)
    assert list(bins["name"].unique()) == [f"critical-sgd-b{b}-seed{seed}" for b, seed in ((8, 0), (32, 1), (128, 0))]
    assert list(unsound) == ["critical-sgd-b32-seed0 (gradient history only)"]


@pytest.mark.parametrize("values", [np.ones(50), np.arange(5.0), np.append(np.arange(50.0), np.nan)])
def test_entries_without_a_spread_are_refused(values):
    with pytest.raises(ValueError, match=r"omega\.npy"):
        details.pooled_spread(values.astype(np.float32))


def test_an_exactly_gaussian_vector_with_unequal_scales_is_not_called_non_normal(tmp_path):
    rng = np.random.default_rng(1)
    omega = rng.lognormal(0, 1, 100_000) * rng.normal(size=100_000)  # each coordinate exactly Gaussian
    z, share = details.pooled_spread(omega.astype(np.float32))
    assert np.all(np.diff(z) >= 0) and abs(z.mean()) < 1e-9 and z.std() == pytest.approx(1)
    assert (z**4).mean() - 3 > 50 and stats.kstest(z, "norm")[0] > 0.1
    assert share == np.mean(np.abs(omega - omega.mean()) > 6 * omega.std()) > 0.001
    folder = sampling(tmp_path / "runs", "sgd", 8, 0, 1.0, omega)
    edit(folder, "results", omega_entries=100_000)
    command(tmp_path / "runs", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    (row,) = table(tmp_path / "out", "omega", "CIFAR100_ResNet18_lr0.1")
    assert float(row["beyond_6_std"]) == pytest.approx(share)
    assert not {"k2", "k2_p", "ks_distance"} & row.keys()
    for claim in ("normality", "non-normal", "near normal", "not normal", "K²", "KS distance", "p-value is"):
        assert claim not in text
    assert "cannot tell whether ω is Gaussian" in " ".join(text.split())
