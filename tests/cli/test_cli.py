from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import fake_op
import pytest

from vidrial.build.cubins import build
from vidrial.build.store import Store
from vidrial.cli import main as cli
from vidrial.device import Device
from vidrial.errors import ArgumentError, SweepError
from vidrial.kernels.power_retention.op import op as power_retention
from vidrial.spec.choices import describe
from vidrial.spec.registry import find_op, make_problem, parse_keywords
from vidrial.tune.pick import choose_config
from vidrial.tune.ranking import SCHEMA

SOFTMAX = f"{Path(__file__).parents[2] / 'examples/softmax/softmax.py'}:op"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command line: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


COMMANDS = ("explain", "compile", "sweep", "source", "analyse", "check", "draw", "report", "env", "demo", "cache", "new")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_names_the_options(run, command: tuple[str, ...]) -> None:
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: vidrial {' '.join(command)}".rstrip())
    options = {"explain": ["--arch", "--limit"], "compile": ["--top", "--jobs"], "sweep": ["--seconds", "--resume", "--gpus"]}
    for option in options.get("".join(command), []):
        assert option in out


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--t", "10007", "--d=32"], {"t": [10007], "d": [32]}),
        (["--t", "1", "--t", "2"], {"t": [1, 2]}),
        (["--t", "7", "--gated", "false", "--scale", "-0.5", "--hq", "none"], {"t": [7], "gated": [False], "scale": [-0.5], "hq": [None]}),
        (["--t", "7", "--dtype", "float16"], {"t": [7], "dtype": ["float16"]}),
    ],
)
def test_keywords_take_the_types_of_example(words: list[str], values: dict[str, list[object]]) -> None:
    assert parse_keywords(power_retention, words) == values


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["explain", "nonsense"], "op 'nonsense' is not known; accepted: flash_attention, power_retention, power_retention_backward"),
        (["explain", "my/rows.py"], "or path/to/file.py:attribute; my/rows.py:op, if op is what the file calls it"),
        (["explain", "no.such.module:op"], "No module named 'no'"),
        (["explain", "nowhere.py:op"], "nowhere.py"),
        (["explain", "..relative:op"], "'..relative:op' names nothing"),
        (["explain", "antigravity_that_raises.py:op"], "cannot be imported: NameError: name 'undefined' is not defined"),
        (["explain", "that_leaves.py:op"], "cannot be imported: SystemExit: no GPU"),
        (["explain", "power_retention", "--t", "9", "--normalize", "max"], "normalize='max' is not known; accepted: 'sum', 'none'"),
        (["compile", "power_retention", "--t", "9", "--arch", "h200", "--dtype", "int32"], "dtype int32 is not served; accepted: bfloat16"),
        (["source", "power_retention", "--t", "9", "--arch", "h200", "--d", "0"], "D=0 is not served; accepted: 32, 64, 128"),
        *(
            (["explain", "power_retention", "--t", "100", "--arch", "h200", *words.split()], reason)
            for words, reason in (
                ("--hq 3 --h 2", "q has 3 heads and k has 2; accepted: a multiple"),
                ("--hq 1 --h 2", "q has 1 heads and k has 2"),
                ("--degree 3", "degree=3: an odd power's weights change sign"),
                ("--d 65", "D=65 is not served"),
                ("--scale nan", "scale=nan is not served"),
                ("--scale 1e300", "scale=1e+300 is not served"),
                ("--b 100000", "heads; accepted: at most 65535"),
                ("--dtype float32", "dtype float32 is not served"),
            )
        ),
        (["explain", "power_retention", "--t", "3000000000", "--arch", "h200"], "elements; accepted: at most 2^31"),
        # Cut to what is quick to check these would be other problems, and right.
        (["check", "power_retention", "--t", "40", "--hq", "3", "--h", "2"], "q has 3 heads and k has 2; accepted: a multiple"),
        (["check", "power_retention", "--b", "100000"], "heads; accepted: at most 65535"),
        (["explain", "vidrial.errors:VidrialError"], "names a type, not an Op"),
        (["explain", "--t", "3"], "'--t' stands where OP should"),
        (["explain", "power_retention"], "power_retention needs --t"),
        (["explain", "power_retention", "--t"], "--t needs a value"),
        (["explain", "power_retention", "--t", "many"], "--t 'many' is not a value of it; accepted: int"),
        (["explain", "power_retention", "--t", "0"], "t=0 is not a size; accepted: at least 1"),
        (["explain", "power_retention", "--t", "-5"], "t=-5 is not a size"),
        (["explain", "power_retention", "--t", "9", "--t", "8"], "a keyword came twice"),
        (["explain", "power_retention", "--t", "9", "--banana", "8"], "'--banana' is not an option of this command or a keyword of its op"),
        (["explain", "power_retention", "--t", "9", "--arch", "sm_12"], "device 'sm_12' is not in the table"),
        (["source", "power_retention", "--t", "9", "--stage", "power_scam"], "'power_scam' is not launched"),
        (["sweep", "power_retention", "--t", "9", "--gpus", "two"], "--gpus 'two'"),
        (["report", "no_such_journal.jsonl", "--out", "page.html"], "no_such_journal.jsonl cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(run, words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("antigravity_that_raises.py").write_text("undefined\n")
    Path("that_leaves.py").write_text("import sys\n\nsys.exit('no GPU')\n")
    code, out, err = run(*words)
    assert code == 2
    assert reason in err
    assert err.startswith("vidrial: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err + out


def test_an_index_that_no_gpu_has_is_refused_by_it(run) -> None:
    code, _, err = run("sweep", "power_retention", "--t", "9", "--gpus", f"{10**30},")
    assert code == 2 and err.startswith("vidrial: ") and err.count("\n") == 1 and str(10**30) in err


def test_a_report_before_any_sweep_says_so(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "empty"))
    code, _, err = run("report", "--out", str(tmp_path / "page.html"))
    assert code == 2 and not (tmp_path / "page.html").exists()
    assert "no sweep has left a journal in" in err and "sweep first (vidrial sweep OP), or name journals" in err


def test_a_report_of_rankings_says_what_they_are(run, tmp_path: Path) -> None:
    (tmp_path / "softmax.json").write_text("{}")
    code, _, err = run("report", str(tmp_path), "--out", str(tmp_path / "page.html"))
    assert code == 2 and "it has rankings (softmax.json), which keep the fastest alone; a report is of a sweep's journal" in err
    (tmp_path / "empty").mkdir()
    assert "it has no journal (*.jsonl); a report is of a sweep's journal: vidrial sweep OP" in run("report", str(tmp_path / "empty"))[2]


def test_draw_writes_beside_by_itself(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("draw", "flash_attention", "--t", "65", "--d", "32", "--arch", "sm_80")[0] == 0
    assert (tmp_path / "flash_attention_pictures" / "flash_sm80.Q.svg").is_file()


def test_debug_lets_the_error_through() -> None:
    with pytest.raises(ArgumentError, match="needs --t"):
        cli.main(["explain", "power_retention", "--debug"])


def test_ctrl_c_is_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vidrial.cli.main.read_one", interrupted)
    assert run("explain", "power_retention", "--t", "9")[0] == 130


def test_click_mistakes_keep_their_own_words(run) -> None:
    code, _, err = run("explain", "power_retention", "--t", "9", "--limit", "0")
    assert code == 2
    assert "--limit" in err
    assert run("nonsense")[0] == 2


def test_explain_ranks_as_the_space_does(run) -> None:
    code, out, _ = run("explain", "power_retention", "--t", "10007", "--arch", "sm_90a", "--limit", "3", "--h", "8")
    space = power_retention.space(power_retention.example(t=10007, h=8), Device.of("h200"))
    assert code == 0
    assert "t=10007 hq=8 h=8" in out
    for word in describe(space.legal[0].config).split():
        assert word in out
    reason, configs = next(iter(space.reasons().items()))
    assert f"{len(configs)}  {reason}" in " ".join(out.split(" "))
    assert f"{len(space.rejected)} rejected, for {len(space.reasons())} reasons" in out


def test_explain_an_op_in_a_file(run) -> None:
    code, out, _ = run("explain", SOFTMAX, "--n", "1001", "--arch", "sm_80", "--limit", "100")
    assert code == 0
    assert "softmax on a100 (sm_80): dtype=float32 m=4096 n=1001" in out
    assert "vector=2 must divide n=1001" in out
    assert "vector=4 keep" not in out.split("rejected")[0]


def test_compile_says_what_each_kernel_takes(run) -> None:
    code, out, _ = run("compile", SOFTMAX, "--n", "1000", "--arch", "sm_80", "--top", "2", "--jobs", "2")
    assert code == 0
    op, device = find_op(SOFTMAX), Device.of("sm_80")
    problem = make_problem(op, {"n": 1000})
    for config in op.space(problem, device, limit=2):
        (stage,) = op.stages(problem, config)
        resources = build(stage.kernel.source(problem, config), "sm_80").resources
        line = next(line for line in out.splitlines() if describe(config) in line).split()
        assert int(line[-5]) == resources.registers
        assert int(line[-4]) == 0
        assert int(line[-3]) == resources.static_smem


def test_a_kernel_that_does_not_compile_is_shown_and_fails(run, tmp_path: Path) -> None:
    text = Path(SOFTMAX.partition(":")[0]).with_name("softmax.cu.j2").read_text()
    (tmp_path / "softmax.cu.j2").write_text(text.replace("Part part;", "Part part", 1))
    (tmp_path / "broken.py").write_text(Path(SOFTMAX.partition(":")[0]).read_text())
    code, out, _ = run("compile", f"{tmp_path / 'broken.py'}:op", "--n", "1000", "--arch", "sm_80", "--top", "1")
    assert code == 1
    assert "does not compile" in out
    assert "at softmax.cu.j2:" in out


def test_source_is_the_predicted_configs(run) -> None:
    code, out, _ = run("source", SOFTMAX, "--n", "1000", "--arch", "sm_80")
    op = find_op(SOFTMAX)
    problem = make_problem(op, {"n": 1000})
    assert code == 0
    assert out == op.kernels[0].source(problem, op.predicted(problem, Device.of("sm_80"))).text + "\n"


def test_draw_writes_a_picture_of_each_object(run, tmp_path: Path) -> None:
    code, out, _ = run("draw", "power_retention", "--t", "65", "--d", "32", "--arch", "sm_80", "--out", str(tmp_path / "new" / "folder"))
    files = sorted((tmp_path / "new" / "folder").glob("*.svg"))
    assert code == 0
    assert {"power_attend.Q.svg", "power_attend.QK.A.svg", "power_attend.QK.C.svg", "power_attend.CopyK.svg"} <= {f.name for f in files}
    assert out.splitlines()[1:] == [str(tmp_path / "new" / "folder" / line.rpartition("/")[2]) for line in out.splitlines()[1:]]
    for file in files:
        assert len(ET.parse(file).getroot()) > 8, file
    assert run("draw", "power_retention", "--t", "10007", "--arch", "h200", "--out", str(tmp_path / "hopper"))[0] == 0
    drawn = {part: ET.parse(tmp_path / "hopper" / f"power_attend.PV.{part}.svg").getroot().find("{*}title") for part in "ABC"}
    assert all("wgmma.m64n64k16.bfloat16.trans" in title.text for title in drawn.values())
    (tmp_path / "file").write_text("")
    code, _, err = run("draw", "power_retention", "--t", "65", "--d", "32", "--arch", "sm_80", "--out", str(tmp_path / "file" / "below"))
    assert (code, "cannot be written" in err) == (2, True)


def test_cache_counts_what_is_there(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "own"))
    for n in range(3):
        Store.shared().put(f"{n}" * 64, bytes(1000), "source", {})
    assert f"{tmp_path / 'own'}: 3 binaries, 0.0 of at most 2048 MB" in run("cache", "show")[1]
    next((tmp_path / "own").rglob("kernel.cubin.z")).write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert "3 binaries read, 1 damaged and set aside" in run("cache", "verify")[1]
    assert "2 binaries removed" in run("cache", "prune", "--max-mb", "0")[1]
    Store.shared().put("a" * 64, bytes(1000), "source", {})
    assert run("cache", "clear", "--yes")[0] == 0
    assert Store.shared().usage() == (0, 0)


def test_env_says_what_is_missing_and_how_to_install_it(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, out, _ = run("env")
    assert code == 0
    assert "missing" not in out
    said = " ".join(out.split())
    assert "power_retention, " in said and (
        "rankings shipped: measured sizes take their winner" in said or "until you run vidrial sweep" in said
    )
    monkeypatch.setenv("VIDRIAL_CUTLASS_INCLUDE", str(tmp_path))
    code, out, _ = run("env")
    assert code == 0
    assert "missing: " in out
    assert "pip install --no-deps nvidia-cutlass==" in " ".join(out.split())


def test_env_says_that_rankings_of_another_gpu_do_not_count(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    known = [Device.of("h200"), Device.of("h100")]
    h100 = dataclasses.replace(known[1], name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("vidrial.cli.tables.gpu_count", lambda: 1)
    monkeypatch.setattr(Device, "current", classmethod(lambda cls, index=None: h100))
    folder, entry = tmp_path / "shipped", {"schema": SCHEMA, "digest": power_retention.digest()}
    (folder / known[0].key).mkdir(parents=True)
    (folder / known[0].key / "power_retention.json").write_text(json.dumps({"rankings": [entry] * 22}))
    monkeypatch.setattr("vidrial.tune.ranking.shipped_folder", lambda: folder)
    said = " ".join(run("env")[1].split())
    assert f"power_retention, NVIDIA H100 80GB HBM3 nothing that counts was measured on this kind of GPU ({h100.key})" in said
    assert (
        f"the cost model's choice until you run vidrial sweep power_retention --t T; rankings shipped for h200 ({known[0].key}) are of another kind and do not"
        in said
    )
    assert choose_config(power_retention, power_retention.example(t=10007), h100).origin == "predicted"
    monkeypatch.setattr(Device, "current", classmethod(lambda cls, index=None: known[0]))
    Store.shared().write_json("ranking", f"power_retention-{known[0].key}-0-0", {"digest": "of other templates"})
    said = " ".join(run("env")[1].split())
    assert "22 rankings shipped: measured sizes take their winner" in said and "1 from this machine are of other templates" in said


def test_sweep_without_a_gpu_says_so(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = run("sweep", "power_retention", "--t", "1000")
    assert code == 2
    assert "no usable CUDA GPU" in err


def test_gpus() -> None:
    assert [cli.gpus_of(text) for text in ("2", "all", "0,2", "3,")] == [2, "all", (0, 2), (3,)]
    for text in ("", ",", "1,x", "-1"):
        with pytest.raises(ArgumentError, match="--gpus"):
            cli.gpus_of(text)


def test_sweep_passes_its_options_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def sweep_lengths(op: object, problems: list[object], options: object) -> None:
        asked.append((op, problems, options))
        error = SweepError("stop here")
        error.add_note("3 trials are kept")
        raise error

    monkeypatch.setattr("vidrial.tune.sweeper.sweep_lengths", sweep_lengths)
    words = ("--seconds", "2.5", "--resume", "--gpus", "0,1", "--strategy", "optuna", "--ray", "auto")
    code, _, err = run("sweep", "power_retention", "--t", "1000", "--t", "5001", *words)
    (op, problems, options) = asked[0]
    assert (code, err) == (2, "vidrial: stop here\n3 trials are kept\n")
    assert op is power_retention
    assert [p.t for p in problems] == [1000, 5001]
    assert (options.seconds, options.resume, options.gpus, options.trials, options.exhaustive) == (2.5, True, (0, 1), None, False)
    assert (options.strategy, options.ray) == ("optuna", "auto")
    run("sweep", "power_retention", "--t", "1000", "--ray", "auto", "--gpus", "all")
    run("sweep", "power_retention", "--t", "1000")
    assert [options.gpus for _, _, options in asked[1:]] == ["all", None]


def test_the_command_line_is_light_and_runs_as_a_module() -> None:
    light = "import sys, vidrial.cli.main; print([m for m in ('cupy', 'torch', 'jax', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True).stdout == "[]\n"
    answer = subprocess.run([sys.executable, "-m", "vidrial", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("vidrial, version ")


@pytest.mark.filterwarnings("ignore:vidrial. the cache lives in")
def test_a_refused_cache_is_not_cleared_and_says_why(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    Store(tmp_path / ".cache/vidrial").write_json("ranking", "hours", {"of": "work"})
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "link"))
    for words in (["clear", "--yes"], ["prune"], ["verify"], ["show"]):
        code, _, text = run("cache", *words)
        assert code == 2 and f"cache directory {tmp_path}/link is a symbolic link; set VIDRIAL_CACHE_DIR to the directory itself" in text
    assert Store(tmp_path / ".cache/vidrial").read_json("ranking", "hours") == {"of": "work"}


OP = """
import dataclasses, pathlib
import fake_op
template = pathlib.Path(__file__).with_name("kernel.cu.j2")
kernel = dataclasses.replace(fake_op.fake, template=template)
op = dataclasses.replace(fake_op.op, name="other", kernels=(kernel,), stages=lambda p, c: (fake_op.Stage(kernel, p, c),))
"""


def test_an_ascii_locale_and_no_stdout(tmp_path: Path) -> None:
    """A template with other characters is rendered, compiled in a pool and printed."""
    text = fake_op.TEMPLATE.read_text(encoding="utf-8")
    (tmp_path / "kernel.cu.j2").write_text(f"// \u2713 gr\u00fcn\n{text}", encoding="utf-8")
    (tmp_path / "other.py").write_text(OP, encoding="utf-8")
    tests = Path(__file__).parents[1]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": f"{tests.parent}:{tests}"}
    for command in ("source", "compile", "explain"):
        words = [sys.executable, "-m", "vidrial", command, f"{tmp_path}/other.py:op", "--n", "300", "--arch", "h200"]
        ended = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert ended.returncode == 0, ended.stderr.decode()
        assert command != "source" or "// \u2713 gr\u00fcn".encode() in ended.stdout
    closed = subprocess.run(f"{sys.executable} -m vidrial env >&-", shell=True, env=environment, capture_output=True, check=False)
    assert closed.returncode == 0 and not closed.stderr, closed.stderr.decode()
