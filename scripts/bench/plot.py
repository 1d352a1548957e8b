"""The plot of a benchmark: one bar per throughput case, its samples as dots, as SVG without any library."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any, Final

WIDTH: Final = 720
ROW: Final = 26
LEFT: Final = 190
RIGHT: Final = 90
TOP: Final = 44
LOOKS: Final = 'role="img" aria-label="Throughput per case in GiB/s" font-family="sans-serif" font-size="12"'
STYLE: Final = (
    "text{fill:#222}.ours{fill:#2a6fb0}.other{fill:#9aa4ad}.dot{fill:#111;fill-opacity:.55}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.dot{fill:#fff}.other{fill:#6b757d}}"
)
OURS: Final = ("random", "zero", "scattered")


def plot(result: dict[str, Any]) -> str:
    """The SVG document of a result of the benchmark."""
    rows = [(case, "") for case in result["cases"] if case["unit"] == "GiB/s"]
    rows += [(case, ", huge pages") for case in result.get("with_huge_pages", {}).get("cases", ())]
    top = max((max(case["samples"]) for case, _ in rows), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / top
    height = TOP + ROW * len(rows) + 16
    machine = result["machine"]
    heading = (
        f"{machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, {result['size_mib']} MiB over loopback"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {LOOKS}>',
        f"<style>{STYLE}</style>",
        '<text x="8" y="16" font-size="13">Throughput (GiB/s): median as bar, every sample as a dot</text>',
        f'<text x="8" y="32">{escape(heading)}</text>',
    ]
    for index, (case, suffix) in enumerate(rows):
        y = TOP + ROW * index
        median = statistics.median(case["samples"])
        kind = "ours" if case["name"] in OURS else "other"
        name = escape(case["name"] + suffix)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{name}</text>')
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y + 4}" width="{median * scale:.1f}" height="{ROW - 9}"/>')
        parts += [
            f'<circle class="dot" cx="{LEFT + sample * scale:.1f}" cy="{y + 12.5}" r="2"/>'
            for sample in case["samples"]
        ]
        end = LEFT + max(case["samples"]) * scale + 8
        parts.append(f'<text x="{end:.1f}" y="{y + 16}">{median:.2f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
