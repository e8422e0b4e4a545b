"""Machine instructions of the compiled row programs per element, which bytes alone do not show.

A resident program is straight-line code: its instructions over the elements of one thread are what an element costs.
`work.json` beside this file holds the output of `python -m p2k.ops.two_pass_softmax.work` when it was last accepted.
Triton must not be in interpreter mode; no GPU is needed.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch

COLUMNS, ARCH = 4096, 90
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Instructions of the special-function unit, which takes a quarter as many per cycle as the others, and of memory.
SPECIAL, MEMORY = ("MUFU", "F2I", "I2F", "FRND"), ("LDG", "STG", "LDS", "STS")


def load() -> dict:
    """The recorded counts: by program and dtype, instructions per element."""
    return json.loads(Path(__file__).with_name("work.json").read_text())


def measure(*dtypes: str) -> dict:
    """Compile the three programs for one resident width and count, in the dtypes named or in all."""
    from p2k.core.compile_check import recorded_launches
    from p2k.ops.two_pass_softmax import kernel

    found = {}
    for name in dtypes or DTYPES:
        for program in kernel.PROGRAMS:
            x = torch.empty(4096, COLUMNS, dtype=DTYPES[name], device="meta")
            (launch,) = recorded_launches(lambda x=x, program=program: kernel.forward(x, program))
            elements = COLUMNS // (32 * launch.options["num_warps"])
            kinds = _instructions(launch)
            found[f"{program} {name}"] = {
                "all": round(sum(kinds.values()) / elements, 2),
                "special": round(sum(kinds[kind] for kind in SPECIAL) / elements, 2),
                "memory": round(sum(kinds[kind] for kind in MEMORY) / elements, 2),
            }
    return {"columns": COLUMNS, "arch": ARCH, "per_element": found}


def _instructions(launch) -> Counter:
    """How often each operation stands in the machine code of one compiled launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.divisible}
    source = ASTSource(launch.function, launch.signature, launch.constants, attributes)
    code = compile(source, target=GPUTarget("cuda", ARCH, 32), options=launch.options).asm["sass"]
    names = re.findall(r"^\s*(?:[-\w]+:){3,}[-\w]+\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.M)
    # What follows the program's end is padding: a branch to itself and no-operations.
    return Counter(name for name in names if name not in ("NOP", "BRA"))


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:]), indent=1))
