"""The account of a training step on a GPU that is not there: bytes, launches, memory, and what the host waits for.

The trainer's own Step runs on fake tensors, with the backends that a GPU is given. What makes or changes a tensor is a
launch: it reads each operand and writes each result once, or only what it gathers or scatters; views cost nothing. Of
a Triton kernel the loads and stores are counted where it runs interpreted (launches.py); a CUDA kernel reads and
writes what its torch op declares. In bytes:

    read, written      what memory gives and takes at least: in a launch no more of a tensor than there is of it
    asked              the same with what a launch asks for again, which may come from a cache
    minimum            of an op of fastlm its operands and results, once; of a product, a gather or a scatter its own;
                       of what else stands between ops nothing: it could ride in a neighbour's pass
"""

import contextlib
import traceback
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlm
from fastlm import dispatch
from fastlm.backends import chunked, native
from fastlm.config import GPT2Config
from fastlm.dispatch.table import TABLE
from fastlm.gpt2 import GPT2
from fastlm.training.batches import Batches
from fastlm.training.config import TrainConfig
from fastlm.training.optimizer import AdamW
from fastlm.training.step import Step

from . import fake_gpu, launches
from .launches import extent
from .programs import MODEL

SHAPE = {"B": 32, "T": 1024, **MODEL}
RATE = 4.3e12  # bytes per second that an H200 copies
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2"}  # the host needs the numbers
GATHERS = {"embedding", "gather", "index", "index_select"}  # read as much of their first operand as they write
SCATTERS = {"scatter_", "scatter_add_", "index_put_"}  # change as much of theirs as they are given
SETS = {"copy_", "fill_", "zero_"}  # do not read what they change
LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # read nothing
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "resize_", "detach_", "lift_fresh"}
COLUMNS = "launches", "read", "written", "asked", "minimum"
BLOCK = 512  # bytes, of which torch's allocator gives multiples
PACKAGE, HERE = Path(fastlm.__file__).parent, Path(__file__).parent


@dataclass
class Row:
    """What belongs together: a kernel within an op of fastlm, an operation between ops, or all of an op."""

    op: str
    kernel: str = ""
    launches: int = 0
    read: int = 0
    written: int = 0
    asked: int = 0
    minimum: int = 0  # of all of an op

    @property
    def bytes(self):
        return self.read + self.written

    @property
    def above(self):
        return self.bytes - self.minimum

    def add(self, other):
        for column in COLUMNS:
            setattr(self, column, getattr(self, column) + getattr(other, column))


@dataclass
class Account:
    """What was counted."""

    rows: dict = field(default_factory=dict)  # (op, kernel) → Row
    minima: Counter = field(default_factory=Counter)  # (op, whether of products) → bytes
    backends: dict = field(default_factory=dict)  # op of fastlm → backend
    passes: dict = field(default_factory=dict)  # (kernel, argument) → (bytes there, loads, stores), these over bytes
    waits: list = field(default_factory=list)  # what the host waits for, and where
    memory: int = 0
    peak: int = 0

    def add(self, op, kernel, read, written, asked):
        self.rows.setdefault((op, kernel), Row(op, kernel)).add(Row(op, kernel, 1, read, written, asked))

    def ops(self, products):
        """The products of every op and between them, or all else, as a Row an op, the most bytes first."""
        found = {}
        for (op, kernel), row in self.rows.items():
            if (kernel in PRODUCTS) == products:
                found.setdefault(op, Row(op, minimum=self.minima[op, products])).add(row)
        return sorted(found.values(), key=lambda row: -row.bytes)

    def whole(self, products):
        """The sum of `ops`."""
        total = Row("products" if products else "all but products")
        for row in self.ops(products):
            total.add(row)
        return total

    def record(self, sizes, dtype):
        """All of it as JSON has it."""
        whole = [self.whole(products) for products in (False, True)]
        return {
            "shape": sizes, "dtype": dtype, "capability": fake_gpu.CAPABILITY, "peak_bytes": self.peak,
            "waits": self.waits, "backends": self.backends, "totals": [asdict(row) for row in whole],
            "ops": [asdict(row) for products in (False, True) for row in self.ops(products)],
            "kernels": [asdict(row) for row in self.rows.values()],
            "passes": [{"kernel": kernel, "argument": name, "bytes": there, "loads": loads, "stores": stores}
                       for (kernel, name), (there, loads, stores) in self.passes.items()],
        }


class Counting(TorchDispatchMode):
    """Fills an account while it is open, on the tensors of a fake GPU."""

    def __init__(self):
        super().__init__()
        self.account, self.phase = Account(), "forward"
        self._ops, self._storages = [], set()  # of fastlm that run, the outermost first; addresses of what is alive

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.partition("::")[2]
        if function.namespace == "prim":
            return function(*args, **kwargs)
        if function.namespace == "aten" and function._can_decompose():
            with self:
                return function.decompose(*args, **kwargs)
        if fake_gpu.in_backward() or self.phase == "backward":
            self.phase = "backward" if fake_gpu.in_backward() else "update"
        given = _tensors(args, kwargs)
        held = {tensor.untyped_storage()._cdata for tensor in given}
        if name in WAITS:
            self._wait(name)
        result = self._run(function, name, args, kwargs)
        made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in held]
        for tensor in made:
            self._keep(tensor)
        changed = _changed(function, args, kwargs)
        devices = {tensor.device.type for tensor in (*given, *made) if tensor.dim() or name == "_to_copy"}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self._wait(f"{name} between devices")
        if function.namespace == "fastlm":
            if not self._ops:
                self.account.minima[name, False] += sum(map(extent, (*_distinct(given), *made, *changed)))
        elif (made or changed) and name not in NOTHING:
            self._count(name, _tensors(args, _without_out(function, kwargs)), made, changed)
        return result

    def _run(self, function, name, args, kwargs):
        """The result; an op of fastlm is run by the backend that a GPU is given."""
        if name == "_local_scalar_dense":
            return 1.0  # a fake tensor has no number
        if name in PRODUCTS and "out" in kwargs:  # torch 2.10 knows no fake addmm with an out and a dtype
            return kwargs["out"]
        if function.namespace != "fastlm":
            return function(*args, **kwargs)
        row = TABLE[name]
        self.account.backends[row.name] = backend = dispatch.choice(row, *args)
        self._ops.append(row.name)
        try:
            with self:
                return dispatch._load(row, backend)(*args)
        finally:
            self._ops.pop()

    def _count(self, name, given, made, changed):
        operands = [] if name in LIKE else _distinct(given)
        if name in SETS:
            operands = [tensor for tensor in operands if tensor is not changed[0]]
        read, written = sum(map(extent, operands)), sum(map(extent, (*made, *changed)))
        if name in GATHERS:
            read += written - extent(given[0])
        if name in SCATTERS:
            written = extent(given[-1])
            read += written - extent(given[0])
        op = self._ops[0] if self._ops else f"{name}, {self.phase}"
        self.account.add(op, name, read, written, read + written)
        if name in PRODUCTS or not self._ops and name in GATHERS | SCATTERS | {"embedding_dense_backward"}:
            self.account.minima[op, name in PRODUCTS] += read + written

    def launched(self, kernel, asked):
        """Takes in a launch: {argument: (tensor, bytes loaded, bytes stored)}."""
        read = sum(min(loaded, extent(tensor)) for tensor, loaded, _ in asked.values())
        written = sum(min(stored, extent(tensor)) for tensor, _, stored in asked.values())
        self.account.add(self._ops[0], kernel, read, written, sum(sum(bytes) for _, *bytes in asked.values()))
        for name, (tensor, *bytes) in asked.items():
            there = extent(tensor)
            if there > self.account.passes.get((kernel, name), (0,))[0]:
                self.account.passes[kernel, name] = there, *(some / there for some in bytes)

    def called(self, op, given):
        """Takes in a call of a CUDA kernel, whose torch op says what it reads and changes; all else it writes."""
        arguments = {argument.name: argument for argument in getattr(torch.ops.fastlm, op).default._schema.arguments}
        tensors = {name.rstrip("_"): value for name, value in given.items() if isinstance(value, torch.Tensor)}
        read = sum(extent(tensor) for name, tensor in tensors.items() if name in arguments)
        written = sum(extent(tensor) for name, tensor in tensors.items()
                      if name not in arguments or arguments[name].is_write)
        self.account.add(self._ops[0], f"{op}, CUDA", read, written, read + written)

    def _keep(self, tensor):
        """Counts the memory of a new storage until it is gone."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage._cdata in self._storages:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._storages.add(storage._cdata)
        self.account.memory += size
        self.account.peak = max(self.account.peak, self.account.memory)
        weakref.finalize(storage, self._free, storage._cdata, size).atexit = False

    def _free(self, storage, size):
        self._storages.discard(storage)
        self.account.memory -= size

    def _wait(self, what):
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)
                  and not Path(frame.filename).is_relative_to(HERE)]
        where = f" at {Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else ""
        self.account.waits.append(f"{what}{where}, {self.phase}")


def _tensors(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def _changed(function, args, kwargs):
    """The tensors that an operation writes in place."""
    arguments = function._schema.arguments
    values = [*zip(arguments, args), *((argument, kwargs.get(argument.name)) for argument in arguments[len(args):])]
    return _tensors([value for argument, value in values if argument.is_write])


def _without_out(function, kwargs):
    """The named arguments that are read."""
    written = {argument.name for argument in function._schema.arguments if argument.kwarg_only and argument.is_write}
    return {name: value for name, value in kwargs.items() if name not in written}


def _distinct(tensors):
    """The tensors without those that lie where another does."""
    return list({(tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()): tensor
                 for tensor in tensors}.values())


class _Native(native.Launchers):
    """The launchers of CUDA kernels that are not there: tell(op, arguments by name) stands for a call."""

    def __init__(self, tell):
        self._tell, self._split_decoding, self._library = tell, True, SimpleNamespace(kDecodeSplit=128)

    def _run(self, op, device, **given):
        self._tell(op, given)


@contextlib.contextmanager
def counting():
    """While it is open, a GPU is there whose operations are counted: yields the Counting."""
    counts = Counting()
    library = _Native(counts.called)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(native, "cuda", library, create=True))
        stack.enter_context(mock.patch.object(chunked.cuda, "softmax", library))
        stack.enter_context(fake_gpu.fake_gpu())
        stack.enter_context(mock.patch.multiple(Batches, pinned=False, _fill=lambda *_: None))
        stack.enter_context(launches.intercepted(counts.launched))
        stack.enter_context(counts)
        yield counts


def sizes_of(shape):
    """The sizes of a step by letter, GPT-2 124M's at B = 32 unless `shape` says otherwise; ValueError for others."""
    if unknown := set(shape or {}) - set(SHAPE):
        raise ValueError(f"a step has no size {', '.join(sorted(unknown))}; it has {', '.join(SHAPE)}")
    return SHAPE | (shape or {})


def step(sizes=SHAPE, dtype="bf16"):
    """The Account of a training step of a GPT-2 of those sizes, as the trainer takes it."""
    B, T, L, H, C, V = (sizes[letter] for letter in SHAPE)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, bos_token_id=None, eos_token_id=None,
                       **off)
    config = TrainConfig(data="", out="", batch_size=B, sequence_length=T, dtype=dtype)
    with counting() as counts:
        with torch.device("cuda"):
            model = GPT2(model)
        optimizer, account = AdamW(model, config), counts.account
        with fake_gpu.autograd_of(model.parameters()):
            account.rows, account.peak = {}, account.memory
            Step(model, optimizer, None, config)(1)
        del model, optimizer
    return account
