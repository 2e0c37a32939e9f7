"""The look of the report: colours for light and for dark, the style sheet, and plots as SVG, drawn once for each.

What came from a file reaches matplotlib as text alone: `text` leaves what XML can hold, and $ begins no formula.
"""

import base64
import html
import io
import math
import warnings

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

THEMES = {  # o: ours, p: peers
    "light": {
        "page": "#fcfcfb", "ink": "#23272c", "dim": "#667079", "rule": "#dfe1df", "band": "#f2f3f1",
        "warn": "#9a5b00", "bad": "#b42318", "bar": "#b9c0c6",
        "o0": "#0a6c74", "o1": "#2c7fb8", "o2": "#7dbfbf", "o3": "#4b5fa5",
        "p0": "#c26a1b", "p1": "#7b5ea7", "p2": "#5f6b7a", "p3": "#b0455e", "p4": "#86862a", "p5": "#8d6b4f",
        "p6": "#5c9a4d",
    },
    "dark": {
        "page": "#15181b", "ink": "#e3e6e8", "dim": "#97a1a9", "rule": "#30363b", "band": "#1d2125",
        "warn": "#e0a458", "bad": "#ff7b72", "bar": "#4d565e",
        "o0": "#4fc9c4", "o1": "#6fb7e8", "o2": "#2b7f80", "o3": "#98a8ee",
        "p0": "#e8985a", "p1": "#b79be0", "p2": "#9aa6b4", "p3": "#e58a9c", "p4": "#c9c66a", "p5": "#c4a487",
        "p6": "#93c983",
    },
}
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("p", "⬟"), ("h", "⬢"), ("*", "★"))
HUES = ("o0", "p0", "o3", "p3", "p1", "p4")  # of things that are not contenders


def _variables(name):
    return "".join(f"--{key}:{value};" for key, value in THEMES[name].items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables("light")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables("dark")} }} }}
""" + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -0.01em; margin: 0 0 1rem; }
h3 { font-size: 1.05rem; margin: 2.75rem 0 0.5rem; }
p { margin: 0.25rem 0 1rem; }
header p, .dim, figcaption, summary { color: var(--dim); }
section, footer { margin-top: 2.5rem; padding-top: 1.75rem; border-top: 1px solid var(--rule); }
.warn { color: var(--warn); } .bad { color: var(--bad); } .ours { color: var(--o0); }
.tally, table, .facts dd { font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.8rem 1.5rem; margin: 0; }
.facts div { min-width: 0; }
dt { color: var(--dim); font-size: 0.8rem; } dd { margin: 0; font-size: 0.95rem; }
.tally { margin: 1.5rem 0 0; }
.scroll { overflow-x: auto; max-width: 100%; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; white-space: nowrap; }
th, td { padding: 0.3rem 0 0.3rem 1.25rem; text-align: right; font-weight: normal;
  border-top: 1px solid var(--rule); }
thead th { color: var(--dim); font-size: 0.8rem; border-top: 0; }
th:first-child { text-align: left; padding: 0.3rem 0.25rem 0.3rem 0; position: sticky; left: 0;
  background: var(--page); }
.word { text-align: left; }
.case th { color: var(--dim); font-size: 0.8rem; padding-top: 1.1rem; border-top: 0; }
.case span { position: sticky; left: 0; }
.chosen th, .chosen td { color: var(--o0); font-weight: 600; }
.note td { text-align: left; color: var(--dim); white-space: normal; min-width: 15rem; }
.note th { color: var(--dim); }
.meter { display: inline-block; width: 5rem; height: 0.45rem; margin-right: 0.75rem; border-radius: 0.25rem;
  background: var(--rule); overflow: hidden; vertical-align: 0.06rem; }
.meter i { display: block; height: 100%; background: var(--o0); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.15rem 1.1rem; margin: 0 0 0.75rem; padding: 0;
  font-size: 0.85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 3rem;
  align-items: start; margin: 0.5rem 0 1rem; }
.wide { max-width: 38rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: 0.8rem; margin-bottom: 0.25rem; }
img { display: block; width: 100%; height: auto; max-width: 100%; }
summary { cursor: pointer; font-size: 0.85rem; padding: 0.25rem 0; }
.long .scroll { max-height: 70vh; overflow-y: auto; }
.long thead th { position: sticky; top: 0; background: var(--page); z-index: 1; }
.long thead th:first-child { z-index: 2; }
code { font: 0.8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  white-space: nowrap; background: var(--band); padding: 0.25rem 0.5rem; border-radius: 0.3rem; }
.commands { margin: 0.75rem 0 0; } .commands .scroll { padding: 0.2rem 0; white-space: nowrap; }
.commands .dim { font-size: 0.8rem; }
footer h2 { font-size: 1.05rem; margin-bottom: 0.75rem; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1.25rem; margin: 0;
  font-size: 0.875rem; }
footer dt, footer dd { font-size: inherit; }
@media (max-width: 30rem) { main { padding-top: 1.5rem; } h1 { font-size: 1.6rem; }
  th[scope=row] { white-space: normal; min-width: 7rem; max-width: 9.5rem; } th, td { padding-left: 0.9rem; }
  .meter { width: 3rem; } }
"""


def text(value):
    """Anything as text for a plot: one line, no character that XML lacks."""
    plain = str(value).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "\ufffd" for c in plain)


def esc(value):
    """Anything as text for HTML, in an element or in a quoted attribute."""
    return html.escape(text(value))


def number(row, key):
    """A finite figure of a row, 0 or more; None where there is none."""
    value = row.get(key)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return value if good else None


def figure_of(value):
    """A figure with as many digits as tell something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def timed(rows):
    return [row for row in rows if number(row, "median_us")]


def plot(title, draw, size=(4.6, 2.7)):
    """A figure in HTML: draw(axes, colours) once for light, once for dark."""
    sources = []
    for colours in THEMES.values():
        settings = {
            "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "fastlm", "font.size": 9,
            "text.color": colours["ink"], "axes.labelcolor": colours["dim"], "axes.edgecolor": colours["rule"],
            "xtick.color": colours["rule"], "ytick.color": colours["rule"], "xtick.labelcolor": colours["dim"],
            "ytick.labelcolor": colours["dim"], "grid.color": colours["rule"], "grid.linewidth": 0.6,
            "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.labelsize": 8.5,
        }
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has fonts of its own
            canvas, file = Figure(figsize=size, layout="constrained"), io.StringIO()
            draw(canvas.subplots(), colours)
            canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue().replace("'DejaVu Sans', ", "system-ui, 'DejaVu Sans', ")
        sources.append(f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}")
    light, dark = sources
    width, height = (round(96 * inches) for inches in size)
    return (f'<figure><figcaption>{esc(title)}</figcaption><picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="{dark}"><img src="{light}" alt="{esc(title)}" width="{width}" height="{height}"></picture>'
            "</figure>")


def _plain(axis):
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_bars(axes, colours, rows, key, unit):
    rows = sorted(rows, key=lambda row: row["median_us"])
    kinds = ["o0" if row.get("chosen") else "o2" if row.get("ours") else "bar" for row in rows]
    names = [text(row["contender"]) for row in rows]
    axes.barh(range(len(rows)), [row[key] for row in rows], 0.62, color=[colours[kind] for kind in kinds])
    axes.set_yticks(range(len(rows)), [name if len(name) <= 26 else f"{name[:25]}…" for name in names])
    for at, (row, label) in enumerate(zip(rows, axes.get_yticklabels())):
        label.set(color=colours["ink"], fontweight="bold" if row.get("chosen") else "normal")
        told, shade = ("~", "warn") if row.get("noisy") else ("", "ink")
        axes.annotate(told + figure_of(row[key]), (row[key], at), (5, 0), textcoords="offset points", va="center",
                      color=colours[shade])
    axes.set(xlim=(0, 1.2 * max(row[key] for row in rows)), xticks=[], xlabel=unit)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines["bottom"].set_visible(False)


def draw_sweep(axes, colours, letter, lines, colour, marker):
    for name, points in lines.items():
        ours = colour[name][0] == "o"
        x, y, best = zip(*points)
        axes.plot(x, y, color=colours[colour[name]], linewidth=2 if ours else 1.1, marker=MARKERS[marker[name]][0],
                  markersize=5 if ours else 4, markerfacecolor="none" if not ours else None, zorder=3 if ours else 2)
        axes.scatter([a for a, b in zip(x, best) if b], [a for a, b in zip(y, best) if b], s=70, facecolor="none",
                     edgecolor=colours["ink"], linewidth=0.9, zorder=4)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    top = max((point[1] for points in lines.values() for point in points), default=1)
    axes.set_xscale("log", base=2)
    axes.set(ylim=(0, max(1.05, 1.08 * top) if top > 0.4 else 1.25 * top or 1), xlabel=letter, ylabel="share of roof")
    axes.set_xticks(ticks[::-(-len(ticks) // 6)])
    _plain(axes.xaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if top < 0.01 else f"{value:.0%}"))
    axes.grid(axis="y")


def draw_roofline(axes, colours, points, read, peaks, colour, marker):
    """points: (FLOP per byte, TFLOP/s, row); read in bytes per second, peaks in FLOP per second by dtype."""
    left = min(0.5 * min(x for x, *_ in points), 0.3e12 * min(peaks[name] for name in peaks) / read * 1e-12)
    right = 2.5 * max(max(x for x, *_ in points), *(peaks[name] / read for name in peaks))
    for name in peaks:
        ridge = peaks[name] / read
        axes.plot((ridge, right), [peaks[name] * 1e-12] * 2, color=colours["dim"], linewidth=1.2)
        axes.annotate(f"{name} {peaks[name] * 1e-12:.3g}", (right, peaks[name] * 1e-12), (0, 3),
                      textcoords="offset points", ha="right", va="bottom", color=colours["dim"], fontsize=8)
    ridge = max(peaks[name] for name in peaks) / read
    axes.plot((left, ridge), (read * left * 1e-12, read * ridge * 1e-12), color=colours["dim"], linewidth=1.2)
    middle = math.sqrt(left * ridge)
    axes.annotate(f"read {read * 1e-9:,.4g} GB/s", (middle, read * middle * 1e-12), (-8, 4),
                  textcoords="offset points", ha="right", va="bottom", color=colours["dim"], fontsize=8)
    for x, y, row in points:
        shade, best = colours[colour[row["op"]]], row.get("chosen")
        axes.plot(x, y, marker[row["dtype"]][0], markersize=6.5 if best else 4, color=shade,
                  alpha=1 if best else 0.65, markerfacecolor=shade if best else "none", zorder=3 if best else 2)
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOP per byte", ylabel="TFLOP/s")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.grid(which="major")
    axes.minorticks_off()


def draw_history(axes, colours, lines, files):
    """lines: name → {number of a file: µs}; files: (name, results)."""
    used = sorted({at for points in lines.values() for at in points})
    highest, lowest = (pick(us for points in lines.values() for us in points.values()) for pick in (max, min))
    if highest > 4 * lowest:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.5, highest * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
    else:
        axes.set_ylim(0, 1.2 * highest)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    bottom = -math.inf  # of the next label, in points: labels do not lie on one another
    for i, (name, points) in enumerate(sorted(lines.items(), key=lambda line: line[1][max(line[1])])):
        x, last, hue = [used.index(at) for at in points], points[max(points)], HUES[i % len(HUES)]
        axes.plot(x, list(points.values()), marker=MARKERS[i % len(MARKERS)][0], color=colours[hue], linewidth=1.8,
                  markersize=4.5)
        own = axes.transData.transform((0, last))[1] * 72 / axes.figure.dpi
        bottom = max(own, bottom)
        axes.annotate(name if len(lines) > 1 else figure_of(last), (x[-1], last), (7, bottom - own), va="center",
                      textcoords="offset points", fontsize=8, color=colours[hue])
        bottom += 10
    names = [text(files[at][1]["head"].get("commit") or files[at][0])[:12] for at in used]
    _plain(axes.yaxis)
    step = -(-len(used) // 5)
    axes.set_xticks(range(len(used))[::step], names[::step])
    axes.set(ylabel="µs", xlim=(-0.2, max(len(used) - 0.6, 1)))
    axes.grid(axis="y")
