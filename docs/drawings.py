"""The drawings of docs/architecture.md, by hand: `python docs/drawings.py` writes docs/pictures/{op,call,sweep}.svg.

tests/docs/test_pictures.py writes them again and compares, and finds text that does not fit its box.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
LINE, PADDING = 16, 10
# Width of a letter, in pixels, in the widest of the usual fonts: of titles (bold, 14), lines (12) and labels (11).
LETTER = {"title": 8.6, "line": 6.9, "label": 6.0}
# Fill and edge of a kind of box, on light and on dark ground; the drawing brings its own ground.
KINDS = {
    "said": ("#e7effc", "#3567b5", "#1d2c47", "#7aa5ea"),
    "made": ("#eef0f2", "#6a7480", "#2a3038", "#98a3b0"),
    "memory": ("#fdf1da", "#b57d12", "#43351a", "#e0ac4a"),
    "disk": ("#e2f4e7", "#2f8a4e", "#1c3a28", "#66c388"),
    "process": ("#f3e9fb", "#7f48b0", "#352345", "#b98be0"),
}


@dataclass
class Drawing:
    """Boxes, arrows and words on a ground of `width` x `height` pixels."""

    width: int
    height: int
    shapes: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, kind: str = "line", anchor: str = "start") -> None:
        """One line of text, its baseline at y."""
        self.shapes.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{html.escape(words)}</text>')

    def box(self, x: float, y: float, width: float, kind: str, title: str, *lines: str, height: float | None = None) -> None:
        """A box with a title and lines below it.

        Raises:
            ValueError: the words are wider than the box.
        """
        room = width - 2 * PADDING
        for words, face in ((title, "title"), *((line, "line") for line in lines)):
            if LETTER[face] * len(words) > room:
                raise ValueError(f"{words!r} needs {LETTER[face] * len(words):.0f} pixels; its box has {room:.0f}")
        tall = height or 2 * PADDING + LINE * (1 + len(lines)) - 3
        self.shapes.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{tall:g}" rx="7"/>')
        self.text(x + PADDING, y + PADDING + 12, title, "title")
        for i, line in enumerate(lines):
            self.text(x + PADDING, y + PADDING + 12 + LINE * (i + 1), line)

    def arrow(self, *points: tuple[float, float], label: str = "", at: tuple[float, float] | None = None, dashed: bool = False) -> None:
        """A line through points, with a head at the last one; its label begins at `at`."""
        path = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<path class="arrow{" dashed" if dashed else ""}" d="{path}"/>')
        if label and at:
            self.text(*at, label, "label")

    def legend(self, y: float, **meanings: str) -> None:
        """What the colours mean, in one row."""
        x = 20.0
        for kind, meaning in meanings.items():
            self.shapes.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="14" height="14" rx="3"/>')
            self.text(x + 20, y + 11, meaning, "label")
            x += 44 + LETTER["label"] * len(meaning)

    def svg(self) -> str:
        """The document."""
        light = "".join(f".{kind}{{fill:{fill};stroke:{edge}}}" for kind, (fill, edge, *_) in KINDS.items())
        dark = "".join(f".{kind}{{fill:{fill};stroke:{edge}}}" for kind, (*_, fill, edge) in KINDS.items())
        style = (
            "text{font-family:system-ui,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1d2329}.title{font-size:14px;font-weight:600}"
            ".line{font-size:12px}.label{font-size:11px;fill:#56606b}.ground{fill:#fff}rect{stroke-width:1.3}"
            ".arrow{fill:none;stroke:#56606b;stroke-width:1.4;marker-end:url(#head)}.dashed{stroke-dasharray:5 4}.head{fill:#56606b}"
            + light
        )
        style += (
            "@media(prefers-color-scheme:dark){text{fill:#e6eaee}.label{fill:#a6b0bb}.ground{fill:#14181d}"
            ".arrow{stroke:#a6b0bb}.head{fill:#a6b0bb}" + dark + "}"
        )
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        body = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}">\n'
            f'<style>{style}</style>\n<defs>{head}<path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>\n'
            f'<rect class="ground" width="100%" height="100%" rx="10"/>\n{body}\n</svg>\n'
        )


def op() -> Drawing:
    """Op -> stages -> kernels -> tiles."""
    d = Drawing(1000, 540)
    d.box(20, 60, 190, "said", "Op", "name, outputs, example", "sample, reference", "check, small", "stages(problem, config)")
    d.box(20, 200, 190, "said", "Problem", "static: dtype, d, degree", "dynamic: b, t, h, ...")
    d.box(20, 288, 190, "said", "Config", "own choice: chunk", "part: scan", "part: attend")
    for i, (name, part) in enumerate(
        (("power_gates", ""), ("power_scan", "config.scan"), ("power_carry", ""), ("power_attend", "config.attend"))
    ):
        y = 60 + 84 * i
        d.box(270, y, 190, "made", "Stage", f"kernel {name}", part or "no part of it")
        d.arrow((210, 130 if i < 1 else 140), (240, 130 if i < 1 else 140), (240, y + 32), (270, y + 32))
        d.arrow((460, y + 32), (520, y + 32) if i < 3 else (492, y + 32), *(() if i < 3 else ((492, 345), (520, 345))))
    for i, name in enumerate(("power_gates", "power_scan", "power_carry")):
        d.box(520, 60 + 84 * i, 190, "said", "Kernel", name, "as power_attend")
    d.box(
        520,
        312,
        190,
        "said",
        "Kernel",
        "power_attend",
        "tiles(static, config)",
        "grid, rules, cost",
        "Arguments: a struct",
        "power_attend.cu.j2",
    )
    d.box(770, 60, 210, "said", "Tiles", "threads, numbers", "SharedMemory: regions", "and the tiled objects:")
    d.box(785, 158, 195, "made", "SmemLayout", "a tile, its swizzle")
    d.box(785, 216, 195, "made", "TiledCopy", "global -> shared memory")
    d.box(785, 274, 195, "made", "LoadMatrix", "shared -> registers")
    d.box(785, 332, 195, "made", "TiledMma", "C += A B^T; on Hopper", "WarpgroupMma")
    d.arrow((710, 345), (740, 345), (740, 90), (770, 90), label="proved, then", at=(720, 432))
    d.text(720, 446, "printed as C++", "label")
    d.box(520, 452, 190, "made", "Source", "types, constants, text")
    d.arrow((615, 425), (615, 452))
    d.arrow((880, 397), (880, 470), (710, 470), label="types and constants", at=(755, 488))
    d.box(270, 452, 190, "disk", "Cubin", "per source and arch")
    d.arrow((520, 470), (460, 470), label="NVRTC", at=(472, 464))
    d.text(20, 36, "An op, its stages, their kernels and tiles (power retention, by mma.sync)", "title")
    d.legend(512, said="declared", made="worked out", disk="cached")
    return d


def call() -> Drawing:
    """A call: arrays -> signature -> request -> config -> plan -> launches."""
    d = Drawing(1000, 470)
    d.text(20, 36, "A call: what follows from what, and what is remembered where", "title")
    row = (
        (20, "Arrays", ("torch, CuPy, JAX,", "NumPy; where", "they lie")),
        (184, "Signature", ("shapes, strides,", "dtype, device,", "alignment")),
        (348, "Request", ("its Problem; or", "an error, naming", "the argument")),
        (512, "Config", ("ranked here, else", "shipped, model,", "or predicted")),
        (676, "Plan", ("per stage: grid,", "binary, packed", "arguments")),
        (840, "Launches", ("pointers put in;", "on the stream of", "the caller")),
    )
    for i, (x, title, lines) in enumerate(row):
        d.box(x, 60, 142, "made", title, *lines)
        if i:
            d.arrow((x - 22, 98), (x, 98))
    d.box(348, 190, 142, "memory", "4096 requests", "by signature and", "options")
    d.box(512, 190, 142, "memory", "4096 configs", "until rankings", "change, or freeze")
    d.box(676, 190, 142, "memory", "4096 plans", "with their loaded", "binaries")
    d.box(840, 190, 142, "memory", "workspace", "the library's", "own memory")
    for x in (419, 583, 747, 911):
        d.arrow((x, 190), (x, 137), dashed=True)
    d.box(512, 300, 142, "disk", "Rankings", "cache: measured", "package: shipped")
    d.box(676, 300, 142, "disk", "Cubins", "by source, arch,", "NVRTC, options")
    d.box(840, 300, 142, "made", "NVRTC", "on a miss; not", "when frozen")
    d.arrow((583, 300), (583, 255))
    d.arrow((747, 300), (747, 255))
    d.arrow((840, 332), (818, 332))
    d.arrow((91, 137), (91, 222), (348, 222), label="warm call: signature, one look-up, plan, launches", at=(20, 245))
    d.arrow((490, 240), (500, 240), (500, 280), (668, 280), (668, 240), (676, 240))
    d.text(20, 320, 'NumPy arrays and CPU tensors, or target="host":', "label")
    d.text(20, 336, "a HostPlan runs the same source through g++,", "label")
    d.text(20, 352, "with the config predicted for the H200.", "label")
    d.text(512, 392, "Inside a CUDA-graph capture, and after freeze(), nothing is compiled or loaded:", "label")
    d.text(512, 408, "FrozenError before the stream is touched, or the best config that is compiled.", "label")
    d.legend(436, made="per call", memory="in this process", disk="on disk, shared by processes")
    return d


def sweep() -> Drawing:
    """A sweep and its processes."""
    d = Drawing(1000, 500)
    d.text(20, 36, "A sweep, its processes and what it leaves", "title")
    d.box(
        350,
        60,
        290,
        "process",
        "Parent: the sweep",
        "predicted best, then neighbours",
        "checks, times, confirms, rechecks",
        "each trial on disk before the next",
    )
    d.box(20, 60, 250, "process", "Compile pool", "one process per core (--jobs)", "headers precompiled once", height=77)
    d.box(28, 150, 76, "process", "worker")
    d.box(112, 150, 76, "process", "worker")
    d.box(196, 150, 66, "process", "...")
    d.arrow((350, 86), (270, 86), label="sources", at=(288, 80))
    d.arrow((270, 116), (350, 116), label="cubins", at=(290, 132))
    d.box(730, 60, 250, "process", "Measuring process, GPU 0", "a CUDA context of its own", "checks twice, times, L2 cold", height=77)
    d.box(730, 150, 250, "process", "Measuring process, GPU 1", "--gpus 2; --ray: other hosts", height=60)
    d.arrow((640, 86), (730, 86), label="jobs, JSON", at=(656, 80))
    d.arrow((730, 116), (640, 116), label="timings", at=(644, 132))
    d.arrow((730, 180), (690, 180), (690, 122))
    d.text(730, 230, "crashes, hangs, sticky errors cost one config:", "label")
    d.text(730, 245, "the process is replaced, the trial recorded", "label")
    d.box(20, 240, 250, "disk", "Cache: bin/", "cubins, each with its source", "shared with every call")
    d.arrow((145, 187), (145, 240))
    d.box(350, 240, 290, "disk", "Journal (cache: journals/)", "one line of JSON per trial", "--resume goes on here; report")
    d.arrow((495, 141), (495, 240), label="every trial, at once", at=(503, 200))
    d.box(350, 350, 290, "disk", "Ranking (cache: ranking/)", "per op, templates, static fields,", "size class, device: the fastest")
    d.arrow((495, 305), (495, 350), label="Ctrl-C ranks too", at=(503, 332))
    d.box(730, 350, 250, "disk", "Shipped rankings", "sweeps/results/<device>/<op>", "committed, in the package")
    d.arrow((640, 382), (730, 382), label="--out", at=(668, 376))
    d.box(20, 350, 250, "made", "Calls", "choose_config: own ranking,", "shipped, model, predicted")
    d.arrow((350, 382), (270, 382), label="read", at=(297, 376))
    d.arrow((855, 415), (855, 440), (145, 440), (145, 415))
    d.arrow((145, 305), (145, 350))
    d.legend(466, process="a process", disk="on disk", made="in the caller's process")
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {"op": op, "call": call, "sweep": sweep}


def write(folder: Path = PICTURES) -> None:
    """Write all drawings into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    write()
