from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_op import Config, Problem, example, op, true_ms

from vidrial.build.cubins import build
from vidrial.build.store import Store
from vidrial.device import Device
from vidrial.dtypes import DType
from vidrial.errors import ConfigError, FrozenError, SweepError
from vidrial.spec.choices import config_order
from vidrial.spec.fields import choice, dynamic, size_class, static
from vidrial.spec.kernel import Kernel
from vidrial.spec.op import Stage
from vidrial.tune import ranking as ranking_module
from vidrial.tune.codec import decode, encode
from vidrial.tune.pick import choose_config, freeze
from vidrial.tune.ranking import ProblemTimings, RankedConfig, Ranking, forget, local, publish, rank, shipped
from vidrial.tune.timing import Timing
from vidrial.tune.trial import Status, Trial

H200, H100 = Device.of("h200"), Device.of("h100")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ranking_module, "shipped_folder", lambda: tmp_path / "shipped")
    forget()
    yield
    freeze(False)


def ranking(times: dict[Config, float], n: int = 10007, device: Device = H200, **changes: Any) -> Ranking:
    trials = [Trial("fake", example(n=n), c, Status.ok, timing=Timing(ms, 1e-3 * ms, 20)) for c, ms in times.items()]
    found = Ranking.from_trials(op, device, trials)
    assert found is not None
    return dataclasses.replace(found, **changes)


def test_ties_are_marked_and_ordered_by_declaration() -> None:
    def timing(ms: float) -> Timing:
        return Timing(ms, 0.0, 20)

    ranked = rank([(Config(32), timing(1.001)), (Config(64), timing(1.002)), (Config(128), timing(1.05)), (Config(96), timing(1.0))])
    assert [(r.config.tile, r.tied) for r in ranked] == [(64, True), (96, True), (32, True), (128, False)]
    # Whatever the noise made of the order, every machine names the same winner.
    again = rank([(Config(32), timing(1.0)), (Config(96), timing(1.002)), (Config(64), timing(1.001))])
    assert again[0].config == Config(64)


def test_config_order_counts_parts() -> None:
    from fake_op import PartsConfig

    assert config_order(PartsConfig(64, Config(96, 2), Config(32, 4))) == (1, 2, 1, 3, 3)


def test_a_ranking_survives_json() -> None:
    first = ranking({Config(64): 1.0, Config(128): 1.004, Config(32, 3): 2.0})
    assert Ranking.from_json(op, json.loads(json.dumps(first.to_json(), allow_nan=False))) == first
    with pytest.raises(SweepError, match="schema"):
        Ranking.from_json(op, first.to_json() | {"schema": 99})


@dataclass(frozen=True)
class Wider:
    """`Config` some commits later: one tile less, one choice more."""

    tile: int = choice(128, 64, 32)
    width: int = choice(1, 2, 3, 4)
    unroll: int = choice(4, 1, 8)


def test_a_ranking_survives_a_choice_that_is_new_and_loses_what_is_none_any_more(caplog: pytest.LogCaptureFixture) -> None:
    later = dataclasses.replace(op, config=Wider)
    old = json.loads(json.dumps(ranking({Config(64, 2): 1.0, Config(96): 1.5, Config(32): 2.0}).to_json()))
    with caplog.at_level(logging.WARNING, "vidrial"):
        found = Ranking.from_json(later, old)
        Ranking.from_json(later, old)
    assert [(r.config, r.timing.median_ms) for r in found.measured[0].configs] == [(Wider(64, 2, 4), 1.0), (Wider(32, 1, 4), 2.0)]
    assert [r.getMessage() for r in caplog.records] == [
        "fake: a config that was measured is ignored: Wider.tile=96 is not a choice; accepted: 128, 64, 32"
    ]
    # And back: what has a choice that this config does not have is left out, not the whole file.
    wide = Ranking.from_json(later, old).to_json()
    wide["measured"][0]["configs"].append(old["measured"][0]["configs"][0])
    assert [r.config for r in Ranking.from_json(op, wide).measured[0].configs] == [Config(64, 2)]


def edited(times: dict[Config, float], *path: Any, to: Any) -> dict[str, Any]:
    """A ranking's JSON, one value of its second problem (of two) changed."""
    data = json.loads(json.dumps(ranking({Config(64, 2): 1.0}, n=10007).merged(ranking(times, n=15001)).to_json()))
    place = data["measured"][1]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return data


BAD_VALUES: list[tuple[tuple[Any, ...], Any]] = [
    *((("configs", 0, "timing", "median_ms"), value) for value in ("abc", 10**400, 0, -1.0, "nan", "inf", None, True, [1.0])),
    *((("configs", 0, "timing", name), value) for name, value in (("iqr_ms", -1.0), ("iqr_ms", "nan"), ("samples", 0))),
    *((("configs", 0, "config", "tile"), value) for value in (0, 7, "64", "1; system()", None, [64], 10**400)),
    *((("configs", 0), value) for value in (None, 3, [], {})),
    *((("configs",), value) for value in (None, 3, [], [None])),
    *((("problem", "n"), value) for value in (0, -5, "15001", None, 2**70, 10**400, 15002, 31)),
    *((("problem", "scale"), value) for value in ("nan", "inf", "x", 10**400)),
    *((("problem", "dtype"), value) for value in ("float7", 3, ["float16"], "bfloat16")),
    (("problem",), None),
]


@pytest.mark.parametrize("where", ["local", "shipped"])
@pytest.mark.parametrize("case", range(len(BAD_VALUES)))
def test_a_bad_value_is_ignored_and_said_once_and_the_rest_counts(
    case: int, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, value = BAD_VALUES[case]
    data = edited({Config(32, 4): 1.0}, *path, to=value)
    if where == "local":
        Store.shared().write_json("ranking", ranking({Config(64, 2): 1.0}).key, data)
    else:
        file = tmp_path / "shipped" / H200.key / "fake.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"rankings": [data]}))
    ranking_module._state.said.clear()
    with caplog.at_level(logging.WARNING, "vidrial"):
        for _ in range(3):
            forget()
            assert choose_config(op, example(n=10007), H200) == (Config(64, 2), "ranking" if where == "local" else "shipped")
            for n in (15001, 14003, 20011, 301):
                found = choose_config(op, example(n=n), H200)
                assert op.reject(example(n=n), found.config, H200) is None
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == len(set(said)) <= 2
    # What is saved then keeps the good problem, and nobody's file is lost.
    ranking({Config(96): 1.0}, n=16001).save(op)
    publish(op, [ranking({Config(96): 1.0}, n=16001)], tmp_path / "shipped")
    for found in local(op, {"dtype": DType.float16}, H200) if where == "local" else shipped(op, H200.key):
        assert {10007, 16001} <= {m.problem.n for m in found.measured}


def test_a_choice_that_narrows_takes_its_configs_along_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    """`Wider` has no tile of 96; its problem, and the other configs, stay."""
    ranking({Config(96, 2): 1.0, Config(64, 3): 1.5}).save(op)
    kernel = dataclasses.replace(op.kernels[0], config=Wider)
    later = dataclasses.replace(op, kernels=(kernel,), config=Wider, stages=lambda p, c: (Stage(kernel, p, c),))
    assert choose_config(later, example(), H200) == (Wider(64, 3, 4), "ranking")
    assert choose_config(later, example(n=10009), H200).config == Wider(64, 3, 4)


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "", "[]", '{"rankings": 3}', '{"rankings": [3]}', '{"rankings": [{"digest": 1}]}'])
def test_a_shipped_file_that_cannot_be_read_is_ignored_and_never_written_over(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shipped" / H200.key / "fake.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert choose_config(op, example(), H200).origin == "predicted"
    if text != '{"rankings": [{"digest": 1}]}':  # of other templates
        with pytest.raises(SweepError, match="is left as it is"):
            publish(op, [ranking({Config(64): 1.0})], tmp_path / "shipped")
        assert path.read_text() == text


def test_a_document_counts_for_what_its_name_says() -> None:
    """A ranking that lies under another one's name: of another size class, device, dtype."""
    wanted = ranking({Config(32, 4): 1.0})
    bfloat16 = [ProblemTimings(dataclasses.replace(m.problem, dtype=DType.bfloat16), m.configs) for m in wanted.measured]
    for other in (
        ranking({Config(32, 4): 1.0}, n=501),
        ranking({Config(32, 4): 1.0}, device=H100),
        dataclasses.replace(wanted, measured=tuple(bfloat16)),
    ):
        Store.shared().write_json("ranking", wanted.key, other.to_json())
        forget()
        assert choose_config(op, example(), H200).origin == "predicted"
    Store.shared().write_json("ranking", wanted.key, wanted.to_json())
    forget()
    assert choose_config(op, example(), H200) == (Config(32, 4), "ranking")


def test_publishing_at_once_loses_no_ranking(tmp_path: Path) -> None:
    folder, lengths = tmp_path / "shipped", range(10001, 10081, 2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: publish(op, [ranking({Config(64): 1.0}, n=n)], folder), lengths))
    assert [m.problem.n for r in shipped(op, H200.key) for m in r.measured] == list(lengths)
    assert [path.name for path in (folder / H200.key).iterdir()] == ["fake.json"]


def test_saving_at_once_into_a_folder_that_was_removed_loses_no_ranking() -> None:
    lengths = range(10001, 10161, 2)
    shutil.rmtree(Store.shared().root)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ranking({Config(64): 1.0}, n=n).save(op), lengths))
    (found,) = local(op, {"dtype": DType.float16}, H200)
    assert [m.problem.n for m in found.measured] == list(lengths)


def test_what_was_measured_with_an_older_config_is_picked(tmp_path: Path) -> None:
    publish(op, [ranking({Config(96, 2): 1.0, Config(64, 3): 1.5})], tmp_path / "shipped")
    kernel = dataclasses.replace(op.kernels[0], config=Wider)
    later = dataclasses.replace(op, kernels=(kernel,), config=Wider, stages=lambda p, c: (Stage(kernel, p, c),))
    assert choose_config(later, example(), H200) == (Wider(64, 3, 4), "shipped")
    # Nothing is left of this one.
    publish(op, [ranking({Config(96, 2): 1.0})], tmp_path / "shipped")
    ranking({Config(96, 2): 1.0}).save(op)
    path = tmp_path / "shipped" / H200.key / "fake.json"
    path.write_text(json.dumps({"rankings": [ranking({Config(96, 2): 1.0}).to_json()]}))
    forget()
    assert choose_config(later, example(), H200).origin == "predicted"


@pytest.mark.parametrize("where", ["shipped", "local", "local, another schema"])
def test_rankings_of_before_are_said_once_with_the_command(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh = dataclasses.replace(op)  # a process that has not asked about it
    old = ranking({Config(64): 1.0}, digest="0" * 64)
    if where == "shipped":
        (path,) = publish(op, [ranking({Config(64): 1.0})], tmp_path / "shipped")
        path.write_text(path.read_text().replace(op.digest(), old.digest))
    elif where == "local":
        old.save(op)
    else:
        found = ranking({Config(64): 1.0})
        Store.shared().write_json("ranking", found.key, found.to_json() | {"schema": 0})
    monkey = ranking_module._state
    monkey.said.clear()
    with caplog.at_level(logging.WARNING, "vidrial"):
        for n in (501, 10007, 20011):
            assert choose_config(fresh, example(n=n), H200).origin == "predicted"
            forget()
    said = [r.getMessage() for r in caplog.records if "do not count" in r.getMessage()]
    there = "1 shipped with Vidrial" if where == "shipped" else "1 from this machine"
    assert said == [
        f"fake on h200: of its rankings, {there} are of other templates and do not count: "
        "calls take the cost model's choice until you run vidrial sweep fake"
    ]


def test_nothing_is_said_where_some_rankings_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranking({Config(64): 1.0}, digest="0" * 64).save(op)
    ranking({Config(64): 1.0}).save(op)
    fresh = dataclasses.replace(op)
    with caplog.at_level(logging.WARNING, "vidrial"):
        assert choose_config(fresh, dataclasses.replace(example(), dtype=DType.bfloat16), H200).origin == "predicted"
        assert choose_config(dataclasses.replace(op), example(), Device.of("h100")).origin == "predicted"
    assert not caplog.records


def test_the_digest_of_a_text_that_was_lexed_before_is_read_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking({Config(64, 2): 1.0}).save(op)
    assert choose_config(op, example(), H200).origin == "ranking"

    def lexed(_: Any) -> str:
        raise AssertionError("lexed again")

    monkeypatch.setattr(Kernel, "digest", lexed)
    forget()
    assert choose_config(op, example(), H200) == (Config(64, 2), "ranking")
    monkeypatch.setattr(Kernel, "text_digest", lambda _: "another text")
    forget()
    with pytest.raises(AssertionError, match="lexed again"):
        choose_config(op, example(), H200)


def test_failed_trials_do_not_count() -> None:
    trials = [Trial("fake", example(), Config(64), Status.ok, timing=Timing(1.0, 0, 3)), Trial("fake", example(), Config(64), Status.crash)]
    assert Ranking.from_trials(op, H200, trials) is None


def test_size_classes() -> None:
    def of(n: int) -> Any:
        return size_class(example(n=n))

    assert of(1025) == of(2047) != of(1026)
    assert of(1024) != of(2048) and of(1088) == of(1984) and of(1025) != of(513)
    assert of(7) == size_class(dataclasses.replace(example(n=7), scale=3.0))


def test_pick_takes_the_first_legal_config_of_this_class() -> None:
    # Measured at 89, where a tile of 64 is legal; 73 is of the same class.
    ranking({Config(64, 3): 1.0, Config(32, 2): 2.0}, n=89).save(op)
    assert choose_config(op, example(n=73), H200) == (Config(64, 3), "ranking")
    ranking({Config(128, 4): 1.0, Config(96): 1.5, Config(32, 2): 2.0}, n=127).save(op)
    found = choose_config(op, example(n=125), H200)
    assert found == (Config(96), "ranking"), "a tile of 128 is longer than 125"


def test_predicted_where_nothing_was_measured_and_error_where_nothing_is_legal() -> None:
    assert choose_config(op, example(n=10007), H200) == (op.predicted(example(n=10007), H200), "predicted")
    with pytest.raises(ConfigError, match="no legal config"):
        choose_config(op, example(n=31), H200)


def test_other_devices_digests_and_dtypes_do_not_count() -> None:
    slow = {Config(32, 4): 1.0}
    ranking(slow, device=H100).save(op)
    ranking(slow, digest="0" * 64).save(op)
    other = [ProblemTimings(dataclasses.replace(m.problem, dtype=DType.bfloat16), m.configs) for m in ranking(slow).measured]
    ranking(slow, measured=tuple(other)).save(op)
    assert choose_config(op, example(), H200).origin == "predicted"
    assert choose_config(op, example(), H100) == (Config(32, 4), "ranking")
    assert choose_config(op, dataclasses.replace(example(), dtype=DType.bfloat16), H200) == (Config(32, 4), "ranking")


def test_local_before_shipped_before_model(tmp_path: Path) -> None:
    publish(op, [ranking({Config(64, 2): 1.0})], tmp_path / "shipped")
    assert choose_config(op, example(), H200) == (Config(64, 2), "shipped")
    assert choose_config(op, example(), H100).origin == "predicted"
    assert choose_config(op, example(n=3001), H200) == (Config(64, 2), "model")
    ranking({Config(96, 4): 1.0}).save(op)
    assert choose_config(op, example(), H200) == (Config(96, 4), "ranking")


def test_shipped_files_join_and_drop_other_templates(tmp_path: Path) -> None:
    folder = tmp_path / "shipped"
    publish(op, [ranking({Config(64): 1.0}, n=10007), ranking({Config(64): 1.0}, n=501)], folder)
    (path,) = publish(op, [ranking({Config(128): 0.5}, n=10007)], folder)
    assert path == folder / H200.key / "fake.json"
    found = {r.measured[0].problem.n: r.measured[0].configs[0].config for r in shipped(op, H200.key)}
    assert found == {10007: Config(128), 501: Config(64)}
    path.write_text(path.read_text().replace(op.digest(), "0" * 64))
    assert shipped(op, H200.key) == []


def test_a_damaged_shipped_file_is_said_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = publish(op, [ranking({Config(64): 1.0})], tmp_path / "shipped")
    path.write_text(path.read_text()[:-30])
    with caplog.at_level(logging.WARNING, "vidrial"):
        assert choose_config(op, example(), H200).origin == "predicted"
    assert str(path) in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="name another folder"):
        publish(op, [ranking({Config(64): 1.0})], tmp_path / "file")


def test_problems_of_one_class_share_a_document_and_the_nearest_counts() -> None:
    ranking({Config(64): 1.0, Config(32): 2.0}, n=10007).save(op)
    ranking({Config(32): 1.0, Config(64): 2.0}, n=15001).save(op)
    ranking({Config(64): 3.0, Config(32): 4.0}, n=10007).save(op)
    (found,) = local(op, {"dtype": DType.float16}, H200)
    assert [(m.problem.n, m.configs[0].timing.median_ms) for m in found.measured] == [(10007, 3.0), (15001, 1.0)]
    assert choose_config(op, example(n=10009), H200).config == Config(64)
    assert choose_config(op, example(n=15003), H200).config == Config(32)


def test_sweeps_that_end_together_lose_no_ranking() -> None:
    lengths = range(10001, 10081, 2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ranking({Config(64): 1.0}, n=n).save(op), lengths))
    (found,) = local(op, {"dtype": DType.float16}, H200)
    assert [m.problem.n for m in found.measured] == list(lengths)


def test_the_model_answers_for_lengths_never_swept() -> None:
    configs = [Config(tile, width) for tile in (128, 64, 32) for width in (3,)]
    for n in (4001, 9001, 14001, 17001, 26001, 40001, 70001):
        ranking({c: true_ms(n, c.tile, c.width) for c in configs}, n=n).save(op)
    ratios, winners = [], set()
    for n in range(5001, 60000, 1234):
        config, origin = choose_config(op, example(n=n), H200)
        best = min(configs, key=lambda c: true_ms(n, c.tile, c.width))
        assert origin == "model"
        winners.add(best)
        ratios.append(true_ms(n, config.tile, config.width) / true_ms(n, best.tile, best.width))
    assert len(winners) >= 2, "the teeth must make different winners"
    assert sum(ratios) / len(ratios) < 1.02 and max(ratios) < 1.15
    assert choose_config(op, example(n=14001), H200).origin == "ranking"


def test_a_pick_is_remembered_and_fast() -> None:
    ranking({Config(64): 1.0}).save(op)
    choose_config(op, example(), H200)
    begin = time.perf_counter()
    for _ in range(100):
        choose_config(op, example(), H200)
    assert (time.perf_counter() - begin) / 100 < 1e-3
    ranking({Config(32): 1.0}).save(op)
    assert choose_config(op, example(), H200).config == Config(32), "a new ranking counts at once"


def test_frozen_takes_what_is_compiled_or_refuses(caplog: pytest.LogCaptureFixture) -> None:
    ranking({Config(64): 1.0, Config(32): 2.0}).save(op)
    freeze()
    with pytest.raises(FrozenError, match="compiled"):
        choose_config(op, example(), H200)
    with pytest.raises(FrozenError, match="fake for sm_90a is not compiled"):
        build(op.kernels[0].source(example(), Config(32)), H200.arch)
    freeze(False)
    build(op.kernels[0].source(example(), Config(32)), H200.arch)
    freeze()
    with caplog.at_level(logging.WARNING, "vidrial"):
        assert choose_config(op, example(), H200).config == Config(32)
    assert "frozen" in caplog.text and "tile=32" in caplog.text
    # What was compiled for one length serves another, also where nothing was measured.
    assert choose_config(op, example(n=501), H200).config == Config(32)
    freeze(False)
    assert choose_config(op, example(), H200).config == Config(64)


def test_fixed_choices_are_kept() -> None:
    ranking({Config(64, 3): 1.0, Config(32, 2): 2.0}).save(op)
    assert choose_config(op, example(), H200, (("width", 2),)) == (Config(32, 2), "ranking")
    found = choose_config(op, example(), H200, (("width", 4),))
    assert found.config.width == 4 and found.origin == "predicted"


def test_a_damaged_local_ranking_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    saved = ranking({Config(32): 1.0})
    Store.shared().write_json("ranking", saved.key, saved.to_json() | {"measured": [{"problem": 3}]})
    forget()
    with caplog.at_level(logging.WARNING, "vidrial"):
        assert choose_config(op, example(), H200).origin == "predicted"
    assert "ignored" in caplog.text


def test_ranked_keeps_problem_facts() -> None:
    found = ranking({Config(64): 1.0})
    assert found.measured == (ProblemTimings(Problem(DType.float16, 10007, 1.0), (RankedConfig(Config(64), Timing(1.0, 1e-3, 20)),)),)


def test_a_problem_that_has_gained_a_field_with_a_default_is_read() -> None:
    @dataclass(frozen=True)
    class Before:
        n: int = dynamic()

    @dataclass(frozen=True)
    class Since:
        n: int = dynamic()
        state: bool = dynamic(keyed=False, default=False)
        size: int = static()

    assert decode(Since, encode(Before(3)) | {"size": 4}) == Since(3, 4) == Since(3, 4, state=False) != Since(3, 4, state=True)
    with pytest.raises(SweepError, match="missing or unknown: size"):
        decode(Since, encode(Before(3)))
