"""What is static for a kernel is what its tiles and its template read: binaries, sources and tiles are shared by that alone."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ArgumentError, TemplateError
from vidrial.spec.choices import configs, describe
from vidrial.spec.fields import ByReads, Static, choice, dynamic, specialize, static
from vidrial.spec.kernel import Kernel
from vidrial.spec.source import Arguments, Tiles


@dataclass(frozen=True)
class Problem:
    dtype: DType = static()
    d: int = static()
    e: int = static()
    gated: bool = static()
    degree: int = static()
    n: int = dynamic()

    @property
    def features(self) -> int:
        return self.d * self.d

    @property
    def rows(self) -> int:
        return self.n // 2

    def doubled(self, times: int) -> int:
        return self.d * 2**times


@dataclass(frozen=True)
class Config:
    tile: int = choice(64, 32)
    stages: int = choice(2, 3)
    mma: str = choice("sync", "wgmma")
    fixed: str = specialize("n")
    block: int = 16

    @property
    def step(self) -> int:
        return self.tile * self.stages


TEMPLATE = """{{ tiles }}
{{ args }}
{% if c.mma == "wgmma" %}// {{ p.degree }}
{% endif %}
int const used = Tiles::e + Tiles::features + (Tiles::gated ? Tiles::step : 0) + Tiles::threads;
"""


def tiles(p: Any, c: Any) -> Tiles:
    return Tiles(threads=c.tile, width=p.d if p.gated else 1)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    template = tmp_path / "k.cu.j2"
    template.write_text(TEMPLATE)
    args = Arguments(n="int", features="int", rows="int", block="int")
    return Kernel("k", template, Problem, Config, args, tiles, lambda p, c: (1, 1, 1), scalars=lambda p, c: {"block": c.block})


def problem(**changes: Any) -> Problem:
    return Problem(**{"dtype": DType.float16, "d": 4, "e": 5, "gated": True, "degree": 2, "n": 100} | changes)


def names(kernel: Kernel, p: Problem, c: Config, lengths: bool = True) -> list[str]:
    name, read = kernel.binary(p, c, lengths)  # type: ignore[misc]
    assert name == "k"
    return sorted(f"{owner}.{field}" for (owner, field), _ in read)


def test_facts_enter_struct_tiles_by_themselves(kernel: Kernel) -> None:
    text = kernel.source(problem(), Config()).text
    for line in ("int e = 5;", "int features = 16;", "bool gated = true;", "int step = 128;", "int width = 4;"):
        assert text.count(f"static constexpr {line}") == 1
    assert "int d =" not in text and "tile =" not in text and "degree" not in text and text.count("threads = ") == 1
    given = dataclasses.replace(kernel, tiles=lambda p, c: Tiles(threads=32, e=7))
    assert "int e = 7;" in given.source(problem(), Config()).text and "int e = 5;" not in given.source(problem(), Config()).text


def test_a_binary_is_what_was_read(kernel: Kernel) -> None:
    every = ["config.mma", "config.stages", "config.tile", "problem.d", "problem.e", "problem.gated"]
    assert names(kernel, problem(), Config()) == every
    assert names(kernel, problem(), Config(mma="wgmma")) == sorted([*every, "problem.degree"])
    first = kernel.binary(problem(), Config())
    for p, c, same in (
        (problem(n=7, dtype=DType.bfloat16, degree=4), Config(block=99), True),
        (problem(e=6), Config(), False),
        (problem(gated=False), Config(), False),
        (problem(), Config(stages=3), False),
    ):
        assert (kernel.binary(p, c) == first) == same
        assert (kernel.source(p, c).text == kernel.source(problem(), Config()).text) == same
    # The tiles alone do not read e.
    assert kernel.resolve(problem(e=6, n=3), Config(stages=3)) is kernel.resolve(problem(), Config())
    assert kernel.resolve(problem(gated=False), Config()) is not kernel.resolve(problem(), Config())
    # Nor d, without gates; but the template's `features` does.
    assert kernel.resolve(problem(gated=False, d=9), Config()) is kernel.resolve(problem(gated=False), Config())
    assert kernel.binary(problem(gated=False, d=9), Config()) != kernel.binary(problem(gated=False), Config())


def test_a_template_that_asks_for_more_makes_other_binaries(kernel: Kernel) -> None:
    assert kernel.binary(problem(), Config()) == kernel.binary(problem(degree=4), Config())
    kernel.template.write_text(TEMPLATE + "int const more = Tiles::degree;\n")
    assert kernel.binary(problem(), Config()) != kernel.binary(problem(degree=4), Config())
    kernel.template.write_text(TEMPLATE + "{{ p.degree }}\n")
    assert kernel.binary(problem(), Config()) != kernel.binary(problem(degree=4), Config())


def test_properties_methods_and_whole_views(kernel: Kernel) -> None:
    by_method = dataclasses.replace(kernel, tiles=lambda p, c: Tiles(threads=p.doubled(3)))
    assert by_method.resolve(problem(), Config()).threads == 32
    # Who asks for a whole problem, in a set say, has read all of it that is static.
    whole = dataclasses.replace(kernel, tiles=lambda p, c: Tiles(threads=32, n=len({p, c})))
    assert whole.resolve(problem(), Config()) is whole.resolve(problem(n=7), Config())
    assert whole.resolve(problem(), Config()) is not whole.resolve(problem(degree=3), Config())
    assert whole.resolve(problem(), Config()) is not whole.resolve(problem(), Config(block=3))
    printed = dataclasses.replace(kernel, tiles=lambda p, c: Tiles(threads=32, n=len(repr(p))))
    assert printed.resolve(problem(degree=10), Config()).n == 1 + printed.resolve(problem(degree=1), Config()).n


def test_what_a_launch_decides_stays_unknown(kernel: Kernel) -> None:
    for name, function in {"n": lambda p, c: Tiles(threads=p.n), "n ": lambda p, c: Tiles(threads=p.rows)}.items():
        with pytest.raises(
            TemplateError, match=rf"Problem\.{name.strip()} is not known before the launch.*known: dtype, d, e, gated, degree"
        ):
            dataclasses.replace(kernel, tiles=function).resolve(problem(), Config())
    for asked in ("n", "rows"):
        kernel.template.write_text(TEMPLATE + f"int const more = Tiles::{asked};\n")
        with pytest.raises(TemplateError, match=r"Problem\.n is not known before the launch"):
            kernel.source(problem(), Config())
        assert f"int {asked} = {100 if asked == 'n' else 50};" in kernel.source(problem(), Config(fixed="n")).text


def test_a_length_that_is_baked_in_decides_the_binary(kernel: Kernel) -> None:
    baking = dataclasses.replace(kernel, tiles=lambda p, c: Tiles(threads=32, n=p.n))
    fixed = Config(fixed="n")
    assert baking.binary(problem(), fixed) != baking.binary(problem(n=7), fixed)
    assert baking.binary(problem(), fixed, lengths=False) == baking.binary(problem(n=7), fixed, lengths=False)
    assert {"problem.n", "config.fixed"} <= set(names(baking, problem(), fixed)) and "problem.n" not in names(
        baking, problem(), fixed, False
    )
    # Its tiles are remembered, but not for who may not read the length.
    with pytest.raises(TemplateError, match="not known before the launch"):
        baking.resolve(problem(), Config())


def test_a_name_that_is_both_s_is_refused(tmp_path: Path, kernel: Kernel) -> None:
    @dataclass(frozen=True)
    class Both(Config):
        e: int = choice(1, 2)

    twice = dataclasses.replace(kernel, config=Both)
    with pytest.raises(TemplateError, match=r"Tiles::e is a field of Problem and of .*Both; rename one, or give it in tiles\(\)"):
        twice.source(problem(), Both())
    assert "int e = 7;" in dataclasses.replace(twice, tiles=lambda p, c: Tiles(threads=32, e=7)).source(problem(), Both()).text
    kernel.template.write_text("{{ tiles }}\nint const bad = Tiles::mma;\n")
    with pytest.raises(TemplateError, match="'sync' .str. may not reach a source"):
        kernel.source(problem(), Config())


def test_scalars_are_fields_and_properties(kernel: Kernel) -> None:
    packed = kernel.pack(problem(), Config(block=3))
    assert [int.from_bytes(packed[i : i + 4], "little") for i in (0, 4, 8, 12)] == [100, 16, 50, 3]
    with pytest.raises(ArgumentError, match=r"argument block \(int\) has no value"):
        dataclasses.replace(kernel, scalars=lambda p, c: {}).pack(problem(), Config())


def test_a_config_s_plain_field_is_no_choice(kernel: Kernel) -> None:
    assert describe(Config(block=99)) == "tile=64 stages=2 mma=sync fixed="
    legal = [c for c in configs(Config) if kernel.reject(problem(), c, Device.of("h200")) is None]
    assert {c.block for c in legal} == {16} and len(legal) == 16


def test_calls_at_once_do_not_disturb_one_another(kernel: Kernel) -> None:
    """Another thread makes tiles that read other fields while this one looks through what is known."""
    remembered = ByReads(lambda static: kernel.tiles(static.problem, static.config))

    class Interrupted(Static):
        def values(self, names: Any) -> tuple[Any, ...]:
            remembered(Static(problem(gated=False), Config()))
            return super().values(names)

    remembered(Static(problem(d=9), Config()))
    assert remembered(Interrupted(problem(), Config())).width == 4
    assert remembered.made == 3


def test_many_threads_get_one_answer_each(kernel: Kernel) -> None:
    asked = [problem(d=d, e=e, gated=gated) for d in range(1, 9) for e in range(1, 5) for gated in (True, False)]
    alone = [kernel.source(p, Config()).text for p in asked]
    shared = dataclasses.replace(kernel)
    with ThreadPoolExecutor(8) as pool:
        binaries = list(pool.map(lambda p: shared.binary(p, Config()), asked * 4))
        texts = list(pool.map(lambda p: shared.source(p, Config()).text, asked * 4))
    assert texts == alone * 4
    assert len(set(binaries)) == len(set(alone)) and binaries[: len(asked)] * 4 == binaries
