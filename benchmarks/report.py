"""The report: what results files tell, as one HTML page that needs nothing but itself.

    of every case of a device, the newest rows     summary, roofline, sweeps or bars, tables
    of all files of a device                       our chosen kernel over commits

There is no script, nothing is asked of a network, and all that came from a file is escaped.
"""

import shlex
import statistics
from collections import defaultdict

from . import look
from .look import HUES, MARKERS, STYLE, esc, number, plot, text, timed

POINTS = 3  # shapes that make a sweep; fewer are bars


def page(results, resources):
    """The page, of (name, {head, roofs, rows}) of results files in the order of their dates, and of resource rows."""
    devices = defaultdict(list)
    for name, found in results:
        devices[text(found["head"].get("device") or "unknown device")].append((name, found))
    count = f"{len(results)} results file{'s' * (len(results) != 1)}"
    about = f"{count} from {len(devices)} device{'s' * (len(devices) != 1)}" if results else "No results yet."
    return "".join((
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fastlm report</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<style>{STYLE}</style></head>\n<body><main><header><h1>fastlm report</h1><p>{about}</p></header>\n",
        *(_device(device, files) for device, files in devices.items()),
        _resources(resources), LEGEND if results else "", "</main></body></html>\n",
    ))


LEGEND = """<footer><h2>How to read it</h2><dl>
<dt>µs</dt><dd>median of a call, operands beyond the cache unless the case says warm</dd>
<dt>±</dt><dd>distance of the quartiles, or of the medians of two passes, over the median;
<span class="warn">~</span> where the machine was too busy to tell</dd>
<dt>roof</dt><dd>share of what the bytes or the FLOPs allow on this device, as measured there</dd>
<dt>error</dt><dd>against fp64, over what the numerics policy allows; above 1 a kernel of ours is WRONG
and not timed</dd>
<dt>peer ÷ ours</dt><dd>time of the fastest peer over ours, a geometric mean over the shapes; above 1 ours is
faster</dd>
<dt>× ours</dt><dd>time over that of the kernel of ours that dispatch chooses; above 1 is slower than ours</dd>
</dl></footer>
"""


# ---- rows


def share(value):
    return f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def sizes(shape):
    return " ".join(f"{letter}={size}" for letter, size in dict(shape).items())


def case_of(row):
    """(op, part, dtype, shape, cold): what makes rows comparable."""
    return row["op"], row["part"], row["dtype"], tuple(row["shape"].items()), bool(row.get("cold", True))


def by_case(rows):
    cases = defaultdict(list)
    for row in rows:
        cases[case_of(row)].append(row)
    return cases


def chosen(rows):
    """The row of ours that dispatch chooses, where it was timed; None else."""
    return next((row for row in timed(rows) if row.get("chosen")), None)


def families(shapes):
    """(letter, [shapes that differ in its size alone, or in what follows from it]) for every sweep among shapes."""
    counts = {letter: len({shape.get(letter) for shape in shapes}) for letter in shapes[0]}
    swept = max(counts, key=lambda letter: (counts[letter], letter in "TSN"))
    follows = {letter for letter in counts
               if len({(shape.get(swept), shape.get(letter)) for shape in shapes}) == counts[swept]}
    groups = defaultdict(list)
    for shape in sorted(shapes, key=lambda shape: shape.get(swept, 0)):
        groups[tuple((letter, size) for letter, size in shape.items() if letter not in follows)].append(shape)
    return swept, list(groups.values())


# ---- the parts of a device


def _device(device, files):
    cases, sources = {}, {}
    for name, found in files:
        for case, rows in by_case(found["rows"]).items():
            cases[case], sources[case] = rows, (name, found["head"])
    head, roofs = files[-1][1]["head"], files[-1][1]["roofs"]
    ops = list(dict.fromkeys(case[0] for case in cases))
    return "".join((
        f"<section><h2>{esc(device)}</h2>", _facts(head, roofs), _tally(cases), _summary(cases),
        _roofline(cases, roofs, ops),
        *(_op(op, {case: rows for case, rows in cases.items() if case[0] == op}, sources) for op in ops),
        _history(files), "</section>\n",
    ))


def _facts(head, roofs):
    facts = {name: head.get(name) for name in
             ("threads", "load", "python", "torch", "triton", "transformers", "fastlm")}
    facts |= {name: f"{rate * 1e-9:,.4g} GB/s" for name in ("read", "copy") if (rate := number(roofs, name))}
    facts |= {f"products {name}": f"{rate * 1e-12:.3g} TFLOP/s" for name in _peaks(roofs)
              if (rate := number(_peaks(roofs), name))}
    told = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc('none' if value is None else value)}</dd></div>"
                   for name, value in facts.items())
    when = f"commit {head.get('commit') or 'unknown'}, {head.get('date') or 'no date'}"
    return f'<p class="dim">{esc(when)}</p><dl class="facts">{told}</dl>'


def _peaks(roofs):
    products = roofs.get("products")
    return products if isinstance(products, dict) else {}


def _tally(cases):
    rows = [row for some in cases.values() for row in some]
    counts = [("", len(cases), "cases"), ("", len(timed(rows)), "rows timed"),
              ("warn", sum(bool(row.get("noisy")) for row in rows), "noisy"),
              ("dim", sum("refused" in row for row in rows), "took no part"),
              ("bad", sum(bool(row.get("wrong")) for row in rows), "WRONG"),
              ("bad", sum("failed" in row for row in rows), "FAILED")]
    told = (f'<span class="{kind if count else "dim"}">{count} {what}</span>' for kind, count, what in counts)
    return f'<p class="tally">{" · ".join(told)}</p>'


def _summary(cases):
    """Our chosen kernel of every op, part and dtype: its share of the roof, and against the fastest peer."""
    groups = defaultdict(list)
    for case, rows in cases.items():
        if (ours := chosen(rows)) is not None:
            peers = [row for row in timed(rows) if not row.get("ours")]
            groups[case[:3]].append((ours, min(peers, key=lambda row: row["median_us"], default=None)))
    lines = []
    for (op, part, dtype), pairs in groups.items():
        roof = [value for ours, _ in pairs if (value := number(ours, "of_roof")) is not None]
        ratios = [peer["median_us"] / ours["median_us"] for ours, peer in pairs if peer]
        noisy = any(row.get("noisy") for pair in pairs for row in pair if row)
        names = list(dict.fromkeys(peer["contender"] for _, peer in pairs if peer))
        mean, against = statistics.median(roof) if roof else None, statistics.geometric_mean(ratios) if ratios else None
        meter = f'<span class="meter"><i style="width:{min(mean, 1):.1%}"></i></span>' if roof else ""
        extent = f"{min(ratios):.2f}–{max(ratios):.2f}" if len(ratios) > 1 else ""
        kind = "warn" if against and against < 0.95 else "ours" if against and against > 1.05 else ""
        mark = '<span class="warn">~</span>' if noisy else ""
        lines.append(
            f'<tr><th scope="row">{esc(op)} <span class="dim">{esc(part)}</span></th><td class="word">{esc(dtype)}</td>'
            f"<td>{len(pairs)}</td><td class=\"roof\">{meter}{share(mean) if roof else '—'}</td>"
            f'<td>{mark}<b class="{kind}">{f"{against:.2f}" if against else "—"}</b></td><td class="dim">{extent}</td>'
            f'<td class="word">{esc(names[0] if len(names) == 1 else "several") if names else "—"}</td></tr>'
        )
    titles = ("op", "dtype", "shapes", "share of roof", "peer ÷ ours", "over shapes", "fastest peer")
    return "<h3>Ours at a glance</h3>" + table(titles, lines, words={0, 1, 6}) if lines else ""


def _op(op, cases, sources):
    rows = [row for some in cases.values() for row in some]
    names = sorted(dict.fromkeys((not row.get("ours"), row["contender"]) for row in timed(rows)), key=lambda n: n[0])
    ours = [name for foreign, name in names if not foreign]
    peers = [name for foreign, name in names if foreign]
    colour = {name: f"o{i % 4}" for i, name in enumerate(ours)} | {name: f"p{i % 7}" for i, name in enumerate(peers)}
    marker = {name: i % len(MARKERS) for i, name in enumerate(ours + peers)}
    plots, swept_any = [], False
    for part, dtype, cold in dict.fromkeys((case[1], case[2], case[4]) for case in cases):
        here = {case[3]: some for case, some in cases.items() if (case[1], case[2], case[4]) == (part, dtype, cold)}
        title = " · ".join((part, dtype) if cold else (part, dtype, "warm"))
        letter, groups = families([dict(shape) for shape in here])
        for group in groups:
            if len(group) >= POINTS and op not in ("generate", "train"):
                lines = _lines(letter, group, here)
                plots.append(plot(" · ".join(filter(None, (title, sizes(_shared(group))))),
                                  lambda axes, colours, lines=lines, letter=letter:
                                      look.draw_sweep(axes, colours, letter, lines, colour, marker)))
                swept_any = True
                continue
            for shape in group:
                bars = timed(here[tuple(shape.items())])
                tokens = [row for row in bars if number(row, "tokens_per_s")]
                bars, key = (tokens, "tokens_per_s") if tokens else (bars, "median_us")
                if len(bars) > 1:
                    unit = "tokens/s, more is better" if tokens else "µs, less is better"
                    plots.append(plot(f"{title} · {sizes(shape)}",
                                      lambda axes, colours, bars=bars, key=key, unit=unit:
                                          look.draw_bars(axes, colours, bars, key, unit),
                                      size=(4.6, 0.55 + 0.27 * len(bars))))
    legend = "".join(f'<li><span style="color:var(--{colour[name]})">{MARKERS[marker[name]][1]}</span> {esc(name)}</li>'
                     for name in ours + peers)
    many = len(rows) > 80
    return "".join((
        f"<h3>{esc(op)}</h3>", f'<ul class="legend">{legend}</ul>' if swept_any else "",
        f'<div class="plots">{"".join(plots)}</div>' if plots else "",
        f'<details{"" if many else " open"}><summary>{len(rows)} rows</summary>{_rows(cases)}</details>',
        _commands(op, cases, sources),
    ))


def _shared(shapes):
    """The sizes that all shapes have in common."""
    return {letter: size for letter, size in shapes[0].items() if all(shape.get(letter) == size for shape in shapes)}


def _lines(letter, group, here):
    """contender → [(size, share of roof, chosen)]"""
    lines = defaultdict(list)
    for shape in group:
        for row in timed(here[tuple(shape.items())]):
            if (height := number(row, "of_roof")) is not None:
                lines[row["contender"]].append((shape[letter], height, bool(row.get("chosen"))))
    return lines


def _commands(op, cases, sources):
    """What repeats the rows of an op, for every file they came from."""
    lines = []
    for name, head in {sources[case][0]: sources[case][1] for case in cases}.items():
        mine = [case for case in cases if sources[case][0] == name]
        shapes, dtypes = {case[3] for case in mine}, dict.fromkeys(case[2] for case in mine)
        words = ["fastlm", "bench", op]
        if len(shapes) == 1:
            words += ["--shape", ",".join(f"{letter}={size}" for letter, size in next(iter(shapes)))]
        if set(dtypes) != {"fp32", "bf16"}:
            words += [word for dtype in dtypes for word in ("--dtype", dtype)]
        words += ["--warm"] * (not mine[0][4]) + ["--out", name]
        when = f"{head.get('commit') or 'no commit'}, {head.get('date') or 'no date'}"
        lines.append(f'<div class="scroll"><code>{esc(shlex.join(words))}</code>'
                     f'<span class="dim"> {esc(when)}</span></div>')
    return f'<div class="commands">{"".join(lines)}</div>'


def _roofline(cases, roofs, ops):
    """The plot of all rows that count both bytes and FLOPs, beneath this device's roofs."""
    points = [(1e3 * row["tflop_per_s"] / row["gb_per_s"], row["tflop_per_s"], row) for rows in cases.values()
              for row in timed(rows) if number(row, "tflop_per_s") and number(row, "gb_per_s")]
    read, peaks = number(roofs, "read"), _peaks(roofs)
    dtypes = [name for name in dict.fromkeys(row["dtype"] for *_, row in points) if number(peaks, name)]
    points = [point for point in points if point[2]["dtype"] in dtypes]
    if not points or not read:
        return ""
    shown = [op for op in ops if any(row["op"] == op for *_, row in points)]
    colour = {op: HUES[i % len(HUES)] for i, op in enumerate(shown)}
    marker = {dtype: MARKERS[i % len(MARKERS)] for i, dtype in enumerate(dtypes)}
    drawn = plot("Every row that counts bytes and FLOPs", lambda axes, colours: look.draw_roofline(
        axes, colours, points, read, {name: peaks[name] for name in dtypes}, colour, marker), size=(5.2, 3.4))
    legend = "".join(f'<li><span style="color:var(--{hue})">●</span> {esc(op)}</li>' for op, hue in colour.items())
    if len(dtypes) > 1:
        legend += "".join(f'<li class="dim">{glyph} {esc(dtype)}</li>' for dtype, (_, glyph) in marker.items())
    return (f'<h3>Roofline</h3><ul class="legend">{legend}<li class="dim">filled: ours, as chosen; hollow: all others'
            f'</li></ul><div class="wide">{drawn}</div>')


def _history(files):
    """Our chosen kernel's µs over a device's files, where there are two or more."""
    lines = defaultdict(dict)  # case → file's number → µs
    for at, (_, found) in enumerate(files):
        for case, rows in by_case(found["rows"]).items():
            if (ours := chosen(rows)) is not None:
                lines[case][at] = ours["median_us"]
    groups = defaultdict(dict)
    for case, points in lines.items():
        if len(points) > 1:
            groups[case[:3] + case[4:]][case[3]] = points
    plots = []
    for (op, part, dtype, cold), shapes in groups.items():
        for family in families([dict(shape) for shape in shapes])[1]:
            same = _shared(family)
            mine = {sizes({key: size for key, size in shape.items() if key not in same}): shapes[tuple(shape.items())]
                    for shape in family}
            title = " · ".join(filter(None, (op, part, dtype, "" if cold else "warm", sizes(same))))
            plots.append(plot(title, lambda axes, colours, mine=mine: look.draw_history(axes, colours, mine, files)))
    told = ("<h3>Over commits</h3><p>The chosen kernel's time in every results file of this device, by commit; the "
            "machine's own mood is in it.</p>")
    return f'{told}<div class="plots">{"".join(plots)}</div>' if plots else ""


# ---- tables


COLUMNS = {  # title → the cell of a row and our time, or None where the row has no such figure
    "µs": lambda row, ours: f"{row['median_us']:,.1f}",
    "±": lambda row, ours: None if (spread := number(row, "spread")) is None else
    f'<span class="warn">~{spread:.0%}</span>' if row.get("noisy") else f"{spread:.0%}",
    "tokens/s": lambda row, ours: f"{value:,.1f}" if (value := number(row, "tokens_per_s")) else None,
    "GB/s": lambda row, ours: f"{value:,.1f}" if (value := number(row, "gb_per_s")) else None,
    "TFLOP/s": lambda row, ours: f"{value:.3g}" if (value := number(row, "tflop_per_s")) else None,
    "MiB": lambda row, ours: f"{value:,}" if (value := number(row, "peak_mib")) else None,
    "roof": lambda row, ours: None if (value := number(row, "of_roof")) is None else share(value),
    "error": lambda row, ours: None if row.get("error") is None else
    f'<span class="{"warn" if not (number(row, "error") or 0) <= 1 else ""}">{_error(row)}</span>',
    "× ours": lambda row, ours: f"{row['median_us'] / ours:.2f}" if ours else None,
}


def _error(row):
    return "∞" if (value := number(row, "error")) is None else f"{value:.2f}"


def table(titles, lines, words=(0,)):
    """An HTML table in a box of its own that scrolls; the columns `words` are set left, the others right."""
    heads = "".join(f'<th scope="col"{" class=word" * (i in words)}>{esc(title)}</th>'
                    for i, title in enumerate(titles))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _rows(cases):
    every = [row for rows in cases.values() for row in timed(rows)]
    titles = [title for title, cell in COLUMNS.items() if any(cell(row, 1.0) is not None for row in every)]
    lines = []
    for (_, part, dtype, shape, cold), rows in cases.items():
        told = " · ".join((part, dtype, sizes(shape), *(() if cold else ("warm",))))
        lines.append(f'<tr class="case"><th colspan="{len(titles) + 1}"><span>{esc(told)}</span></th></tr>')
        ours = (chosen(rows) or {}).get("median_us")
        for row in rows:
            notes, name = [], esc(row["contender"])
            if isinstance(row.get("ran"), dict):
                notes.append(esc("ran: " + ", ".join(f"{op} on {backend}" for op, backend in row["ran"].items())))
            if isinstance(row.get("latency_us"), list):
                steps = [f"{value / 1e3:,.2f}" for value in row["latency_us"] if isinstance(value, (int, float))]
                notes.append(f'a token takes {" / ".join(steps)} ms (50, 90, 99 of 100)')
            if row.get("wrong"):
                notes.append(f'<b class="bad">WRONG: {_error(row)} of the allowed error</b>')
            elif "failed" in row:
                notes.append(f'<b class="bad">FAILED: {esc(row["failed"])}</b>')
            elif "refused" in row:
                notes.append(esc(row["refused"]))
            if number(row, "median_us"):
                cells = "".join(f"<td>{COLUMNS[title](row, ours) or '—'}</td>" for title in titles)
                kind = ' class="chosen"' if row.get("chosen") else ""
                lines.append(f'<tr{kind}><th scope="row">{name}</th>{cells}</tr>')
                name = ""
            if notes:
                lines.append(f'<tr class="note"><th scope="row">{name}</th><td colspan="{max(len(titles), 1)}">'
                             f'{"; ".join(notes)}</td></tr>')
    return table(("", *titles), lines)


def _resources(rows):
    if not rows:
        return ""
    titles = list(dict.fromkeys(name for row in rows for name in row))
    words = {i for i, name in enumerate(titles) if any(isinstance(row.get(name), str) for row in rows)}

    def cell(i, name, row):
        told = f"{value:,}" if isinstance(value := row.get(name, "—"), int) else esc(value)
        kind = "word" if i in words else "warn" if name == "spills" and number(row, name) else ""
        return f'<th scope="row">{told}</th>' if not i else f'<td class="{kind}">{told}</td>'

    lines = (f"<tr>{''.join(cell(i, name, row) for i, name in enumerate(titles))}</tr>" for row in rows)
    return (f'<section><h2>Resources of the compiled kernels</h2><details class="long"><summary>{len(rows)} kernels, '
            "as compiled for GPUs that need not be here</summary>"
            f'{table([name.replace("_", " ") for name in titles], lines, words)}</details></section>\n')
