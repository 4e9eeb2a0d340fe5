"""Run tau2-bench against served models: python src/eval/tau2_runner.py --endpoint URL --model NAME --tag TAG

    [--user-endpoint URL --user-model NAME] [--domains retail,airline,telecom] [--trials 4] [--tasks N]
    [--agent-args '{"temperature": 1.0, "top_p": 0.95}'] [--python TAU2/bin/python] [--out results/eval] [--force]

tau2-bench is a dialogue with tools and a simulated user, so its own package runs it (its command `tau2 run`) and says which
dialogue succeeded; this module starts it, reads its log and records pass^k. It is not on PyPI: install its version 1.0 or
newer from the source of github.com/sierra-research/tau2-bench (PyPI's `tau2` is another program) into an environment of its
own, Python 3.12 or newer, named by --python. The user is gpt-4.1 in published results; OPENAI_API_KEY is passed on. In
1.0.1 the rewards of 40 of retail's 114 tasks also need a verdict of gpt-4.1. The domain mock, ten small tasks, is for trials.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError, read_json, run_cli
from intervals import clustered_interval
from records import add_tag_arguments, sha256_json, tagged_record, write_result

DOMAINS = ("retail", "airline", "telecom")
TRIAL = "mock"
USER_MODEL = "gpt-4.1"
LOOK = "import tau2.domains; from tau2.utils import DATA_DIR; print(DATA_DIR)"


def data_folder(python: str) -> Path:
    """Where tau2-bench keeps its logs; :class:`UserError` unless that interpreter has its package (and not its namesake)."""
    try:
        done = subprocess.run([python, "-c", LOOK], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--python {python}: {error.strerror}") from None
    if done.returncode:
        raise UserError(
            "tau2: the tau2-bench package is not installed; clone github.com/sierra-research/tau2-bench, pip install it "
            "into an environment of its own, whose interpreter --python (of day_one --tau2-python) names (PyPI's is another)"
        )
    return Path(done.stdout.splitlines()[-1])


def pass_hat(trials: int, successes: int, k: int) -> float:
    """The chance that k of the trials, drawn without return, all succeeded (arXiv:2406.12045)."""
    return math.comb(successes, k) / math.comb(trials, k)


def summarize(simulations: Sequence[Mapping[str, Any]], trials: int) -> dict[str, Any]:
    """pass^1 ... pass^trials over tasks, from tau2's log. A dialogue that ended without a reward has failed."""
    tasks: dict[str, list[bool]] = {}
    ended = Counter(str(simulation.get("termination_reason")) for simulation in simulations)
    for simulation in simulations:  # tau2 calls every error one of its infrastructure, a model's too, and repeats it
        info = simulation.get("info") or {}
        if simulation.get("termination_reason") == "infrastructure_error" and "litellm" in str(info.get("error_traceback")):
            told = " ".join(str(info.get("error")).split())[:200]
            raise UserError(f"tau2: a server lost {simulation['task_id']} ({told}); see to it and run the same command again")
    for simulation in simulations:
        reward = (simulation.get("reward_info") or {}).get("reward") or 0.0
        tasks.setdefault(str(simulation["task_id"]), []).append(reward >= 1 - 1e-6)
    if short := [name for name, wins in tasks.items() if len(wins) != trials]:
        raise UserError(f"tau2: task {short[0]} has {len(tasks[short[0]])} of {trials} trials; run the same command again")
    if not tasks:
        raise UserError("tau2: its log holds no dialogue")
    hats = {
        f"pass^{k}": sum(pass_hat(trials, sum(wins), k) for wins in tasks.values()) / len(tasks) for k in range(1, trials + 1)
    }
    low, high = clustered_interval([sum(wins) / trials for wins in tasks.values()], trials)
    made = {"n": len(tasks), "trials": trials, "acc": hats["pass^1"], "acc_low": low, "acc_high": high, **hats}
    return made | {"ended": dict(sorted(ended.items()))}


def command(args: argparse.Namespace, domain: str, name: str) -> list[str]:
    """tau2's own command line for one domain."""
    agent = {"api_base": args.endpoint, **json.loads(args.agent_args)}
    user = {"temperature": 0.0} | ({"api_base": args.user_endpoint} if args.user_endpoint else {})
    line = [args.python, "-m", "tau2.cli", "run", "--domain", domain, "--num-trials", str(args.trials)]
    line += ["--save-to", name, "--auto-resume"]
    line += ["--agent-llm", f"openai/{args.model}", "--agent-llm-args", json.dumps(agent)]
    named = f"openai/{args.user_model}" if args.user_endpoint else args.user_model
    line += ["--user-llm", named, "--user-llm-args", json.dumps(user)]
    return line + (["--num-tasks", str(args.tasks)] if args.tasks else [])


def run_domain(args: argparse.Namespace, data: Path, domain: str) -> dict[str, Any]:
    """One domain, run by tau2 and read from its log. tau2 itself goes on with a log of the same name, whatever the settings
    that it was begun with: the name tells them."""
    settings = [args.model, args.weights, args.agent_args, args.user_endpoint, args.user_model, args.trials, args.tasks]
    log = data / "simulations" / f"{args.tag}_{domain}_{sha256_json(settings)[:8]}"
    if args.force:
        shutil.rmtree(log, ignore_errors=True)
    environment = {"OPENAI_API_KEY": "EMPTY", **os.environ}
    if code := subprocess.run(command(args, domain, log.name), env=environment).returncode:
        raise UserError(f"tau2 run --domain {domain} ended with exit code {code}; its message stands above")
    return summarize(read_json(log / "results.json")["simulations"], args.trials)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    endpoint = "OpenAI-compatible URL of the model, such as http://localhost:8000/v1"
    parser.add_argument("--endpoint", required=True, help=endpoint)
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--weights", default="", help="what tells its weights from others of that name, such as a digest")
    add_tag_arguments(parser, "eval")
    parser.add_argument("--user-endpoint", help="URL of the simulated user's model (default: OpenAI's)")
    parser.add_argument("--user-model", default=USER_MODEL, help="the simulated user")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="comma-separated (default: all three)")
    parser.add_argument("--trials", type=int, default=4, help="dialogues for each task")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has tau2-bench (default: this one)")
    parser.add_argument("--tasks", type=int, help="first N tasks of each domain")
    parser.add_argument("--agent-args", default="{}", help="JSON of sampling arguments for the model")
    args = parser.parse_args()
    if args.trials < 1 or (args.tasks is not None and args.tasks < 1):
        raise UserError("--trials and --tasks must be at least 1")
    if unknown := set(args.domains.split(",")) - {*DOMAINS, TRIAL}:
        raise UserError(f"--domains: unknown {', '.join(sorted(unknown))}; known: {', '.join((*DOMAINS, TRIAL))}")
    try:
        given = json.loads(args.agent_args)
    except json.JSONDecodeError as error:
        raise UserError(f"--agent-args: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError('--agent-args: expected a JSON object such as {"temperature": 0.6}')
    return args


def main() -> None:
    args = parse_args()
    result = tagged_record(args)
    data = data_folder(args.python)
    started = time.time()
    metrics = {f"tau2_{domain}": run_domain(args, data, domain) for domain in args.domains.split(",")}
    settings = {
        "model": args.model,
        "weights": args.weights,
        "user_model": args.user_model,
        "trials": args.trials,
        "tasks": args.tasks,
    }
    write_result(
        result, kind="eval", tag=args.tag, started=started, metrics=metrics, sampling=json.loads(args.agent_args),
        extra={"settings": settings},
    )  # fmt: skip
    for name, values in metrics.items():
        shown = (f"{key} {100 * value:.1f}%" for key, value in values.items() if key.startswith("pass^"))
        print(name, *shown, flush=True)


if __name__ == "__main__":
    run_cli(main)
