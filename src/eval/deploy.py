"""The command that serves a model on this machine, and a first answer of it: bash pipelines/deploy.sh --model ARTIFACT

    bash pipelines/deploy.sh --model work/iq3/razor-tiny-IQ3_XXS.gguf              # print it, with the numbers behind it
    bash pipelines/deploy.sh --model FILE-00001-of-00003.gguf --serve --context 65536 --parallel 2 --port 8080
    bash pipelines/deploy.sh --model work/packed --check                           # start, ask, stop

A GGUF (of a split one the first part; a directory that holds one) is served by llama-server, with the NAME-mmproj and the mtp
file that lie beside it, or the mtp block inside; any other checkpoint by vLLM. What memory the cards and the host have decides
where weights lie, how long the context is and how large a batch of a prompt; what cannot fit is refused with the least that
would. --serve runs the server until Ctrl-C, --check stops it again; both first ask one question and end with 1 if the answer is
empty, no number, one token over and over, or of logits that are NaN.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from backend import stuck
from backend_openai import Client, finite_rows
from checkpoint import Checkpoint
from console import UserError, read_json, run_cli
from devices import nvidia_smi
from families import layer_count, text_config
from gguf_format import SHARD, GgufFile, gguf_files, is_first, is_gguf
from llama_cpp import at_hand, sees_gpu
from llamacpp_eval8 import LlamaServer, LocalServer
from size_model import state_bytes

GIB = 2**30
# What llama.cpp has on a card beside weights, context and logits: results/bench/h100_122b_gguf_offload.json leaves 0.5 GiB.
CARD_BYTES = 768 << 20
HOST_BYTES = 1 << 30  # the program in the host's memory
BATCHES = (2048, 512)  # tokens of a prompt computed at once: the larger reads a prompt faster and needs more memory
DRAFTED = 3  # tokens that llama.cpp drafts by default: a recurrent state is kept for each
SHORT, USUAL = 8192, 32768  # contexts: below SHORT experts go to the host instead; USUAL where they are there
LEAST = 4096
ALL = 999  # of --n-gpu-layers: whatever there is
VLLM_SHARE, VLLM_BYTES = 0.9, 4 << 30  # of a card that vLLM takes; activations, graphs and the like on each
QUESTION, RIGHT = "What is 17 + 25?", "42"


@dataclasses.dataclass(frozen=True)
class Machine:
    """``cards``: free bytes of each GPU that the engine can use; ``host``: bytes of memory that are free; ``cores``: of the
    CPU, without their second threads."""

    cards: tuple[int, ...]
    host: int
    cores: int

    def text(self) -> str:
        cards = " + ".join(f"{free / GIB:.1f}" for free in self.cards)
        return f"{f'cards {cards} GiB free' if cards else 'no card'}, host {self.host / GIB:.1f} GiB free, {self.cores} cores"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a GGUF's header says of its memory, in bytes. ``embedding``: the table, which stays in the host's memory and is on
    the card too where it is ``tied`` to the output; ``rest``: what stands outside the layers else; ``dense``, ``experts``: of
    each layer; ``keys``: what a token of context adds in each layer; ``state``: of a sequence in each layer; ``windows``:
    tokens that a layer looks back, 0 for all; ``beside``: further files that are loaded. ``notes``: what is not known."""

    architecture: str
    trained: int
    vocabulary: int
    embedding: int
    tied: bool
    rest: int
    dense: tuple[int, ...]
    experts: tuple[int, ...]
    keys: tuple[int, ...]
    state: tuple[int, ...]
    windows: tuple[int, ...] = ()
    beside: int = 0
    drafts: bool = False
    notes: tuple[str, ...] = ()

    def cache(self, layer: int, context: int, slots: int, batch: int) -> int:
        """Bytes of the context of a layer, ``slots`` sequences of ``context`` tokens."""
        cells = context * slots
        if self.windows and self.windows[layer]:
            cells = min(cells, self.windows[layer] * slots + batch)
        return self.keys[layer] * cells + self.state[layer] * slots * (1 + DRAFTED * self.drafts)


def per_layer(value: Any, layers: int) -> list[Any]:
    """A header's value for each layer, whether it has one for all or a list of them."""
    return list(value)[:layers] if isinstance(value, list | tuple) else [value] * layers


def facts_of(file: GgufFile, drafts: bool = False, beside: int = 0) -> Facts:
    """The memory of a model, from its header alone. Sources: llama-kv-cache.cpp, llama-hparams.cpp."""
    name, notes = file.architecture(), []

    def value(key: str, default: Any = 0) -> Any:
        return file.fields.get(f"{name}.{key}", default)

    blocks = int(value("block_count"))
    layers = blocks - int(value("nextn_predict_layers"))
    sizes = {tensor: int(info.n_bytes) for tensor, info in file.tensors.items()}
    dense, experts = [0] * blocks, [0] * blocks
    embedding = rest = 0
    for tensor, size in sizes.items():
        if match := re.match(r"blk\.(\d+)\.", tensor):
            (experts if "_exps." in tensor else dense)[int(match[1])] += size
        elif tensor == "token_embd.weight":
            embedding = size
        else:
            rest += size
    heads, width = value("attention.head_count", 1), value("embedding_length")
    head = [width // max(1, each) for each in per_layer(heads, blocks)]
    kv = per_layer(value("attention.head_count_kv", heads), blocks)
    latent = value("attention.key_length_mla", None) is not None  # keys hold the values too
    keys = []
    for number, size in zip(kv, head, strict=True):
        own = int(value("attention.key_length", size)) + (0 if latent else int(value("attention.value_length", size)))
        keys.append(2 * int(number) * own)
    state = [0] * blocks
    if inner := int(value("ssm.inner_size")):
        depth, groups = int(value("ssm.state_size")), int(value("ssm.group_count"))
        window = max(0, int(value("ssm.conv_kernel")) - 1) * (inner + 2 * groups * depth)
        interval = value("full_attention_interval", 4 if name in ("qwen3next", "qwen35", "qwen35moe") else 0)
        recurrent = value("attention.recurrent_layers", None)
        if recurrent is None and interval:
            recurrent = [bool((layer + 1) % interval) for layer in range(layers)]
        for layer in range(layers):
            here = bool(recurrent[layer]) if recurrent is not None else 0 not in kv or not kv[layer]
            state[layer] = 4 * (depth * inner + window) * here
            keys[layer] *= not here or recurrent is None  # where nothing says which, a layer has both (Falcon-H1)
    if short := int(value("shortconv.l_cache")):
        state = [4 * width * (short - 1) if not count else 0 for count in keys]
    if any(value(key) for key in ("wkv.head_size", "kda.head_dim")):
        notes.append("the state of its recurrent layers is not counted")
    pattern = value("attention.sliding_window_pattern", None)
    window = int(value("attention.sliding_window"))
    windows = [window * bool(own) for own in per_layer(pattern, blocks)] if window and isinstance(pattern, list) else []
    if window and not windows:
        notes.append("its layers are counted as if all of them saw the whole context")
    if not drafts:  # a block for drafting that is not used is not loaded
        dense, experts, keys, state = (part[:layers] for part in (dense, experts, keys, state))
    vocabulary = len(file.fields.get("tokenizer.ggml.tokens", ())) or int(value("vocab_size"))
    return Facts(
        name, int(value("context_length", LEAST)), vocabulary, embedding, "output.weight" not in sizes, rest, tuple(dense),
        tuple(experts), tuple(keys), tuple(state), tuple(windows), beside, drafts, tuple(notes),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Placement:
    """How llama-server is started: ``layers`` on the card (None: no card), of which the experts of the first ``hosted`` are in
    the host's memory; ``card``, ``host``: bytes needed there."""

    context: int
    slots: int
    batch: int
    layers: int | None
    hosted: int
    card: int
    host: int
    threads: int

    def options(self) -> list[str]:
        found = ["--ubatch-size", str(self.batch)]
        if self.layers is not None:
            found += ["--n-gpu-layers", str(self.layers), "--flash-attn", "on"]
            found += ["--n-cpu-moe", str(self.hosted)] if self.hosted else []
        else:
            found += ["--n-gpu-layers", "0"]
        return [*found, "--threads", str(self.threads)]


def contexts(facts: Facts, asked: int | None, least: int, most: int | None = None) -> list[int]:
    """The lengths to try, the longest first: the one that is asked for, or halves of what the model was trained on."""
    if asked:
        return [asked]
    length, found = min(facts.trained, most or facts.trained), []
    while length >= least or not found:
        found.append(length)
        length //= 2
    return found


def needs(facts: Facts, context: int, slots: int, batch: int, first: int, hosted: int) -> tuple[int, int]:
    """(bytes on the cards, bytes in the host's memory) with the layers from ``first`` on on the cards, of which those before
    ``hosted`` leave their experts in the host's memory. All of them in the host's: ``first`` above the last."""
    count = len(facts.dense)
    card, host = 0, facts.embedding + HOST_BYTES
    for layer in range(count):
        cache = facts.cache(layer, context, slots, batch)
        if layer < first:
            host += facts.dense[layer] + facts.experts[layer] + cache
        else:
            card += facts.dense[layer] + cache
            if layer < hosted:
                host += facts.experts[layer]
            else:
                card += facts.experts[layer]
    if first <= count:
        return card + facts.rest + facts.embedding * facts.tied + facts.beside, host
    return 0, host + facts.rest + facts.beside + 4 * facts.vocabulary * batch


def place(facts: Facts, machine: Machine, asked: int | None = None, slots: int = 1) -> Placement:
    """The fastest placement that fits: all on the cards; the experts of as few layers as possible in the host's memory; as many
    layers as possible on the cards; none. :class:`UserError` with the least that would do."""
    count = len(facts.dense)

    def room(batch: int) -> int:
        return sum(max(0, free - CARD_BYTES - 4 * facts.vocabulary * batch) for free in machine.cards)

    def made(context: int, batch: int, first: int, hosted: int) -> Placement | None:
        card, host = needs(facts, context, slots, batch, first, hosted)
        if (first <= count and card > room(batch)) or host > machine.host:
            return None
        on_card = None if first > count else count + 1 - first if first else ALL
        buffers = len(machine.cards) * (CARD_BYTES + 4 * facts.vocabulary * batch) if on_card is not None else 0
        return Placement(context, slots, batch, on_card, hosted, card + buffers, host, machine.cores)

    tried: list[tuple[int, int, int, int]] = []
    for length in contexts(facts, asked, SHORT) if machine.cards else ():
        tried += [(length, batch, 0, 0) for batch in BATCHES]
    usual = contexts(facts, asked, LEAST, USUAL)
    if machine.cards and any(facts.experts):
        for length in usual:
            tried += [(length, batch, 0, hosted) for batch in BATCHES for hosted in range(1, count + 1)]
    if machine.cards:
        for length in usual:
            tried += [(length, BATCHES[-1], first, count) for first in range(1, count + 1)]
    tried += [(length, BATCHES[-1], count + 1, 0) for length in usual]
    for one in tried:
        if found := made(*one):
            return found
    length, batch = usual[-1], BATCHES[-1]
    buffers = CARD_BYTES + 4 * facts.vocabulary * batch
    whole, beside = needs(facts, length, slots, batch, 0, 0), needs(facts, length, slots, batch, 0, count)
    alone = needs(facts, length, slots, batch, count + 1, 0)[1]
    ways = [f"a card with {(whole[0] + buffers) / GIB:.1f} GiB free"]
    if any(facts.experts):
        ways.append(f"one with {(beside[0] + buffers) / GIB:.1f} beside {beside[1] / GIB:.1f} GiB of free memory")
    ways.append(f"{alone / GIB:.1f} GiB of free memory without a card")
    shorter = f"; or a shorter --context than {asked:,}" if asked and asked > LEAST else ""
    raise UserError(
        f"does not fit ({slots} x {length:,} tokens of context; {machine.text()}); "
        f"the least that would: {', or '.join(ways)}{shorter}"
    )


# ---------------------------------------------------------------- what is there


def group_limit(name: str) -> list[str]:
    """The words of a file of this process's control group; nothing outside of one."""
    file = Path("/sys/fs/cgroup") / name
    words = file.read_text(encoding="ascii").split() if file.is_file() else []
    return words if words and words[0] != "max" else []


def this_machine(cards: bool = True) -> Machine:
    """What is free here, within the limits of a container; ``cards`` False: the engine sees none."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(file.read_text(encoding="ascii").strip() if file.is_file() else str(cpu))
    cores, host = len(siblings), psutil.virtual_memory().available
    if len(quota := group_limit("cpu.max")) == 2:
        cores = max(1, min(cores, int(quota[0]) // int(quota[1])))
    if limit := group_limit("memory.max"):
        host = min(host, int(limit[0]) - int(next(iter(group_limit("memory.current")), 0)))
    free = tuple(int(one) << 20 for (one,) in nvidia_smi("memory.free")) if cards else ()
    return Machine(free, host, cores)


def model_file(path: Path) -> Path:
    """The model of a directory that holds one GGUF and what belongs to it, or the path itself."""
    if not path.is_dir() or (path / "config.json").exists():
        return path
    found = models_in(path)
    if len(found) != 1:
        held = f"holds {len(found)} GGUF models: {', '.join(f.name for f in found)}" if found else "no checkpoint and no GGUF"
        raise UserError(f"{path}: {held}; give the file or the directory of a model")
    return found[0]


def models_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.gguf") if is_first(f.name) and not is_mmproj(f) and not is_sidecar(f))


def is_mmproj(file: Path) -> bool:
    return "mmproj" in file.name.lower()


def is_sidecar(file: Path) -> bool:
    """Whether a file is a head for drafting alone: named mtp-NAME, as llama.cpp's converter has it, or NAME-mtp, and without
    the first layer of a model."""
    named = re.search(r"(^|[-_.])mtp[-_.]", file.name.lower())
    return bool(named) and not any(name.startswith("blk.0.") for name in GgufFile(file).tensors)


def beside(file: Path) -> tuple[Path | None, Path | None]:
    """(the vision tower's file, that of the head for drafting) in the directory of a model: whose name has the model's, up to
    its type; any where the model is alone."""
    match = SHARD.match(file.name)
    stem = (match[1] if match else file.stem).lower()
    name, alone = stem.rsplit("-", 1)[0], len(models_in(file.parent)) == 1
    found: list[Path | None] = []
    for kind in (is_mmproj, is_sidecar):
        files = [
            other for other in sorted(file.parent.glob("*.gguf")) if is_first(other.name) and other != file and kind(other)
        ]
        own = [other for other in files if alone or bare(other).startswith(name)]
        found.append(max(own, key=lambda other: len(os.path.commonprefix([bare(other), stem])), default=None))
    return found[0], found[1]


def bare(file: Path) -> str:
    return file.name.lower().removeprefix("mtp-").removeprefix("mmproj-")


def engine_path() -> tuple[str, bool, list[str]]:
    """(llama-server as a shell would say it, whether it sees the cards, notes)."""
    here, cards = at_hand("llama-server"), bool(nvidia_smi("name"))
    if here is None:
        able = not cards or shutil.which("nvcc") is not None
        note = ["llama.cpp is not built here yet: the first run does, 5 to 20 minutes"]
        note += [] if able else ["without nvcc it will not see the card; LLAMA_CPP names a build of your own"]
        return '"$(bash pipelines/llama_cpp.sh | tail -n 1)/llama-server"', cards and able, note
    able = cards and sees_gpu()
    note = [f"{here.parent} was built without CUDA and does not see the card"] if cards and not able else []
    return shlex.quote(str(here)), able, note


@dataclasses.dataclass(frozen=True)
class Deployment:
    """The command without host and port, as a shell takes it; what it rests on, as lines; how a server of it is started
    (``missing``: why it cannot be)."""

    command: str
    lines: Sequence[str]
    arguments: Sequence[str] = ()
    placement: Placement | None = None
    missing: str = ""
    drafts: bool = False


def deploy_gguf(path: Path, args: argparse.Namespace) -> Deployment:
    file = GgufFile(path)
    if file.fields.get("general.type") not in (None, "model") or not file.fields.get(f"{file.architecture()}.block_count"):
        raise UserError(f"{path}: a GGUF, but no language model ({file.architecture()}, {file.fields.get('general.type')})")
    projector, sidecar = beside(path)
    inside = any(name.endswith(".nextn.eh_proj.weight") for name in file.tensors)  # some keep tensors that no graph reads
    drafts = inside or sidecar is not None
    more = [other for other in (projector, None if inside else sidecar) if other]
    server, cards, notes = engine_path()
    machine = this_machine(cards)
    facts = facts_of(file, drafts, sum(part.stat().st_size for other in more for part in gguf_files(other)))
    try:
        placement = place(facts, machine, args.context, args.parallel)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    options = placement.options()
    options += ["--mmproj", str(projector)] if projector else []
    options += ["--spec-type", "draft-mtp"] if drafts else []
    options += ["--model-draft", str(sidecar)] if drafts and not inside else []
    typed = ["--model", str(path), "--ctx-size", str(placement.context * placement.slots), "--parallel", str(placement.slots)]
    lines = [
        f"{facts.architecture}: {file.bytes / GIB:.2f} GiB in {len(file.files)} file{'s'[: len(file.files) > 1]}, of it "
        f"{sum(facts.experts) / GIB:.2f} experts of {len(facts.dense)} layers; trained on {facts.trained:,} tokens",
        f"a token of context takes {sum(facts.keys):,} bytes of keys and values, a sequence {sum(facts.state) / 1e6:,.1f} MB "
        "of recurrent state",
        machine.text(),
        placement_text(placement, len(facts.dense)),
        *(f"with {other.name}" for other in more),
        *(["drafts by its own mtp block"] if inside else []),
        *facts.notes,
        *notes,
    ]
    return Deployment(f"{server} {shlex.join([*typed, *options])}", lines, options, placement, drafts=drafts)


def placement_text(placement: Placement, layers: int) -> str:
    where = "all in the host's memory" if placement.layers is None else "all on the card"
    if placement.layers not in (None, ALL):
        where = f"{int(placement.layers or 1) - 1} of {layers} layers on the card, all experts in the host's memory"
    elif placement.hosted:
        where = f"the experts of {placement.hosted} of {layers} layers in the host's memory, the rest on the card"
    return (
        f"{where}: {placement.card / GIB:.1f} GiB on cards, {placement.host / GIB:.1f} GiB of memory, for {placement.slots} x "
        f"{placement.context:,} tokens"
    )


def deploy_checkpoint(path: Path, args: argparse.Namespace) -> Deployment:
    """vLLM for a checkpoint: as few cards as hold it, over which its heads, and the groups of a packed one, divide."""
    checkpoint = Checkpoint(path)
    text, given = text_config(checkpoint.config), read_json(path / "config.json")
    heads = int(text.get("num_attention_heads") or 1)
    kv, width = int(text.get("num_key_value_heads") or heads), int(text.get("head_dim") or text.get("hidden_size", 0) // heads)
    token, state = (layer_count(checkpoint.config) or 0) * 4 * kv * width, 0
    if "linear_num_key_heads" in text:
        token, state = state_bytes(text)
    trained = int(text.get("max_position_embeddings") or LEAST)
    machine = this_machine()
    inner, group = text.get("moe_intermediate_size") or text.get("intermediate_size") or 0, group_size(given)
    weights = checkpoint.bytes
    missing = "" if importlib.util.find_spec("vllm") else (
        "vLLM cannot be imported here: pip install vllm (its own environment), or make a GGUF: bash pipelines/pack_gguf.sh"
    )  # fmt: skip
    lengths = [args.context] if args.context else [length for length in (trained, USUAL, SHORT, LEAST) if length <= trained]
    free = min(machine.cards, default=machine.host)
    share, fixed = (VLLM_SHARE, VLLM_BYTES) if machine.cards else (1.0, HOST_BYTES)

    def needed(n: int, length: int) -> float:
        return (weights / n + args.parallel * (token * length + state) / min(n, kv) + fixed) / share

    ways = [n for n in (1, 2, 4, 8, 16) if n <= max(1, len(machine.cards)) and heads % n == 0]
    ways = [n for n in ways if not group or inner % (n * group) == 0]
    fits = ((n, length) for length in lengths for n in ways if needed(n, length) <= free)
    if (cut := next(fits, None)) is None:
        length, n = lengths[-1], max(ways, default=1)
        need = needed(n, length)
        raise UserError(
            f"{path}: does not fit ({args.parallel} x {length:,} tokens of context; {machine.text()}); the least that would: "
            f"{need / GIB:.1f} GiB free on {f'each of {n} cards' if n > 1 else 'a card'}"
        )
    n, length = cut
    command = ["vllm", "serve", str(path), "--max-model-len", str(length), "--max-num-seqs", str(args.parallel)]
    command += ["--tensor-parallel-size", str(n)] if n > 1 else []
    lines = [
        f"{given.get('model_type')}: {weights / GIB:.2f} GiB{', packed' * checkpoint.is_packed}; trained on {trained:,} "
        f"tokens; a token of context takes {token:,} bytes of keys and values",
        machine.text(),
        f"{n} card{'s'[: n > 1]}" if machine.cards else "no card: vLLM for CPUs",
        *([f"missing: {missing}"] if missing else []),
    ]
    return Deployment(shlex.join(command), lines, command, None, missing)


def group_size(config: dict[str, Any]) -> int:
    """The largest group of inputs with one scale in a packed checkpoint; 0: none."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    return max((int((group.get("weights") or {}).get("group_size") or 0) for group in groups.values()), default=0)


# ---------------------------------------------------------------- asked


def ask(client: Client, model: str) -> tuple[str, str]:
    """(the answer to :data:`QUESTION`, what it took); :class:`UserError` that says what is wrong with it."""
    fields = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 512, "temperature": 0.0}
    started = time.perf_counter()
    answer = client.call("/v1/chat/completions", fields | {"logprobs": True})
    seconds = time.perf_counter() - started
    choice = answer["choices"][0]
    rows = finite_rows(choice.get("logprobs"), str(client.base_url))
    message, timings = choice["message"], answer.get("timings") or {}
    text = "\n".join(filter(None, (message.get("reasoning_content") or message.get("reasoning"), message.get("content"))))
    check_answer(text, [row["token"] for row in rows])
    tokens = int(answer["usage"]["completion_tokens"])
    rate = float(timings.get("predicted_per_second") or tokens / seconds)
    took = f"{tokens} tokens, {rate:.1f} tokens/s"
    if "draft_n" in timings:
        took += f", {timings['draft_n_accepted']} of {timings['draft_n']} drafted tokens accepted"
        if timings["draft_n"] and not timings["draft_n_accepted"]:
            raise UserError(
                f"none of {timings['draft_n']} drafted tokens was accepted: the head is another model's, or damaged"
            )
    return text, took


def check_answer(text: str, tokens: Sequence[str]) -> None:
    """Raise :class:`UserError` unless an answer to :data:`QUESTION` could be one of a model that works."""
    shown = " ".join(text.split())[:80]
    if not text.strip():
        raise UserError("the answer is empty")
    if len(tokens) >= 16 and stuck(tokens):
        raise UserError(f"the answer ends in one token over and over: {shown!r}")
    if text.count("\ufffd") > len(text) // 4:
        raise UserError(f"the answer is no text: {shown!r}")
    if not any(sign.isdigit() for sign in text):
        raise UserError(f"a number was asked for, the answer has none: {shown!r}")


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot be used ({error}); give another") from None


def start(path: Path, found: Deployment, port: int | None) -> LocalServer:
    """The server, ready to answer."""
    if found.placement:
        return LlamaServer(path, found.placement.context, found.placement.slots, found.arguments, port=port, own=())
    return LocalServer(path, found.arguments, 1800, port, "/v1/models")


def serve(path: Path, found: Deployment, args: argparse.Namespace) -> int:
    """Start the server, ask it, and with --serve let it run until it ends or Ctrl-C; the exit code."""
    if found.missing:
        raise UserError(f"{path}: {found.missing}")
    if args.serve:
        check_port(args.port)
    with start(path, found, args.port if args.serve else None) as server:
        models = server.client.call("/v1/models")["data"]
        try:
            text, took = ask(server.client, str(models[0]["id"]))
        except UserError as error:
            print(f"{path}: {QUESTION!r}: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"{QUESTION} {' '.join(text.split())[-200:]}", flush=True)
        print(f"answered in {took}{'' if RIGHT in text else f'; {RIGHT} would be right'}", flush=True)
        if args.serve:
            print(f"serving http://127.0.0.1:{args.port}/v1 until Ctrl-C", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                while server.process and server.process.poll() is None:
                    time.sleep(0.5)
                server.check()
    return 0


def count(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF (the first part of a split one), or a checkpoint")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--serve", action="store_true", help="run it, ask it one question, and serve until Ctrl-C")
    how.add_argument("--check", action="store_true", help="run it, ask it one question, and stop")
    parser.add_argument("--context", type=count, help="tokens of each sequence (default: as long as fits)")
    parser.add_argument("--parallel", type=count, default=1, help="sequences at once (default 1)")
    parser.add_argument("--port", type=count, default=8080, help="of 127.0.0.1, for --serve (default 8080)")
    args = parser.parse_args()
    if not args.model.exists():
        raise UserError(f"{args.model}: no such file or directory")
    path = model_file(args.model)
    found = (deploy_gguf if is_gguf(path) else deploy_checkpoint)(path, args)
    print("\n".join(found.lines))
    print(f"{found.command} --host 127.0.0.1 --port {args.port}", flush=True)
    return serve(path, found, args) if args.serve or args.check else 0


if __name__ == "__main__":
    run_cli(main)
