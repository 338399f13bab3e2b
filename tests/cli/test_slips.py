"""The slips of an author's day: each ends in one sentence that names what is wrong, exit code 2 and no traceback, whatever command meets it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vidrial.cli import main as cli
from vidrial.cli.new import write_kernel
from vidrial.errors import VidrialError

GRID = "def grid(p: Problem, c: Config) -> tuple[int, int, int]:\n    return -(-p.n // c.elements), 1, 1"
RULES = "def rules(p: Problem, c: Config, device: vd.Device) -> Iterator[tuple[bool, str]]:"
FIRST = "    yield p.dtype in served, f\"dtype {p.dtype} is not served; accepted: {', '.join(map(str, served))}\""
SERVED = "    served = (vd.DType.float32, vd.DType.bfloat16, vd.DType.float16)\n"
OUTPUTS = 'outputs=lambda p: {"out": vd.Buffer((p.n,), p.dtype)}'
INPUTS = 'inputs=lambda p: {"x": vd.Buffer((p.n,), p.dtype), "y": vd.Buffer((p.n,), p.dtype)}'
TILES = "return vd.Tiles(threads=c.threads, Elem=p.dtype, vector=c.vector, unroll=c.unroll)"
EXAMPLE = "    return Problem(vd.DType.of(dtype), n, alpha)"
SAMPLE = 'return {"x": p.dtype.round(draw(p.n)), "y": p.dtype.round(draw(p.n))}'
REFERENCE = 'return {"out": float('
SMALL = "small=lambda p: replace(p, n=min(p.n, 4097))"
OP = "op = vd.Op.of("
# What is written in place of what; the sentence; the command that meets it (explain does all that `Op` construction and rules can).
SLIPS: dict[str, tuple[str, str, str, str]] = {
    "a problem that is not frozen": (
        "@dataclass(frozen=True)\nclass Problem",
        "@dataclass\nclass Problem",
        r"kernel slip: problem 'Problem' is no frozen dataclass; write @dataclass\(frozen=True\)",
        "explain",
    ),
    "a config that is not frozen": (
        "@dataclass(frozen=True)\nclass Config",
        "@dataclass\nclass Config",
        r"kernel slip: config 'Config' is no frozen dataclass",
        "explain",
    ),
    "a grid of two": (
        ", 1, 1\n\n\ndef rules",
        ", 1\n\n\ndef rules",
        r"kernel slip: grid\(\) gives \(\d+, 1\), which is not three counts of CTAs; give a tuple of three integers .*slip\.py:\d+",
        "compile",
    ),
    "a float grid": (
        "-(-p.n // c.elements), 1, 1",
        "p.n / c.elements, 1, 1",
        r"grid\(\) gives \(\d+\.\d+, 1, 1\), which is not three counts of CTAs; .*by // and not by /",
        "compile",
    ),
    "rules that yield a bool": (
        FIRST,
        "    yield p.dtype in served",
        r"kernel slip: rules\(\) yields True, which is no pair \(it holds, the reason if it does not\); see .*slip\.py:\d+",
        "explain",
    ),
    "rules that return a bool": (
        RULES,
        "def rules(p, c, device):\n    return True\n\n\ndef other(p, c, device):",
        r"kernel slip: rules\(\) gives True, which is no series of \(holds, reason\) pairs",
        "explain",
    ),
    "rules without device": (
        "c: Config, device: vd.Device) -> Iterator",
        "c: Config) -> Iterator",
        r"kernel slip: rules\(\) raises TypeError: rules\(\) takes 2 positional arguments but 3 were given; at .*slip\.py:\d+",
        "explain",
    ),
    "a rule that raises": (
        FIRST,
        "    yield p.dtyp in served, 'no'",
        r"kernel slip: rules\(\) raises AttributeError: 'Problem' object has no attribute 'dtyp'; at .*slip\.py:\d+",
        "explain",
    ),
    "a keyword without annotation": (
        "def example(*, n: int,",
        "def example(*, n,",
        r"op slip: example\(\)'s n has no annotation, so --n has no type; write n: int",
        "explain",
    ),
    "an annotation that is no name": (
        "def example(*, n: int,",
        "def example(*, n: whole,",
        r"op slip: the annotations of example\(\) cannot be read: name 'whole' is not defined",
        "explain",
    ),
    "an output under another name": (
        OUTPUTS,
        OUTPUTS.replace("out", "z", 2).replace("zputs", "outputs"),
        r"op slip: outputs gives z, which no kernel takes: their pointers are out, x, y",
        "explain",
    ),
    "a sample of another dtype": (
        SAMPLE,
        'return {"x": draw(p.n).astype("float16"), "y": p.dtype.round(draw(p.n))}',
        r"op slip: sample\(\) gives x as float16; inputs declares float32",
        "check",
    ),
    "a sample of another shape": (
        SAMPLE,
        'return {"x": p.dtype.round(draw(p.n + 1)), "y": p.dtype.round(draw(p.n))}',
        r"op slip: sample\(\) gives x of shape \[2\]; inputs declares \[1\]",
        "check",
    ),
    "a sample of another name": (
        SAMPLE,
        'return {"x": p.dtype.round(draw(p.n))}',
        r"op slip: sample\(\) gives x; inputs declares x, y",
        "check",
    ),
    "no Buffer": (
        OUTPUTS,
        'outputs=lambda p: {"out": (p.n,)}',
        r"op slip: outputs\(\) gives \{'out': \(100,\)\}, where out is no Buffer; give name -> Buffer; see .*slip\.py",
        "explain",
    ),
    "no Check": (
        "    return vd.Check(",
        "    return tuple(",
        r"op slip: check\(\) raises TypeError: tuple expected at most 1 argument, got 4; at .*slip\.py:\d+",
        "check",
    ),
    "a cost that divides by zero": (
        "narrow = 16 / (c.vector * p.dtype.bytes)",
        "narrow = 16 / (c.vector - c.vector)",
        r"kernel slip: cost\(\) raises ZeroDivisionError: division by zero; at .*slip\.py:\d+",
        "explain",
    ),
    "a cost that is a float": (
        "    return vd.Cost(",
        "    return float(2.0) or vd.Cost(",
        r"kernel slip: cost\(\) gives 2\.0, which is no Cost; give Cost\(flops=\.\.\., bytes=\.\.\., ctas=\.\.\.\)",
        "explain",
    ),
    "an error at import": (
        "ARGS = ",
        "problem_from(3)\nARGS = ",
        r"cannot be imported: NameError: name 'problem_from' is not defined; at .*slip\.py:4\d",
        "explain",
    ),
    "a syntax error": ("ARGS = ", "ARGS == = ", r"cannot be imported: SyntaxError: .*slip\.py", "explain"),
    "a module that is not there": (
        "import numpy as np",
        "import nunpy as np",
        r"cannot be imported: ModuleNotFoundError: No module named 'nunpy'; at .*slip\.py:\d+",
        "explain",
    ),
    "a reference of other names": (
        REFERENCE,
        REFERENCE.replace("out", "y"),
        r"op slip: reference\(\) gives y; its outputs have out",
        "check",
    ),
    "a choice of nothing": (
        "vd.choice(256, 128, 512)",
        "vd.choice()",
        r"cannot be imported: TypeError: choice\(\) missing 1 required positional argument: 'default'; at .*slip\.py:\d+",
        "explain",
    ),
    "a choice of several types": (
        "vd.choice(256, 128, 512)",
        'vd.choice(256, "128")',
        r"kernel slip: Config\.threads has a value of several types, int and str: 256, '128'; give unlike ones of one type",
        "explain",
    ),
    "a choice twice": (
        "vd.choice(256, 128, 512)",
        "vd.choice(256, 128, 256)",
        r"kernel slip: Config\.threads has a value twice: 256, 128, 256",
        "explain",
    ),
    "a problem that can be no key": (
        EXAMPLE,
        "    return Problem(vd.DType.of(dtype), [n], alpha)",
        r"op slip: example\(\) gives Problem\(.*\), which can be no key \(unhashable type: 'list'\); give tuples",
        "explain",
    ),
    "a kernel's name that is none": (
        'vd.Kernel("slip"',
        'vd.Kernel("row slip"',
        r"kernel 'row slip': the name is that of a C\+\+ function; accepted: letters, digits and underscores",
        "explain",
    ),
    "a template that is not there": (
        '"slip.cu.j2"',
        '"slips.cu.j2"',
        r"kernel slip: template .*slips\.cu\.j2 does not exist; give a Path",
        "explain",
    ),
    "a template that is a string": (
        'Path(__file__).with_name("slip.cu.j2")',
        '"slip.cu.j2"',
        r"kernel slip: template slip\.cu\.j2 does not exist; give a Path, Path\(__file__\)",
        "explain",
    ),
    "an entry point of another name": (
        'vd.Kernel("slip"',
        'vd.Kernel("slap"',
        r"slip\.cu\.j2: its kernel is slip; the Kernel's name is slap: they must be the same",
        "compile",
    ),
    "threads that no CTA has": (
        TILES,
        TILES.replace("c.threads,", "1025,"),
        r"1025 threads per CTA: must be a multiple of 32, at most 1024",
        "explain",
    ),
    "negative shared memory": (
        TILES,
        TILES.replace("Elem=", "smem=SharedMemory(A=-16), Elem=").replace(
            "return vd", "from vidrial.layout import SharedMemory\n\n    return vd"
        ),
        r"-16",
        "explain",
    ),
    "shared memory that is a number": (
        TILES,
        TILES.replace("Elem=", "smem=4096, Elem="),
        r"Tiles\(threads=256, smem=4096\); accepted: a number of threads, and SharedMemory",
        "explain",
    ),
    "tiles that are a dictionary": (
        TILES,
        "return dict(threads=c.threads)",
        r"kernel slip: tiles\(\) gives \{'threads': 256\}, which is no Tiles; give Tiles\(threads=\.\.\.\)",
        "explain",
    ),
    "a buffer of a dtype by name": (
        OUTPUTS,
        OUTPUTS.replace("p.dtype", "'float32'"),
        r"Buffer of dtype 'float32'; give a DType: DType\.bfloat16",
        "explain",
    ),
    "a buffer of a bare size": (
        OUTPUTS,
        OUTPUTS.replace("(p.n,)", "p.n"),
        r"Buffer of shape 100; give a tuple of integers, \(n,\) for one axis",
        "explain",
    ),
    "an output that is an input, too": (
        OUTPUTS,
        OUTPUTS.replace('{"out"', '{"x": vd.Buffer((p.n,), p.dtype), "out"'),
        r"op slip: x is among its inputs and its outputs; give each array one name",
        "explain",
    ),
    "inputs without a problem": (
        INPUTS,
        INPUTS.replace("lambda p:", "lambda:").replace("p.n", "9").replace("p.dtype", "vd.DType.float32"),
        r"op slip: inputs\(\) raises TypeError: .*takes 0 positional arguments but 1 was given; at .*slip\.py:\d+",
        "explain",
    ),
    "outputs of two arguments": (
        OUTPUTS,
        OUTPUTS.replace("lambda p:", "lambda p, c:"),
        r"op slip: outputs\(\) raises TypeError: .*missing 1 required positional argument: 'c'; at .*slip\.py:\d+",
        "explain",
    ),
    "a small problem that is a number": (SMALL, "small=lambda p: 37", r"op slip: small\(\) gives 37, which is no Problem", "check"),
    "an example that raises": (
        EXAMPLE,
        "    return Problem(vd.DType[dtype.upper()], n, alpha)",
        r"op slip: example\(\) raises KeyError: 'FLOAT32'; at .*slip\.py:\d+",
        "explain",
    ),
    "an example that is a number": (EXAMPLE, "    return n", r"op slip: example\(\) gives 100, which is no Problem", "explain"),
    "a misspelt choice in tiles": (
        "threads=c.threads, Elem",
        "threads=c.thread, Elem",
        r"Config\.thread is not known before the launch, so tiles\(\) may not depend on it; known: threads, vector, unroll",
        "explain",
    ),
    "a dynamic field in tiles": (
        "threads=c.threads, Elem",
        "threads=p.n, Elem",
        r"Problem\.n is not known before the launch, so tiles\(\) may not depend on it",
        "explain",
    ),
    "arguments that are a dictionary": (
        "ARGS = vd.Arguments(",
        "ARGS = dict(",
        r"kernel slip: args is \{.*\}; give Arguments\(",
        "explain",
    ),
    "an argument that nobody gives": (
        'n="int", alpha',
        'n="int", m="int", alpha',
        r"argument m \(int\) has no value; give it in the problem or in scalars\(\)",
        "explain",
    ),
    "an op that is not named op": (OP, "the_op = vd.Op.of(", r"slip\.py:op' names nothing; the ops of .*slip\.py: the_op", "explain"),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_kernel("slip", tmp_path)
    return tmp_path / "slip.py"


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return int(ended.value.code or 0), captured.err


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_sentence_and_code_2(slip: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, said, command = SLIPS[slip]
    text = written.read_text()
    assert before in text
    written.write_text(text.replace(before, after, 1))
    words = [command, f"{written}:op", "--n", "1" if command == "check" else "100"]
    code, err = run([*words, *(["--quick", "--configs", "1"] if command == "check" else ["--arch", "h200"])], capsys)
    assert code == 2, err
    assert err.startswith("vidrial: ") and err.count("\n") == 1
    assert re.search(said, err), err
    if command == "explain":
        with pytest.raises(VidrialError):
            cli.main([*words, "--arch", "h200", "--debug"])


def test_what_it_is_without_a_slip(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a file finds its op by itself."""
    assert run(["explain", str(written), "--n", "100", "--arch", "h200"], capsys) == (0, "")


def test_a_file_with_no_op_or_several_says_what_to_add(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written.read_text()
    written.write_text(f"{text}\nother = replace(op, name='other')\n")
    code, err = run(["explain", str(written), "--n", "100"], capsys)
    assert (code, err) == (2, f"vidrial: {written} has 2 ops; say which: {written}:op or {written}:other\n")
    empty = written.with_name("empty.py")
    empty.write_text("x = 1\n")
    code, err = run(["explain", str(empty), "--n", "100"], capsys)
    assert code == 2 and err == f"vidrial: {empty} has 0 ops; give its Op a name at its top level: op = vd.Op.of(...)\n"


def test_two_kernels_of_one_name_and_a_stage_without_its_part(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scan = Path(__file__).parents[2] / "examples/scan"
    for file in scan.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    text = (scan / "scan.py").read_text()
    for before, after, said in (
        ('name="scan_offsets"', 'name="scan_sums"', "op scan: two kernels are named scan_sums; give each a name of its own"),
        (', part="offsets"', "", "takes its config from part offsets and has part=''; give part='offsets'"),
        ('return {"sums": per_block,', 'return {"x": per_block, "sums": per_block,', "op scan: x is among its inputs and its workspace"),
        (
            "per_block = vd.Buffer((p.b, -(-p.t // c.block)), vd.DType.float32)",
            'per_block = vd.Buffer((p.b, 3), "float32")',
            "Buffer of dtype 'float32'",
        ),
        ("kernels=(sums, offsets, add)", "kernels=sums", "give a tuple of Kernels, (kernel,) if it is one"),
    ):
        assert before in text
        file = tmp_path / f"scan{len(said)}.py"
        file.write_text(text.replace(before, after, 1))
        code, err = run(["explain", f"{file}:op", "--t", "100", "--arch", "h200"], capsys)
        assert code == 2 and said in err and err.count("\n") == 1, err
