"""Rollout tokens per second of the three engines: `python benchmarks/engines.py --model models/smollm2-135m-instruct`.

Each engine runs in a separate process with the same prompts, in turns (A B C A B C ...), after a warm-up. Prints the
median over the turns with the range, and the ratio to the transformers engine. The script starts the server, on
loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("transformers", "colocate", "server")
QUESTIONS = [f"What is {a} + {7 * a % 13}? Explain it in a few sentences." for a in range(3, 11)]


def measure(args: argparse.Namespace) -> None:
    """Measures one engine in this process; prints the number of tokens and the seconds of sampling and of the sync."""
    from rlrt_lightning import Policy, Sampling, TransformersEngine, VllmColocateEngine, VllmServerEngine

    policy = Policy(path=args.model, dtype=args.dtype)
    policy.load()
    engine = {
        "transformers": lambda: TransformersEngine(max_rows=512),
        "colocate": lambda: VllmColocateEngine(max_rows=512),
        "server": lambda: VllmServerEngine([args.url], weights=args.weights, concurrency=512),
    }[args.engine]()
    prompts = [policy.encode_prompt(q) for q in QUESTIONS]
    sampling = Sampling(max_new_tokens=args.tokens)
    engine.sync(policy)
    list(engine.generate(prompts, 1, sampling, list(range(len(prompts)))))
    start = time.perf_counter()
    engine.sync(policy)
    synced = time.perf_counter()
    drawn = list(engine.generate(prompts, args.rollouts, sampling, list(range(len(prompts)))))
    end = time.perf_counter()
    tokens = sum(len(r.response_ids) for r in drawn)
    print(json.dumps({"tokens": tokens, "seconds": end - synced, "sync": synced - start}), flush=True)
    os._exit(0)  # shutting down vLLM can take long


def serve(model: str, dtype: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("rlrt", "rollouts/vllm_server")]
    words += [f"--model.policy.path={model}", f"--model.policy.dtype={dtype}", f"--port={port}"]
    command = [sys.executable, "-m", "rlrt_lightning", "serve", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return process, url
        except OSError:
            time.sleep(1)
    raise SystemExit("the server does not respond")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of the model")
    parser.add_argument("--dtype", default="float32", help="type of the weights (bfloat16 if the CPU supports it)")
    parser.add_argument("--rollouts", type=int, default=8, help=f"rollouts for each of the {len(QUESTIONS)} prompts")
    parser.add_argument("--tokens", type=int, default=64, help="maximum response length")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements of each engine")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        measure(args)
    server, url = serve(args.model, args.dtype)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    try:
        with tempfile.TemporaryDirectory() as weights:
            for turn in range(args.turns):
                for name in ENGINES:
                    words = [sys.executable, __file__, *sys.argv[1:], "--engine", name, "--url", url]
                    done = subprocess.run([*words, "--weights", weights], capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                    measured[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
                    print(f"turn {turn + 1}, {name}: {measured[name][-1]}", flush=True)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    speeds = {name: [f["tokens"] / f["seconds"] for f in rows] for name, rows in measured.items()}
    print("\n| engine | tokens/s, median (range) | relative to transformers | sync, s |\n| --- | --- | --- | --- |")
    for name, speed in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speed, speeds["transformers"], strict=True))
        sync = statistics.median(f["sync"] for f in measured[name])
        cell = f"{statistics.median(speed):.0f} ({min(speed):.0f} to {max(speed):.0f})"
        print(f"| {name} | {cell} | {ratio:.2f} | {sync:.2f} |")


if __name__ == "__main__":
    main()
