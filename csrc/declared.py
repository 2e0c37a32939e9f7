"""Reads the structs, constants and functions that fastlm.h declares, and writes them as tables for C++ (bind.h).

    python csrc/declared.py declared.h x86_64

A struct's members are its op's fields, in order: their offsets and kinds are the compiler's, which also makes sure that
none is missing here. It prints the instruction sets of a processor, and the compiler's flags for each (cpu/isas.h).
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent


def declared(text):
    """({struct: members}, constants, {"cpu" or "cuda": {function: struct}}) of the header's text."""
    text = re.sub(r"//.*", "", text)
    structs = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.M | re.S):
        declarators = [part for line in body.split(";") for part in line.split(",") if part.strip()]
        structs[name] = [re.search(r"(\w+)\s*$", part)[1] for part in declarators]
    constants = [name for line in re.findall(r"^constexpr int64_t (.*);", text, re.M)
                 for name in re.findall(r"(\w+) =", line)]
    ops = {}
    for space, body in re.findall(r"^namespace (cpu|cuda) \{(.*?)^\}", text, re.M | re.S):
        ops[space] = dict(re.findall(r"void (\w+)\(const (\w+)& op, ", body))
    return structs, constants, ops


def written(structs, constants, ops):
    """The text of declared.h."""
    def listed(macro, entries):
        return " \\\n  ".join([f"#define {macro}(X)", *entries])

    lines = ["// By csrc/declared.py, from fastlm.h."]
    lines += [listed(f"FASTLM_FIELDS_OF_{name}", [f"X({name}, {member})" for member in members])
              for name, members in structs.items()]
    lines += [listed("FASTLM_STRUCTS", [f"X({name})" for name in structs])]
    lines += [listed(f"FASTLM_{space.upper()}_OPS", [f"X({op}, {struct})" for op, struct in ops[space].items()])
              for space in ops]
    lines += [listed("FASTLM_CONSTANTS", [f"X({name})" for name in constants])]
    return "\n".join(lines) + "\n"


def ladder(processor):
    """{instruction set: flags} of the rows of cpu/isas.h for a processor, in order."""
    text = (HERE / "cpu" / "isas.h").read_text(encoding="utf-8").replace("\\\n", "")
    flags, found = [], {}
    for name, of, own in re.findall(r'X\((\w+), (\w+), +"(.*?)"', text):
        if of in ("any", {"amd64": "x86_64", "arm64": "aarch64"}.get(processor.lower(), processor)):
            flags += own.split()
            found[name] = list(flags)
    return found


def write(path):
    """Writes declared.h there, unless that is what it holds already."""
    text = written(*declared((HERE / "fastlm.h").read_text(encoding="utf-8")))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(";".join(f"{name}={' '.join(flags)}" for name, flags in ladder(sys.argv[2]).items()))
