"""The report: everything is told, nothing believed, and a browser shows it on a phone, in light and in dark."""

import base64
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from fastlm.benchmarks import harness
from fastlm.benchmarks.report import families, page
from fastlm.cli.report import report

ROOFS = {"copy": 3.9e12, "read": 4.1e12, "launch": 2e-6, "taken": 0.0,
         "products": {"fp32": 48e12, "bf16": 760e12, "fp16": 740e12}}
HOSTILE = "<script>alert('$x^$')</script>\"&\x00"


def head(commit="abc1234", device="NVIDIA H200", day=1, **more):
    return {"device": device, "kind": "cuda", "threads": 16, "python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1",
            "transformers": None, "fastlm": "0.1.0", "commit": commit, "date": f"2026-11-{day:02} 10:00:00 +0000",
            "load": 0.4, **more}


def row(contender, us, *, op="softmax_xent", part="forward", dtype="bf16", shape=None, bytes=3.3e9, flops=0, **more):
    """A timed row as the harness writes it; ours where the contender begins with fastlm."""
    shape = shape or {"N": 32768, "V": 50257}
    floor = max(bytes / ROOFS["copy"], flops / ROOFS["products"][dtype])
    return {"op": op, "part": part, "dtype": dtype, "shape": shape, "cold": True, "contender": contender,
            "ours": contender.startswith("fastlm"), "chosen": contender == "fastlm triton", "error": 0.31,
            "median_us": us, "spread": 0.02, "noisy": False, "of_roof": floor / us * 1e6, "samples_us": [us] * 3,
            "gb_per_s": bytes / us * 1e-3, "tflop_per_s": flops / us * 1e-6, **more}


def refused(contender, why, **more):
    names = ("op", "part", "dtype", "shape", "cold", "contender", "ours", "error", "wrong")
    return {key: value for key, value in row(contender, 1.0, **more).items() if key in names} | (
        {"refused": why} if why else {})


def attention(speed=1.0):
    """A sweep over T of attention, of two heads' sizes, with peers."""
    for D, T in ((D, T) for D in (64, 128) for T in (1024, 2048, 4096, 8192)):
        shape, H = {"B": 16384 // T, "T": T, "H": 12, "D": D}, 12
        work = dict(op="attention", shape=shape, bytes=4 * 16384 * H * D * 2, flops=2 * 16384 * T * H * D)
        best = work["flops"] / 760e12 * 1e6
        for part, factor in (("forward", 1), ("forward + backward", 3.5)):
            for name, share in (("fastlm triton", 0.62), ("fastlm cuda", 0.18), ("SDPA, math", 0.05), ("cuDNN", 0.71),
                                ("FlashAttention-2", 0.48), ("efficient", 0.3), ("torch.compile", 0.5)):
                us = factor * best / share / (1 if name == "cuDNN" else speed) * (1 + 400 / T) + 6
                work_done = work | {"flops": work["flops"] * factor}
                yield row(name, us, part=part, **work_done)


def results(speed=1.0, **about):
    """A results file with a sweep, bars, programs, and rows of every kind."""
    rows = list(attention(speed))
    for dtype, part in ((dtype, part) for dtype in ("fp32", "bf16") for part in ("forward", "forward + backward")):
        size = (2 if dtype == "fp32" else 1) * (3 if part != "forward" else 1)
        work = dict(part=part, dtype=dtype, bytes=3.3e9 * size)
        rows += [row("fastlm triton", 930.0 * size / speed, **work), row("fastlm cuda", 1010.0 * size, **work),
                 row("eager", 3520.0 * size, **work),
                 row("torch.compile", 1390.0 * size, noisy=True, spread=0.37, **work),
                 refused("Liger", "not installed: pip install liger-kernel", **work)]
    for B, S in ((1, 1024), (8, 1024), (64, 512), (256, 512), (1024, 512)):
        work = dict(op="decode_attention", part="decode", shape={"B": B, "S": S, "H": 12, "D": 64},
                    bytes=4 * B * S * 12 * 64, flops=4 * B * S * 12 * 64)
        floor = work["bytes"] / 4.1e12 * 1e6
        rows += [row("fastlm triton", floor / 0.83 + 5 / speed, **work), row("SDPA", floor / 0.4 + 9, **work),
                 row("FlashInfer", floor / 0.8 + 6, **work)]
        rows.append(refused("fastlm cuda", None, error=3.2, wrong=True, **work))
    for B in (1, 64):
        for part in ("prefill", "decode"):
            for name, us in (("fastlm", 900.0), ("transformers", 6100.0), ("transformers, compiled", 1500.0)):
                us *= (4 if part == "prefill" else 1) / (speed if name == "fastlm" else 1)
                step = row(name, us, op="generate", part=part, shape={"B": B, "T": 512, "N": 128},
                           chosen=name == "fastlm")
                del step["gb_per_s"], step["tflop_per_s"]
                rows.append(step | {"tokens_per_s": B / us * 1e6} | (
                    {"latency_us": [880.0, 990.0, 1300.0]} if name == "fastlm" and part == "decode" else {}))
    return {"head": head(**about), "roofs": ROOFS, "rows": rows}


RESOURCES = [
    {"kernel": f"attention_fwd D=64 128x{width}", "dtype": dtype, "sm": sm, "registers": 168 + width,
     "spills": width // 128 * 4, "shared": 49152 + width, "threads": 256, "occupancy": 0.25, "wgmma": 8, "tma": 3,
     "wide_loads": 0, "wide_stores": 4}
    for width in (64, 128) for dtype in ("bf16", "fp16") for sm in (80, 90, 100)
]


class Reader(HTMLParser):
    """What a page holds: its tags, its addresses, its text, its plots, in order."""

    def __init__(self, written):
        super().__init__()
        self.tags, self.addresses, self.words, self.alone = [], [], [], []
        self.feed(written)
        self.text = " ".join(" ".join(self.words).split())
        self.plots = [base64.b64decode(uri.split(",")[1]).decode() for uri in self.addresses]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.words.append(data)


def of(*rows, **about):
    return {"head": head(**about), "roofs": ROOFS, "rows": list(rows)}


def read(*files, resources=()):
    return Reader(page([(f"results/{i}.json", found) for i, found in enumerate(files)], list(resources)))


def test_every_fact_and_figure_is_told():
    told = read(results(), resources=RESOURCES).text
    for fact in ("NVIDIA H200", "abc1234", "2026-11-01 10:00:00 +0000", "2.13.0", "transformers none", "4,100 GB/s",
                 "760 TFLOP/s", "fastlm bench attention --dtype bf16 --out results/0.json",
                 "fastlm bench softmax_xent --shape N=32768,V=50257 --out results/0.json",
                 "1,390.0 ~37%", "not installed: pip install liger-kernel", "WRONG: 3.20 of the allowed error",
                 "5 WRONG", "4 noisy", "a token takes 0.88 / 0.99 / 1.30 ms", "12 kernels", "3.78"):
        assert fact in told, fact


def test_nothing_is_asked_of_a_network_and_nothing_runs():
    found = read(results(), results(1.1, day=2), resources=RESOURCES)
    assert "script" not in found.tags and "link" not in found.tags and "iframe" not in found.tags
    assert len(found.addresses) > 20 and all(uri.startswith("data:image/svg+xml;base64,") for uri in found.addresses)
    for svg in found.plots:
        ElementTree.fromstring(svg)
        assert not re.search(r'(?:src|href)="(?!#)', svg) and "<script" not in svg and "url(http" not in svg
    assert "http" not in "".join(re.findall(r"url\([^)]*\)|@import[^;]*", page([("r", results())], [])))


def test_light_and_dark_plots_come_in_pairs_and_are_the_same_each_time():
    once, again = (page([("r.json", of(row("fastlm triton", 1.0), row("eager", 2.0)))], []) for _ in range(2))
    assert once == again
    dark, light = Reader(once).plots
    assert dark != light and all("fastlm triton" in svg for svg in (dark, light))


def test_hostile_text_is_shown_and_never_markup():
    shape = {"N<b>": 3, "V": 4}
    rows = [row("fastlm triton", 10.0, op=HOSTILE, part=HOSTILE, shape=shape),
            row(HOSTILE, 20.0, op=HOSTILE, part=HOSTILE, shape=shape),
            refused("x" + HOSTILE, HOSTILE, op=HOSTILE, part=HOSTILE, shape=shape),
            refused("\ud800 \u202e" + HOSTILE, HOSTILE)]
    found = of(*rows, device=HOSTILE, commit=HOSTILE, date=HOSTILE, torch=HOSTILE)
    written = page([(HOSTILE, found), ("again" + HOSTILE, found)], [{"kernel": HOSTILE, HOSTILE: HOSTILE}])
    written.encode()
    found = Reader(written)
    assert "<script" not in written and "script" not in found.tags and "b" in found.tags and "<b>=" not in written
    assert "alert('$x^$')</script>\"&\ufffd" in found.text
    assert found.plots
    for svg in found.plots:
        assert "<script" not in svg and ElementTree.fromstring(svg) is not None


@pytest.mark.parametrize("rows", [
    [], [refused("Liger", "runs on a GPU only")], [row("fastlm triton", 5.0)], [row("eager", 5.0)],
    *([row("fastlm triton", 5.0) | {"median_us": us}] for us in (float("nan"), "soon", 0, None, True)),
    [row("fastlm triton", 5.0, error=float("inf"), of_roof=None, gb_per_s=None, spread="x", shape={"N": 1})],
])
def test_few_or_broken_rows_are_a_page_still(rows):
    assert "NVIDIA H200" in read(of(*rows)).text


def test_what_failed_and_who_ran_a_part_is_told():
    ran = {"attention_qkv_fwd": "cuda", "attention_qkv_bwd": "torch<b>"}
    told = read(of(row("fastlm triton", 5.0), refused("fastlm cuda", None) | {"failed": "no kernel <b>image"},
                   row("fastlm torch", 6.0, ran=ran), row("eager", 7.0, ran="odd"))).text
    assert "1 FAILED" in told and "FAILED: no kernel <b>image" in told and "0 WRONG" in told
    assert "ran: attention_qkv_fwd on cuda, attention_qkv_bwd on torch<b>" in told


def test_no_files_are_a_page_still():
    assert "No results yet." in Reader(page([], [])).text
    assert "No results yet." not in read({"head": {}, "roofs": {}, "rows": [row("fastlm triton", 5.0)]}).text


def test_a_peer_that_is_faster_is_told():
    told = read(of(row("fastlm triton", 10.0), row("eager", 8.0), row("cuDNN", 5.0))).text
    assert "0.50 cuDNN" in told


def test_history_over_two_files_of_a_device_shows_the_newest_rows():
    old, new = of(row("fastlm triton", 20.0), commit="aaaaaaa"), of(row("fastlm triton", 10.0), commit="bbbbbbb", day=2)
    found = read(old, new)
    assert "Over commits" in found.text and "10.0" in found.text and "20.0" not in found.text
    assert all("aaaaaaa" in svg and "bbbbbbb" in svg for svg in found.plots[-2:])
    assert "Over commits" not in read(old).text
    elsewhere = read(old, of(row("fastlm triton", 10.0), device="Apple M5"))
    assert "Over commits" not in elsewhere.text and "20.0" in elsewhere.text and "2 devices" in elsewhere.text


def test_a_case_that_only_the_older_file_has_stays():
    old = of(row("fastlm triton", 20.0), row("fastlm triton", 77.0, dtype="fp32"))
    found = read(old, of(row("fastlm triton", 10.0)))
    assert "77.0" in found.text and "--dtype fp32 --out results/0.json" in found.text
    assert "--dtype bf16 --out results/1.json" in found.text


def test_sizes_that_follow_from_another_make_one_sweep():
    shapes = [{"B": 16384 // T, "T": T, "H": H} for H in (12, 25) for T in (4096, 1024, 2048)]
    letter, groups = families(shapes)
    assert letter == "T" and [[shape["T"] for shape in group] for group in groups] == [[1024, 2048, 4096]] * 2
    assert families([{"N": 1, "V": 2}])[1] == [[{"N": 1, "V": 2}]]


# ---- the command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the command looks into, in place of benchmarks/results."""
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "benchmarks" / "harness.py"))
    (tmp_path / "benchmarks" / "results" / "gpu").mkdir(parents=True)
    return tmp_path / "benchmarks" / "results"


def test_the_command_takes_every_results_file_of_the_folder(folder, tmp_path, capsys):
    for name, day in (("a.json", 2), ("gpu/b.json", 1)):
        found = of(row("fastlm triton", 10.0 * day), commit=f"commit{day}", day=day)
        harness.write(folder / name, found["head"], found["roofs"], found["rows"])
    (folder / "other.json").write_text("[]")
    (folder / "resources.json").write_text(json.dumps({"triton": "3.7.1", "rows": RESOURCES}))
    (folder / "resources-nvcc.json").write_text("{}")
    report(None, tmp_path / "deep" / "r.html")
    told = Reader((tmp_path / "deep" / "r.html").read_text()).text
    assert "2 results files" in told and "20.0" in told and "12 kernels" in told and "triton-3.7.1" in told
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.html"]
    printed = capsys.readouterr().out
    assert "other.json is no results file" in printed and "resource report" in printed and "wrote" in printed


@pytest.mark.parametrize("damage", [
    "", "{", "[]", '{"head": {}, "roofs": {}, "rows": [{}]}', '{"head": 1, "roofs": {}, "rows": []}',
    '{"head": {}, "roofs": {}, "rows": [{"op": [], "part": "", "dtype": "", "shape": {"N": 1}, "contender": ""}]}',
    '{"head": {}, "roofs": {}, "rows": [{"op": "x", "part": "", "dtype": "", "shape": {"N": []}, "contender": ""}]}',
])
def test_a_damaged_file_that_was_named_is_an_error_and_the_old_page_stays(folder, tmp_path, damage):
    (tmp_path / "r.json").write_text(damage)
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(ValueError, match="r.json is no results file"):
        report([tmp_path / "r.json"], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "old"


def test_no_file_names_the_fix(folder, tmp_path):
    with pytest.raises(ValueError, match="fastlm bench --out FILE"):
        report(None, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# ---- a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(tmp_path, address, *options):
    """What a headless Chromium prints."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--disable-dev-shm-usage", "--allow-file-access-from-files", "--virtual-time-budget=5000",
               f"--user-data-dir={tmp_path / 'profile'}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def shot(tmp_path, address, width, height, dark):
    from matplotlib.image import imread

    path = tmp_path / f"{width}-{dark}.png"
    browse(tmp_path, address, f"--window-size={width},{height}", f"--screenshot={path}",
           f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    return imread(path)[..., :3]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_a_browser_shows_the_page_on_a_phone_and_a_screen_in_light_and_in_dark(tmp_path):
    written = tmp_path / "r.html"
    rows = [row("fastlm triton", 20.0, dtype="fp32"), row("a_peer_with_one_long_word" * 8, 90.0, dtype="fp32"),
            refused("Liger", "not_installed_" * 30)]
    files = [("old.json", of(*rows)), ("a/long/folder" * 20 + ".json", results(day=2))]
    written.write_text(page(files, RESOURCES))
    for width, height in ((390, 844), (1280, 900)):
        light, dark = (shot(tmp_path, written.as_uri(), width, height, dark) for dark in (False, True))
        assert light.shape == dark.shape == (height, width, 3)
        assert light.mean() > 0.85 and dark.mean() < 0.25
        assert light.std() > 0.02 and dark.std() > 0.02  # something stands there
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"""<iframe src="{written.as_uri()}" style="width:390px;height:844px;border:0"></iframe><p></p>
        <script>onload = () => {{
          const page = document.querySelector("iframe").contentDocument, root = page.documentElement
          const broken = [...page.images].filter(image => !image.complete || !image.naturalWidth)
          const boxes = [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth)
          document.querySelector("p").textContent = `width ${{root.scrollWidth}} images ${{page.images.length}} ` +
            `broken ${{broken.length}} scroll ${{boxes.length}}`
        }}</script>""")
    dom = browse(tmp_path, wrapper.as_uri(), "--window-size=1280,900", "--dump-dom")
    width, images, broken, scroll = map(int, re.search(
        r"<p>width (\d+) images (\d+) broken (\d+) scroll (\d+)", dom).groups())
    assert width == 390 and images > 10 and broken == 0 and scroll > 0, dom
