"""Anaphora's engine beside vLLM and llama.cpp: the same model, prompts and number of threads, taking turns in one run.

    benchmarks/peers/setup.sh                       # once: each peer in a virtual environment of its own
    python benchmarks/peers/compare.py [--context 7000] [--rounds 3] [--peers vllm,llamacpp] [--json]

Every engine is a process that lives through the whole run (worker.py). Request by request each has its turn; while one
computes, the others are stopped (SIGSTOP), so that no idle thread of theirs spins. Who begins changes from request to
request. A round is, with prompts of random tokens that were never seen before:

- cold: a prompt of CONTEXT tokens, to the first token;
- warm: the same prompt with 32 other tokens at its end, to the first token (three times);
- same: exactly the prompt of before once more, to the first token (three times);
- decode: seconds for each further token behind CONTEXT tokens, and behind 512.

Figures are medians over the rounds. A peer that is not installed, or does not run on this machine, is left out, and the
report says why. vLLM computes in the number format that Anaphora chose unless --vllm-dtype says otherwise; llama.cpp in that of
the GGUF file, from which the other two have their weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
PEERS = ("vllm", "llamacpp")
OURS = "anaphora"
NEW_TOKENS = 32
SHORT = 512
WARM_REQUESTS = 3
"""Per round: they are short beside the cold one."""

BUSY = 0.5
"""Of the load average, before anything was started."""

LOWEST_TOKEN = 100
"""Ids below may be control tokens."""


class LeftOut(Exception):
    """Why an engine has no part in the comparison, or no more."""


class Side:
    """One engine's process. It runs only during its own turns."""

    def __init__(self, name: str, python: Path, environment: dict[str, str], log: IO[str], *, timeout_s: float) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._log = log
        self._process = subprocess.Popen(
            [str(python), str(HERE / "worker.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # a group of its own, which is stopped as a whole
        )
        self.about: dict[str, Any] = {}

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its turn. Raises LeftOut with the reason if it fails, dies or takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        limit = threading.Timer(self._timeout_s, self._signal, [signal.SIGKILL])
        limit.start()
        started_s = time.monotonic()
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            raise LeftOut(self._why_it_ended(time.monotonic() - started_s))
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LeftOut(answer["error"])
        return answer

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError), self._process:  # closes its pipes, and waits for its end
            pass

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _why_it_ended(self, after_s: float) -> str:
        status = self._process.wait()
        if after_s >= self._timeout_s:
            return f"no answer within {self._timeout_s:.0f} s"
        ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        return f"{ended}; its last words: {said[-1]}" if said else ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as Anaphora takes it; llama.cpp needs one that is a GGUF file")
    parser.add_argument("--context", type=int, default=7000, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--peers-dir", type=Path, default=Path("~/.cache/anaphora/peers"), help="what setup.sh was given")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--vllm-dtype", help="default: the one that Anaphora computes in")
    parser.add_argument("--vllm-compile", action="store_true", help="let vLLM compile the model; needs a C++ compiler")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one answer")
    parser.add_argument("--out", type=Path, help="also write the whole report there, as JSON")
    parser.add_argument("--json", action="store_true", help="print the whole report instead of the table")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    names = [name for name in args.peers.split(",") if name]
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are: {', '.join(PEERS)}")
    report = compared(args, names)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


def compared(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    where = about()
    if (load := where["machine"]["load_before"]) > BUSY:
        tell(f"the machine is busy (load {load}): engines whose threads wait for each other by spinning suffer most from that")
    skipped: dict[str, str] = {}
    samples: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        ours = started(OURS, args, {}, stack)
        sides = [ours]
        for name in names:
            try:
                sides.append(started(name, args, ours.about, stack))
            except LeftOut as error:
                skipped[name] = str(error)
                tell(f"{name} is left out: {error}")
        loaded = {side.name: side.about for side in sides}
        chance = random.Random(0)
        for turn, (round_, case, tokens, new) in enumerate(requests(args, chance, ours.about["vocab_size"])):
            for i in range(len(sides)):
                side = sides[(turn + i) % len(sides)]
                try:
                    answer = side.ask(do="prefill", tokens=tokens, new=new)
                except LeftOut as error:
                    if side is ours:
                        raise
                    skipped[side.name] = f"{case}, round {round_ + 1}: {error}"
                    tell(f"{side.name} is left out from here: {error}")
                    continue
                seconds = answer["first_s"] if new == 1 else answer["next_s"]
                samples.append({"side": side.name, "round": round_, "case": case, "s": seconds, "cached": answer["cached"]})
                tell(f"round {round_ + 1}: {case}, {side.name}: {seconds:.4f} s, {answer['cached']} tokens cached")
            sides = [side for side in sides if side.name not in skipped]
    return {
        **where,
        "model": args.model,
        "context": args.context,
        "new_tokens": NEW_TOKENS,
        "rounds": args.rounds,
        "threads": args.threads,
        "sides": loaded,
        "skipped": skipped,
        "cases": summarised(samples, list(loaded)),
        "samples": samples,
    }


def started(name: str, args: argparse.Namespace, ours: dict[str, Any], stack: contextlib.ExitStack) -> Side:
    """An engine that has loaded the model. Raises LeftOut; `ours` is what Anaphora's side said of the model."""
    model = {OURS: args.model, "vllm": ours.get("folder"), "llamacpp": ours.get("gguf")}[name]
    if model is None:
        raise LeftOut(f"{args.model} is not a GGUF file")
    python = Path(sys.executable) if name == OURS else installed(name, args.peers_dir.expanduser())
    log = stack.enter_context(tempfile.TemporaryFile("w+", prefix=f"{name}-", errors="replace"))  # noqa: SIM115
    side = Side(name, python, environment(name, args.threads), log, timeout_s=args.timeout)
    stack.callback(side.close)
    tell(f"{name} is loading")
    room = args.context + args.decode_tokens + 1
    side.about = side.ask(
        do="load",
        model=model,
        context=-(-room // 256) * 256,
        threads=args.threads,
        dtype=(args.vllm_dtype or ours["dtype"]) if name == "vllm" else args.dtype,
        compile=args.vllm_compile,
    )
    chance = random.Random(name)
    for _ in range(2):  # whatever an engine does once, it does now
        tokens = randoms(chance, min(SHORT, args.context), (ours or side.about)["vocab_size"])
        side.ask(do="prefill", tokens=tokens, new=4)
    return side


def installed(name: str, folder: Path) -> Path:
    python = folder / name / "bin" / "python"
    if (folder / f"{name}.ready").exists() and python.exists():
        return python
    failed = folder / f"{name}.failed"
    if failed.exists():
        raise LeftOut(f"setup.sh could not install it: {failed.read_text().strip()}")
    raise LeftOut(f"not installed in {folder}: run {HERE / 'setup.sh'} {folder} {name}")


def environment(name: str, threads: int) -> dict[str, str]:
    """The same number of threads for all, and whatever else each engine is started with."""
    found = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    found.pop("PYTHONPATH", None)
    if name == OURS:
        found.setdefault("GOMP_SPINCOUNT", "2000")  # as `anaphora serve` starts its engine
    if name == "vllm":
        # In the worker's own process: processes that wait for each other by spinning would take the cores from the model.
        found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return found


def requests(args: argparse.Namespace, chance: random.Random, vocab_size: int) -> Iterator[tuple[int, str, list[int], int]]:
    """Round, case, prompt, and number of tokens to generate."""
    many = args.decode_tokens + 1
    short = min(SHORT, args.context)
    for round_ in range(args.rounds):
        prompt = randoms(chance, args.context, vocab_size)
        yield round_, "cold", prompt, 1
        for _ in range(WARM_REQUESTS):
            prompt = prompt[:-NEW_TOKENS] + randoms(chance, NEW_TOKENS, vocab_size)
            yield round_, "warm", prompt, 1
            yield round_, "same", prompt, 1
        yield round_, f"decode at {args.context}", prompt, many
        if short < args.context:
            yield round_, f"decode at {short}", randoms(chance, short, vocab_size), many


def randoms(chance: random.Random, count: int, vocab_size: int) -> list[int]:
    return [chance.randrange(LOWEST_TOKEN, vocab_size) for _ in range(count)]


def summarised(samples: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """By case, of every side: the median, the fastest and slowest, how many times ours it takes, tokens cached (fewest)."""
    cases = []
    for case in dict.fromkeys(sample["case"] for sample in samples):
        row: dict[str, Any] = {"case": case}
        for name in names:
            some = [sample for sample in samples if (sample["case"], sample["side"]) == (case, name)]
            if not some:
                continue
            seconds = [sample["s"] for sample in some]
            cached = [sample["cached"] for sample in some if sample["cached"] is not None]
            median_s = statistics.median(seconds)
            row[name] = {
                "s": median_s,
                "min_s": min(seconds),
                "max_s": max(seconds),
                "of_ours": median_s / row[OURS]["s"] if name != OURS else 1.0,
                "cached": min(cached) if cached else None,
            }
        cases.append(row)
    return cases


def about() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=HERE).stdout.strip()

    processor = platform.processor() or platform.machine()
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
            elif line.startswith("flags"):
                flags = set(line.split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    machine = {
        "processor": processor,
        "cores": os.cpu_count(),
        "instructions": [flag for flag in wanted if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "-uno")),
        "machine": machine,
    }


def table(report: dict[str, Any]) -> str:
    names = list(report["sides"])
    machine = report["machine"]
    lines = [f"{machine['processor']}, {report['threads']} threads, commit {report['commit']}, {report['rounds']} rounds"]
    lines += [f"- the machine was busy before: load {machine['load_before']}"] if machine["load_before"] > BUSY else []
    lines += [f"- {name}: {side['version']}, {side['dtype']}" for name, side in report["sides"].items()]
    lines += ["", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    titles = {
        "cold": f"cold, {report['context']} tokens",
        "warm": f"warm, {report['new_tokens']} new tokens",
        "same": "the same prompt again",
    }
    for row in report["cases"]:
        title = titles.get(row["case"], f"{row['case']} tokens, each token")
        lines.append(f"| {title} | {' | '.join(cell(row.get(name), name) for name in names)} |")
    lines += ["", "(×: times what Anaphora takes. In brackets: tokens of the prompt that were cached.)"]
    lines += [f"left out: {name}: {why}" for name, why in report["skipped"].items()]
    return "\n".join(lines)


def cell(found: dict[str, Any] | None, name: str) -> str:
    if found is None:
        return "–"
    seconds = found["s"]
    text = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
    if name != OURS:
        text += f", {found['of_ours']:.2f}×"
    return f"{text} ({found['cached']})" if found["cached"] else text


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
