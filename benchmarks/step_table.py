"""The results of bagel_step.py in words."""

from rich.table import Table


BASELINES = {"plain": "the plain structure", "plain_cached": "the plain structure with its cache"}


def gibibytes(value: int | None) -> str:
    return f"{value / 2**30:.1f}" if value else "-"


def table(result: dict, title: str) -> Table:
    rows = Table(
        *(
            "phase",
            "seconds",
            "model PFLOP",
            "utilisation",
            "peak GiB",
            "estimated GiB",
            "plain, s",
            "its cache kept, s",
        ),
        title=title,
    )
    plain = [result.get(name, {}).get("seconds_scaled", {}) for name in BASELINES]
    for phase, found in result["phases"].items():
        rows.add_row(
            phase,
            f"{found['seconds']:.2f}",
            f"{found['model_flops'] / 1e15:.3g}",
            f"{found['utilisation']:.1%}" if found["model_flops"] else "-",
            gibibytes(found["peak_bytes"]),
            gibibytes(found["estimated_peak_bytes"]),
            *(f"{seconds[phase]:.2f}" if phase in seconds else "-" for seconds in plain),
        )
    rows.add_section()
    rows.add_row(
        "all",
        f"{result['seconds']:.2f}",
        f"{result['floor_flops'] / 1e15:.3g}",
        f"{1 / result['floor_ratio']:.1%}",
        gibibytes(result["peak_bytes"]),
        gibibytes(result["estimated_peak_bytes"]),
        *(f"{sum(seconds.values()):.2f}" if seconds else "-" for seconds in plain),
    )
    return rows


def summary(name: str, result: dict) -> list[str]:
    """Say the piece's ratios, rates and failures in lines."""
    if "error" in result:
        return [f"{name} failed in phase {result['phase']!r}: {result['error']}"]
    found = [(words, result[key]) for key, words in BASELINES.items() if key in result]
    faster = [f"{plain['ratio_seconds']:.2f}x than {words}" for words, plain in found if "error" not in plain]
    lines = [f"{name}: {result['floor_ratio']:.2f}x the counted floor"]
    if faster:
        lines.append(f"{name}: {', '.join(faster).replace('x than', 'x faster than', 1)}")
    lines += [
        f"{name}: {words} failed in phase {plain['phase']!r}: {plain['error']}"
        for words, plain in found
        if "error" in plain
    ]
    lengths, share = result["thinking_lengths"], result["log_ratio_share"]
    return [
        *lines,
        f"{name}: {result['thinking_tokens_per_second']:.0f} tokens/s (thinkings of {lengths['min']} to "
        f"{lengths['max']}, mean {lengths['mean']:.0f}), {result['image_steps_per_second']:.2f} image steps/s",
        f"{name}: rollout against training, log-ratio over the clip range at {share['numbers']} numbers: "
        f"rms {share['rms']:.2g}, max {share['max']:.2g}",
    ]
