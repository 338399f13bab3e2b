"""What a sweep found, as a value and as text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from vidrial.device import Device
from vidrial.spec.choices import describe
from vidrial.spec.fields import C, P
from vidrial.spec.op import Op
from vidrial.tune.ranking import RankedConfig, Ranking
from vidrial.tune.trial import CHANCES, Status, Trial, latest, passing_failures

# Blocked configs that a note names.
SHOWN = 3


@dataclass(frozen=True)
class SweepResult(Generic[P, C]):
    """What a sweep found. `winner` is the first of `ranked`; `notes` say what else one should know about the figures."""

    op: str
    problem: P
    device: Device
    trials: tuple[Trial[P, C], ...]
    ranking: Ranking[P, C]
    notes: tuple[str, ...]
    journal: Path
    seconds: float

    @property
    def ranked(self) -> tuple[RankedConfig[C], ...]:
        """The measured configs, fastest first."""
        return self.ranking.measured[0].configs

    @property
    def winner(self) -> Trial[P, C]:
        """The fastest config's trial; `tied` says whether others are as fast."""
        return latest(self.trials)[self.ranked[0].config]

    @property
    def tied(self) -> bool:
        """Whether the winner is within the noise of another config, and first in order of declaration only."""
        return self.ranked[0].tied

    @property
    def failures(self) -> dict[Status, int]:
        """How many configs ended otherwise than ok, by status."""
        return dict(Counter(t.status for t in latest(self.trials).values() if not t.ok))

    @property
    def blocked(self) -> dict[C, str]:
        """Configs that a crash, a time-out or a launch error ended twice, with the reason: only `retry` tries them again."""
        known = latest(self.trials)
        return {c: f"{known[c].status.name}: {known[c].reason}" for c, times in passing_failures(self.trials).items() if times >= CHANCES}

    @property
    def worst_ms(self) -> float:
        """The slowest legal config that was timed, in milliseconds."""
        return max(t.ms for t in latest(self.trials).values() if t.ok)

    def table(self, rows: int = 8) -> str:
        """The first `rows` configs as text: times, error beside the reference, how much slower than the winner, resources."""
        best, known = self.winner.ms, latest(self.trials)
        lines = [("", "ms", "+- ms", "x best", "error", "regs", "spill", "smem", "ptxas", "config")]
        for place, ranked in enumerate(self.ranked[:rows], 1):
            trial, r = known[ranked.config], known[ranked.config].resources
            lines.append(
                (
                    f"{place}{'=' if ranked.tied else ''}",
                    f"{ranked.timing.median_ms:.4f}",
                    f"{ranked.timing.iqr_ms:.4f}",
                    f"{ranked.timing.median_ms / best:.2f}",
                    f"{trial.check.relative:.1e}" if trial.check else "",
                    str(max((k.registers for k in r), default="")),
                    str(sum(k.spill_bytes for k in r) if r else ""),
                    str(max((k.smem_bytes for k in r), default="")),
                    ", ".join(dict.fromkeys(k.ptxas for k in r if k.ptxas)),
                    describe(ranked.config),
                )
            )
        text = _columns(lines)
        failed = ", ".join(f"{count} {status.name}" for status, count in self.failures.items()) or "none failed"
        slowest = f"the worst legal one takes {self.worst_ms / best:.1f} times as long"
        summary = f"{len(known)} configs tried in {self.seconds:.0f} s; {failed}; {slowest}"
        return "\n".join([text, summary, *(f"note: {note}" for note in self.notes)])


def chances(trials: Sequence[Trial]) -> list[str]:
    """Notes: what --resume gives another chance, and what is blocked, with the reasons."""
    known, failed = latest(trials), passing_failures(trials)
    once, blocked = [c for c, n in failed.items() if n < CHANCES], [c for c, n in failed.items() if n >= CHANCES]
    notes = [f"{len(once)} configs ended by a crash, a time-out or a launch error: --resume (resume=True) tries them again"] if once else []
    if blocked:
        reasons = "; ".join(f"{describe(c)}: {known[c].status.name}: {known[c].reason.partition(chr(10))[0]}" for c in blocked[:SHOWN])
        more = f"; and {len(blocked) - SHOWN} more" if len(blocked) > SHOWN else ""
        notes.append(f"{len(blocked)} configs ended so {CHANCES} times and are blocked until --retry (retry=True): {reasons}{more}")
    return notes


def no_valid_config(op: Op, problem: Any, device: Device, trials: Sequence[Trial]) -> str:
    """The message of a sweep that found nothing: causes with their counts, and the most frequent reason."""
    failed = list(latest(trials).values())
    if not failed:
        reasons = op.space(problem, device).reasons()
        some = "; ".join(f"{len(configs)} x {reason}" for reason, configs in itertools.islice(reasons.items(), 3))
        return f"{op.name}: no config is legal for {problem} on {device.name}: {some or 'the space is empty'}"
    counts = Counter(t.status.name for t in failed)
    causes = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    reason, count = Counter(t.reason.partition("\n")[0] for t in failed).most_common(1)[0]
    return f"{op.name}: all {len(failed)} configs failed for {problem} on {device.name}: {causes}. Most often ({count}): {reason}"


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([*(w.rjust(n) for w, n in zip(line[:-1], widths, strict=False)), line[-1]]) for line in lines)
