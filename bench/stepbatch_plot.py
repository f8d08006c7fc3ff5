"""The plot of bench.stepbatch: latency by load, a line for each side, as an SVG written by hand."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_SERIES = (("mean_s", "mean"), ("p50_s", "median"), ("p99_s", "99th percentile"))
_COLOURS = ("#8c8c8c", "#d99000", "#c44e52", "#2060a8", "#57a773", "#8172b3")
_WIDTH, _HEIGHT, _GAP, _LEFT, _TOP, _BELOW = 230, 220, 62, 56, 34, 92


def write_plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes the SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plot(figures["loads"]))


def plot(loads: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """An SVG of three panels. `loads`: figures by load and side, seconds under `mean_s`, `p50_s` and `p99_s`."""
    sides = list(next(iter(loads.values())))
    values = [one[name] for found in loads.values() for one in found.values() for name, _ in _SERIES]
    ticks = _ticks(min(values), max(values))
    width = _LEFT + len(_SERIES) * (_WIDTH + _GAP)
    parts = [
        _panel(place, title, {side: _line(loads, side, name) for side in sides}, list(loads), ticks)
        for place, (name, title) in enumerate(_SERIES)
    ]
    legend = [_key(place, side) for place, side in enumerate(sides)]
    height = _TOP + _HEIGHT + _BELOW
    content = "".join((*parts, *legend))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>{content}</svg>\n'
    )


def _line(loads: Mapping[str, Mapping[str, Mapping[str, float]]], side: str, name: str) -> dict[str, float]:
    return {load: found[side][name] for load, found in loads.items() if side in found}


def _ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 of each power of ten around the values: the axis is logarithmic."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    low = max((mark for mark in marks if mark <= least), default=marks[0])
    high = min((mark for mark in marks if mark >= most), default=marks[-1])
    return [mark for mark in marks if low <= mark <= high]


def _panel(
    place: int, title: str, lines: Mapping[str, Mapping[str, float]], loads: Sequence[str], ticks: Sequence[float]
) -> str:
    left = _LEFT + place * (_WIDTH + _GAP)
    xs = {load: left + _WIDTH * (0.1 + 0.8 * i / max(1, len(loads) - 1)) for i, load in enumerate(loads)}

    def y(value: float) -> float:
        share = math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return _TOP + _HEIGHT * (1 - share)

    drawn = [f'<text x="{left + _WIDTH / 2}" y="{_TOP - 14}" text-anchor="middle">{escape(title)}, s</text>']
    for tick in ticks:
        drawn.append(f'<path d="M{left} {y(tick):.1f}h{_WIDTH}" stroke="#e4e4e4"/>')
        drawn.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for load, x in xs.items():
        drawn.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{load}</text>')
    for colour, line in zip(_COLOURS, lines.values(), strict=False):
        points = [(xs[load], y(value)) for load, value in line.items()]
        path = " ".join(f"{x:.1f},{height:.1f}" for x, height in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{height:.1f}" r="3" fill="{colour}"/>' for x, height in points]
    below = "load, of plain diffusers’ capacity"
    drawn.append(f'<text x="{left + _WIDTH / 2}" y="{_TOP + _HEIGHT + 36}" text-anchor="middle">{below}</text>')
    return "".join(drawn)


def _key(place: int, side: str) -> str:
    x, y = _LEFT + 170 * (place % 5), _TOP + _HEIGHT + 60 + 18 * (place // 5)
    return (
        f'<rect x="{x}" y="{y - 8}" width="18" height="4" fill="{_COLOURS[place % len(_COLOURS)]}"/>'
        f'<text x="{x + 24}" y="{y}">{escape(side)}</text>'
    )
