"""The backends an op can run on, and whether this machine has them; and whether its torch is one of those tested."""

import importlib.util
import os
import re
import warnings

import torch

TESTED = (2, 10), (2, 15)  # the lowest and the highest release of torch, as pyproject.toml has them
LOWEST = (8, 0)  # the compute capability that the CUDA kernels need, as CMakeLists.txt has it
ALL = "FASTLM_TARGETS=all pip install -e ."


def _is_here(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported already, and by no usual way
        return True


# Looked for here and not where they are asked for: torch 2.10's compiler cannot trace the search.
NATIVE, TRITON = _is_here("fastlm._C"), _is_here("triton")


def _asked_once(question):
    """The question, answered once; as functools.cache, which is a warning where torch.compile traces it."""
    answers = []

    def answer():
        if not answers:
            answers.append(question())
        return answers[0]

    return answer


def untested_torch():
    """None where torch is of a release that fastlm is tested with, else a sentence."""
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if TESTED[0] <= release <= TESTED[1]:
        return None
    (low, lowest), (high, highest) = TESTED
    return (f"fastlm is tested with torch {low}.{lowest} to {high}.{highest}, and this is {torch.__version__}: "
            f"pip install 'torch>={low}.{lowest},<{high}.{highest + 1}'")


if (told := untested_torch()) is not None:
    warnings.warn(told, stacklevel=2)


@_asked_once
def _native():
    """None where the compiled module loads, else the sentence why not."""
    if not NATIVE:
        return "the compiled kernels were not built: install a C++ compiler and reinstall fastlm"
    try:
        import fastlm._C as _C
    except ImportError as error:
        return f"the compiled kernels do not load ({error}): reinstall fastlm"
    if not hasattr(_C.cpu, "dtypes"):
        return "the compiled kernels are of another version of fastlm: reinstall it"
    return None


@_asked_once
def _no_gpu():
    return None if torch.cuda.is_available() else "this machine has no CUDA GPU that torch can use"


def _cuda():
    if (reason := _native()) is not None:
        return reason
    import fastlm._C as _C

    if (reason := _no_gpu()) is not None:
        return reason
    if not hasattr(_C, "cuda"):
        return f"fastlm was built without CUDA: with the CUDA toolkit (nvcc) installed, {ALL} builds it"
    return _no_code(_C.cuda.architectures(), torch.cuda.get_device_capability())


def _no_code(architectures, capability):
    """None where code for `architectures` ("80-real, 90a-real, 120") runs on a GPU of `capability`, else a sentence.

    Machine code runs on later minors of its major; PTX, where "-real" does not leave it out, on all that is newer; code
    for an architecture with a letter on itself alone, or with an f on its major.
    """
    for name in architectures.split(", "):
        number, letter, kind = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", name).groups()
        built = divmod(int(number), 10)
        if letter == "a":
            runs = capability == built
        else:
            runs = capability >= built and (capability[0] == built[0] or kind != "-real" and not letter)
        if runs:
            return None
    gpu = "sm_{}{}".format(*capability)
    if capability < LOWEST:
        return "the CUDA kernels need a GPU of sm_{}{} or newer, and this is {}".format(*LOWEST, gpu)
    return (f"the CUDA kernels were built for {architectures}, and this GPU is {gpu}: {ALL}, or a reinstall here, "
            "builds it")


@_asked_once
def _triton():
    if not TRITON:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _no_gpu()


def _always():
    return None


# name → (device types of the tensors it takes, the sentence why this machine cannot, or None)
BACKENDS = {
    "cuda": (("cuda",), _cuda),
    "triton": (("cuda",), _triton),
    "cpu": (("cpu",), _native),
    "torch": (("cpu", "cuda", "meta", "mps", "xpu"), _always),
    "reference": (("cpu", "cuda", "meta", "mps", "xpu"), _always),
}


def devices(backend):
    """Device types of the tensors that `backend` takes; interpreted Triton takes those on the CPU."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ("cpu",)
    return BACKENDS[backend][0]


def machine_why_not(backend):
    """None where this machine can run `backend`, else a sentence."""
    return BACKENDS[backend][1]()
