"""Numbers and rows of tables as words, for the sentences of the report."""

import math


def short(value):
    """Return a number with three digits, or as a whole number where it has more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def each(table, text):
    """Return "SGD …, SHB …": `text` of each row, as a dict, behind the name of its optimizer."""
    return ", ".join(f"{row['optimizer'].upper()} {text(row)}" for row in table.to_dict("records"))


def with_error(value, se):
    """Return "0.0957 ± 0.0070": the 95 % error, 1.96 standard errors, in two digits, and the value to its place."""
    error = 1.96 * se
    if not (math.isfinite(error) and error > 0):
        return f"{value:.3g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def of_seeds(n):
    """Return "n = 2 seeds"."""
    return f"n = {n:g} seed" + ("s" if n > 1 else "")


def span_of_seeds(counts):
    """Return "n = 1–2 seeds": from the least to the greatest of several counts."""
    low, high = min(counts), max(counts)
    return of_seeds(high) if low == high else f"n = {low:g}–{high:g} seeds"


def steps_of(table):
    """Return "0, 50, 1,600"."""
    return ", ".join(f"{step:,}" for step in sorted(table["steps"].unique()))
