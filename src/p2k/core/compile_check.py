"""Compile Triton kernels for GPUs that are not there, and read what they would use.

No driver is touched. It proves that a kernel compiles, and with how many registers, spilled bytes, 128-bit loads and
tensor-core instructions; it says nothing about its numbers or its speed.
Triton must not be in interpreter mode, so `measure` asks a fresh process:

    python -m p2k.core.compile_check p2k.ops.oqc.budget
"""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from p2k.core.checks import require
from p2k.core.device import version_of
from p2k.core.errors import P2KError
from p2k.core.machine_code import Program, inspect, machine_code_of, run_tool
from p2k.core.syntax import canonical, import_closure

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
COMPILATION = ("always_compile", "disable_line_info")

# More of these is better, more of the others is worse.
GAINS = ("wide_loads", "tensor_core")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: the function, its argument types, what is fixed at compile time, its options."""

    function: object
    signature: dict
    constants: dict
    divisible: tuple
    options: dict


def recorded_launches(call: Callable[[], object]) -> list[Launch]:
    """Run `call` with every Triton launch recorded instead of executed. Its tensors may be on the meta device."""
    triton = require("triton", extra="gpu", purpose="a compile check")
    launches = []

    def record(function, *arguments, grid, warmup, **keywords):
        launches.append(_describe(function, arguments, keywords))

    with mock.patch.object(triton.JITFunction, "run", record):
        call()
    return launches


def _describe(function, arguments: tuple, keywords: dict) -> Launch:
    """Specialise arguments as Triton does: None and 1 are constants, multiples of 16 are known to be."""
    values = dict(zip(function.arg_names, arguments, strict=False)) | keywords
    options = {name: values.pop(name) for name in keywords if name not in function.arg_names}
    fixed = {parameter.name for parameter in function.params if parameter.is_constexpr}
    fixed |= {name for name, value in values.items() if value is None or (isinstance(value, int) and value == 1)}
    signature = {name: "constexpr" if name in fixed else _type(values[name]) for name in function.arg_names}
    divisible = tuple(
        index
        for index, name in enumerate(function.arg_names)
        if name not in fixed
        and (isinstance(values[name], torch.Tensor) or (isinstance(values[name], int) and values[name] % 16 == 0))
    )
    return Launch(function, signature, {name: values[name] for name in fixed}, divisible, options)


def _type(value) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def compile_launch(launch: Launch, arch: int) -> Program:
    """Compile one recorded launch for compute capability `arch` (80, 90, 100).

    Raises:
        P2KError: the kernel does not compile; the message holds the compiler's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.divisible}
    source = ASTSource(launch.function, launch.signature, launch.constants, attributes)
    report = io.StringIO()
    try:
        with _verbose_assembler(), contextlib.redirect_stdout(report):
            compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    except Exception as error:
        cause = error.__cause__ or error
        raise P2KError(f"{launch.function.__name__} does not compile for sm_{arch}: {cause}") from error
    target = re.search(r"\.target\s+sm_(\w+)", compiled.asm["ptx"]).group(1)
    return Program(report.getvalue(), compiled.metadata.shared, target, machine_code_of(compiled.asm["cubin"]))


@contextlib.contextmanager
def _verbose_assembler():
    """Let Triton print what ptxas says, and never take a kernel from its cache, which keeps no such report.

    Debug lines are left out: they take a tenth of the time and change no instruction.
    """
    from triton import knobs

    with contextlib.ExitStack() as stack:
        for group, knob in ((knobs.nvidia, "dump_ptxas_log"), *((knobs.compilation, name) for name in COMPILATION)):
            stack.enter_context(mock.patch.object(group, knob, True))
        yield


def measure(module: str) -> dict:
    """Compile every case of `module` in a process where Triton compiles, and return `report(module)` from there.

    Raises:
        P2KError: a kernel does not compile; the message holds the compiler's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "p2k.core.compile_check", module]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise P2KError(result.stderr.strip())
    return json.loads(result.stdout)


def report(module: str) -> dict:
    """Versions and resources of every case, and a digest: `module.cases()` yields (name, archs, call) triples.

    A key is ``<case> <kernel> sm_<arch>``, so that a case may launch several kernels.
    """
    kernels = _measured(importlib.import_module(module).cases())
    return {"versions": _versions(), "digest": digest(module, kernels), "kernels": kernels}


def digest(module: str, kernels: dict) -> str:
    """sha256 over a budget's entries and the source they follow from; comments and docstrings do not count."""
    folder = Path(__file__).parents[2]
    # Run as a script, this module is called __main__; its spec keeps the name.
    files = import_closure(folder, "p2k", [f"import {module}, {__spec__.name}"])
    sources = {path.relative_to(folder).as_posix(): canonical(path.read_text(encoding="utf-8")) for path in files}
    return hashlib.sha256(json.dumps([kernels, sources], sort_keys=True).encode()).hexdigest()


def is_current(module: str, recorded: dict) -> bool:
    """Whether `report(module)` would say what is recorded: same code, same compilers, entries as they were written.

    A compiler gives the same program for the same source, so a budget that is current holds.
    """
    return recorded["versions"] == _versions() and recorded.get("digest") == digest(module, recorded["kernels"])


def _measured(cases) -> dict[str, dict]:
    programs = {}
    for name, archs, call in cases:
        for launch in recorded_launches(call):
            for arch in archs:
                programs[f"{name} {launch.function.__name__} sm_{arch}"] = compile_launch(launch, arch)
    return dict(zip(programs, map(dataclasses.asdict, inspect(list(programs.values()))), strict=True))


def _versions() -> dict[str, str]:
    ptxas = re.search(r"release (\S+),", run_tool("ptxas", "--version")).group(1)
    return {"triton": version_of("triton"), "ptxas": ptxas}


def over_budget(measured: dict, budget: dict) -> list[str]:
    """Sentences on every kernel that exceeds its budget, has none, or is budgeted and gone.

    More registers, spilled or shared bytes than budgeted are too many, fewer wide loads or tensor-core instructions
    too few. Hardware hands out registers in eights, so a budget reaches to the next multiple.
    """
    problems = [f"{key}: budgeted but not measured" for key in budget if key not in measured]
    for key, found in measured.items():
        if key not in budget:
            problems.append(f"{key}: measured but not budgeted")
            continue
        bounds = budget[key] | {"registers": -(-budget[key]["registers"] // 8) * 8}
        worse = [name for name, value in found.items() if _exceeds(name, value, bounds.get(name))]
        if worse:
            numbers = (f"{name} {value} (budget {bounds.get(name)})" for name, value in found.items())
            problems.append(f"{key}: {', '.join(worse)} beyond the budget: {', '.join(numbers)}")
    return problems


def _exceeds(name: str, value: int, bound: int | None) -> bool:
    """Whether a figure is worse than its bound, or has none."""
    return bound is None or (value < bound if name in GAINS else value > bound)


if __name__ == "__main__":
    try:
        print(json.dumps(report(sys.argv[1]), indent=1))
    except P2KError as error:
        sys.exit(str(error))
