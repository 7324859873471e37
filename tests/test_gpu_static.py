"""bench.gpu_static: what it reads from machine code, what it counts, and what it finds fault with.
Longer than 350 lines: one table of tests for each stage of the tool, read together.

The kernels of the package are compiled by ``make test-gpu-static``; here by one test, for an
address that launchers rarely meet.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_static import __main__ as command
from bench.gpu_static import judgement, listing, results, roofline, table, targets
from bench.gpu_static.listing import Block, Instruction, Resources
from bench.gpu_static.measure import Measured, WayCount, measure
from bench.gpu_static.paths import Arm, Way, lines_of_all, path
from bench.gpu_static.row import Elementwise, Matrix, Row, Stream
from bench.gpu_static.targets import TARGETS
from ppkernels.ops.power_linear.model import HALF_INSTRUCTIONS, SINGLE_INSTRUCTIONS

# ---- reading machine code

SASS = """
.text.scale:
	//## File "/any/where/kernels.py", line 4 inlined at "/any/where/kernels.py", line 9
	//## File "/any/where/kernels.py", line 9
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   BSSY B0, `(.L_x_0) ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
	//## File "/any/where/kernels.py", line 6
        /*0030*/              @!P1 LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
	//## File "/any/where/kernels.py", line 5
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0060*/                   BSYNC B0 ;
.L_x_0:
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
	.section	.text.other,"ax",@progbits
        /*0000*/                   FADD R1, R1, R1 ;
"""

AMDGCN = """
scale:                                  ; @scale
; %bb.0:
	.loc	1 4 7 prologue_end              ; kernels.py:4:7 @[ kernels.py:9:3 ]
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_vccnz .LBB0_2
; %bb.1:
	.loc	1 5 7                           ; kernels.py:5:7
	buffer_load_dwordx4 v[0:3], v21, s[12:15], 0 offen
	s_branch .LBB0_3
.LBB0_2:
	.loc	1 6 7                           ; kernels.py:6:7
	buffer_load_ushort v0, v21, s[12:15], 0 offen
.LBB0_3:                                ; %Flow
	.loc	1 0 7                           ; kernels.py:0:7
	v_exp_f32_e32 v0, v0
	global_store_dwordx2 v21, v[0:1], s[0:1]
	s_endpgm
.Lfunc_end0:
	.vgpr_count:     12
"""


@pytest.mark.parametrize(
    ("blocks", "start", "instructions"),
    [
        (listing.read_sass(SASS, "scale"), "S2R", 8),
        (listing.read_amdgcn(AMDGCN, "scale"), "s_load_dwordx2", 7),
    ],
    ids=["sass", "amdgcn"],
)
def test_small_listings(blocks: list[Block], start: str, instructions: int) -> None:
    first = blocks[0].instructions[0]
    assert first.opcode == start
    assert first.frames == (("kernels.py", 4), ("kernels.py", 9))
    wide = path(blocks, frozenset(), frozenset({("kernels.py", 6)}))
    assert len(wide) == instructions
    assert [found.access for found in wide if found.access] == [("load", 128), ("store", 64)]
    assert sum(found.is_special for found in wide) == 1
    narrow = path(blocks, frozenset({("kernels.py", 6)}), frozenset())
    assert [found.access for found in narrow if found.access] == [("load", 16), ("store", 64)]


@pytest.mark.parametrize(
    ("opcode", "access"),
    [
        ("LDG.E", ("load", 32)),
        ("LDG.E.64", ("load", 64)),
        ("LDG.E.128.CONSTANT", ("load", 128)),
        ("LDG.E.ENL2.256", ("load", 256)),
        ("LDG.E.U8", ("load", 8)),
        ("STG.E.S16", ("store", 16)),
        ("STG.E.128", ("store", 128)),
        ("LDS.128", None),
        ("buffer_load_dwordx4", ("load", 128)),
        ("buffer_load_dword", ("load", 32)),
        ("buffer_load_short_d16_hi", ("load", 16)),
        ("global_load_ubyte", ("load", 8)),
        ("buffer_store_dwordx3", ("store", 96)),
        ("s_load_dwordx4", None),
        ("ds_read_b128", None),
    ],
)
def test_widths(opcode: str, access: tuple[str, int] | None) -> None:
    assert Instruction(opcode).access == access


def test_kinds_of_instructions() -> None:
    matrix = ("HMMA.16816.F32", "HGMMA.64x128x16.F32", "UTCHMMA", "v_mfma_f32_16x16x16_f16")
    assert all(Instruction(opcode).is_matrix for opcode in matrix)
    assert not Instruction("HFMA2.MMA").is_matrix
    assert not Instruction("FFMA").is_matrix
    special = ("MUFU.RCP", "v_exp_f32_e32", "v_sqrt_f32_e64", "v_rcp_f32")
    assert all(Instruction(opcode).is_special for opcode in special)
    assert not Instruction("v_fma_f32").is_special


def test_resources() -> None:
    usage = "Function scale:\n REG:40 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:560 TEXTURE:0"
    assert listing.nvidia_resources(usage, 4) == Resources(40, 8, 16, 4)
    notes = (
        ".private_segment_fixed_size: 24\n.sgpr_spill_count: 1\n.vgpr_count: 99\n"
        ".vgpr_spill_count: 2\n"
    )
    assert listing.amd_resources(notes, 0) == Resources(99, 24, 12, 0)


def test_lines_of_inline_assembly() -> None:
    ptx = "\n".join(
        [
            "\t.loc 1 5 2",
            "\t// begin inline asm",
            "\t.loc 1 5 2",
            "\tmov.u32 %r1, 0x0;",
            "\t.loc 1 6 2",
            "\tld.global.b32 { %r1 }, [ %rd1 + 0 ];",
            "\t// end inline asm",
            "\t.loc 1 9 2",
        ]
    )
    assert targets.with_true_lines(ptx) == ptx.replace("\t.loc 1 6 2\n", "") + "\n"


# ---- which instructions count


def run(*lines: int) -> list[Instruction]:
    return [Instruction("FADD", (("kernels.py", line),)) for line in lines]


def test_a_loop_counts_once_and_the_longer_side_of_a_branch_counts() -> None:
    blocks = [
        Block(run(1), [1]),
        Block(run(2, 2), [1, 2]),  # back to itself, or on
        Block(run(3), [3, 4]),
        Block(run(4, 4, 4), [5]),
        Block(run(5), [5]),
        Block(run(6), [], is_end=True),
    ]
    assert len(path(blocks, frozenset(), frozenset())) == 1 + 2 + 1 + 3 + 1


def test_required_lines_come_before_excluded_ones() -> None:
    blocks = [
        Block(run(1), [1, 2]),
        Block(run(2), [], is_end=True),  # leaves at once
        Block(run(3, 9), [3, 4]),  # an instruction of line 9 was moved up to here
        Block(run(9, 9, 9), [4]),
        Block(run(4), [], is_end=True),
    ]
    excluded = frozenset({("kernels.py", 9)})
    required = frozenset({("kernels.py", 4)})
    assert len(path(blocks, frozenset(), excluded)) == 2
    assert len(path(blocks, required, excluded)) == 1 + 2 + 1


def test_a_kernel_without_an_end() -> None:
    with pytest.raises(LookupError, match="no way leads"):
        path([Block(run(1), [0])], frozenset(), frozenset())


def test_parts_of_the_source(tmp_path: Path) -> None:
    file = tmp_path / "kernels.py"
    file.write_text(
        "def f(x):\n    if x > 0:\n        y = 1\n        y = 2\n    else:\n        y = 3\n"
    )

    def lines(*arms: Arm) -> list[int]:
        return sorted(line for _, line in lines_of_all([file], arms))

    assert lines(Arm("f")) == [2, 3, 4, 5, 6]
    assert lines(Arm("f", "x > 0")) == [3, 4]
    assert lines(Arm("f", "x > 0", is_else=True)) == [6]
    with pytest.raises(LookupError, match="no `if x > 1`"):
        lines(Arm("f", "x > 1"))
    with pytest.raises(LookupError, match="no function g"):
        lines(Arm("g"))


# ---- small kernels, compiled


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module gpu_static_kernels.py; what it compiles goes into an empty cache."""
    pytest.importorskip("triton")
    try:
        targets.require_compiler()
    except targets.CannotCompile as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from tests import gpu_static_kernels

    return gpu_static_kernels


def small_row(
    kernel: Any, block: int, choices: dict[str, Any], way: Way, numel: str = "i32"
) -> Row:
    streams = (
        Stream("read x", 4, Arm(kernel.__name__)),
        Stream("write out", 4, Arm(kernel.__name__)),
    )
    return Row(
        name="small",
        kernel=kernel,
        types={"x": "*fp32", "out": "*fp32", "numel": numel},
        choices=lambda target: {"BLOCK": block, **choices},
        work=Elementwise(block, streams, "none", {"usual": way}),
        files=(Path(kernel.fn.__code__.co_filename),),
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_known_count(name: str, kernels: Any) -> None:
    """16 more products an element are 16 more instructions an element; a masked tail is not."""
    test = "start + BLOCK <= numel"
    full = Way((Arm("products", test),), (Arm("products", test, is_else=True),))
    few, many = (
        measure(small_row(kernels.products, 1024, {"COUNT": count, "num_warps": 4}, full), name)
        for count in (4, 20)
    )
    more = many.ways["usual"].instructions - few.ways["usual"].instructions
    # CDNA multiplies two float32 at once.
    assert more == pytest.approx(8 if name == "gfx942" else 16, abs=0.5)
    assert few.load_bits == few.store_bits == (128,)
    assert many.resources.spilled_bytes == many.resources.stack_bytes == 0


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_a_spill_is_found(name: str, kernels: Any) -> None:
    block = 512 * TARGETS[name].lanes  # values of a thread: more than registers
    row = small_row(kernels.normalized, block, {"num_warps": 1}, Way())
    found = list(judgement.faults(row, name, measure(row, name), None))
    assert any("registers spill" in sentence for sentence in found)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_a_narrow_access_is_found(name: str, kernels: Any) -> None:
    row = small_row(kernels.masked, 1024, {"num_warps": 4}, Way())
    found = list(judgement.faults(row, name, measure(row, name), None))
    assert f"small, {name}: a full block reads 32 bits at a time, not 128." in found
    assert f"small, {name}: a full block writes 32 bits at a time, not 128." in found


@pytest.mark.parametrize("name", TARGETS)
def test_matrix_instructions_are_found(name: str, kernels: Any) -> None:
    row = Row(
        name="small",
        kernel=kernels.product_of_matrices,
        types={"a": "*bf16", "b": "*bf16", "out": "*fp32"},
        choices=lambda target: {"SIZE": 64, "num_warps": 4},
        work=Matrix(2 * 64**3, "bf16", 3 * 64 * 64, Arm("product_of_matrices"), 64 * 64, 64 * 64),
        files=(Path(kernels.__file__),),
    )
    measured = measure(row, name)
    assert measured.matrix_instructions > 0
    assert measured.ways["power"].instructions > 0
    without = replace(measured, matrix_instructions=0)
    assert f"small, {name}: no matrix instruction." in judgement.faults(row, name, without, {})


def test_addresses_that_are_not_aligned_get_accesses_of_one_element(kernels: Any) -> None:
    """Of which any address of a float32 allows."""
    from bench.gpu_static.catalogue import ROWS

    row = next(row for row in ROWS if row.name == "step/sgd/fp32")
    unaligned = replace(row, choices=lambda target: {**row.choices(target), "ALIGNED": False})
    measured = measure(unaligned, "sm_90")
    assert measured.load_bits == measured.store_bits == (32,)


# ---- judging

STREAMS = (Stream("read x", 4, Arm("f")), Stream("write out", 4, Arm("f")))
GOOD = Measured(
    Resources(40, 0, 0, 0),
    matrix_instructions=0,
    load_bits=(128,),
    store_bits=(128,),
    stream_bytes={"read x": 4, "write out": 4},
    ways={"usual": WayCount(60.0, 0.0, 1e-4, "memory")},
)
WORK = Elementwise(1024, STREAMS, "none", {"usual": Way()})
ROW = Row("small", None, {}, lambda target: {}, WORK)
RECORDED = {"ways": {"usual": {"instructions": 60.0}}}


def judged(measured: Measured, recorded: Any = RECORDED, row: Row = ROW) -> list[str]:
    return list(judgement.faults(row, "sm_90", measured, recorded))


def test_nothing_is_wrong() -> None:
    assert judged(GOOD) == []
    a_little_more = replace(GOOD, ways={"usual": WayCount(61.0, 0.0, 1e-4, "memory")})
    assert judged(a_little_more) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"resources": Resources(255, 64, 0, 0)}, "registers spill: 64 bytes of stack"),
        ({"resources": Resources(255, 0, 32, 0)}, "registers spill: 0 bytes of stack, 32 spilled"),
        ({"store_bits": (64, 128)}, "a full block writes 64 bits at a time"),
        ({"stream_bytes": {"read x": 8, "write out": 4}}, "read x: 8 bytes an element, where 4"),
        ({"stream_bytes": {"read x": 4, "write out": 0}}, "write out: 0 bytes an element"),
        ({"keeps_subnormals": False}, "takes subnormal numbers for 0"),
        ({"rounds_to_nearest": False}, "no conversion rounds to nearest"),
        ({"ways": {"usual": WayCount(65.0, 0.0, 1e-4, "memory")}}, "60 are recorded"),
        ({"ways": {"usual": WayCount(60.0, 9.0, 1e-4, "special")}}, "what it lacks is special"),
        ({"ways": {"other": WayCount(60.0, 0.0, 1e-4, "memory")}}, "nothing is recorded of other"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], sentence: str) -> None:
    (found,) = judged(replace(GOOD, **changes))
    assert found.startswith("small, sm_90: ")
    assert sentence in found


def test_nothing_recorded() -> None:
    (found,) = judged(GOOD, None)
    assert "nothing is recorded; run `python -m bench.gpu_static`" in found


def test_what_is_exempt() -> None:
    slow = replace(GOOD, ways={"usual": WayCount(60.0, 9.0, 1e-4, "special")})
    assert judged(slow, row=replace(ROW, work=replace(WORK, is_memory_bound=False))) == []


# ---- the model of an H100


def test_the_roofline() -> None:
    # 8 bytes an element; 128 lanes of 132 multiprocessors issue one instruction a cycle.
    afforded = roofline.affordable(8)
    assert afforded == pytest.approx(8 / 3.35e12 * 128 * 132 * 1.755e9)
    size = 1 << 20
    below = roofline.elementwise([Instruction("FFMA")] * int(8 * afforded - 1), 8, 8, size)
    above = roofline.elementwise([Instruction("FFMA")] * int(8 * afforded + 1), 8, 8, size)
    assert (below.bound, above.bound) == ("memory", "issue")
    assert below.seconds == pytest.approx(8 * size / 3.35e12)
    # Half as many lanes for integers, an eighth for reciprocals.
    integers = roofline.elementwise([Instruction("LOP3.LUT")] * int(5 * afforded), 8, 8, size)
    special = roofline.elementwise([Instruction("MUFU.RCP")] * int(2 * afforded), 8, 8, size)
    assert (integers.bound, special.bound) == ("integer", "special")
    matrix = roofline.matrix(2 * 4096**3, 3 * 2 * 4096**2, "bf16", issued=4096**2)
    assert matrix.seconds == pytest.approx(2 * 4096**3 / 989.4e12)
    assert matrix.bound == "matrix"
    powered = roofline.matrix(2 * 4096**3, 3 * 2 * 4096**2, "bf16", issued=1e3 * 4096**2)
    assert powered.bound == "issue"


# ---- the command, and what is saved


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main([]) == 2
    assert "kernels are interpreted then; unset it" in capsys.readouterr().out
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert command.main([]) == 2
    assert "The package triton is missing" in capsys.readouterr().out


def test_wrong_arguments(kernels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--kernel", "nothing"]) == 2
    assert "no kernel is named nothing; there are power/fp32" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--target", "sm_1"])


def test_what_is_saved_is_read_again(kernels: Any, tmp_path: Path) -> None:
    file = tmp_path / "gpu_static.json"
    row = replace(ROW, kernel=kernels.masked)
    results.save([row], {("small", "sm_90"): GOOD}, file)
    results.save([row], {("small", "sm_80"): GOOD}, file)
    content = results.load(file)
    assert content["h100"]["clock_hz"] == roofline.CLOCK
    for name in ("sm_80", "sm_90"):
        assert judged(GOOD, results.recorded(content, "small", name)) == []
    assert results.recorded(content, "small", "gfx942") is None
    results.save([], {}, file)
    assert results.load(file)["kernels"] == {}


def test_everything_is_recorded(kernels: Any) -> None:
    from bench.gpu_static.catalogue import ROWS

    content = results.load()
    assert list(content["kernels"]) == [row.name for row in ROWS]
    for row in ROWS:
        assert content["kernels"][row.name]["targets"].keys() == TARGETS.keys()


def test_the_model_of_products_counts_as_the_compiled_code_does() -> None:
    """Instructions of a power in power_linear's kernels, which choose between fused and buffer."""
    for name, entry in results.load()["kernels"].items():
        if counted := entry["targets"]["sm_90"]["ways"].get("power"):
            is_single = name.split("/")[2].startswith("fp32")
            stated = SINGLE_INSTRUCTIONS if is_single else HALF_INSTRUCTIONS
            assert counted["instructions"] == pytest.approx(stated, rel=0.15), name


@pytest.mark.parametrize(
    ("readme", "part"),
    [
        ("bench/README.md", "model"),
        ("ppkernels/ops/power/README.md", "power(?!_linear)"),
        ("ppkernels/ops/power_linear/README.md", "products"),
        ("ppkernels/ops/select/README.md", "select/"),
        ("ppkernels/ops/statistics/README.md", "statistics/"),
        ("ppkernels/ops/step/README.md", "step/"),
    ],
)
def test_the_tables_of_the_readmes(readme: str, part: str) -> None:
    """They are what ``python -m bench.gpu_static --markdown <part>`` prints."""
    lines = (Path(__file__).parents[1] / readme).read_text()
    assert table.markdown(results.load(), part) in lines
