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
