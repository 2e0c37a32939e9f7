"""This machine's roofs: the fastest that any plain call was seen to move bytes or multiply matrices here.

    copy, read      bytes per second     a copy counts what is read and what is written
    products        FLOP per second      of a square matrix product, by dtype
    launch          seconds              an operation on one element

No table of device names: everything is measured, in seconds, and kept in the user's cache for the next time. On a
machine that others keep busy a call may take a hundred times as long as the one before: every part has its share of
LIMIT seconds, and stops there with the fastest that it saw.
"""

import json
import time
from dataclasses import asdict, dataclass

import torch

from fastlm.measure.clock import cache_bytes, race
from fastlm.measure.files import cache_folder, slug, write_json
from fastlm.measure.numerics import DTYPES

LIMIT = 20.0  # seconds that measuring a device takes at most, give or take a call
LARGEST = 2**30  # bytes of a buffer


@dataclass(frozen=True)
class Roofs:
    """Bytes per second, FLOP per second by dtype, seconds; as measured at `taken` (seconds since 1970)."""

    copy: float
    read: float
    products: dict[str, float]
    launch: float
    taken: float

    def floor(self, *, bytes, flops, dtype, traffic="copy"):
        """The seconds that a piece of work needs at least: its bytes or its FLOPs, whichever takes longer."""
        return max(bytes / getattr(self, traffic), flops / self.products[dtype])

    def __str__(self):
        products = ", ".join(f"{name} {value * 1e-12:.3g}" for name, value in self.products.items())
        return (f"read {self.read * 1e-9:.3g} GB/s, copy {self.copy * 1e-9:.3g} GB/s, products {products} TFLOP/s, "
                f"launch {self.launch * 1e6:.2g} µs")


def roofs(device="cpu", *, fresh=False):
    """The Roofs of a device: from the cache, or measured now (a few seconds) and kept there.

    fresh: measured anyway. What is kept is the best that was ever seen; a busy machine lowers no roof.
    """
    known = known_roofs(device)
    if known is not None and not fresh:
        return known
    found = measure(device)
    if known is not None:
        found = Roofs(
            copy=max(found.copy, known.copy), read=max(found.read, known.read), launch=min(found.launch, known.launch),
            products={name: max(found.products[name], known.products.get(name, 0.0)) for name in found.products},
            taken=found.taken,
        )
    write_json(_path(device), asdict(found))
    return found


def known_roofs(device="cpu"):
    """The Roofs of a device from the cache; None where they were not measured yet."""
    try:
        return Roofs(**json.loads(_path(device).read_text()))
    except (OSError, ValueError, TypeError):  # absent, or of another version
        return None


def _path(device):
    return cache_folder() / "roofs" / f"{slug(f'{device_name(device)}-torch{torch.__version__}')}.json"


def device_name(device):
    """The name of a GPU, or of the processor with its vectors and the number of threads that torch uses.

    A cloud's processors of several kinds may have one name: their vectors tell them apart.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def processor():
    """The name of this machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    if names:
        return names[0]
    import platform

    return platform.processor() or "unknown CPU"


def measure(device="cpu", *, bytes=None, size=None, seconds=0.4, limit=LIMIT):
    """The Roofs of a device, measured with buffers of `bytes` and square products of `size`, in `limit` seconds."""
    bytes = bytes or min(max(8 * cache_bytes(device), 2**28), LARGEST)
    size = size or (8192 if torch.device(device).type == "cuda" else 1536)
    copy, read = _memory(bytes, device, seconds, 0.4 * limit)
    products = {name: _product(dtype, size, device, seconds, 0.15 * limit) for name, dtype in DTYPES.items()}
    products = {name: max(rate, products["fp32"]) for name, rate in products.items()}  # what is narrower can be widened
    one = torch.zeros(1, device=device)
    launch = race({"": [lambda: one.add_(1)]}, device=device, seconds=seconds / 4, limit=0.15 * limit)[""].median
    return Roofs(copy=copy, read=read, products=products, launch=launch, taken=time.time())


def _memory(bytes, device, seconds, limit):
    """Bytes per second of a copy, and of the fastest of four reductions."""
    source = torch.ones(bytes // 4, device=device)
    target, bits = torch.empty_like(source), source.view(torch.int32)
    times = race({
        "copy": [lambda: target.copy_(source)], "sum": [lambda: source.sum()], "max": [lambda: source.amax()],
        "dot": [lambda: source.dot(source)], "bits": [lambda: bits.amin()],
    }, device=device, seconds=seconds, limit=limit)
    best = {name: bytes / _best(taken) for name, taken in times.items()}
    return 2 * best.pop("copy"), max(best.values())


def _product(dtype, largest, device, seconds, limit):
    """FLOP per second; on a CPU without instructions for a dtype a small product tells as much."""
    size, best, end = min(256, largest), 0.0, time.perf_counter() + limit
    while True:
        a, b = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
        begun = time.perf_counter()
        times = race({"": [lambda a=a, b=b: a @ b]}, device=device, seconds=seconds, limit=end - begun)[""]
        best = max(best, 2 * size**3 / _best(times))
        if size == largest or times.median > 20e-3 or time.perf_counter() > end:
            return best
        size = min(largest, 2 * size)


def _best(times):
    """The fastest tenth: what the machine can do, not what its neighbours leave."""
    samples = sorted(times.samples)
    return samples[len(samples) // 10]
