"""What single runs show: how the entries of one ω are spread, and how ‖g‖ went from step to step."""

import numpy as np
import pandas as pd
from scipy import stats

from report import records

EDGES = np.linspace(-6, 6, 121)  # of the histogram, in standard deviations


def omega(runs, shares):
    """Return one row per sampling run that did not diverge: the parts and moments of its ω.

    shares: {name: share of the entries beyond ±6 std}, known of those ω only that were read whole.
    """
    sampled = runs[(runs["mode"] == "sampling") & ~runs["diverged"]]
    table = sampled[["name", "optimizer", "batch_size", "seed", *records.PARTS, *records.OMEGA]].reset_index(drop=True)
    table["omega_entries"] = table["omega_entries"].astype("Int64")
    return table.assign(beyond_6_std=table["name"].map(shares).astype(float))


def spread_of_omegas(runs):
    """Read one ω per optimizer; return ({name: DataFrame or dict}, {run: why its ω was not used}).

    omega_histogram: density of the standardized entries, and the normal's, in bins from left to right.
    omega_qq: quantiles of the entries beside the normal's. shares: {name: share of entries that the bins cut off}.
    """
    bars, quantiles, shares, unsound = [], [], {}, {}
    for candidates in omegas_to_read(runs):
        for run in candidates.to_dict("records"):
            try:
                z, shares[run["name"]] = pooled_spread(records.omega(run["folder"], run["omega_entries"]))
            except (ValueError, OSError) as error:
                unsound[f"{run['name']} (ω only)"] = str(error)
                continue
            bars.append(histogram(z).assign(name=run["name"]))
            quantiles.append(qq(z).assign(name=run["name"]))
            break
    return {"omega_histogram": stacked(bars), "omega_qq": stacked(quantiles), "shares": shares}, unsound


def omegas_to_read(runs):
    """Yield, for each optimizer, its sampling runs, those whose ω should rather be shown first.

    b is the middle one of those that all optimizers sampled (else of its own), the seed the lowest.
    """
    sampled = runs[(runs["mode"] == "sampling") & ~runs["diverged"]]
    by_optimizer = sampled.groupby("optimizer", observed=True)
    common = set(sampled["batch_size"])
    for _, mine in by_optimizer:
        common &= set(mine["batch_size"])
    for _, mine in by_optimizer:
        sizes = sorted(common or set(mine["batch_size"]))
        distance = np.abs(np.log(mine["batch_size"] / sizes[len(sizes) // 2]))
        mine = mine.assign(uncommon=~mine["batch_size"].isin(common), distance=distance)
        yield mine.sort_values(["uncommon", "distance", "batch_size", "seed"], kind="stable")


def pooled_spread(values):
    """Return (z, share): one ω's entries, standardized and sorted (float64), and the share of them beyond ±6 std.

    They tell how the entries are spread over the coordinates. As coordinates differ in scale they cannot tell
    whether ω is Gaussian: an exactly Gaussian vector with unequal scales looks heavy-tailed too. ValueError for
    entries that cannot be standardized.
    """
    z = np.sort(values).astype(np.float64)
    if len(z) < 20 or not np.all(np.isfinite(z)) or z[0] == z[-1]:
        raise ValueError("omega.npy: fewer than 20 entries, not all finite, or all equal")
    z = (z - z.mean()) / z.std()
    return z, float(np.mean(np.abs(z) > 6))


def histogram(z):
    """Return the density of the entries z in bins of EDGES, beside the standard normal's at their middles."""
    left, right = EDGES[:-1], EDGES[1:]
    density = np.histogram(z, EDGES)[0] / len(z) / np.diff(EDGES)
    normal = stats.norm.pdf((right + left) / 2)
    return pd.DataFrame({"left": left, "right": right, "density": density, "normal": normal})


def qq(z):
    """Return quantiles of the sorted entries z beside the normal's: 150 a tail at most, denser outwards."""
    tail = np.unique(np.round(np.geomspace(1, (len(z) + 1) // 2, 150)).astype(int))
    rank = np.union1d(tail, len(z) + 1 - tail)
    return pd.DataFrame({"normal_quantile": stats.norm.ppf((rank - 0.5) / len(z)), "omega_quantile": z[rank - 1]})


def gradients(runs):
    """Return (the `envelope`s of some runs in one table, {run: why its history was not used}).

    Of each optimizer: the first, middle and last b that have a sound history, the lowest seed of each.
    """
    tables, unsound = [], {}
    critical = runs[(runs["mode"] == "critical") & ~runs["diverged"]].sort_values("seed", kind="stable")
    for _, mine in critical.groupby("optimizer", observed=True):
        at = {}
        for run in mine.sort_values("batch_size", kind="stable").to_dict("records"):
            try:
                norms = records.gradient_norms(run["folder"], run["steps"])
            except (ValueError, OSError) as error:
                unsound[f"{run['name']} (gradient history only)"] = str(error)
                continue
            if run["batch_size"] not in at:
                at[run["batch_size"]] = envelope(norms).assign(name=run["name"])
        sizes = sorted(at)
        chosen = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}) if sizes else []
        tables += [at[b] for b in chosen]
    return stacked(tables), unsound


def envelope(norms, bins=600):
    """Return one row per log-spaced bin of steps, `bins` at most: its least and greatest norm, so that no excursion
    hides, and the mean of all norms up to its last step.
    """
    starts = np.unique(np.round(np.geomspace(1, len(norms) + 1, bins + 1)).astype(int))
    first, last = starts[:-1], starts[1:] - 1
    return pd.DataFrame(
        {
            "first_step": first,
            "last_step": last,
            "norm_min": np.minimum.reduceat(norms, first - 1),
            "norm_max": np.maximum.reduceat(norms, first - 1),
            "running_mean": np.cumsum(norms, dtype=np.float64)[last - 1] / last,
        }
    )


def stacked(tables):
    """Return the tables one below the other, their name first; an empty one for none."""
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "name", table.pop("name"))
    return table
