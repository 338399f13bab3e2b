from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from vidrial.cli import main as cli
from vidrial.device import Device
from vidrial.errors import ArgumentError, SweepError
from vidrial.kernels.power_retention.op import op
from vidrial.report.page import chart
from vidrial.report.plot import write_png
from vidrial.report.rows import group, plain, read_journals, rejected_trials, write_report
from vidrial.spec.choices import describe
from vidrial.spec.op import Check
from vidrial.tune.codec import encode
from vidrial.tune.journal import Journal
from vidrial.tune.timing import Timing
from vidrial.tune.trial import KernelResources, Status, Trial

DEVICE = Device.of("h200")
LENGTHS = (1000, 5001, 33333)
VOID = {"meta", "br", "line", "wbr"}


def trials(t: int, count: int = 6) -> list[Trial]:
    """`count` configs at times 1, 1.25, 1.5, ... x t / 1000 ms; one that does not compile; the winner timed twice."""
    problem = op.example(t=t)
    configs = [c.config for c in op.space(problem, DEVICE, limit=count + 1).legal]
    common = {"device": DEVICE.key, "versions": "vidrial 1, nvrtc 13.0", "time": "2026-01-02T03:04:05+00:00", "reference_ms": 1.0}
    resources = (KernelResources("power_attend", 244, 8, 67072),)

    def timed(i: int, scale: float = 1.0, phase: str = "screen") -> Trial:
        ms = scale * t / 1000 * (1 + i / 4)
        check = Check(2.5e-3, 1e-4, 5e-3, 2e-3)
        return Trial(op.name, problem, configs[i], Status.ok, phase, Timing(ms, ms / 100, 20), check, "", resources, **common)

    broken = Trial(op.name, problem, configs[count], Status.compile, reason="expected a <semicolon> & more", **common)
    return [timed(0, 9.0), *(timed(i) for i in range(1, count)), broken, timed(0, phase="final")]


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    folder = tmp_path / "journals"
    for t in LENGTHS:
        made = trials(t)
        with Journal(folder / f"{t}.jsonl", op, {"problem": encode(made[0].problem)}) as journal:
            for trial in made:
                journal.append(trial)
    return folder


def plains(trials: Iterable[Trial]) -> list[Trial]:
    return [plain(trial) for trial in trials]


class Page(HTMLParser):
    """Checks that tags nest, and keeps the tables' text, the circles and whatever names another place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.circles: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.links += [f"{tag} {name}" for name in ("src", "href", "action") if name in named]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "circle":
            self.circles.append(named)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_says_what_the_journals_say(journals: Path, tmp_path: Path) -> None:
    text = write_report(read_journals([journals]), tmp_path / "new" / "page.html").read_text()
    page = Page(text)
    assert page.links == []
    assert not re.search(r"https?://|url\(|@import|<script", text)
    for t in LENGTHS:
        first = describe(trials(t)[0].config)
        winner = next(row for row in page.rows if row[0] == f"t={t}" and row[2] == "no other")
        # The first look at it was 9 times as slow; the last timing counts. 6 configs lie 25 % apart.
        assert winner[1:6] == [f"{t / 1000:.4f}", "no other", "2.25", "0.0025", "0.0001"]
        choices = dict(zip(page.rows[0][6:], winner[6:], strict=True))
        shared = re.search("All winners have ([^<]*)[.]<", text)
        assert shared and {f"{n}={v}" for n, v in choices.items()} | set(shared[1].split()) == set(first.split())
        assert [f"t={t}", "power_attend", "244", "8", "67072"] in page.rows
        assert [f"t={t}", "1.00%", "1.00%", "0.0%"] in page.rows
    assert next(row[:3] for row in page.rows if row[1:2] == ["compile"]) == ["3", "compile", "expected a <semicolon> & more"]
    # Once in milliseconds, once beside the fastest.
    assert len(page.circles) == 2 * 6 * len(LENGTHS)
    assert sum(circle["class"] == "best" for circle in page.circles) == 2 * len(LENGTHS)
    assert text.index("expected a &lt;semicolon&gt;") < text.index("All trials")
    assert "18 ok, 3 compile" in text


def test_ties_within_the_noise_are_counted(tmp_path: Path) -> None:
    made = trials(1000)
    close = dataclasses.replace(made[1], timing=Timing(1.002, 0.01, 20))
    page = Page(write_report(plains([*made, close]), tmp_path / "page.html").read_text())
    assert page.rows[1][2] == "1 more"


def test_the_axis_is_what_differs() -> None:
    axis, groups = group(plains([*trials(5001), *trials(1000)]))
    assert (axis, [g.label for g in groups], [g.length for g in groups]) == ("t", ["t=1000", "t=5001"], [1000.0, 5001.0])
    heads = [dataclasses.replace(trial, problem=op.example(t=1000, h=h, hq=16)) for h in (2, 8) for trial in trials(1000)]
    assert group(plains(heads))[0] == "h"
    assert group(plains(trials(1000)))[1][0].label == "t=1000"


def test_a_line_joins_problems_that_differ_in_length_only() -> None:
    wide = [dataclasses.replace(trial, problem=op.example(t=t, d=128)) for t in (1000, 3000) for trial in trials(t)]
    axis, groups = group(plains([*trials(5001), *trials(1000), *trials(65), *wide]))
    assert axis == "t" and [g.series for g in groups] == ["d=64", "d=128", "d=64", "d=128", "d=64"]
    # e and scale go with d.
    assert groups[1].label == "d=128, t=1000"
    svg = chart(axis, [[(g.length, 1.0, "x")] for g in groups], series=[g.series for g in groups])
    lines = re.findall(r'class="line" points="([^"]+)"><title>the fastest, d=(\d+)', svg)
    assert [(len(points.split()), d) for points, d in lines] == [(3, "64"), (2, "128")]


def test_a_failure_counts_whatever_was_timed_before() -> None:
    made = trials(1000)
    wrong = dataclasses.replace(made[-1], status=Status.wrong, timing=None, reason="differs", phase="recheck")
    passed = dataclasses.replace(made[1], timing=None, phase="recheck")
    (only,) = group(plains([*made, wrong, passed]))[1]
    assert only.timed[0].config == describe(made[1].config)
    assert only.timed[0].ms == 1.25
    assert {row.status.name for row in only.trials if row.config == describe(made[0].config)} == {"wrong"}


def test_rules_that_reject_are_added(journals: Path) -> None:
    rows = read_journals([journals])
    rejected = rejected_trials(op, rows)
    expected = sum(len(op.space(op.example(t=t), DEVICE, limit=1).rejected) for t in LENGTHS)
    assert len(rejected) == expected > 100
    assert all(row.status.name == "rejected" and row.reason and not row.ok for row in rejected)


def test_damage_is_named_and_a_torn_last_line_is_not_damage(journals: Path, tmp_path: Path) -> None:
    file = journals / "1000.jsonl"
    lines = file.read_bytes().split(b"\n")
    whole = len(read_journals([file]))
    file.write_bytes(b"\n".join(lines[:-1]) + b'\n{"op": "power_ret')
    assert len(read_journals([file])) == whole
    file.write_bytes(b"\n".join([*lines[:3], b"{}", *lines[3:]]))
    with pytest.raises(SweepError, match=r"1000\.jsonl, line 4 is damaged \(fields of Trial that are missing or unknown: check"):
        read_journals([file])
    header = json.loads(lines[0]) | {"schema": 99}
    file.write_bytes(json.dumps(header).encode() + b"\n")
    with pytest.raises(SweepError, match="of schema 99, this version's is 3: report it with the version that wrote it"):
        read_journals([file])
    for text in (b"", b"not json\n", b"[]\n"):
        file.write_bytes(text)
        with pytest.raises(SweepError, match="is not a journal"):
            read_journals([file])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SweepError, match="no trial to report"):
        read_journals([tmp_path / "empty"])
    with pytest.raises(ArgumentError, match="cannot be written"):
        write_report(plains(trials(1000)), journals / "5001.jsonl" / "page.html")


def test_a_journal_is_reported_whose_op_is_not_there(journals: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(journals), "--out", str(tmp_path / "known.html")])
    for file in journals.iterdir():
        file.write_text(file.read_text().replace('"op": "power_retention"', '"op": "gone & <lost>"'))
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(journals), "--out", str(tmp_path / "page.html")])
    assert not ended.value.code
    page, known = Page((tmp_path / "page.html").read_text()), Page((tmp_path / "known.html").read_text())
    assert [row for row in page.rows if row[0] == "t=5001"] == [row for row in known.rows if row[0] == "t=5001"] != []
    assert "<title>gone &amp; &lt;lost&gt; on h200" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["problem", "config"])
def test_a_trial_without_its_op_has_fields_by_name(name: str) -> None:
    with pytest.raises(SweepError, match="not fields by name"):
        Trial.from_plain_json(encode(trials(1000)[0]) | {name: [3]})


def test_without_journals_the_caches_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "journals" / "power_retention-1.jsonl"
    # The second sweep sets the first one's journal aside: it is not reported.
    for count in (6, 4):
        with Journal(path, op, {}, fresh=True) as journal:
            for trial in trials(1000, count):
                journal.append(trial)
    assert len(list(path.parent.iterdir())) == 2
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "--out", str(tmp_path / "page.html")])
    assert not ended.value.code
    assert "configs: 4 ok" in (tmp_path / "page.html").read_text()


def test_nothing_timed_is_a_page_too(tmp_path: Path) -> None:
    failed = [t for t in trials(1000) if not t.ok]
    page = Page(write_report(plains(failed), tmp_path / "page.html").read_text())
    assert ["t=1000", "", "none of its configs could be timed", "", "", ""] in page.rows
    with pytest.raises(SweepError, match="no config was timed"):
        pytest.importorskip("matplotlib")
        write_png(plains(failed), tmp_path / "plot.png")


CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"


def pixels(file: Path) -> np.ndarray:
    """[height, width, channels] of a PNG of 8 bits a channel."""
    data, place, packed = file.read_bytes(), 8, b""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    channels = {2: 3, 6: 4}[data[25]]
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        packed += data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    raw, stride, rows = zlib.decompress(packed), width * channels, list[bytes]()
    above = bytes(channels + stride)
    for start in range(0, len(raw), 1 + stride):
        kind, row = raw[start], bytearray(channels) + raw[start + 1 : start + 1 + stride]
        if kind:
            for i in range(channels, len(row)):
                left, up, corner = row[i - channels], above[i], above[i - channels]
                if kind == 4:
                    by_left, by_up, by_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
                    guess = left if by_left <= by_up and by_left <= by_corner else up if by_up <= by_corner else corner
                else:
                    guess = (left, up, (left + up) // 2)[kind - 1]
                row[i] = (row[i] + guess) & 255
        above = bytes(row)
        rows.append(above[channels:])
    return np.frombuffer(b"".join(rows), np.uint8).reshape(height, width, channels).astype(np.int64)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("width", "flags", "back"), [(1200, "", 255), (400, "", 255), (1200, "--blink-settings=preferredColorScheme=0", 20)]
)
def test_a_browser_draws_it(journals: Path, tmp_path: Path, width: int, flags: str, back: int) -> None:
    height = 900 if width > 1000 else 1400
    page, picture = write_report(read_journals([journals]), tmp_path / "page.html"), tmp_path / "page.png"
    words = [
        *QUIET.split(),
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},{height}",
    ]
    command = [str(CHROMIUM), *words, *flags.split(), f"--screenshot={picture}", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert picture.is_file(), ended.stderr
    image = pixels(picture)[..., :3]
    assert image.shape == (height, width, 3)
    # Ink in one of the two colour schemes on its background; and the blue line, which only a drawn SVG has.
    assert abs(int(np.median(image[..., 0])) - back) < 2 and image[..., 0].std() > 8
    blue = np.array([31, 111, 235] if back == 255 else [110, 168, 254])
    assert (np.abs(image - blue).sum(-1) < 12).sum() > 100
    # Nothing sticks out: the right margin is empty.
    assert (image[:, -8:] == image[0, 0]).all()


def test_png(journals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(journals), "--out", str(tmp_path / "page.html"), "--png", str(tmp_path / "plot.png")])
    assert not ended.value.code
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "page.html"), str(tmp_path / "plot.png")]
    head = (tmp_path / "plot.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[16:20], "big") == 1280
    assert "rejected" in (tmp_path / "page.html").read_text()


def test_chart_places_points_by_their_logarithms() -> None:
    svg = chart("t", [[(100.0, 1.0, "a"), (100.0, 4.0, "b")], [(10000.0, 16.0, "c")]])
    circles = {hint: (float(x), float(y)) for x, y, hint in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="\d"><title>(\w)</title>', svg)}
    assert circles["a"][0] == circles["b"][0] < circles["c"][0]
    # 1 to 4 is half of the way from 1 to 16.
    assert circles["b"][1] == pytest.approx((circles["a"][1] + circles["c"][1]) / 2, abs=0.11)
    for label in ("100", "10000", "1", "2", "5", "10"):
        assert f">{label}</text>" in svg
    assert chart("t", [[]]) is None
    assert ">1.05</text>" in chart("t", [[(7.0, 1.05, "a")]])
