"""Servers with OpenAI's /v1/completions that are damaged, busy, mute, cut or another one: none counts as wrong answers."""

import http.server
import json
import random
import re
import threading
import time

import pytest
from conftest import REPO

import backend_openai
from backend import Sampling
from backend_openai import Answer, Client, Dispatch, OpenAIBackend, OpenAIServers, in_parallel
from console import UserError
from hf_model import load_tokenizer
from llamacpp_eval8 import free_port
from records import sha256_json
from runner import benchmark_metrics, extract_answer, graded_rows
from tasks_tools import MALFORMED, VERBS, Dialogue, Fault, ToolCalls, checked, execute, replayed

MODEL = REPO / "models" / "razor-tiny"
TOKENIZER = load_tokenizer(MODEL)
PROMPT = TOKENIZER.apply_chat_template(
    [{"role": "user", "content": "What is 1 + 1?"}], tokenize=False, add_generation_prompt=True
)
ROOM = Sampling(max_tokens=400)
ANSWER = "One and one.\n</think>\n\nThe answer is 2."


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Handler(http.server.BaseHTTPRequestHandler):
    """POST: ``server.answers``, a list of (status, body) whose last one stays; a body may be bytes, or a function of the
    request. GET: ``server.models``, or 404. Neither while ``server.runs`` is not set."""

    def do_GET(self):
        self.server.runs.wait()
        self.send(404 if self.server.models is None else 200, self.server.models)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.runs.wait()
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send(status, body(asked) if callable(body) else body)

    def send(self, status, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    """scripted(answers, port=0, models=None) -> an HTTP server that gives them; several may run."""
    running = []

    def start(answers, port=0, models=None):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.answers, server.models, server.asked, server.runs = list(answers), models, [], threading.Event()
        server.runs.set()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.runs.set()
        server.shutdown()
        server.server_close()


COUNT = len(ids_of(ANSWER)) + 1  # with the end token
BEYOND = ANSWER + "<|im_end|>\n<|im_start|>user\n"


def good(asked, told=True):
    """The answer of a server of razor-tiny's tokenizer: the biased token, else ANSWER and the end token. ``told``: its ids."""
    prompt = ids_of(asked["prompt"]) if isinstance(asked["prompt"], str) else asked["prompt"]
    biased = [int(token) for token in asked.get("logit_bias", ())]
    new = (biased or [*ids_of(ANSWER), TOKENIZER.eos_token_id])[: asked["max_tokens"]]
    reason = "stop" if new[-1] == TOKENIZER.eos_token_id else "length"
    choice = {"index": 0, "text": TOKENIZER.decode(new).removesuffix("<|im_end|>"), "finish_reason": reason, "logprobs": None}
    if told and "return_token_ids" in asked:
        choice["token_ids"] = new
    return {"model": "m", "choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(new)}}


def of_text(asked, **fields):
    """The same of a server that tells no ids; ``fields`` of the choice or of usage are set afterwards, but for the probe."""
    answer = good(asked, told=False)
    if asked["max_tokens"] > 1:
        choice, usage = answer["choices"][0], answer["usage"]
        for key, value in fields.items():
            (usage if key in usage else choice)[key] = value
    return answer


def engine(server, **options):
    return OpenAIBackend(server.url, "m", MODEL, 2048, parallel=1, **options)


def answer_of(server, sampling=ROOM, **options):
    ((_, done),) = engine(server, **options).generate([PROMPT], sampling)
    return done


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("options", [{}, {"send_text": True}, {"plain": True}], ids=["ids", "text", "plain"])
def test_an_undamaged_answer_is_taken(scripted, told, options):
    done = answer_of(scripted([(200, lambda asked: good(asked, told=told))]), **options)
    assert (done.text, done.tokens, done.finish_reason) == (ANSWER, COUNT, "stop")
    done = answer_of(scripted([(200, lambda asked: good(asked, told=told))]), Sampling(max_tokens=5), **options)
    assert (done.tokens, done.finish_reason) == (5, "length") and ANSWER.startswith(done.text)
    uncounted = scripted([(200, lambda asked: of_text(asked, completion_tokens=COUNT - 1))])  # some do not count the end
    assert answer_of(uncounted, **options).text == ANSWER
    beyond = scripted([(200, lambda asked: of_text(asked, text=BEYOND, completion_tokens=len(ids_of(BEYOND))))])
    assert answer_of(beyond, **options).text == ANSWER  # a server that does not know the end goes on


def test_ids_are_believed_before_text(scripted):
    """A llama-server without --special tells ids beside its log-probabilities, where </think> is missing from the text."""

    def silent(asked):
        answer, new = good(asked, told=False), [*ids_of(ANSWER), TOKENIZER.eos_token_id]
        choice = answer["choices"][0]
        choice["text"] = choice["text"].replace("</think>", "")
        new = [int(token) for token in asked["logit_bias"]] or new
        choice["logprobs"] = {"content": [{"id": token, "token": "", "logprob": -0.1} for token in new]}
        return answer

    assert answer_of(scripted([(200, silent)])).text == ANSWER


HIDDEN = ANSWER.replace("</think>", "")
OTHER = ANSWER.split("</think>")[1].strip()
ERROR = {"error": {"message": "CUDA out of memory"}}
NAN = {"content": [{"id": 5, "logprob": None}]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda asked: of_text(asked, text=HIDDEN), "tokens were generated and the text has"),
        (lambda asked: of_text(asked, text=OTHER), "tokens were generated and the text has"),
        (lambda asked: of_text(asked, text=""), f"{COUNT} tokens were generated and the text has 0"),
        (lambda asked: of_text(asked, text=PROMPT + ANSWER), "tokens were generated and the text has"),
        (lambda asked: of_text(asked, finish_reason="length"), f"cut at {COUNT} tokens where 400 were asked"),
        (lambda asked: of_text(asked, completion_tokens=401), "401 tokens were made where at most 400"),
        (lambda asked: of_text(asked, text=None), r"choices\[0\].text is null"),
        (lambda asked: of_text(asked, text=["a"]), r"choices\[0\].text is \[\"a\"\]"),
        (lambda asked: of_text(asked, finish_reason=None), "finish_reason None; expected stop or length"),
        (lambda asked: of_text(asked, completion_tokens=None), "usage.completion_tokens is null"),
        (lambda asked: of_text(asked, completion_tokens="20"), 'usage.completion_tokens is "20"'),
        (lambda asked: of_text(asked, prompt_tokens=3), "read 3 prompt tokens where the tokenizer has"),
        (lambda asked: of_text(asked) | {"usage": None}, "usage is null"),
        (lambda asked: of_text(asked) | {"choices": []}, r"choices\[0\] is null"),
        (lambda asked: of_text(asked) | {"choices": None}, "choices is null"),
        (lambda asked: of_text(asked) | ERROR, "answered with an error: CUDA out of memory"),
        (lambda asked: {"error": "no slot"}, "answered with an error: no slot"),
        (lambda asked: of_text(asked, logprobs=NAN), "a log-probability is no number"),
        (lambda asked: of_text(asked, logprobs={"token_logprobs": [float("nan")]}), "a log-probability is no number"),
        ([1, 2], r"the answer is \[1, 2\]"),
        (None, "the answer is null"),
        (b"\xff\xfe{}", "the answer is not JSON"),
        (b"<html>", "the answer is not JSON"),
        (b"", "the answer is not JSON"),
        (lambda asked: of_text(asked) | ({} if asked["max_tokens"] == 1 else {"model": "n"}), "answers as 'n', before as 'm'"),
    ],
)  # fmt: skip
def test_a_damaged_answer_is_one_line(scripted, body, expected):
    with pytest.raises(UserError, match=expected) as caught:
        answer_of(scripted([(200, body)]))
    assert "\n" not in str(caught.value) and "http://127.0.0.1" in str(caught.value)


def test_a_hidden_end_of_thought_is_seen_before_the_run(scripted):
    """One biased token shows whether special tokens are in the text at all."""

    def hides(asked):
        answer = good(asked, told=False)
        answer["choices"][0]["text"] = answer["choices"][0]["text"].replace("</think>", "")
        return answer

    server = scripted([(200, hides)])
    with pytest.raises(UserError, match="leaves special tokens such as </think> out"):
        answer_of(server)
    assert len(server.asked) == 1


def test_what_is_sent_is_what_is_declared(scripted):
    """No default of a server holds for what is not sent; with --plain-fields the record lists nothing that was not."""
    server = scripted([(200, good)])
    own = engine(server)
    list(own.generate([PROMPT], Sampling(temperature=0.5, top_p=0.9, top_k=7, max_tokens=100)))
    sent = server.asked[-1]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["max_tokens"]) == (0.5, 0.9, 7, 100)
    assert sent["min_p"] == sent["presence_penalty"] == sent["dry_multiplier"] == sent["mirostat"] == 0
    assert sent["repeat_penalty"] == sent["repetition_penalty"] == 1 and sent["stop_token_ids"] == [827]
    assert sorted(sent) == own.describe()["sent"] and "top_k" in sent
    plain = engine(server, plain=True)
    list(plain.generate([PROMPT], Sampling(temperature=0.5, top_k=None, max_tokens=100)))
    assert sorted(server.asked[-1]) == plain.describe()["sent"] and "top_k" not in server.asked[-1]
    assert "top_k" not in Sampling(top_k=None).to_json()


def test_identity_of_a_server(scripted):
    """Address, listed and served model, tokenizer and fields; a run is not resumed against another of any of them."""
    entry = {"id": "m", "owned_by": "llamacpp", "created": 5, "meta": {"n_params": 7, "n_ctx": 512, "n_ctx_train": 2048}}
    listed = {"data": [{"id": "other"}, entry]}
    facts = engine(scripted([(200, good)], models=listed)).describe()
    assert facts["listed_model"] == {"id": "m", "owned_by": "llamacpp", "n_params": 7, "n_ctx_train": 2048}
    assert facts["served_model"] == "m" and len(facts["tokenizer_sha256"]) == 64 and json.dumps(facts)
    found = [facts]
    found.append(engine(scripted([(200, good)], models=listed)).describe())
    found.append(engine(scripted([(200, good)])).describe())
    found.append(engine(scripted([(200, lambda asked: good(asked) | {"model": "n"})])).describe())
    assert all(a != b for a in found for b in found if a is not b)
    for models in ([], None, {"data": None}, {"data": ["m"]}, b"<html>"):
        assert engine(scripted([(200, good)], models=models)).describe()["listed_model"] == {}


def test_context_of_a_server(scripted, capfd):
    """A shorter one is said, and an answer that it cuts is an error; the model's own is where every backend stops."""
    room = 8
    prompt = len(ids_of(PROMPT))
    listed = {"data": [{"id": "m", "max_model_len": prompt + room}]}
    server = scripted([(200, good)], models=listed)
    with pytest.raises(UserError, match=f"cut at {room} tokens where 400 were asked: its context is {prompt + room}"):
        answer_of(server)
    assert server.asked[-1]["max_tokens"] == room and f"its context is {prompt + room}" in capfd.readouterr().err
    trained = {"data": [{"id": "m", "meta": {"n_ctx": prompt + room, "n_ctx_train": prompt + room}}]}
    assert answer_of(scripted([(200, good)], models=trained)).finish_reason == "length"


def test_refused_and_busy_requests_are_retried(scripted):
    port = free_port()
    answers = [(503, {}), (429, {}), (500, {}), (200, {"ok": 1})]
    threading.Timer(0.05, scripted, [answers, port]).start()
    client = Client(f"http://127.0.0.1:{port}")
    assert client.call("/x", {}) == {"ok": 1}
    refused = scripted([(400, {"error": {"message": "no such field"}})])
    with pytest.raises(UserError, match="HTTP 400: no such field"):
        Client(f"http://127.0.0.1:{refused.server_port}").call("/x", {})
    assert len(refused.asked) == 1
    with pytest.raises(UserError, match="no answer within 0 s"):
        Client(f"http://127.0.0.1:{free_port()}", patience=0.4).call("/x", {})
    broken = scripted([(500, b"\xff")])
    with pytest.raises(UserError, match="no answer within 0 s .HTTP 500"):
        Client(broken.url, patience=0.4).call("/x", {})
    assert len(broken.asked) > 1


def test_a_mute_server_is_given_up(scripted, monkeypatch, capfd):
    """With a word while it is waited for."""
    monkeypatch.setattr(backend_openai, "FIRST_WORD", 0.2)

    def mute(asked):
        time.sleep(1.0 if asked["max_tokens"] > 1 else 0)
        return good(asked)

    started = time.monotonic()
    with pytest.raises(UserError, match="no answer to a request within 1 s.*--timeout"):
        answer_of(scripted([(200, mute)]), timeout=0.7)
    assert time.monotonic() - started < 3
    said = capfd.readouterr().err
    assert "no answer for 0 s; a request is given up after 1 s" in said and said.count("no answer for") == 2
    assert answer_of(scripted([(200, mute)]), timeout=5.0).text == ANSWER


def test_doubled_bos_of_an_endpoint_is_refused(scripted):
    count = len(ids_of("hello"))
    choice = {"text": "x", "finish_reason": "stop"}
    server = scripted([(200, {"choices": [choice], "usage": {"prompt_tokens": count + 1, "completion_tokens": 1}})])
    openai = OpenAIBackend(server.url, "m", MODEL, 64, send_text=True)
    with pytest.raises(UserError, match=f"read {count + 1} prompt tokens where the tokenizer has {count}"):
        list(openai.generate(["hello"], Sampling()))


def test_in_parallel_raises_the_first_failure():
    def work(index):
        if index == 3:
            raise UserError("three")
        return index

    got = []
    with pytest.raises(UserError, match="three"):
        got.extend(in_parallel(work, 100, 1))
    assert got == [(0, 0), (1, 1), (2, 2)]  # what was finished came first
    assert sorted(in_parallel(lambda i: 2 * i, 5, 3)) == [(i, 2 * i) for i in range(5)]


# ---- several servers ----


def test_dispatch_loses_no_item_and_takes_none_twice():
    """Against any order of events, late answers of servers taken for lost among them."""
    draw = random.Random(0)
    for _ in range(200):
        count, names = draw.randrange(12), ["a", "b", "c"][: draw.randint(1, 3)]
        dispatch, asked, first = Dispatch(count, set()), [], []  # asked: requests that may still be answered
        for _ in range(10_000):
            if len(first) == count:
                break
            server, event = draw.choice(names), draw.random()
            if event < 0.3:
                dispatch.up.add(server)
            elif event < 0.6:
                was_up = server in dispatch.up
                index = dispatch.take(server)
                assert index is None or (was_up and dispatch.out[index] == server)
                asked += [] if index is None else [(server, index)]
            elif event < 0.65:
                dispatch.lose(server)
                assert server not in dispatch.up and server not in dispatch.out.values()
            elif asked:
                request = asked.pop(draw.randrange(len(asked)))
                if event < 0.7:
                    dispatch.lose(*request)
                elif dispatch.answer(*request):
                    first.append(request[1])
            parts = [*dispatch.waiting, *dispatch.out, *dispatch.answered]
            assert sorted(parts) == list(range(count))
        assert sorted(first) == list(range(count)) == sorted(dispatch.answered)
    dispatch = Dispatch(3, {"a", "b"})
    assert [dispatch.take(name) for name in "aba"] == [0, 1, 2]
    dispatch.lose("a")
    assert list(dispatch.waiting) == [0, 2] and dispatch.losses == {0: 1, 2: 1} and dispatch.take("a") is None


@pytest.mark.parametrize(
    ("ids", "logprobs", "told"),
    [
        ([5, 6], [-0.1, -1.0], ""),
        ([5, 6], [-0.3, -0.8], ""),
        ([5, 6], [-0.1, -1.5], r"token 6 \(log-probability -1.50\) where it has 6 \(-1.00\) in place 2"),
        ([5, 7], [-0.1, -0.9], ""),  # a tie
        ([5, 7], [-0.1, -0.4], "token 7 .* where it has 6 .* in place 2"),
        ([4, 6], [-0.7, -1.0], "token 4 .* where it has 5 .* in place 1"),
        (None, [], "answers 'b' to a fixed prompt where it has 'a'"),
    ],
)  # fmt: skip
def test_one_model_by_its_answer(ids, logprobs, told):
    first = Answer("a", "length", 9, 2, [5, 6], "m", [-0.1, -1.0])
    found = Answer("b", "length", 9, 2, ids, "m", logprobs).other_than(first)
    assert re.fullmatch(told, found) if not told.startswith("token") else re.search(told, found)


@pytest.fixture
def soon(monkeypatch):
    """Looks and patience of tenths of a second."""
    for name, value in {"LOOK": 0.05, "BRIEFLY": 0.1, "FIRST_WORD": 1.0, "START": 20.0}.items():
        monkeypatch.setattr(backend_openai, name, value)


PROMPTS = [PROMPT.replace("1 + 1", f"1 + {number}") for number in range(12)]


def several(addresses, parallel=1):
    urls = addresses if isinstance(addresses, str) else ",".join(server.url for server in addresses)
    return OpenAIServers(urls, OpenAIBackend("http://127.0.0.1:1", "m", MODEL, 2048, parallel=parallel))


def slowly(asked):
    time.sleep(0.02)
    return good(asked)


def asked_of(server):
    return sum(request["max_tokens"] == ROOM.max_tokens for request in server.asked)


def test_many_servers_answer_as_one(scripted, soon, capfd):
    """One that says 503 for a while, one that falls silent and comes back: nothing is lost or doubled, both are used again."""
    expected = dict(engine(scripted([(200, good)])).generate(PROMPTS, ROOM))
    busy = scripted([*[(200, slowly)] * 3, *[(503, {})] * 12, (200, slowly)])
    silent, well = scripted([(200, slowly)]), scripted([(200, slowly)])
    servers = several([well, busy, silent])
    got = {}
    for index, done in servers.generate(PROMPTS * 6, ROOM):
        assert index not in got
        got[index] = done
        if len(got) == 6:
            assert asked_of(silent)
            silent.runs.clear()
        if len(got) == 40:
            while "no answer to a request within 1 s" not in capfd.readouterr().err:
                time.sleep(0.05)
            before = asked_of(silent)
            silent.runs.set()
            while silent.url not in servers.up:
                time.sleep(0.01)
    assert [got[index] for index in range(72)] == [expected[index] for index in range(12)] * 6
    tally = servers.tally()
    assert sum(tally["answers"]) == 72 and min(tally["answers"]) > 0 and tally["refused"] == 0 and tally["asked_again"] > 0
    assert asked_of(silent) > before and asked_of(busy) > 0 and not any("127.0.0.1" in str(value) for value in tally.values())
    assert "base_url" not in servers.describe() and "127.0.0.1" not in json.dumps(servers.describe())


OTHERS = [
    ({"models": {"data": [{"id": "x"}]}}, good, "not the model of .*: listed_model is {'id': 'x'} where it has {'id': 'm'}"),
    ({}, lambda asked: good(asked) | {"model": "n"}, "not the model of .*: served_model is n where it has m"),
    ({}, lambda asked: of_text(asked, prompt_tokens=3), "the server read 3 prompt tokens where the tokenizer has"),
    (
        {},
        lambda asked: of_text(asked, text="Rome", completion_tokens=1),
        "not the model of .*: answers 'Rome' to a fixed prompt where it has 'One",
    ),
]


@pytest.mark.parametrize(("options", "body", "told"), OTHERS)
def test_another_model_is_refused_by_name(scripted, soon, capfd, options, body, told):
    listed = {"models": {"data": [{"id": "m"}]}}
    first, other = scripted([(200, slowly)], **listed), scripted([(200, body)], **(listed | options))
    servers = several([first, other])
    assert len(dict(servers.generate(PROMPTS, ROOM))) == 12
    assert re.search(f"{other.url}: {told}.*This server is not used", capfd.readouterr().err)
    assert servers.tally() == {"answers": [12, 0], "refused": 1, "asked_again": 0}


def test_a_server_that_goes_wrong_is_refused_and_its_items_go_on(scripted, soon):
    """Its answers before that were checked one by one. When none is left, the run ends as with one server."""
    wrong = scripted([*[(200, slowly)] * 4, (200, lambda asked: of_text(asked, text=HIDDEN))])
    servers = several([wrong, scripted([(200, slowly)])])
    assert len(dict(servers.generate(PROMPTS, ROOM))) == 12 and servers.tally()["refused"] == 1
    with pytest.raises(UserError, match="tokens were generated and the text has"):
        list(
            several([scripted([*[(200, good)] * 3, (200, lambda asked: of_text(asked, text=HIDDEN))])] * 2).generate(
                PROMPTS, ROOM
            )
        )


def test_no_server_at_all_ends_the_run(scripted, soon, monkeypatch):
    monkeypatch.setattr(backend_openai, "START", 0.5)
    down = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(2)]
    with pytest.raises(UserError, match="none of 2 servers answered for 0 s .*the same command goes on from here"):
        list(several(",".join(down)).generate(PROMPTS, ROOM))


def test_an_item_that_ends_servers_ends_the_run(scripted, soon):
    deadly = scripted([*[(200, good)] * 2, (500, {})] * 9)
    with pytest.raises(UserError, match="an item was lost by servers 5 times"):
        list(several([deadly]).generate(PROMPTS, ROOM))


def test_a_file_of_servers_is_read_again(scripted, soon, tmp_path, capfd):
    """Added, taken away, unreadable for a moment; one that starts late under its address is used."""
    listed, late = tmp_path / "servers", free_port()
    one, two = scripted([(200, slowly)]), scripted([(200, slowly)])
    listed.write_text(f"# of this job\n{one.url}/\nhttp://127.0.0.1:{late}/v1\n")
    servers = several(f"@{listed}")
    for count, _ in enumerate(servers.generate(PROMPTS * 10, ROOM), 1):
        if count == 2:
            third = scripted([(200, slowly)], late)
            listed.write_text("")
        if count == 20:
            listed.write_text(f"{two.url}\n{third.url}")
    said = capfd.readouterr().err
    assert f"{one.url}: no longer in {listed}" in said and "names no server" in said and "answers again" in said
    assert asked_of(two) and asked_of(third) and len(servers.servers) == 2 and sum(servers.tally()["answers"]) == 120
    for text, told in (("", "names no server"), ("host:80", "not a server's address")):
        listed.write_text(text)
        with pytest.raises(UserError, match=told):
            several(f"@{listed}")
    with pytest.raises(UserError, match="No such file"):
        several(f"@{listed}.gone")


# ---- dialogues with tools: a server plays callers of every kind, whose calls are executed ----

ITEMS = ToolCalls().load()
BY_OPENING = {(item.question, tuple(item.meta["tools"])): item for item in ITEMS}


def said(content="Done.", calls=(), reason=None, asked=None):
    """The answer of a server; its prompt has as many tokens as the request has signs."""
    listed = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    message = {"role": "assistant", "content": None if listed else content} | ({"tool_calls": listed} if listed else {})
    choice = {"message": message, "finish_reason": reason or ("tool_calls" if listed else "stop")}
    usage = {"prompt_tokens": len(json.dumps(asked)), "completion_tokens": 5}
    return {"model": "m", "choices": [choice], "usage": usage}


def caller(play=lambda item, turn, step, call: call, speaks=lambda turn: f"Done.\n**Answer:** {turn['answer']}.", reason=None):
    """A server that makes the reference calls, each as ``play`` changes it: None stops calling; a text is sent as it is."""

    def answer(asked):
        if "prompt" in asked or len(asked["messages"]) == 1 and asked["messages"][0]["content"] == "Hello":
            return good(asked) if "prompt" in asked else said(asked=asked)
        names = tuple(tool["function"]["name"] for tool in asked["tools"])
        item = BY_OPENING[asked["messages"][0]["content"], names]
        history = [call["function"]["arguments"] for m in asked["messages"] for call in m.get("tool_calls") or ()]
        assert all(isinstance(json.loads(arguments), dict) for arguments in history)  # as llama-server and vLLM ask for
        users = [place for place, message in enumerate(asked["messages"]) if message["role"] == "user"]
        turn, step = item.meta["turns"][len(users) - 1], sum(m["role"] == "tool" for m in asked["messages"][users[-1] :])
        call = play(item, turn, step, turn["calls"][step] if step < len(turn["calls"]) else None)
        if call is None:
            return said(speaks(turn), asked=asked, reason=reason)
        name, arguments = call
        return said(calls=[(name, arguments if isinstance(arguments, str) else json.dumps(arguments))], asked=asked)

    return answer


def first_broken(name=None, arguments=None):
    """A caller whose first call of each turn is broken, and who then goes on as it should."""

    def play(item, turn, step, call):
        if step == 0:
            return name or turn["calls"][0][0], "{}" if arguments is None else arguments
        return turn["calls"][step - 1] if step <= len(turn["calls"]) else None

    return play


def level_off(item, turn, step, call):
    """Levels that are set are one too high or too low."""
    if call is None or "level" not in call[1]:
        return call
    return call[0], call[1] | {"level": call[1]["level"] + (1 if call[1]["level"] < 50 else -1)}


def talked(server, items=ITEMS):
    """(log rows, metrics) of dialogues."""
    benchmark = ToolCalls()
    done = dict(engine(server).generate([benchmark.given(item, None) for item in items], Sampling(max_tokens=100)))
    rows = graded_rows(benchmark, items, [Dialogue(item) for item in items], [done[i] for i in range(len(items))])
    return rows, benchmark_metrics(benchmark, items, rows)


SETS = [item for item in ITEMS if any("set_level" in name for turn in item.meta["turns"] for name, _ in turn["calls"])]
QUESTIONS = [item for item in ITEMS if any(turn["answer"] is not None for turn in item.meta["turns"])]
MUTE = lambda turn: "I cannot."  # noqa: E731
CALLERS = {
    "right": (caller(), ITEMS, 1, set(), "stop"),
    "bad_json": (caller(first_broken(arguments='{"name": ')), ITEMS[:15], 1, {"bad_json"}, "stop"),
    "no_object": (caller(first_broken(arguments="[1]")), ITEMS[:15], 1, {"bad_json"}, "stop"),
    "unknown_tool": (caller(first_broken(name="lamp_explode")), ITEMS[:15], 1, {"unknown_tool"}, "stop"),
    "missing_argument": (caller(first_broken()), ITEMS[:15], 1, {"missing_argument"}, "stop"),
    "wrong_call": (caller(level_off), SETS, 0, {"wrong_call"}, "stop"),
    "no_call": (caller(lambda *_: None, MUTE), ITEMS[:15], 0, {"no_call"}, "stop"),
    "guess": (caller(lambda *_: None), [i for i in ITEMS if i.gold.endswith('"changes": {}}')], 1, set(), "stop"),
    "loop": (caller(lambda item, turn, step, call: turn["calls"][0]), ITEMS[:15], 0, {"loop"}, "stop"),
    "cut": (caller(reason="length"), ITEMS[:15], 0, set(), "length"),
    "mute": (caller(speaks=MUTE), QUESTIONS, 0, set(), "stop"),
}


@pytest.mark.parametrize("name", CALLERS)
def test_callers_are_told_apart(scripted, name):
    answer, items, share, faults, reason = CALLERS[name]
    rows, metrics = talked(scripted([(200, answer)]), items)
    assert len(items) >= 10 and metrics["acc"] == share and {row["finish_reason"] for row in rows} == {reason}
    seen = {kind for kind, count in metrics["faults"].items() if count["times"]}
    assert seen >= faults and (name in ("loop", "wrong_call") or seen == faults), metrics["faults"]
    if faults and name != "wrong_call":
        assert all(metrics["faults"][kind]["dialogues"] == len(items) for kind in faults)
    assert metrics["malformed"] == float(bool(faults & set(MALFORMED)))
    assert sum(own["n"] for own in metrics["by_tools"].values()) == len(items) == metrics["n"]
    transcripts = [json.loads(row["text"]) for row in rows]
    assert [own[0]["content"] for own in transcripts] == [item.question for item in items]
    assert not any("<" in row["text"] for row in rows)
    if name == "bad_json":  # what the model wrote is in the log, what a server is told is JSON
        assert transcripts[0][1]["tool_calls"][0]["function"]["arguments"] == '{"name": '
        assert "error" in json.loads(transcripts[0][2]["content"])
        assert re.fullmatch(r"[a-z0-9]{9}", transcripts[0][1]["tool_calls"][0]["id"])
    for row, item in zip(rows, items):  # graded anew from the log alone
        again = extract_answer(ToolCalls(), item, row["text"], row["finish_reason"], row["prompt_opens_thinking"])
        assert again == row["extracted"] and (again == item.gold) == row["correct"]


def test_a_reply_that_the_server_cannot_read_is_the_models_fault(scripted):
    error = {"error": {"message": "The model produced output that does not match the expected peg-native format"}}
    server = scripted([(200, caller()), (200, caller()), (200, caller()), (500, error)])
    rows, metrics = talked(server, ITEMS[:1])
    assert metrics["faults"]["unreadable"] == {"times": 1, "dialogues": 1} and metrics["malformed"] == 1
    assert rows[0]["extracted"] is None and "does not match" in json.loads(rows[0]["text"])[-1]["why"]


def test_a_context_that_is_full_cuts_a_dialogue(scripted):
    """The prompt of the next reply is known to need more tokens than the server has."""
    item = ITEMS[0]
    server = scripted([(200, caller(lambda item, turn, step, call: turn["calls"][0]))], models={"data": [{"id": "m"}]})
    server.models["data"][0]["max_model_len"] = len(json.dumps(Dialogue(item))) + 1500
    rows, metrics = talked(server, [item])
    assert rows[0]["finish_reason"] == "length" and metrics["trunc"] == 1 and not metrics["faults"]["loop"]["times"]


@pytest.mark.parametrize(
    "answer,told",
    [
        (
            lambda asked: good(asked) if "prompt" in asked else said(asked=asked["messages"]),
            "m: its chat template does not know",
        ),
        (lambda asked: good(asked) if "prompt" in asked else said(asked=asked, reason="abort"), "finish_reason 'abort'"),
        (lambda asked: good(asked) if "prompt" in asked else said(asked=asked, calls=[("a", 3)]), "function.arguments is 3"),
    ],
)
def test_a_server_that_takes_no_tools_is_one_line(scripted, answer, told):
    with pytest.raises(UserError, match=told):
        talked(scripted([(200, answer)]), ITEMS[:1])


def test_an_evaluation_with_tools(scripted, command, tmp_path):
    """The command: a record with intervals, transcripts in the log, grades made anew, a second run that asks for nothing."""
    server = scripted([(200, caller(level_off))])
    model = ("--model", "m", "--backend", "openai", "--base-url", server.url, "--tokenizer", MODEL)
    run = (*model, "--benchmarks", "tool_calls", "--limit", 30, "--out", tmp_path / "eval", "--tag", "t")
    done = command("src/eval/vllm_eval8.py", *run)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "eval/t.json").read_text())["metrics"]["tool_calls"]
    assert metrics["n"] == 30 and 0 < metrics["acc_low"] < metrics["acc"] < metrics["acc_high"] < 1
    assert [own["n"] for own in metrics["by_tools"].values()] == [6] * 5
    assert [own["n"] for own in metrics["by_turns"].values()] == [10] * 3
    assert metrics["faults"]["wrong_call"]["times"] and metrics["calls"] > 30
    asked = len(server.asked)
    regraded = command("src/eval/regrade.py", "t", "--results", tmp_path)
    assert regraded.returncode == 0 and "0 verdicts changed" in regraded.stdout, regraded.stderr
    assert json.loads((tmp_path / "eval/t.json").read_text())["metrics"]["tool_calls"] == metrics
    (tmp_path / "eval/t.json").unlink()
    assert command("src/eval/vllm_eval8.py", *run).returncode == 0
    assert all("messages" not in sent for sent in server.asked[asked:])  # one look at the server, nothing more


def test_the_world_of_tools():
    """Every item is solved by its reference calls, needs each of them, and is always the same."""
    assert len({item.id for item in ITEMS}) == 150 and [item.id for item in ToolCalls().load(7)] == [i.id for i in ITEMS[:7]]
    assert {len(item.meta["tools"]) for item in ITEMS} == {1, 5, 15, 30, 60}
    assert sha256_json([ToolCalls().standard(item) for item in ITEMS])[:16] == "3924fce4971bd500"  # else another revision
    for item in ITEMS:
        solved = replayed(item, json.dumps([{"role": "assistant", "content": "Done."}] * len(item.meta["turns"])))
        assert not all(solved.right), item.id


@pytest.mark.parametrize(
    "tool,arguments,kind",
    [
        ("lamp_read", '{"name": "Ada"}', None),
        ("lamp_read", {"name": "Ada"}, None),
        ("lamp_set_level", '{"name": "Ada", "level": 5.0}', None),  # JSON schema calls it an integer
        ("lamp_list", '{"mode": "slow"}', None),
        ("lamp_list", '{"mode": "slow", "names_only": true}', None),
        ("lamp_list", '{"mode": "slow", "names_only": "yes"}', "wrong_type"),
        ("lamp_read", "{'name': 'Ada'}", "bad_json"),
        ("lamp_read", "null", "bad_json"),
        ("lamp_read", '{"a":' * 100_000, "bad_json"),
        ("door_read", '{"name": "Ada"}', "unknown_tool"),
        ("lamp_read", "{}", "missing_argument"),
        ("lamp_read", '{"name": "Ada", "colour": 1}', "unknown_argument"),
        ("lamp_read", '{"name": 3}', "wrong_type"),
        ("lamp_set_level", '{"name": "Ada", "level": "5"}', "wrong_type"),
        ("lamp_set_level", '{"name": "Ada", "level": true}', "wrong_type"),
        ("lamp_set_level", '{"name": "Ada", "level": 5.5}', "wrong_type"),
        ("lamp_set_mode", '{"names": ["Ada", 3], "mode": "off"}', "wrong_type"),
        ("lamp_set_level", '{"name": "Ada", "level": 100}', "wrong_value"),
        ("lamp_set_mode", '{"names": ["Ada"], "mode": "warp"}', "wrong_value"),
        ("lamp_read", '{"name": "Zoe"}', "refused"),
        ("lamp_move", '{"source": "Ada", "target": "Ada", "amount": 1}', "refused"),
        ("lamp_move", '{"source": "Ada", "target": "Ben", "amount": 8}', "refused"),
        ("lamp_move", '{"source": "Ada", "target": "Ben", "amount": 7}', None),
    ],
)
def test_a_call_is_executed_or_told_why_not(tool, arguments, kind):
    tools = [f"lamp_{verb}" for verb in VERBS]
    things = {"Ada": {"level": 7, "mode": "slow"}, "Ben": {"level": 3, "mode": "off"}}
    try:
        execute(things, tool.partition("_")[2], checked(tools, tool, arguments))
        found = None
    except Fault as fault:
        found = fault.kind
    assert found == kind
    assert things["Ada"]["level"] == (0 if kind is None and tool == "lamp_move" else 5 if "5.0" in str(arguments) else 7)


@pytest.mark.parametrize(
    "text,found",
    [
        ("Done.\nAnswer: 42", 42), ("**Answer:** 42.", 42), ("answer: the level is 42", 42), ("Answer: -5", -5),
        ("Answer: \\boxed{42}", 42), ("Answer: 1\nAnswer: 2", 2), ("Answer: 42.5", None), ("Answer: 1,042", None),
        ("The answer is 42", None), ("Answer: many", None),
        ("<think>\nAnswer: 1\n</think>\nAnswer: 2", 2), ("<think>Answer: 1", None),
    ],
)  # fmt: skip
def test_a_number_that_was_asked_for(text, found):
    item = next(item for item in ITEMS if item.meta["turns"][0]["answer"] is not None)
    assert replayed(item, json.dumps([{"role": "assistant", "content": text}])).answers == [found]
