"""`specialize`: a config that bakes a length in is another binary for every length; any other config compiles nothing for a new one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_op
import pytest
from fake_op import ARGS, FUNCTIONS, H200, Problem, example, true_ms

from vidrial.build.cubins import build
from vidrial.build.store import Store
from vidrial.errors import TemplateError
from vidrial.spec.fields import baked, choice, part, specialize, specialized
from vidrial.spec.kernel import Kernel
from vidrial.spec.op import Op
from vidrial.spec.source import Tiles
from vidrial.tune import ranking as ranking_module
from vidrial.tune.candidates import check_configs
from vidrial.tune.codec import decode, encode
from vidrial.tune.pick import choose_config
from vidrial.tune.ranking import Ranking, forget, top_configs
from vidrial.tune.timing import Timing
from vidrial.tune.trial import Status, Trial

TEMPLATE = """{{ tiles }}
{{ args }}
extern "C" __global__ void baked(Args args) {
  int const n = Tiles::n > 0 ? Tiles::n : args.n;
  for (int i = threadIdx.x; i < n; i += 128) args.y[i] = n;
}
"""


@dataclass(frozen=True)
class Config:
    tile: int = choice(128, 64)
    fixed: str = specialize("n")


@dataclass(frozen=True)
class Outer:
    inner: Config = part(Config)


def tiles(p: Any, c: Config) -> Tiles:
    return Tiles(threads=128, tile=c.tile, n=p.n if c.fixed else 0)


@pytest.fixture
def op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ranking_module, "shipped_folder", lambda: None)
    forget()
    template = tmp_path / "baked.cu.j2"
    template.write_text(TEMPLATE)
    kernel = Kernel("baked", template, Problem, Config, ARGS, tiles, fake_op.fake.grid, lambda p, c, d: (), fake_op.cost)
    return Op.of(kernel, **FUNCTIONS)


def test_it_changes_the_source_and_nothing_else_does(op: Op) -> None:
    (kernel,) = op.kernels
    assert kernel.source(example(n=1000), Config()).text == kernel.source(example(n=10007), Config()).text
    one, two = (kernel.source(example(n=n), Config(fixed="n")).text for n in (1000, 10007))
    assert one != two and "n = 1000;" in one and "n = 10007;" in two

    build(kernel.source(example(n=1000), Config()), "sm_80")
    known = Store.shared().usage()[0]
    build(kernel.source(example(n=10007), Config()), "sm_80")
    assert Store.shared().usage()[0] == known == 1
    for n in (1000, 10007):
        build(kernel.source(example(n=n), Config(fixed="n")), "sm_80")
    assert Store.shared().usage()[0] == 3


def test_a_field_that_is_not_baked_in_is_refused(op: Op) -> None:
    careless = dataclasses.replace(op.kernels[0], tiles=lambda p, c: Tiles(threads=128, n=p.n))
    with pytest.raises(TemplateError, match=r"Problem\.n is not known before the launch.*specialize\('n'\)"):
        careless.source(example(), Config())
    assert careless.resolve(example(n=77), Config(fixed="n")).n == 77


def test_names_of_what_is_baked_in() -> None:
    assert baked(Config()) == () and baked(Config(fixed="n")) == ("n",)
    assert specialized(Outer(Config(fixed="n"))) and not specialized(Outer())
    assert decode(Config, encode(Config(fixed="n"))) == Config(fixed="n")


def test_it_is_picked_for_its_own_length_alone(op: Op) -> None:
    times = {Config(fixed="n"): 1.0, Config(64, "n"): 1.1, Config(64): 1.2, Config(): 1.3}
    for n in (4001, 10007, 20001, 40001, 80001):
        timings = {c: Timing(ms * true_ms(n, c.tile, 3), 1e-4, 20) for c, ms in times.items()}
        trials = [Trial("baked", example(n=n), c, Status.ok, timing=timing) for c, timing in timings.items()]
        found = Ranking.from_trials(op, H200, trials)
        assert found is not None
        found.save(op)
    assert top_configs(found.measured) == (Config(64),)
    assert choose_config(op, example(n=10007), H200).config.fixed == "n"
    assert choose_config(op, example(n=10009), H200) == (Config(64), "model")


def test_it_is_checked_by_its_like_at_the_small_problem(op: Op) -> None:
    assert check_configs(op, example(n=300), example(n=10007), Config(fixed="n"), H200) == (Config(fixed="n"),)
