"""The measuring processes of a sweep on a Ray cluster: one actor a GPU, compile tasks on CPUs, the journal here. Needs `vidrial-dsl[ray]`.

An actor keeps a measuring process of its own, as `Workers` does on this machine: a bad config kills that process, never the actor. A
node that is lost takes its jobs with it, which then run elsewhere. Every node needs this version of Vidrial and the op's module.
What travels is JSON, sources and cubins.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from vidrial import __version__
from vidrial.build.cubins import Compiler
from vidrial.build.files import Closing
from vidrial.build.nvrtc import Cubin, cubin_key
from vidrial.build.pool import Job as CompileJob
from vidrial.build.pool import answer, result
from vidrial.build.store import Store
from vidrial.device import Device
from vidrial.errors import ArgumentError, CompileError, CompileStopped, SweepError, ToolchainError
from vidrial.spec.headers import vidrial_include
from vidrial.spec.op import Op
from vidrial.spec.registry import resolve
from vidrial.tune.codec import decode, encode
from vidrial.tune.trial import Status
from vidrial.tune.workers import Job, Reply, Workers, job_fields

# Until a port, a cluster and an actor answer; how often a job is begun before its config is to blame.
PORT_SECONDS, CLUSTER_SECONDS, ACTOR_SECONDS, ATTEMPTS = 5.0, 40.0, 60.0, 3
# Compile tasks asked for ahead of what is waited for, for each CPU.
AHEAD = 2
PROBE = "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False); print(len(ray.nodes()))"


class RayWorkers(Closing):
    """The measuring actors of a cluster, all on GPUs of one kind; use it as a context manager.

    Args:
        address: `host:port`, `ray://host:port` or `auto`; a connection that the caller has made is used as it is.
        op, bench, limit: as for `Workers`.
        gpus: so many actors at most; None: all GPUs of the cluster.
        device: the kind of GPU; None: the one that most of the cluster's are.

    Raises:
        ToolchainError: Ray is not installed. ArgumentError: `gpus` is no count.
        SweepError: the cluster does not answer within a minute, has no such GPU free, or its nodes have another Vidrial or op.
    """

    def __init__(
        self, address: str, op: str, bench: str, limit: float, gpus: int | Sequence[int] | str | None, device: Device | None
    ) -> None:
        if gpus is not None and (not isinstance(gpus, int) or gpus < 1):
            raise ArgumentError(f"gpus={gpus!r}: on a Ray cluster a count from 1 up is accepted, or None for all")
        self._ray, self._ours = _connect(address)
        self._names, self._limit, self._op = (op, bench), limit, resolve(op)
        self._prepare = Job("prepare")
        self.replaced = 0
        self.notes: tuple[str, ...] = ()
        self._sent: dict[Any, set[str]] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.device, self._idle = self._begin(gpus, device)
            undo.pop_all()
        self.count = len(self._idle)
        self.compiler: Compiler | None = self._compile

    def set_problem(self, prepare: Job) -> None:
        """From now on jobs are of this problem: every actor gets ready for it, while the caller goes on."""
        self._prepare = prepare
        for actor in self._idle:
            actor.set_problem.remote(json.dumps(encode(prepare)))

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Run jobs on whichever actor is idle; each comes back with its reply when it is done. Those of a lost node run again.

        Raises:
            SweepError: a measuring process cannot begin, or the last actor is lost.
        """
        waiting, again = iter(jobs), deque[tuple[Job, int]]()
        busy: dict[Any, tuple[Any, Job, int]] = {}
        try:
            while True:
                while self._idle and (task := again.popleft() if again else next(((job, 1) for job in waiting), None)) is not None:
                    actor = self._idle.popleft()
                    busy[self._start(actor, task[0])] = actor, *task
                if not busy:
                    return
                (done, *_), _ = self._ray.wait(list(busy), num_returns=1)
                actor, job, attempt = busy.pop(done)
                reply = self._reply(done)
                if reply is not None:
                    self._idle.append(actor)
                    yield job, reply
                    continue
                self.replaced += 1
                self._sent.pop(actor, None)
                if not self._idle and not busy:
                    raise SweepError("every measuring node of the Ray cluster is lost; start them again, then sweep with resume=True")
                if attempt < ATTEMPTS:
                    again.append((job, attempt + 1))
                else:
                    yield job, Reply(Status.crash, f"{ATTEMPTS} nodes of the Ray cluster were lost while it ran")
        finally:
            # What goes on there belongs to nobody: those actors end.
            for actor, _, _ in busy.values():
                self._ray.kill(actor)

    def close(self) -> None:
        """End the actors, and the connection if it is ours."""
        for actor in list(self._sent):
            self._ray.kill(actor)
        self._sent.clear()
        if self._ours:
            self._ray.shutdown()
            self._ours = False

    def _begin(self, gpus: int | None, wanted: Device | None) -> tuple[Device, deque[Any]]:
        """The kind of GPU that measures, and its actors."""
        there = int(self._ray.cluster_resources().get("GPU", 0))
        if not there:
            raise SweepError("the Ray cluster has no GPU; start its nodes with `ray start --num-gpus=...`")
        # NOTE: an actor with a GPU would hold a CPU as well, and on small nodes leave none to compile.
        kind = self._ray.remote(num_gpus=1, num_cpus=0, max_restarts=0)(_Actor)
        actors = [kind.remote(*self._names, self._limit) for _ in range(there if wanted is None else min(there, gpus or there))]
        self._sent = {actor: set() for actor in actors}
        asked = {actor.describe.remote(): actor for actor in actors}
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=ACTOR_SECONDS)
        if not ready:
            raise SweepError(f"none of the Ray cluster's {there} GPUs became free within {ACTOR_SECONDS:g} s; free one, or sweep later")
        found = {asked[answer]: self._described(answer) for answer in ready}
        kinds = Counter(device.key for device in found.values() if device is not None)
        chosen = wanted or next((d for d in found.values() if d is not None and d.key == kinds.most_common(1)[0][0]), None)
        if chosen is None:
            raise SweepError("no node of the Ray cluster has a usable CUDA GPU; check nvidia-smi there")
        # Where there is no GPU to ask, none can be of another kind: a bench that needs one says so when it begins.
        alike = [actor for actor, device in found.items() if device is None or device.key == chosen.key][:gpus]
        if not alike:
            raise SweepError(f"the Ray cluster has no free {chosen.name} ({chosen.key}); it has {', '.join(kinds)}")
        others = sum(count for key, count in kinds.items() if key != chosen.key)
        if others:
            self.notes = (f"{others} GPUs of another kind than {chosen.name} were left out: their times do not compare",)
        for actor in set(self._sent) - set(alike):
            self._sent.pop(actor)
            self._ray.kill(actor)
        return chosen, deque(alike)

    def _described(self, answer: Any) -> Device | None:
        try:
            told = json.loads(self._ray.get(answer))
        except self._ray.exceptions.RayError as error:
            raise SweepError(
                f"a node of the Ray cluster cannot run {self._names[0]}: {_cause(error)}; install Vidrial {__version__} "
                "and the op's module on every node"
            ) from None
        if (told["version"], told["digest"]) != (__version__, self._op.digest()):
            raise SweepError(
                f"a node of the Ray cluster has Vidrial {told['version']} with other templates of {self._op.name} than here "
                f"({__version__}); install the same on every node"
            )
        device: Device | None = decode(Device | None, told["device"])
        return device

    def _start(self, actor: Any, job: Job) -> Any:
        """The future of a job's reply; cubins that the actor's node may lack travel with it."""
        binaries = []
        problems = [(job.problem, config) for config in job.configs] + [(job.small, config) for config in job.check_configs]
        for stage in (stage for problem, config in problems for stage in self._op.stages(problem, config)):
            source = stage.kernel.source(stage.problem, stage.config)
            key = cubin_key(source.text, self.device.arch)
            entry = Store.shared().get(key) if key not in self._sent[actor] else None
            if entry is not None:
                self._sent[actor].add(key)
                binaries.append((key, entry.image, entry.source, json.dumps(dict(entry.meta))))
        return actor.run.remote(json.dumps(encode(job)), json.dumps(encode(self._prepare)), binaries)

    def _reply(self, done: Any) -> Reply | None:
        """The reply of a future; None if its node is lost."""
        errors = self._ray.exceptions
        try:
            told = json.loads(self._ray.get(done))
        except (errors.RayActorError, errors.NodeDiedError, errors.ObjectLostError):
            return None
        except errors.RayError as error:
            raise SweepError(f"the Ray cluster failed: {_cause(error)}") from None
        if "error" in told:
            raise SweepError(told["error"])
        reply: Reply = decode(Reply, told)
        return reply

    def _compile(self, jobs: Iterable[CompileJob]) -> Iterator[tuple[Hashable, Cubin | CompileError]]:
        """Compile on the cluster's CPUs; a task whose node is lost runs again there."""
        task = self._ray.remote(num_cpus=1, max_retries=ATTEMPTS)(_compile_task)
        waiting, busy = deque(jobs), dict[Any, CompileJob]()
        cpus = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        try:
            while waiting or busy:
                while waiting and len(busy) < AHEAD * cpus:
                    job = waiting.popleft()
                    busy[task.remote(self._names[0], json.dumps(job.request))] = job
                (done, *_), _ = self._ray.wait(list(busy), num_returns=1)
                job = busy.pop(done)
                try:
                    reply = json.loads(self._ray.get(done))
                except self._ray.exceptions.RayError as error:
                    yield job.key, CompileStopped(f"{job.name} for {job.arch} ended its compiler: {_cause(error)}\n  config: {job.config}")
                    continue
                yield job.key, result(reply)
        finally:
            for future in busy:
                self._ray.cancel(future, force=True)


class _Actor:
    """One GPU of the cluster, and the measuring process on it. Ray shows it that GPU alone, so its index is 0."""

    def __init__(self, op: str, bench: str, limit: float) -> None:
        self._op: Op = resolve(op)
        self._fields = job_fields(self._op)
        self._workers = Workers(op, bench, (0,), None, limit)
        self._prepare = ""
        import ray

        # Which of the node's GPUs it is: the measuring process sees it as the first one.
        self._gpu = f"{socket.gethostname()}:{','.join(map(str, ray.get_gpu_ids()))}"

    def describe(self) -> str:
        """The GPU (null where there is none), and what is installed here."""
        try:
            device = Device.current(0)
        except ToolchainError:
            device = None
        return json.dumps({"version": __version__, "digest": self._op.digest(), "device": encode(device)})

    def set_problem(self, prepare: str) -> None:
        """Get ready for a problem."""
        if prepare != self._prepare:
            self._prepare = prepare
            self._workers.set_problem(decode(Job, json.loads(prepare), self._fields))

    def run(self, job: str, prepare: str, binaries: Sequence[tuple[str, bytes, str, str]]) -> str:
        """The reply to a job; or why the measuring process cannot begin."""
        for key, image, source, meta in binaries:
            if Store.shared().get(key) is None:
                Store.shared().put(key, image, source, json.loads(meta))
        self.set_problem(prepare)
        try:
            ((_, reply),) = self._workers.run([decode(Job, json.loads(job), self._fields)])
        except SweepError as error:
            return json.dumps({"error": f"{error} (on {socket.gethostname()})"})
        return json.dumps(encode(replace(reply, gpu=self._gpu)))


def _compile_task(op: str, text: str) -> str:
    """The answer to a compile job's request; its includes are this node's."""
    request = json.loads(text)
    home = next((kernel.template.parent for kernel in resolve(op).kernels if kernel.name == request["name"]), vidrial_include())
    return json.dumps(answer(request | {"includes": (str(home), str(vidrial_include()))}))


def _connect(address: str) -> tuple[Any, bool]:
    """Ray, connected; and whether the connection is ours to end."""
    try:
        import ray
    except ImportError as error:
        raise ToolchainError(f"Ray cannot be imported ({error}); install it: pip install vidrial-dsl[ray]") from None
    if ray.is_initialized():
        return ray, False
    _probe(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _silent(address, str(error)) from None
    return ray, True


def _probe(address: str) -> None:
    """Refuse an address that does not answer: Ray itself tries for minutes, and may end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PORT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _silent(address, str(error)) from None
    elif address != "auto":
        raise ArgumentError(f"ray={address!r}: accepted are host:port, ray://host:port and auto")
    program = [sys.executable, "-c", PROBE, address]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        ended = subprocess.run(
            program, capture_output=True, encoding="utf-8", errors="replace", timeout=CLUSTER_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise _silent(address, f"no answer within {CLUSTER_SECONDS:g} s") from None
    if ended.returncode:
        raise _silent(address, (ended.stderr.strip().splitlines() or ["it ended"])[-1])


def _silent(address: str, why: str) -> SweepError:
    return SweepError(
        f"the Ray cluster at {address} does not answer ({why}); check `ray status` there, or sweep without ray. "
        "Trials in journals are kept, and --resume (resume=True) goes on from them"
    )


def _cause(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
