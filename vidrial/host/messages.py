"""What the host target's process says when a launch fails, in the kernel's own lines: addresses, sanitizer reports, signals."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

ADDR2LINE_SECONDS = 60
LIBRARY = "/include/vidrial/"
# Frames of the runtime and of the libraries are not what the author of a kernel wants to see.
_NOT_KERNEL = ("/vidrial/host/", "/cute/", "/cutlass/", "/usr/", "/libsanitizer/", "/nvidia/", "../", "<stdin>")
_STACK = re.compile(r"<stack([0-9a-f ]*)>")
_PLACE = re.compile(r"<place ([0-9a-f]+)>")
_FRAME = re.compile(r"^\s*#\d+ .*?(?P<place>[^\s()]+:\d+)(?::\d+)?(?: \(|$)")
_ACCESS = re.compile(r"^\s*(?P<what>(?:previous |atomic )*(?:read|write) of size \d+).*?(?:thread (?P<thread>T\d+).*)?$", re.IGNORECASE)
_FIBER = re.compile(r"Thread (T\d+) '(CUDA thread \d+)'")
_SUMMARY = re.compile(
    r"(?:ERROR|WARNING): (?P<tool>\w+Sanitizer): (?P<what>.+?)(?: \(pid=\d+\)| on (?:unknown )?address.*)?$", re.MULTILINE
)
_UNDEFINED = re.compile(r"^(?P<place>\S+?:\d+):\d+: runtime error: (?P<what>.+)$", re.MULTILINE)
_THREAD = re.compile(r"^VIDRIAL (block .*)$", re.MULTILINE)


def resolve(executable: Path, text: str) -> str:
    """`text` with `<place ..>` and `<stack ..>` (offsets into the executable) replaced by lines of the source."""
    stacks = [address for found in _STACK.finditer(text) for address in found[1].split()]
    lines = _lines(executable, sorted({*stacks, *_PLACE.findall(text)}))

    def chain(found: re.Match[str]) -> str:
        places = dict.fromkeys(place for address in found[1].split() for place in lines.get(address, ()) if is_kernel(place))
        return "".join(f"\n  at {place}" for place in places)

    def place(found: re.Match[str]) -> str:
        known = lines.get(found[1], [])
        inner = next((p for p in known if is_kernel(p)), known[0] if known else f"offset {found[1]}")
        # The author's own line, and the library's that it led to.
        own = next((p for p in known if is_kernel(p) and not p.startswith("vidrial/")), inner)
        return own if own == inner else f"{own} ({inner})"

    return _PLACE.sub(place, _STACK.sub(chain, text))


def crash(executable: Path, returncode: int, errors: str) -> str:
    """One paragraph on a process that ended without a reply: the sanitizer's finding with the kernel's lines, or the signal."""
    lines = [*_findings(errors)]
    if not lines:
        died = signal.Signals(-returncode).name if -returncode in signal.valid_signals() else f"exit status {returncode}"
        said = [line for line in errors.splitlines() if line.strip()]
        lines = [f"the process died ({died})" + (f"; the last that it said: {said[-1].strip()}" if said else "")]
    lines += [f"by {thread}" for thread in _THREAD.findall(errors)[:1]]
    return "\n  ".join(lines) + (f"\nwhole report:\n{errors.strip()}" if errors.strip() else "")


def is_kernel(place: str) -> bool:
    """Whether `file:line` belongs to a kernel or to one of Vidrial's device headers."""
    return not place.startswith("??") and not any(part in place for part in _NOT_KERNEL)


def _findings(errors: str) -> Iterator[str]:
    """What a sanitizer found, then for each access in its report the kernel's line."""
    if found := _SUMMARY.search(errors):
        yield f"{found['tool']}: {found['what']}"
        yield from _accesses(errors)
    elif found := _UNDEFINED.search(errors):
        yield f"UndefinedBehaviorSanitizer: {found['what']}"
        frames = [_tidy(found["place"])] if is_kernel(found["place"]) else []
        frames += [_tidy(frame["place"]) for line in errors.splitlines() if (frame := _FRAME.match(line)) and is_kernel(frame["place"])]
        yield from (f"at {place}" for place in dict.fromkeys(frames))


def _accesses(errors: str) -> Iterator[str]:
    what, names = "", dict(_FIBER.findall(errors))
    for line in errors.splitlines():
        if found := _ACCESS.match(line):
            who = names.get(found["thread"])
            what = found["what"].lower() + (f" by {who}" if who else "")
        elif "allocated by" in line or "allocated at" in line or "is located" in line or "is heap block" in line:
            return
        elif what and (frame := _FRAME.match(line)) and is_kernel(frame["place"]):
            yield f"{what} at {_tidy(frame['place'])}"
            if "/vidrial/" not in frame["place"]:
                what = ""


def _lines(executable: Path, addresses: list[str]) -> dict[str, list[str]]:
    """For each address its source lines, innermost inlined call first; empty without addr2line (it comes with the compiler)."""
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if tool is None or not addresses:
        return {}
    command = [tool, "-a", "-i", "-e", str(executable), *(f"0x{a}" for a in addresses)]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=ADDR2LINE_SECONDS)
    found: dict[str, list[str]] = {}
    for line in answer.stdout.splitlines():
        if line.startswith("0x"):
            current = found.setdefault(f"{int(line, 16):x}", [])
        else:
            current.append(_tidy(line.split(" (discriminator")[0]))
    return found


def _tidy(place: str) -> str:
    """A place as the author knows it: relative to the folder of compilation, headers from `vidrial/` on."""
    name = re.sub(r"^(\./)+", "", place)
    return name[name.index(LIBRARY) + len("/include/") :] if LIBRARY in name and "/vidrial/host/" not in name else name
