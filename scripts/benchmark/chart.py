"""The results as a bar chart in SVG: speed as a multiple of the better of the other servers."""

from html import escape

from contenders import PEERS
from report import best_peer, median, ratio

WIDTH, LEFT, RIGHT = 860, 390, 60
BAR, GAP, GROUP = 9, 1, 40
TOP, BOTTOM = 44, 50
# What is longer is cut, and its figure says how long it is.
LONGEST = 6.0
COLOURS = {"qcow2fs": "#2563a8", PEERS[0]: "#d58a2b", PEERS[1]: "#9a9a9a"}


def draw(results, note):
    """`results`: jobs with their rounds; `note`: lines below them. Returns the SVG's text."""
    shown = [(job, rounds) for job, rounds in results
             if job.chart and ratio(rounds, best_peer) is not None]
    height = TOP + GROUP * len(shown) + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / LONGEST
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    at = LEFT
    for name, colour in COLOURS.items():
        parts.append(f'<rect x="{at}" y="14" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{at + 15}" y="23" fill="#333333">{name}</text>')
        at += 40 + 7 * len(name)
    for tick in range(1, int(LONGEST) + 1):
        x = LEFT + tick * scale
        dark = "#666666" if tick == 1 else "#e2e2e2"
        parts.append(f'<line x1="{x:.0f}" y1="{TOP - 6}" x2="{x:.0f}" y2="{height - BOTTOM}" '
                     f'stroke="{dark}"/>')
        parts.append(f'<text x="{x:.0f}" y="{TOP - 9}" fill="#666666" font-size="10" '
                     f'text-anchor="middle">{tick}x</text>')
    for row, (job, rounds) in enumerate(shown):
        top = TOP + row * GROUP + 4
        parts.append(f'<text x="{LEFT - 8}" y="{top + 18}" fill="#222222" text-anchor="end">'
                     f'{escape(job.title)}</text>')
        best = max(median(rounds, name) or 0 for name in PEERS)
        for place, (name, colour) in enumerate(COLOURS.items()):
            times = (ratio(rounds, best_peer) if name == "qcow2fs"
                     else (median(rounds, name) or 0) / best)
            y = top + place * (BAR + GAP)
            length = min(times, LONGEST) * scale
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" '
                         f'fill="{colour}"/>')
            if name == "qcow2fs":
                parts.append(f'<text x="{LEFT + length + 5:.0f}" y="{y + 9}" fill="{colour}" '
                             f'font-weight="bold">{times:.1f}x</text>')
    for line, text in enumerate(note):
        parts.append(f'<text x="{WIDTH - 10}" y="{height - 28 + 14 * line}" fill="#666666" '
                     f'font-size="10" text-anchor="end">{escape(text)}</text>')
    return "\n".join(parts) + "\n</svg>\n"
