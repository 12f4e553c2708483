"""Numbers and rows of tables as words, for the sentences of the report."""


def short(value):
    """Return a number with three digits, or as a whole number where it has more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def each(table, text):
    """Return "SGD …, SHB …": `text` of each row, as a dict, behind the name of its optimizer."""
    return ", ".join(f"{row['optimizer'].upper()} {text(row)}" for row in table.to_dict("records"))
