"""`--config` and `check --arch`: the config that they name, or a sentence with what is accepted and exit code 2; and ptxas's warnings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from vidrial.build.nvrtc import Cubin, Resources, notes
from vidrial.cli import main as cli
from vidrial.cli import tables
from vidrial.device import Device
from vidrial.errors import ConfigError
from vidrial.spec.chosen import config_with, describe_taken, parse_choices, taken
from vidrial.spec.registry import find_op
from vidrial.tune.codec import decode, encode
from vidrial.tune.trial import KernelResources

EXAMPLES = Path(__file__).parents[2] / "examples"
SOFTMAX, GEMM, SCAN = (f"{EXAMPLES / name / name}.py:op" for name in ("softmax", "gemm", "scan"))
H200 = Device.of("h200")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def test_source_draw_and_compile_take_it(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("source", SOFTMAX, "--n", "1000", "--config", "row_threads=256, vector=2")
    assert code == 0 and "row_threads = 256" in out and "vector = 2" in out
    code, out, _ = run("draw", SCAN, "--t", "1000", "--config", "block=4096,add.threads=64", "--out", str(tmp_path))
    assert (code, out.splitlines()[0].split()[1]) == (0, "block=4096") and "add.threads=64" in out
    code, out, _ = run("compile", SOFTMAX, "--n", "1000", "--arch", "sm_80", "--jobs", "1", "--config", "row_threads=512,keep=1,vector=2")
    assert (
        code == 0
        and out.count("\nsoftmax  row_threads=512 rows=1 vector=2 keep=1 ") == 1
        and "kernels with row_threads=512,keep=1,vector=2 on a100" in out
    )


WRONG = {
    "threads=3": "--config threads: gemm has no such choice; accepted: ",
    "by": "--config 'by': accepted are choices with their values, as by=threads,threads.rows=128",
    "stages=3": "--config stages: several parts of gemm have it; accepted: threads.stages, tma.stages",
    "tma.rows=100": "--config tma.rows=100: not a value of it; accepted: 128, 256, 192, 64",
    "by=tma,by=tma": "--config gives by twice; accepted: each choice once",
    "by=tma,tma.stages=7,tma.columns=256": "gemm: no legal config with by=tma, tma.stages=7, tma.columns=256 for ",
    "by=threads,tma.rows=128": "gemm: no legal config with by=threads, tma.rows=128: with these choices nothing of part tma is launched for ",
}


@pytest.mark.parametrize("choices", WRONG)
@pytest.mark.parametrize("command", ["source", "compile", "analyse", "draw", "check"])
def test_what_is_not_accepted_is_one_sentence(run: Run, command: str, choices: str, tmp_path: Path) -> None:
    code, out, err = run(command, GEMM, "--config", choices, *(["--out", str(tmp_path)] if command == "draw" else []))
    assert (code, out) == (2, "") and err.startswith(f"vidrial: {WRONG[choices]}"), err


def test_check_runs_that_config_alone_by_the_rules_of_a_gpu(run: Run) -> None:
    code, out, err = run(
        "check", SOFTMAX, "--m", "3", "--n", "66", "--quick", "--config", "row_threads=32,vector=2,keep=2", "--arch", "a100"
    )
    assert code == 0 and err.count("\n") == 1 and "row_threads=32" in out and "all 1 right" in out and "not run" not in out
    code, _, err = run("check", GEMM, "--quick", "--config", "by=tma", "--arch", "a100")
    assert code == 2 and "on a100: gemm_tma: TMA and wgmma are instructions of sm_90a; a100 is sm_80" in err


def test_an_undotted_name_is_that_of_the_only_part_that_has_it() -> None:
    op = find_op(GEMM)
    assert parse_choices(op, "side=4,by=tma") == {"tma.side": 4, "by": "tma"}
    problem = op.example(m=512, n=512, k=512)
    config = config_with(op, problem, H200, {"tma.side": 16, "tma.columns": 96})
    assert (config.by, config.tma.side, config.tma.columns) == ("tma", 16, 96) and op.reject(problem, config, H200) is None
    # The fastest of these: no other makes both.
    others = [c.config for c in op.ranked(problem, H200, {"by": "tma"}) if (c.config.tma.side, c.config.tma.columns) == (16, 96)]
    assert config == others[0]
    assert set(taken(op, problem, config)) == {"by", *(f"tma.{f.name}" for f in dataclasses.fields(config.tma))}
    assert "threads." not in describe_taken(op, problem, config)


def test_no_legal_config_says_what_came_furthest() -> None:
    op = find_op(SOFTMAX)

    def rules(p: object, c: object) -> list[tuple[bool, str]]:
        return [(c.vector == 8, "vector is not 8"), (c.rows == 16, "rows are not 16"), (False, "that many rows of vectors are none")]  # type: ignore[attr-defined]

    # Three quarters break the first rule, one config in twenty comes to the last.
    none = dataclasses.replace(op, rules=rules)
    with pytest.raises(ConfigError, match=r"on h200: that many rows of vectors are none; rows are not 16; vector is not 8$"):
        none.predicted(op.example(n=64), H200)


LOG = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function 'k'
ptxas info    : (C7517) another
ptxas info    : (C7517) another
ptxas warning : Potential Performance Loss: something without a code
ptxas info    : Used 32 registers"""


def test_what_ptxas_warns_of_is_a_column(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert notes(LOG) == "C7510, C7517, performance loss" and notes("ptxas info    : Used 32 registers") == ""
    cubin = Cubin(b"", "sm_80", Resources(32, 0, 0, 0, 0), "", 0.0, notes(LOG))
    monkeypatch.setattr(tables, "build_many", lambda sources, arch, jobs: ((key, cubin) for key in sources))
    monkeypatch.setattr(tables, "look_up", lambda source, arch: ("", cubin))
    assert "C7510, C7517, performance loss" in run("compile", SOFTMAX, "--n", "1000", "--arch", "sm_80", "--top", "1")[1]
    assert "C7510, C7517, performance loss" in run("explain", SOFTMAX, "--n", "1000", "--arch", "sm_80", "--limit", "1")[1]
    monkeypatch.setattr(tables, "look_up", lambda source, arch: ("", None))
    assert "ptxas" not in run("explain", SOFTMAX, "--n", "1000", "--arch", "sm_80", "--limit", "1")[1]


def test_older_journals_lack_the_warnings() -> None:
    resources = KernelResources("k", 32, 0, 1024, "C7517")
    known = encode(resources)
    assert decode(KernelResources, known) == resources
    del known["ptxas"]
    assert decode(KernelResources, known) == dataclasses.replace(resources, ptxas="")
