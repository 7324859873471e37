"""From a compiled kernel to its instructions: NVIDIA's machine code and AMD's assembly, alike.

Each instruction comes with its ``frames``: the source lines that it stems from, the innermost
first and then the calls around it, as (file name, line). The compilers write them next to the code.
Blocks are runs of instructions that are entered at the top and left at the bottom.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Frame = tuple[str, int]


@dataclass(frozen=True)
class Instruction:
    """``goes_to``: the label of a branch; ``may_pass``: what follows may be run next."""

    opcode: str
    frames: tuple[Frame, ...] = ()
    goes_to: str | None = None
    may_pass: bool = True
    is_end: bool = False

    @property
    def is_special(self) -> bool:
        """Whether the unit for reciprocals, roots, exponentials and logarithms computes it."""
        return bool(_SPECIAL.match(self.opcode))

    @property
    def is_matrix(self) -> bool:
        return bool(_MATRIX.match(self.opcode))

    @property
    def access(self) -> tuple[str, int] | None:
        """("load" or "store", bits a thread) of an access to global memory, else None."""
        for pattern, width in ((_SASS_ACCESS, _sass_bits), (_AMD_ACCESS, _amd_bits)):
            if match := pattern.match(self.opcode):
                direction = "load" if match[1].lower() in ("ldg", "load") else "store"
                return direction, width(match[2])
        return None


_SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
# HFMA2.MMA is no matrix instruction: it is two products in one register.
_MATRIX = re.compile(r"([A-Z]*GMMA|[HIDBQO]MMA|UTC[A-Z]*MMA)(\.|$)|v_s?mfma")
_SASS_ACCESS = re.compile(r"(LDG|STG)\b(.*)")
_AMD_ACCESS = re.compile(r"(?:buffer|global|flat)_(load|store)_(\w+)")


def _sass_bits(suffix: str) -> int:
    """LDG.E.128 reads 128 bits, LDG.E.U8 eight, LDG.E 32."""
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffix)
    return int(sizes[0]) if sizes else 32


def _amd_bits(kind: str) -> int:
    """dwordx4 is 128 bits, ushort and short_d16_hi 16, ubyte eight."""
    if match := re.match(r"dword(?:x(\d))?", kind):
        return 32 * int(match[1] or 1)
    return 16 if "short" in kind else 8


@dataclass
class Block:
    """Instructions, and the numbers of the blocks that may come next; ``is_end``: or none."""

    instructions: list[Instruction] = field(default_factory=list)
    following: list[int] = field(default_factory=list)
    is_end: bool = False


Listing = list[tuple[str | None, Instruction | None]]
"""Lines of a kernel: (label, None) or (None, instruction)."""


def blocks_of(listing: Listing) -> list[Block]:
    """The control-flow graph of a kernel; its first block is the entry."""
    blocks, labels = [Block()], {}
    for label, instruction in listing:
        last = blocks[-1].instructions
        is_left = last and (last[-1].goes_to or not last[-1].may_pass or last[-1].is_end)
        if is_left or (label is not None and last):
            blocks.append(Block())
        if label is not None:
            labels[label] = len(blocks) - 1
        if instruction is not None:
            blocks[-1].instructions.append(instruction)
    for number, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else Instruction("")
        block.is_end = last.is_end
        if last.may_pass and number + 1 < len(blocks):
            block.following.append(number + 1)
        # A label that is not there is outside: the slow way of a division, as a function.
        if last.goes_to in labels:
            block.following.append(labels[last.goes_to])
    return blocks


# ---- NVIDIA

_SASS_FRAME = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
_SASS_LABEL = re.compile(r"(\.L\w+):")
_SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")


def read_sass(text: str, name: str) -> list[Block]:
    """The blocks of kernel ``name`` in what ``nvdisasm -c -gi`` prints.

    A branch that only threads gone different ways take (BRA.DIV) is not followed, and of a call,
    which is the slow way of a division or a root, nothing but the instruction counts.
    """
    listing: Listing = []
    frames: tuple[Frame, ...] = ()
    is_frame = False
    for line in _of_function(text, name):
        if match := _SASS_FRAME.match(line):
            frame = (Path(match[1]).name, int(match[2]))
            frames = (*frames, frame) if is_frame else (frame,)
            is_frame = True
            continue
        is_frame = False
        if match := _SASS_LABEL.match(line):
            listing.append((match[1], None))
        elif match := _SASS.match(line):
            listing.append((None, _sass_instruction(*match.groups(), frames)))
    return blocks_of(_with_meeting_points(listing))


def _of_function(text: str, name: str) -> Iterator[str]:
    """The lines from the kernel's label to the next section or function."""
    is_inside = False
    for line in text.splitlines():
        if line.startswith(f".text.{name}:"):
            is_inside = True
        elif is_inside and (line.startswith("$") or "\t.section" in line):
            return
        elif is_inside:
            yield line


def _sass_instruction(
    predicate: str | None, opcode: str, operands: str, frames: tuple[Frame, ...]
) -> Instruction:
    kind = opcode.split(".")[0]
    target = re.search(r"`\((\.L\w+)\)", operands)
    label = target[1] if target else None
    is_conditional = predicate is not None or re.search(r"\b!?U?P\d", operands) is not None
    if kind == "BRA" and ".DIV" not in opcode:
        return Instruction(opcode, frames, label, may_pass=is_conditional)
    if kind == "EXIT":
        return Instruction(opcode, frames, may_pass=predicate is not None, is_end=True)
    if kind in ("BSSY", "BSYNC"):
        # The place to meet at, of a barrier register, which `_with_meeting_points` resolves.
        register = re.search(r"B\d+", operands)
        name = register[0] if register else ""
        return Instruction(f"{opcode} {name} {label or ''}".rstrip(), frames)
    if kind == "RET":
        return Instruction(opcode, frames, may_pass=False)
    return Instruction(opcode, frames)


def _with_meeting_points(listing: Listing) -> Listing:
    """BSYNC leads to the label that BSSY put into its register: the next of these below it."""
    places = {label: place for place, (label, _) in enumerate(listing) if label is not None}
    meetings = [
        instruction.opcode.split()[1:]
        for _, instruction in listing
        if instruction is not None and instruction.opcode.startswith("BSSY")
    ]
    resolved: Listing = []
    for place, (label, instruction) in enumerate(listing):
        if instruction is not None and instruction.opcode.startswith(("BSSY", "BSYNC")):
            opcode, *operands = instruction.opcode.split()
            target = None
            if opcode.startswith("BSYNC"):
                below = [
                    to for register, to in meetings if [register] == operands and places[to] > place
                ]
                target = min(below, key=places.__getitem__, default=None)
            instruction = Instruction(opcode, goes_to=target, may_pass=target is None)
        resolved.append((label, instruction))
    return resolved


# ---- AMD

_AMD_FRAME = re.compile(r"([^\s:;@\[\]]+):(\d+):\d+")
_AMD_LABEL = re.compile(r"(\.LBB\w+):")
_AMD = re.compile(r"\t([a-z]\w+)(?:\s+([^;]*))?")


def read_amdgcn(text: str, name: str) -> list[Block]:
    """The blocks of kernel ``name`` in the assembly that Triton keeps."""
    listing: Listing = []
    frames: tuple[Frame, ...] = ()
    body = text.partition(f"\n{name}:")[2].partition("\n.Lfunc_end")[0]
    for line in body.splitlines():
        if line.startswith("\t.loc"):
            found = _AMD_FRAME.findall(line.partition(";")[2])
            frames = tuple((Path(file).name, int(number)) for file, number in found)
        elif match := _AMD_LABEL.match(line):
            listing.append((match[1], None))
        elif match := _AMD.match(line):
            listing.append((None, _amd_instruction(match[1], (match[2] or "").strip(), frames)))
    return blocks_of(listing)


def _amd_instruction(opcode: str, operands: str, frames: tuple[Frame, ...]) -> Instruction:
    if opcode.startswith(("s_branch", "s_cbranch")):
        return Instruction(opcode, frames, operands, may_pass=opcode != "s_branch")
    return Instruction(opcode, frames, may_pass=opcode != "s_endpgm", is_end=opcode == "s_endpgm")


# ---- a whole kernel


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread, bytes of stack and spills, shared memory."""

    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int


def read(compiled: Any) -> tuple[list[Block], Resources]:
    """Blocks and resources of what `compile_kernel` gives."""
    name = compiled.metadata.name
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return read_amdgcn(text, name), amd_resources(text, compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = _nvidia("nvdisasm", "-c", "-gi", file.name)
        usage = _nvidia("cuobjdump", "-res-usage", file.name)
    return read_sass(code, name), nvidia_resources(usage, compiled.metadata.shared)


def _nvidia(tool: str, *arguments: str) -> str:
    """What a tool prints, of those that come with Triton."""
    from triton import knobs

    command: Sequence[str] = [getattr(knobs.nvidia, tool).path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_resources(usage: str, shared: int) -> Resources:
    """Of what ``cuobjdump -res-usage`` prints. NVIDIA's spills are on the stack."""
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    stack, local = int(numbers["STACK"]), int(numbers["LOCAL"])
    return Resources(int(numbers["REG"]), stack, local, shared)


def amd_resources(text: str, shared: int) -> Resources:
    """Of the notes at the end of the assembly: vector registers, and 4 bytes a spilled one."""

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])

    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    stack = number("private_segment_fixed_size")
    return Resources(number("vgpr_count"), stack, 4 * spilled, shared)
