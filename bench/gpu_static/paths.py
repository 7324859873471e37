"""The instructions that a usual block of elements runs.

# Note [What is counted]
A kernel's code holds more than a block of elements runs: the masked last block, steps that are
plain or far, decays that are off. Which lines of the source those are is known: the arm of an
``if``, or a function. `path` looks for them in the compiled code by the source lines that the
compiler notes beside each instruction, and takes, of all ways from the kernel's entry to its end,

  1. those with the most instructions of lines that the block must run (its unmasked accesses),
  2. of these those with the fewest instructions of lines that it does not run: none but what the
     compiler has moved up and runs anyway,
  3. and of these the longest.

So the count is that of a whole block, and where a branch is left that no line decides, of its
longer side: an upper bound, scalars and all. A loop counts once. Counted are all instructions that
are issued, with a predicate or without. Not counted are the slow ways that a division or a root
takes for subnormal numbers, which are functions that are called.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.gpu_static.listing import Block, Frame, Instruction


@dataclass(frozen=True)
class Arm:
    """A part of the source: function ``function``, or there what an ``if`` of ``test`` runs.

    With ``is_else`` it is what the ``if`` runs else.
    """

    function: str
    test: str | None = None
    is_else: bool = False


@dataclass(frozen=True)
class Way:
    """Which parts of the source a block of elements runs, ``required``, and which not."""

    required: tuple[Arm, ...] = ()
    excluded: tuple[Arm, ...] = ()


Lines = frozenset[Frame]


@cache
def lines_of(path: Path, arm: Arm) -> Lines:
    """The lines of ``arm`` in a file, none where it does not hold that function.

    Raises:
        LookupError: the function is there, the ``if`` is not: the source has changed.
    """
    found: set[Frame] = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name == arm.function:
            bodies = [function.body] if arm.test is None else _bodies(function, arm)
            if not bodies:
                raise LookupError(f"{path.name}: {arm.function} has no `if {arm.test}`")
            for body in bodies:
                last = body[-1].end_lineno or body[-1].lineno
                found |= {(path.name, line) for line in range(body[0].lineno, last + 1)}
    return frozenset(found)


def _bodies(function: ast.FunctionDef, arm: Arm) -> list[list[ast.stmt]]:
    return [
        node.orelse if arm.is_else else node.body
        for node in ast.walk(function)
        if isinstance(node, ast.If) and ast.unparse(node.test) == arm.test
    ]


def lines_of_all(paths: Sequence[Path], arms: Iterable[Arm]) -> Lines:
    """The lines of ``arms`` wherever they are in the files.

    Raises:
        LookupError: a function is in none of the files, or lacks the ``if``.
    """
    found: set[Frame] = set()
    for arm in arms:
        lines = frozenset().union(*(lines_of(path, arm) for path in paths))
        if not lines:
            names = ", ".join(path.name for path in paths)
            raise LookupError(f"no function {arm.function} in {names}")
        found |= lines
    return frozenset(found)


def comes_from(instruction: Instruction, lines: Collection[Frame]) -> bool:
    """Whether a line of ``lines``, or a call in one, made this instruction."""
    return any(frame in lines for frame in instruction.frames)


def path(blocks: Sequence[Block], required: Lines, excluded: Lines) -> list[Instruction]:
    """The instructions of the way that Note [What is counted] describes.

    Raises:
        LookupError: no way leads from the entry to an end.
    """
    order = _topological(blocks)
    rank = {number: place for place, number in enumerate(order)}
    # Of a block, the best way to an end: its worth by 1, 2 and 3 of the Note, and what follows.
    best: dict[int, tuple[tuple[int, int, int], int]] = {}
    for number in order:
        block = blocks[number]
        # What leads back in the order is the end of a loop's turn.
        nexts = [to for to in block.following if to in best and rank[to] < rank[number]]
        ways = [(best[to][0], to) for to in nexts]
        ways += [((0, 0, 0), -1)] if block.is_end else []
        if ways:
            worth, to = max(ways)
            own = _worth(block, required, excluded)
            best[number] = ((worth[0] + own[0], worth[1] + own[1], worth[2] + own[2]), to)
    if 0 not in best:
        raise LookupError("no way leads from the kernel's entry to its end")
    found: list[Instruction] = []
    number = 0
    while number >= 0:
        found += blocks[number].instructions
        number = best[number][1]
    return found


def _worth(block: Block, required: Lines, excluded: Lines) -> tuple[int, int, int]:
    wanted = sum(comes_from(instruction, required) for instruction in block.instructions)
    unwanted = sum(comes_from(instruction, excluded) for instruction in block.instructions)
    return wanted, -unwanted, len(block.instructions)


def _topological(blocks: Sequence[Block]) -> list[int]:
    """Blocks that can be reached, each after all that follow it, but for those it loops back to."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].following))]
    while stack:
        number, following = stack[-1]
        to = next((to for to in following if to not in seen), None)
        if to is None:
            order.append(number)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(blocks[to].following)))
    return order
