"""A small server that speaks OpenAI's protocol and misbehaves as it is told."""

import base64
import io
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class Server:
    """Answer with the mean colour of the picture and the last line of the question, after `faults` of its calls.

    faults: what goes wrong at the first calls, one a call: a status, "cut" (half a body), "empty", "slow", "close".
    always: what goes wrong for questions that contain a text.
    """

    def __init__(self, faults=(), always=None, models=("llava",)):
        self.faults, self.always, self.models = list(faults), always or {}, models
        self.bodies, self.keys, self.seen = [], [], Counter()
        self.at_once, self.most_at_once, self._lock = 0, 0, threading.Lock()

    @contextmanager
    def running(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.reply(200, json.dumps({"data": [{"id": name} for name in server.models]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    server.bodies.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                    fault = server.faults.pop(0) if server.faults else None
                try:
                    self.answer(body, fault)
                finally:
                    with server._lock:
                        server.at_once -= 1

            def answer(self, body, fault):
                said = server.say(body)
                fault = next((wrong for text, wrong in server.always.items() if text in said), fault)
                whole = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]})
                if isinstance(fault, int):
                    self.reply(fault, json.dumps({"error": {"message": "not now"}}))
                elif fault == "close":
                    self.connection.close()
                elif fault == "cut":
                    self.reply(200, whole[: len(whole) // 2])
                elif fault == "empty":
                    self.reply(200, json.dumps({"choices": [{"message": {"content": " \n"}}]}))
                else:
                    time.sleep(1.0 if fault == "slow" else 0.02)
                    self.reply(200, whole)

            def reply(self, status, text):
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:  # the client has not waited
                    pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
            http.daemon_threads = True
            threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
            try:
                yield f"http://127.0.0.1:{http.server_port}/v1"
            finally:
                http.shutdown()

    def say(self, body):
        [message] = body["messages"]
        text = message["content"][-1]["text"].splitlines()[-1]
        pictures = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
        colours = []
        for url in pictures:
            image = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
            colours.append("-".join(map(str, image.resize((1, 1)).getpixel((0, 0)))))
        said = " ".join([*colours, text])
        with self._lock:
            self.seen[said] += 1
        return said
