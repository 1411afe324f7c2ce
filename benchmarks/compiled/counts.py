"""What a compiled program consists of, counted in the text that its compiler prints.

- `launches`: what the device is told to start, one thing after another: the instructions of the
  entry computation and of those that it calls, loops and branches included, each once. Parameters,
  constants, tuples and bitcasts do nothing, and of an operation in two halves, a start and a done,
  the start counts. On a GPU each is a kernel or a library call. On a TPU, whose program needs no
  host between its steps, it is one of these steps; most are fusions.
- `copies`: the launches that only copy: into another layout, or on a TPU into its fast memory.
- `library_calls`: on a GPU, the convolutions and matrix products of cuDNN and cuBLAS. A TPU has no
  library.
- `convolutions`: those that are neither a library call nor part of a fusion. A TPU's compiler makes
  convolutions of matrix products too, and fuses what surrounds them into them.
- `all_reduces`, `all_gathers`, `other_collectives` (reduce-scatter, all-to-all, permutations):
  wherever in the program they are. One may carry many arrays. A TPU runs other work between the
  pieces of one; they have a channel in common, and count once.
- `conditionals`: branches, wherever they are.
- `bytes_accessed`: what all launches read and write on one device. The TPU's compiler tells. The
  GPU's does not, and it is the sizes of operands and results; of an operand that a fusion only
  slices or gathers from, that is what it takes. Padding and caches do not count.
- `temporary_bytes`: memory that the program needs on one device beside its arguments and results,
  as the compiler tells.
- `largest_result`: the bytes of the largest array that a launch writes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

VERSION = 1  # raise it where something is counted in another way: all is compiled again

# They move nothing, or stand for what is called.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier"),
}
PARTS = {"dynamic-slice", "gather", "slice"}
CALLS = {"call", "while", "conditional"}
COLLECTIVES = {
    "all-reduce": "all_reduces",
    "all-gather": "all_gathers",
    "reduce-scatter": "other_collectives",
    "all-to-all": "other_collectives",
    "ragged-all-to-all": "other_collectives",
    "collective-permute": "other_collectives",
    "collective-broadcast": "other_collectives",
}
LIBRARIES = re.compile(r'custom_call_target="__cu|"kind":"__cu(?:dnn|blas)')
COMPUTATION = re.compile(r"(ENTRY )?(%[\w.-]+) .*\{$")
# No type has a word in it that follows a space and is followed by a parenthesis.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"\{?(%[\w.-]+(?:, *%[\w.-]+)*)"
)
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Counts:
    """The numbers that the module describes."""

    launches: int
    copies: int
    library_calls: int
    convolutions: int
    all_reduces: int
    all_gathers: int
    other_collectives: int
    conditionals: int
    bytes_accessed: int
    temporary_bytes: int
    largest_result: int


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    result: str  # its type
    opcode: str
    text: str  # the operands, and what else describes it

    @property
    def operation(self) -> str:
        """The opcode; of an operation in two halves, that of the whole."""
        return self.opcode.removesuffix("-start")

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%[\w.-]+", self.text.partition(")")[0])

    @property
    def called(self) -> list[str]:
        """The names of the computations that it calls."""
        return [name for names in CALLED.findall(self.text) for name in re.split(", *", names)]

    @property
    def sizes(self) -> list[int]:
        """The bytes of each array of the result."""
        return [
            math.prod(map(int, filter(None, shape.split(",")))) * max(int(bits or 8), 8) // 8
            for _, bits, shape in ARRAY.findall(self.result)
        ]


class Program:
    """A compiled program, as XLA prints it.

    Args:
      text: what `jax.stages.Compiled.as_text` returns.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self._entry, body = "", []
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                body = self.computations[header[2]] = []
                self._entry = header[2] if header[1] else self._entry
            elif instruction := INSTRUCTION.match(line):
                body.append(Instruction(*instruction.groups()))
        self.instructions = {it.name: it for body in self.computations.values() for it in body}

    def launches(self, computation: str = "") -> Iterator[Instruction]:
        """The instructions that the device is told to start."""
        for it in self.computations[computation or self._entry]:
            if it.opcode in CALLS:
                for called in it.called:
                    yield from self.launches(called)
            elif it.opcode not in FREE and not it.opcode.endswith(("-done", "-update")):
                yield it

    def bytes_read(self, instruction: Instruction) -> int:
        """The sizes of an instruction's operands, or of what it slices or gathers from them."""
        sizes = [sum(self.instructions[name].sizes) for name in instruction.operands]
        if instruction.opcode == "fusion":
            (body,) = (self.computations[called] for called in instruction.called)
            for it in (it for it in body if it.opcode == "parameter"):
                uses = [use for use in body if it.name in use.operands]
                if all(use.opcode in PARTS and use.operands[0] == it.name for use in uses):
                    index = int(it.text.partition(")")[0])
                    sizes[index] = min(sizes[index], sum(sum(use.sizes) for use in uses))
        return sum(sizes)


def _collectives(program: Program) -> list[str]:
    """The column of each collective. The pieces of one are in fusions, and share a channel."""
    pieces, whole = set(), []
    launches = {it.name for it in program.launches()}
    for it in program.instructions.values():
        if column := COLLECTIVES.get(it.operation):
            channel = re.search(r"channel_id=\d+", it.text)
            collective = (column, channel[0] if channel else it.name)
            if it.name in launches:
                whole.append(collective)
            else:
                pieces.add(collective)
    return [column for column, _ in [*pieces, *(it for it in whole if it not in pieces)]]


def count(compiled: Any) -> Counts:
    """Counts what a program consists of.

    Args:
      compiled: a `jax.stages.Compiled`.

    Returns:
      The numbers that the module describes.
    """
    program = Program(compiled.as_text())
    launches = list(program.launches())
    collectives = _collectives(program)
    if cost := compiled.cost_analysis():
        accessed = cost["bytes accessed"]
    else:
        accessed = sum(program.bytes_read(it) + sum(it.sizes) for it in launches)
    return Counts(
        launches=len(launches),
        copies=sum(it.operation == "copy" for it in launches),
        library_calls=sum(bool(LIBRARIES.search(it.text)) for it in launches),
        convolutions=sum(it.opcode == "convolution" for it in launches),
        all_reduces=collectives.count("all_reduces"),
        all_gathers=collectives.count("all_gathers"),
        other_collectives=collectives.count("other_collectives"),
        conditionals=sum(it.opcode == "conditional" for it in program.instructions.values()),
        bytes_accessed=int(accessed),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        largest_result=max((size for it in launches for size in it.sizes), default=0),
    )
