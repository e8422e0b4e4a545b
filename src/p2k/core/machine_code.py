"""What a program that ptxas has assembled uses: registers, spilled bytes, wide loads, matrix products.

Triton's wheel brings ptxas, cuobjdump and nvdisasm; no driver is touched.
"""

import dataclasses
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

from p2k.core.checks import require
from p2k.core.errors import P2KError

# From Volta on.
INSTRUCTION_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one thread or one program of a compiled kernel uses."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int
    tensor_core: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled kernel: the assembler's report, its shared memory in bytes, its target and its machine code."""

    report: str
    shared_bytes: int
    target: str
    code: bytes


def machine_code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file: the contents of its text sections."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        sections = run_tool("cuobjdump", "-elf", binary)
    # Index, offset and size in hexadecimal, then other columns, the type among them, and the name.
    found = re.findall(r"^ +\w+ +(\w+) +(\w+) .* PROGBITS .* \.text\.\w+$", sections, re.MULTILINE)
    return b"".join(cubin[int(at, 16) : int(at, 16) + int(size, 16)] for at, size in found)


def inspect(programs: list[Program]) -> list[Resources]:
    """Resources of every program, with the instructions of each target disassembled in one go.

    The disassembler spends most of its time on starting: a third of a second, against hundredths on a kernel.
    """
    listings = {}
    for target in sorted({program.target for program in programs}):
        chosen = [number for number, program in enumerate(programs) if program.target == target]
        texts = _disassembled(target, [programs[number].code for number in chosen])
        listings |= dict(zip(chosen, texts, strict=True))
    return [_resources(program, listings[number]) for number, program in enumerate(programs)]


def _disassembled(target: str, codes: list[bytes]) -> list[str]:
    """The instructions of each of several machine codes for one target."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.bin")
        binary.write_bytes(b"".join(codes))
        lines = re.findall(r"^ +/\*[0-9a-f]{4,}\*/.*$", run_tool("nvdisasm", "-b", f"SM{target}", binary), re.MULTILINE)
    counts = [len(code) // INSTRUCTION_BYTES for code in codes]
    if len(lines) != sum(counts):
        raise P2KError(f"nvdisasm printed {len(lines)} instructions for sm_{target}, expected {sum(counts)}")
    rest = iter(lines)
    return ["\n".join(itertools.islice(rest, count)) for count in counts]


def _resources(program: Program, listing: str) -> Resources:
    """Read the assembler's report, and count the wide loads and matrix products of the machine code."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", program.report).groups()
    registers = re.search(r"Used (\d+) registers", program.report).group(1)
    # A load of 128 bits or, from Blackwell on, 256.
    wide = re.findall(r"\bLDG\.E\S*\.(?:128|256)\b", listing)
    # Matrix products per generation: HMMA and IMMA, HGMMA from Hopper, UTCHMMA and its kin from Blackwell.
    matrix = re.findall(r"\b(?:[HIDQ]G?MMA|UTC\w*MMA)\b", listing)
    return Resources(int(registers), sum(map(int, spills)), program.shared_bytes, len(wide), len(matrix))


def run_tool(tool: str, *arguments) -> str:
    """Standard output and error of one of Triton's tools for NVIDIA, which must succeed."""
    triton = require("triton", extra="gpu", purpose="a compile check")
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        raise P2KError(f"{tool} failed: {result.stderr.strip()}")
    return result.stdout + result.stderr
