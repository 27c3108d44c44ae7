"""Rounding of what a run writes."""


def digits(value: float, number: int = 5) -> float:
    """Round to so many significant digits; whole numbers stay whole."""
    return value if isinstance(value, int) else float(f"{value:.{number}g}")
