"""A server that is slow, fails, or answers nonsense costs time or an answer, never a wrong caption."""

import base64
import socket

import pytest

from diffalign.captioning import Answers, ChatServer, Missing, Question, ask
from diffalign.captioning.chat_server import GIVE_UP, LONGEST_SIDE
from diffalign.captioning.http_answers import Endpoint
from diffalign.data.pairs import ImageRef
from diffalign.errors import ConfigError, ModelError
from tests.captioning.server import Server
from tests.data.world import picture

TEMPLATE = "Say what is there.\n{prompt}"


def questions(count, first=0):
    return [Question(f"prompt {i}", ImageRef(data=picture(i))) for i in range(first, first + count)]


def client(address, pauses=None, timeout=20.0, retries=4, key=None, **settings):
    pause = (pauses if pauses is not None else []).append
    endpoint = Endpoint(address, key, timeout=timeout, retries=retries, pause=pause)
    return ChatServer(endpoint, template=TEMPLATE, **settings)


def said(by, asked):
    found = {question.text: answer for batch in by.answers(asked) for question, answer in batch}
    return [found[question.text] for question in asked]


def colour(seed):
    image = ImageRef(data=picture(seed)).load().resize((1, 1))
    return "-".join(map(str, image.getpixel((0, 0))))


def test_every_question_gets_its_own_answer_several_at_a_time():
    server = Server()
    with server.running() as address:
        answers = said(client(address, concurrency=4, key="secret"), questions(12))
    assert answers == [f"{colour(i)} prompt {i}" for i in range(12)]
    assert 1 < server.most_at_once <= 4
    assert set(server.keys) == {"Bearer secret"}
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("llava", 0, 64)


def test_failures_that_pass_are_waited_for():
    server, pauses = Server([500, "cut", 429, "close"]), []
    with server.running() as address:
        answers = said(client(address, pauses, concurrency=1), questions(2))
    assert answers == [f"{colour(i)} prompt {i}" for i in range(2)]
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    assert len(server.bodies) == 6


def test_a_slow_server_is_asked_again():
    server = Server(["slow"])
    with server.running() as address:
        assert said(client(address, timeout=0.3, concurrency=1), questions(1)) == [f"{colour(0)} prompt 0"]
    assert len(server.bodies) == 2


def test_what_is_no_answer_is_missing(tmp_path):
    server = Server(always={"prompt 1": "cut", "prompt 2": "empty", "prompt 3": 400, "prompt 4": 503})
    with server.running() as address, Answers(tmp_path / "a.sqlite") as known:
        by = client(address, retries=1, concurrency=1)
        answers = ask(by, asked := questions(6), known)
        assert [isinstance(answer, Missing) for answer in answers] == [False, True, True, True, True, False]
        assert "cannot be read" in answers[1].reason
        assert answers[2].reason == "empty answer"
        assert answers[3].reason == 'status 400: {"error": {"message": "not now"}}'
        times = [sum(n for said, n in server.seen.items() if f"prompt {i}" in said) for i in range(6)]
        assert times == [1, 2, 1, 1, 2, 1]  # what will not pass is not asked twice
        server.always = {}
        assert ask(by, asked, known) == [f"{colour(i)} prompt {i}" for i in range(6)]
        times = [sum(n for said, n in server.seen.items() if f"prompt {i}" in said) for i in range(6)]
        assert times == [1, 3, 2, 2, 3, 1]  # only what was missing is asked for again


def test_a_server_that_fails_all_along_ends_the_work():
    with (
        Server(always={"prompt": 500}).running() as address,
        pytest.raises(ModelError, match=f"failed {GIVE_UP} times in a row, at last with: status 500"),
    ):
        said(client(address, retries=0), questions(GIVE_UP + 5))


def test_who_may_not_ask_is_told_at_once():
    server = Server(always={"prompt": 401})
    with server.running() as address, pytest.raises(ModelError, match="Set OPENAI_API_KEY"):
        said(client(address, concurrency=1), questions(3))
    assert len(server.bodies) == 1


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ModelError, match=rf"No server answers at {address}.*usually ends in /v1"):
        client(address)
    with pytest.raises(ModelError, match="No server answers"):
        said(client(address, model="llava"), questions(1))
    with pytest.raises(ConfigError, match="is no address"):
        client("ftp://here/v1")


def test_the_model_has_to_be_named_where_there_are_several():
    with Server(models=("llava", "qwen")).running() as address:
        with pytest.raises(ModelError, match="has llava, qwen: say with --model"):
            client(address)
        assert client(address, model="qwen").model == "qwen"


def test_large_pictures_are_sent_smaller():
    server = Server()
    with server.running() as address:
        said(client(address), [Question("x", ImageRef(data=picture(0, (2 * LONGEST_SIDE, 64))))])
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert ImageRef(data=base64.b64decode(url.partition("base64,")[2])).size() == (LONGEST_SIDE, 32)
