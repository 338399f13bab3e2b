"""Rankings outlive an edit of templates that changes no machine code: this proves it, kernel by kernel, and then writes the present digest.

    python tests/restamp.py OLD_TREE power_retention        # a checkout of the commit that the rankings were measured with
    python tests/restamp.py OLD_TREE power_retention --check  # proves and writes nothing

Every config that a shipped ranking keeps is rendered and compiled for the ranking's device in both trees, each by its own Python sources: the
same launches in the same order, the same grid, threads and shared memory, and byte for byte the same code and constants. A ranking of which
one launch differs keeps its old digest, which no call counts, and what differs is printed; so does one that is of neither tree. Needs no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine_code import disassemble, sections

from vidrial import describe
from vidrial.build.cubins import build_many
from vidrial.build.nvrtc import Cubin
from vidrial.device import TABLE
from vidrial.spec.registry import find_op
from vidrial.spec.source import Source
from vidrial.tune.ranking import Ranking

RESULTS = Path(__file__).resolve().parents[1] / "sweeps/results"
SHOWN = 3  # differences of a ranking


def main() -> int:
    """The command; 1 if a ranking could not be proved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout of the commit whose templates the rankings are of")
    parser.add_argument("op", help="the op's name")
    parser.add_argument("--check", action="store_true", help="prove, and write nothing")
    parser.add_argument("--jobs", type=int, help="processes that compile; by default VIDRIAL_JOBS, or one per core")
    parser.add_argument("--describe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.describe:
        print(json.dumps(launches(options.op, options.describe, options.jobs)))
        return 0
    return sum(restamp(options, path) for path in sorted(RESULTS.glob(f"*/{options.op}.json"))) > 0


def restamp(options: argparse.Namespace, path: Path) -> int:
    """Prove one device's file and write it; how many of its rankings could not be proved."""
    start, trees = time.monotonic(), (options.old.resolve(), Path(__file__).resolve().parents[1])
    old, new = (asked(tree, options, path) for tree in trees)
    data, left = json.loads(path.read_bytes()), 0
    for i, entry in enumerate(data["rankings"]):
        if entry["digest"] == new["digest"]:
            continue
        faults = [f"of {entry['digest'][:16]}, and {trees[0]} is {old['digest'][:16]}"] if entry["digest"] != old["digest"] else []
        kept = sum(len(measured["configs"]) for measured in entry["measured"])
        faults = faults or differences(old["rankings"][i], new["rankings"][i], kept)
        for fault in [*faults[:SHOWN], *([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])]:
            print(f"{path.parent.name}: ranking {i}: {fault}")
        left += bool(faults)
        entry["digest"] = entry["digest"] if faults else new["digest"]
    kernels = len({code.rsplit(" ", 1)[1] for ranking in new["rankings"] for config in ranking.values() for code in config})
    configs, count = sum(map(len, new["rankings"])), len(data["rankings"])
    print(f"{path}: {count - left} of {count} rankings hold: {configs} configs of {kernels} kernels, {time.monotonic() - start:.0f} s")
    if not options.check:
        staged = path.with_suffix(".new")
        staged.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(staged, path)
    return left


def asked(tree: Path, options: argparse.Namespace, path: Path) -> Any:
    """`launches` as a tree's own sources make them."""
    command = [sys.executable, str(Path(__file__).resolve()), str(tree), options.op, "--describe", str(path.resolve())]
    command += ["--jobs", str(options.jobs)] if options.jobs else []
    return json.loads(
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, check=True, text=True).stdout
    )


def differences(old: dict[str, list[str]], new: dict[str, list[str]], kept: int) -> list[str]:
    """What is another for a ranking's `kept` configs, in words."""
    if old.keys() != new.keys() or len(old) != kept or not kept:
        return [f"of its {kept} configs {len(old)} were read and {len(new)} are"]
    found = []
    for config, codes in old.items():
        if len(codes) != len(new[config]):
            found.append(f"{len(codes)} launches, now {len(new[config])}: {config}")
        found += [f"{a} is now {b}: {config}" for a, b in zip(codes, new[config], strict=False) if a != b]
    return found


def launches(name: str, path: Path, jobs: int | None) -> dict[str, Any]:
    """The op's digest, and of each ranking in the file what each of its configs launches: kernel, geometry and a digest of its code."""
    op, device = find_op(name), next((d for d in TABLE if d.key == path.parent.name), None)
    if device is None:
        raise SystemExit(f"{path}: no device of vidrial.device has this key")
    sources: dict[str, tuple[Source, str]] = {}
    rankings: list[dict[str, list[tuple[str, str]]]] = []
    for entry in json.loads(path.read_bytes())["rankings"]:
        configs: dict[str, list[tuple[str, str]]] = {}
        for i, measured in enumerate(Ranking.from_json(op, entry).measured):
            for j, ranked in enumerate(measured.configs):
                # NOTE: by number: a problem or config that has gained a field reads otherwise.
                key = f"problem {i}, config {j}"
                configs[key] = []
                for stage in op.stages(measured.problem, ranked.config):
                    source = stage.kernel.source(stage.problem, stage.config)
                    sources[source.text] = source, describe(stage.config)
                    geometry = stage.kernel.geometry(stage.problem, stage.config)
                    configs[key].append((f"{stage.kernel.name} {geometry}", source.text))
        rankings.append(configs)
    codes = {}
    for text, cubin in build_many(sources, device.arch, jobs=jobs):
        if not isinstance(cubin, Cubin):
            raise SystemExit(f"{sources[text][1]}: {cubin}")
        codes[text] = code_of(cubin)
    told = [{key: [f"{words} {codes[text]}" for words, text in config] for key, config in ranking.items()} for ranking in rankings]
    return {"digest": op.digest(), "rankings": told}


def code_of(cubin: Cubin) -> str:
    """A digest of what a launch reads of a cubin: instructions, relocations, constants, and what it takes of an SM.

    Members of `struct Tiles` are variables of which no code reads any; where the code does ask for addresses, in bank 4, variables count, too.
    """
    every = sections(cubin.image)
    code = disassemble(cubin.image)
    if not code:
        raise SystemExit("cuobjdump shows no instruction of a cubin")
    counted = [".text.", ".rela.text.", ".nv.constant1", ".nv.constant2", ".nv.constant3"]
    if any("c[0x4]" in line for _, line in code):
        counted += [".nv.global", ".nv.constant4", ".rela.nv.constant4"]
    found = [(name, data) for name, data in sorted(every.items()) if name.startswith(tuple(counted))]
    return hashlib.sha256(repr((found, cubin.resources)).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
