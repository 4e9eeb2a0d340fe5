"""The benchmark tool_calls: dialogues of several turns in a generated world of 1 to 60 tools, whose calls are executed.

Not a command; bench8_loaders registers it. An item is a world (a dozen kinds of things, each with a level and a mode, and
tools that read and change them) and what a user asks for, turn by turn. A server is asked through the protocol of OpenAI
(`tools`, `tool_calls`), so by its model's own chat template. Calls run here: pure functions of the arguments and a dictionary,
no shell and no code. An item is right when the state at the end and every number that was asked for are those of the reference
calls. The sample log holds the whole transcript, from which everything is graded anew.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graders import split_thinking
from intervals import clustered_interval
from task import Benchmark, stratified
from task_text import PERSONS, Item

Turn = dict[str, Any]  # a message of the protocol
Things = dict[str, dict[str, Any]]  # of one kind, by name: {"level": int, "mode": str}
Request = tuple[str, list[tuple[str, dict[str, Any]]], str, Callable[[Any], int] | None]

TOOL_COUNTS, TURN_COUNTS, ITEMS_EACH = (1, 5, 15, 30, 60), (1, 2, 4), 10
REPLIES = 8  # of the model to one turn of the user; reference calls need three at most
REPLY_TOKENS = 4096  # the longest reply
KINDS = "lamp door tank robot drone oven pump radio shelf plant gate scale".split()
MODES, TOP = ("idle", "slow", "fast", "off"), 99  # the highest level
RULES = (
    "You look after a small works through tools. Do what is asked for by calling them, and nothing else. Reply without a call "
    "when it is done. If a question was asked, end that reply with a line `Answer: NUMBER`.\n\n"
)
NAME, MODE = {"type": "string"}, {"type": "string", "enum": list(MODES)}
LEVEL = {"type": "integer", "minimum": 0, "maximum": TOP}
VERBS: dict[str, tuple[str, dict[str, Any]]] = {  # of the tool lamp_read: what it does, and its arguments
    "read": ("Tell level and mode of one {}.", {"name": NAME}),
    "set_level": ("Set the level of one {}.", {"name": NAME, "level": LEVEL}),
    "set_mode": ("Put some {}s into a mode.", {"names": {"type": "array", "items": NAME}, "mode": MODE}),
    "move": ("Move units of level from one {} to another.", {"source": NAME, "target": NAME, "amount": LEVEL}),
    "list": ("List the {}s in a mode with their levels.", {"mode": MODE, "names_only": {"type": "boolean"}}),
}
OPTIONAL = "names_only"
TYPES = {"string": str, "integer": int, "boolean": bool, "array": list}
# A call that cannot be executed; then one that is refused (no such thing, not enough units), one that leaves a value that the
# turn does not ask for, a turn that went wrong without any call, and one with REPLIES replies and no end.
MALFORMED = ("unreadable", "bad_json", "unknown_tool", "missing_argument", "unknown_argument", "wrong_type", "wrong_value")
FAULTS = (*MALFORMED, "refused", "wrong_call", "no_call", "loop")
ANSWER = re.compile(r"(?mi)^[\s*_`#>]{0,9}answer[\s*_`]{0,9}:[^\d\n-]{0,40}(-?\d{1,9}+)(?!\d|[.,]\d)")


class Fault(Exception):
    """Why a call was not executed: its kind, one of FAULTS, and the text that the model gets."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


# ---- tools ----


def described(tool: str) -> dict[str, Any]:
    """A tool as the protocol tells it to a model."""
    kind, _, verb = tool.partition("_")
    text, arguments = VERBS[verb]
    required = [name for name in arguments if name != OPTIONAL]
    schema = {"type": "object", "properties": arguments, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": tool, "description": text.format(kind), "parameters": schema}}


def check_value(name: str, value: Any, schema: Mapping[str, Any]) -> None:
    if type(value) is not TYPES[schema["type"]]:
        raise Fault("wrong_type", f"{name}: not of type {schema['type']}")
    for each in value if isinstance(value, list) else ():
        check_value(name, each, schema["items"])
    if value not in schema.get("enum", (value,)) or type(value) is int and not 0 <= value <= TOP:
        raise Fault("wrong_value", f"{name}: not a value that the schema allows")


def read_object(arguments: Any) -> dict[str, Any] | None:
    """The arguments of a call, JSON text in the protocol, an object from some servers; None where they are neither."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def checked(tools: Sequence[str], tool: str, arguments: Any) -> dict[str, Any]:
    """The arguments of a call; a :class:`Fault` unless they are what the tool's schema asks for."""
    if tool not in tools:
        raise Fault("unknown_tool", f"there is no tool {tool!r}")
    if (given := read_object(arguments)) is None:
        raise Fault("bad_json", "the arguments are not a JSON object")
    known = VERBS[tool.partition("_")[2]][1]
    if missing := [name for name in known if name not in given and name != OPTIONAL]:
        raise Fault("missing_argument", f"missing argument {missing[0]}")
    if unknown := [name for name in given if name not in known]:
        raise Fault("unknown_argument", f"unknown argument {unknown[0]!r}")
    # as JSON schema has it, 1.0 is an integer
    given = {name: int(v) if type(v) is float and v.is_integer() else v for name, v in given.items()}
    for name, value in given.items():
        check_value(name, value, known[name])
    return given


def execute(things: Things, verb: str, arguments: Mapping[str, Any]) -> Any:
    """What a well-formed call tells; ``things`` change in place. A :class:`Fault` where it asks for what cannot be done."""
    named = [arguments[key] for key in ("name", "source", "target") if key in arguments] + arguments.get("names", [])
    if lost := [name for name in named if name not in things]:
        raise Fault("refused", f"there is none of the name {lost[0]!r}")
    if verb == "read":
        return things[arguments["name"]]
    if verb == "list":
        found = {name: own["level"] for name, own in things.items() if own["mode"] == arguments["mode"]}
        return sorted(found) if arguments.get("names_only") else found
    if verb == "set_level":
        things[arguments["name"]]["level"] = arguments["level"]
    elif verb == "set_mode":
        for name in named:
            things[name]["mode"] = arguments["mode"]
    else:
        source, target, amount = things[arguments["source"]], things[arguments["target"]], arguments["amount"]
        if source is target or amount > source["level"] or target["level"] + amount > TOP:
            raise Fault("refused", "not enough units, no room for them, or twice the same name")
        source["level"], target["level"] = source["level"] - amount, target["level"] + amount
    return {"done": True}


def changes(state: Mapping[str, Things], other: Mapping[str, Things]) -> dict[str, Any]:
    """{"lamp Ada level": value in ``other``} where it differs."""
    every = [(kind, name, key) for kind, things in other.items() for name, own in things.items() for key in own]
    return {f"{k} {name} {key}": other[k][name][key] for k, name, key in every if state[k][name][key] != other[k][name][key]}


# ---- what a user asks for ----


def requests(kind: str, things: Things, rng: random.Random, before: str) -> list[Request]:
    """(words, reference calls, the one thing that it speaks of or "", the number asked for as a function of what the last call
    tells). ``before``: the thing of this kind that the turn before spoke of, which is then called the same one."""
    a, b = rng.sample(sorted(things), 2)
    a, b = (before, a if a != before else b) if before else (a, b)
    mode, other = rng.sample(MODES, 2)
    one, two = f"the same {kind}" if before else f"the {kind} {a}", f"the {kind} {b}"
    n, level = rng.randint(2, 9), rng.randint(0, TOP)
    read, listed = ("read", {"name": a}), ("list", {"mode": mode})
    found = [name for name, own in things.items() if own["mode"] == mode]
    move, more = {"source": a, "target": b}, {"name": a, "level": things[b]["level"] + n}
    sweep = [listed, ("set_mode", {"names": found, "mode": other})]
    return [
        (f"What is the level of {one}?", [read], a, lambda told: told["level"]),
        (f"How many {kind}s are in mode {mode}?", [listed], "", len),
        (f"What do the levels of all {kind}s in mode {mode} add up to?", [listed], "", lambda told: sum(told.values())),
        (f"Set the level of {one} to {level}.", [("set_level", {"name": a, "level": level})], a, None),
        (f"Put {one} and {two} into mode {mode}.", [("set_mode", {"names": [a, b], "mode": mode})], "", None),
        (f"Move {n} units from {one} to {two}.", [("move", move | {"amount": n})], "", None),
        (f"Set the level of {one} to {n} more than that of {two}.", [("read", {"name": b}), ("set_level", more)], "", None),
        (f"Put every {kind} that is in mode {mode} into mode {other}.", sweep, "", None),
        (f"Move all units of {one} to {two}.", [read, ("move", move | {"amount": things[a]["level"]})], "", None),
    ]


def make_turns(rng: random.Random, tools: Sequence[str], state: dict[str, Things], count: int) -> list[Turn]:
    """``count`` turns of a user: words, reference calls, the answer to a question, and the state after each."""
    made, last, spoken = list[Turn](), "", ""
    while len(made) < count:
        kind = last if last and rng.random() < 0.5 else rng.choice(list(state))
        text, calls, own, number = rng.choice(requests(kind, state[kind], rng, spoken if kind == last else ""))
        told, after = None, copy.deepcopy(state)
        try:
            for verb, arguments in calls:
                told = execute(after[kind], verb, checked(tools, f"{kind}_{verb}", arguments))
        except Fault:  # a tool that is not there, more units than there are
            continue
        if number or after != state:
            reference = [(f"{kind}_{verb}", arguments) for verb, arguments in calls]
            made.append({"text": text, "calls": reference, "answer": number(told) if number else None, "after": after})
            state, last, spoken = after, kind, own
    return made


def make_item(number: int, count: int, turns: int) -> Item:
    """One item of ``count`` tools and ``turns`` turns, always the same."""
    rng = random.Random(f"{ToolCalls.revision}:{count}:{turns}:{number}")
    kinds = rng.sample(KINDS, -(-count // len(VERBS)))
    tools = rng.sample([f"{kind}_{verb}" for kind in kinds for verb in VERBS], count)
    state: dict[str, Things] = {kind: {} for kind in sorted({tool.partition("_")[0] for tool in tools})}
    for things in state.values():
        for name in rng.sample(PERSONS, rng.randint(3, 6)):
            things[name] = {"level": rng.randint(5, 60), "mode": rng.choice(MODES)}
    asked = make_turns(rng, tools, state, turns)
    gold = {"answers": [turn["answer"] for turn in asked], "changes": changes(state, asked[-1]["after"])}
    meta, name = {"tools": tools, "state": state, "turns": asked}, f"tool_calls-{count:02d}-{turns}-{number:03d}"
    return Item(name, RULES + asked[0]["text"], json.dumps(gold, sort_keys=True), meta)


# ---- a dialogue ----


class Episode:
    """A dialogue that is going on: what was said, the state, and what went wrong. ``open`` until the last turn is answered, a
    reply was cut short, or one turn took too many replies (``whole`` is false then)."""

    def __init__(self, item: Item) -> None:
        self.turns, self.tools, self.state = item.meta["turns"], item.meta["tools"], copy.deepcopy(item.meta["state"])
        self.messages: list[Turn] = [{"role": "user", "content": item.question}]
        self.replies, self.calls, self.faults = 0, 0, Counter[str]()  # the first of this turn, the others of all
        self.answers: list[int | None] = []
        self.right: list[bool] = []  # of each turn: the answer and the state at its end
        self.called, self.open, self.whole = False, True, False

    def take(self, message: Turn) -> None:
        """A reply: its calls are executed and told, or the turn ends. ``cut``: it was not finished, or could not be read."""
        self.messages.append(message)
        self.replies += 1
        if cut := message.get("cut"):
            self.faults["unreadable"] += cut == "unreadable"
            self.open = False
        elif calls := message.get("tool_calls"):
            for call in calls:
                self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": self._call(**call["function"])})
            if self.replies == REPLIES:
                self.faults["loop"] += 1
                self.open = False
        else:
            self._end_turn(message.get("content") or "")

    def _call(self, name: str, arguments: Any) -> str:
        """The result of one call, as JSON."""
        self.called, self.calls, before = True, self.calls + 1, copy.deepcopy(self.state)
        try:
            given, (kind, _, verb) = checked(self.tools, name, arguments), name.partition("_")
            told = execute(self.state[kind], verb, given)
        except Fault as fault:
            self.faults[fault.kind] += 1
            return json.dumps({"error": str(fault)})
        wrong = changes(self.turns[len(self.answers)]["after"], self.state)
        self.faults["wrong_call"] += bool(changes(before, self.state).keys() & wrong.keys())
        return json.dumps(told)

    def _end_turn(self, said: str) -> None:
        asked = self.turns[len(self.answers)]
        stated = ANSWER.findall(split_thinking(said, False)[1] or "")
        self.answers.append(int(stated[-1]) if stated and asked["answer"] is not None else None)
        self.right.append(self.answers[-1] == asked["answer"] and self.state == asked["after"])
        self.faults["no_call"] += not (self.right[-1] or self.called)
        self.replies, self.called = 0, False
        self.whole = len(self.answers) == len(self.turns)
        self.open = not self.whole
        if self.open:
            self.messages.append({"role": "user", "content": self.turns[len(self.answers)]["text"]})

    def sent(self) -> list[Turn]:
        """The messages for a server. Templates render arguments as an object: a history with broken JSON would be refused."""
        told = copy.deepcopy(self.messages)
        for call in [call for message in told for call in message.get("tool_calls") or ()]:
            call["function"]["arguments"] = json.dumps(read_object(call["function"]["arguments"]) or {})
        return told

    def transcript(self) -> str:
        """All messages as JSON, without a sign that could be taken for the mark of a thought."""
        return json.dumps(self.messages).replace("<", "\\u003c")


def replayed(item: Item, transcript: str) -> Episode:
    """The dialogue of a transcript, its calls executed again."""
    episode = Episode(item)
    for message in json.loads(transcript):
        if message["role"] == "assistant":
            episode.take(message)
    return episode


class Dialogue(str):
    """What an engine gets in place of a rendered prompt: the first request as JSON, which begins an :class:`Episode`."""

    item: Item
    tools: list[dict[str, Any]]

    def __new__(cls, item: Item) -> Dialogue:
        tools = [described(tool) for tool in item.meta["tools"]]
        made = super().__new__(cls, json.dumps({"messages": Episode(item).messages, "tools": tools}, sort_keys=True))
        made.item, made.tools = item, tools
        return made


class ToolCalls(Benchmark):
    """150 dialogues: ITEMS_EACH for each number of tools and of turns."""

    name = "tool_calls"
    revision = "tool-calls-1"
    max_tokens = REPLY_TOKENS
    chosen = "stratified sample"
    converses = True

    def load(self, n: int | None = None) -> list[Item]:
        cells = itertools.product(range(ITEMS_EACH), TOOL_COUNTS, TURN_COUNTS)
        return stratified([make_item(*cell) for cell in cells], lambda item: item.id[:-4], self.name)[:n]

    def given(self, item: Item, render: Callable[[list[Turn]], Any]) -> Dialogue:
        return Dialogue(item)

    def standard(self, item: Item) -> Any:
        return item.meta | {"tools": Dialogue(item).tools}

    def extract(self, item: Item, answer: str) -> str | None:
        """Answers and changes of state, as the gold answer has them; None for a dialogue that did not reach its end."""
        episode = replayed(item, answer)
        found = {"answers": episode.answers, "changes": changes(item.meta["state"], episode.state)}
        return json.dumps(found, sort_keys=True) if episode.whole else None

    def aggregate(self, items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy by the number of tools and of turns, the share of turns after which all was right, calls, and FAULTS: how
        often, and in how many dialogues. ``malformed``: the share of dialogues with a call that could not be executed."""
        known = {item.id: item for item in items}
        ended = [(row, replayed(known[row["id"]], row["text"])) for row in rows]
        made: dict[str, Any] = {}
        for key in ("tools", "turns"):
            groups: dict[int, list[tuple[str, bool]]] = {}
            for row, own in ended:
                groups.setdefault(len(getattr(own, key)), []).append((row["id"], row["correct"]))
            made[f"by_{key}"] = {str(size): shares(groups[size], "acc") for size in sorted(groups)}
        turns = sum(len(own.turns) for _, own in ended)
        made |= {"turns": turns, "acc_turns": sum(sum(own.right) for _, own in ended) / turns}
        made["calls"] = sum(own.calls for _, own in ended)
        counts = {name: [own.faults[name] for _, own in ended] for name in FAULTS}
        made["faults"] = {name: {"times": sum(own), "dialogues": sum(map(bool, own))} for name, own in counts.items()}
        return made | shares([(row["id"], any(own.faults[name] for name in MALFORMED)) for row, own in ended], "malformed")


def shares(verdicts: Sequence[tuple[str, bool]], name: str) -> dict[str, Any]:
    """{"n": items, NAME: the share of yes, NAME_low, NAME_high: its interval over items} of (item, yes or no)."""
    own: dict[str, list[bool]] = {}
    for item, verdict in verdicts:
        own.setdefault(item, []).append(verdict)
    means = [sum(each) / len(each) for each in own.values()]
    low, high = clustered_interval(means, len(verdicts) // len(own))
    return {"n": len(own), name: sum(means) / len(means), f"{name}_low": low, f"{name}_high": high}
