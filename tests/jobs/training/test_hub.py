"""`train.push_to_hub` against a server on this machine that speaks the hub's part: asked first, uploaded last."""

import base64
import json
import shlex
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants
from rich.console import Console

from diffalign import config as configuration
from diffalign.errors import ConfigError
from diffalign.jobs.training import hub

KEPT_HERE = ("config.yaml", "environment.json", "metrics.jsonl", "checkpoint-2/optimizer.pt", "diffalign/events.out")
SENT = {
    "README.md": b"---\n---\n# dpo",
    "pytorch_lora_weights.safetensors": bytes(range(256)) * 20,
    "kohya/dpo.safetensors": b"kohya",
    "validation/step-000002.png": b"png",
}


class Hub(ThreadingHTTPServer):
    """Remember who asked for what, and the files of every repository."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.role, self.broken, self.created, self.files, self.messages = "write", False, [], {}, []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path != "/api/whoami-v2":
            return self.answer({"error": "not found"}, 404)
        if self.headers["Authorization"] != "Bearer hf_good":
            return self.answer({"error": "Invalid username or password."}, 401)
        return self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": self.server.role}}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.broken:
            return self.answer({"error": "out of order"}, 400)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.address}/me/dpo"})
        if self.path == "/api/validate-yaml":  # the front matter of model cards
            return self.answer({"errors": [], "warnings": []})
        repo, action = self.path.removeprefix("/api/models/").removesuffix("/main").rsplit("/", 1)
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in
                     json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        assert action == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = f"{repo}/{line['value']['path']}"
                self.server.files[path] = base64.b64decode(line["value"]["content"])
            else:
                self.server.messages.append(line["value"]["summary"])
        return self.answer({"commitUrl": f"{self.server.address}/{repo}/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a finished run."""
    run = tmp_path / "dpo"
    for name, content in {**dict.fromkeys(KEPT_HERE, b"private"), **SENT}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    return run


def config(folder, **train):
    return configuration.check(
        {
            "model": {"pretrained_model_name_or_path": "some/base"},
            "data": {"train_data_dir": "pairs"},
            "objective": {"name": "dpo"},
            "train": {"output_dir": str(folder), "push_to_hub": True, "max_train_steps": 7, **train},
        }
    )


def test_the_result_is_uploaded_and_nothing_else(server, folder, capsys):
    wanted = config(folder, hub_private=True)
    repo = hub.check(wanted)
    assert repo == "me/dpo"
    assert not server.created  # before training nothing is made
    assert hub.push(wanted, repo, Console())
    assert server.files == {f"me/dpo/{name}": content for name, content in SENT.items()}
    (made,) = server.created
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "dpo", "private")
    assert server.messages == ["dpo, 7 steps"]
    assert f"Uploaded: {server.address}/me/dpo" in capsys.readouterr().out


def test_a_repository_may_be_named(server, folder):
    assert hub.check(config(folder, hub_model_id="sdxl-dpo")) == "me/sdxl-dpo"
    assert hub.check(config(folder, hub_model_id="team/sdxl-dpo")) == "team/sdxl-dpo"
    with pytest.raises(ConfigError, match=r'train\.hub_model_id: "me/a b" is no name for a repository'):
        hub.check(config(folder, hub_model_id="me/a b"))


def test_off_by_default(folder):
    assert hub.check(config(folder, push_to_hub=False)) is None
    assert not configuration.Config.model_fields["train"].default.push_to_hub


def test_who_may_not_write_is_told_before_training(server, folder, monkeypatch):
    server.role = "read"
    with pytest.raises(ConfigError, match=r"may only read.*hf auth login"):
        hub.check(config(folder))
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(ConfigError, match=r"does not know who you are.*hf auth login.*HF_TOKEN"):
        hub.check(config(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        hub.check(config(folder))


def test_a_failed_upload_says_how_to_repeat_it(server, folder, capsys):
    server.broken = True
    assert not hub.push(config(folder), "me/dpo", Console())
    said = capsys.readouterr().out
    assert "Not uploaded to me/dpo" in said
    assert "out of order" in said
    program, *words = shlex.split(said.splitlines()[-1])
    assert program == "hf"
    server.broken = False
    from huggingface_hub.cli.hf import app

    app.main(words, standalone_mode=False)  # the command that was printed
    assert server.files == {f"me/dpo/{name}": content for name, content in SENT.items()}


def test_a_token_has_no_place_in_a_configuration(folder):
    with pytest.raises(ConfigError, match=r'Unknown key "train\.hub_token"'):
        config(folder, hub_token="hf_secret")
