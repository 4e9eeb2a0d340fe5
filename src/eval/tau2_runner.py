"""Run tau2-bench against served models: python src/eval/tau2_runner.py --endpoint URL --model NAME --tag TAG

    [--user-endpoint URL --user-model NAME] [--domains retail,airline,telecom] [--trials 4] [--tasks N]
    [--agent-args '{"temperature": 1.0, "top_p": 0.95}'] [--out results/eval] [--force]

tau2-bench is a dialogue with tools and a simulated user, so its own package runs it (its command `tau2 run`) and says which
dialogue succeeded; this module starts it, reads its log and records pass^k. It is not on PyPI: install it from the source
of github.com/sierra-research/tau2-bench (PyPI's `tau2` is another program). The user is gpt-4.1 in published results;
OPENAI_API_KEY is passed on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError, read_json, run_cli
from records import add_tag_arguments, tagged_record, write_result

DOMAINS = ("retail", "airline", "telecom")
USER_MODEL = "gpt-4.1"


def require_tau2() -> None:
    """Raise :class:`UserError` unless tau2-bench's package (and not its namesake) can be imported."""
    try:
        found = importlib.util.find_spec("tau2.domains")
    except ImportError:
        found = None
    if found is None:
        raise UserError(
            "tau2: the tau2-bench package is not installed; clone github.com/sierra-research/tau2-bench and pip install "
            "it into this environment (PyPI's tau2 is another program)"
        )


def pass_hat(trials: int, successes: int, k: int) -> float:
    """The chance that k of the trials, drawn without return, all succeeded (arXiv:2406.12045)."""
    return math.comb(successes, k) / math.comb(trials, k)


def summarize(simulations: Sequence[Mapping[str, Any]], trials: int) -> dict[str, Any]:
    """pass^1 ... pass^trials over tasks, from tau2's log. A dialogue that ended without a reward has failed."""
    tasks: dict[str, list[bool]] = {}
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
    return {"n": len(tasks), "trials": trials, "acc": hats["pass^1"], **hats}


def command(args: argparse.Namespace, domain: str, name: str) -> list[str]:
    """tau2's own command line for one domain."""
    agent = {"api_base": args.endpoint, **json.loads(args.agent_args)}
    user = {"temperature": 0.0} | ({"api_base": args.user_endpoint} if args.user_endpoint else {})
    line = [sys.executable, "-m", "tau2.cli", "run", "--domain", domain, "--num-trials", str(args.trials), "--save-to", name]
    line += ["--agent-llm", f"openai/{args.model}", "--agent-llm-args", json.dumps(agent)]
    named = f"openai/{args.user_model}" if args.user_endpoint else args.user_model
    line += ["--user-llm", named, "--user-llm-args", json.dumps(user)]
    return line + (["--num-tasks", str(args.tasks)] if args.tasks else [])


def run_domain(args: argparse.Namespace, domain: str) -> dict[str, Any]:
    """One domain, run by tau2 and read from its log. tau2 itself goes on with a log of the same name."""
    name = f"{args.tag}_{domain}"
    environment = {"OPENAI_API_KEY": "EMPTY", **os.environ}
    if code := subprocess.run(command(args, domain, name), env=environment).returncode:
        raise UserError(f"tau2 run --domain {domain} ended with exit code {code}; its message stands above")
    from tau2.utils.utils import DATA_DIR  # only there once the package is

    return summarize(read_json(Path(DATA_DIR) / "simulations" / f"{name}.json")["simulations"], args.trials)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    endpoint = "OpenAI-compatible URL of the model, such as http://localhost:8000/v1"
    parser.add_argument("--endpoint", required=True, help=endpoint)
    parser.add_argument("--model", required=True, help="its name there")
    add_tag_arguments(parser, "eval")
    parser.add_argument("--user-endpoint", help="URL of the simulated user's model (default: OpenAI's)")
    parser.add_argument("--user-model", default=USER_MODEL, help="the simulated user")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="comma-separated (default: all three)")
    parser.add_argument("--trials", type=int, default=4, help="dialogues for each task")
    parser.add_argument("--tasks", type=int, help="first N tasks of each domain")
    parser.add_argument("--agent-args", default="{}", help="JSON of sampling arguments for the model")
    args = parser.parse_args()
    if args.trials < 1 or (args.tasks is not None and args.tasks < 1):
        raise UserError("--trials and --tasks must be at least 1")
    if unknown := set(args.domains.split(",")) - set(DOMAINS):
        raise UserError(f"--domains: unknown {', '.join(sorted(unknown))}; known: {', '.join(DOMAINS)}")
    try:
        json.loads(args.agent_args)
    except json.JSONDecodeError as error:
        raise UserError(f"--agent-args: not JSON ({error})") from None
    return args


def main() -> None:
    args = parse_args()
    result = tagged_record(args)
    require_tau2()
    started = time.time()
    metrics = {f"tau2_{domain}": run_domain(args, domain) for domain in args.domains.split(",")}
    settings = {"model": args.model, "user_model": args.user_model, "trials": args.trials, "tasks": args.tasks}
    write_result(
        result, kind="eval", tag=args.tag, started=started, metrics=metrics, sampling=json.loads(args.agent_args),
        extra={"settings": settings},
    )  # fmt: skip
    for name, values in metrics.items():
        shown = (f"{key} {100 * value:.1f}%" for key, value in values.items() if key.startswith("pass^"))
        print(name, *shown, flush=True)


if __name__ == "__main__":
    run_cli(main)
