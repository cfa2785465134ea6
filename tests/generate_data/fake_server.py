"""Fake of the servers that generate answers: python -m tests.generate_data.fake_server KIND MODEL PORT [LOG]

KIND is sglang, completions (ids on request) or chat; other routes are refused.  The answer to a
prompt of ids is ``answer_to``; to messages, a text with their number.  FAKE selects a fault: ``die_at:N`` exits at the
N-th prompt; ``garbage``, ``status:CODE``, ``drop`` (closes the connection) and ``get:CODE`` (for all other requests)
apply while the file FAKE_WHILE exists, or always; ``no_models:CODE`` lists no model;
``refuse`` rejects prompts with the id 77; ``token:X`` requires that token; ``slow:S`` delays each answer;
``cut:REASONING`` returns a truncated answer of reasoning only.  FAKE_PATH is the model path.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BEHAVIOR, _, ARGUMENT = os.environ.get("FAKE", "").partition(":")
STOP = 1


def answer_to(prompt, limit):
    """Letters, then the stop token."""
    length = len(prompt) % 5 + 3
    return [*(70 + (sum(prompt) + i) % 20 for i in range(length)), STOP][:limit]


def is_failing():
    trouble = os.environ.get("FAKE_WHILE")
    return trouble is None or Path(trouble).exists()


class Handler(BaseHTTPRequestHandler):
    num_requests = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        if not self._admitted():
            return
        if BEHAVIOR == "get" and is_failing():
            self._send(int(ARGUMENT), {"error": "no"})
        elif self.path == "/v1/models" and BEHAVIOR == "no_models":
            self._send(int(ARGUMENT), {"data": []})
        elif self.path == "/v1/models":
            self._send(200, {"data": [{"id": MODEL, "max_model_len": 200}]})
        elif self.path == "/model_info" and KIND == "sglang":
            self._send(200, {"model_path": os.environ.get("FAKE_PATH", MODEL)})
        else:
            self._send(404, {"error": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            return
        if len(sys.argv) > 4:
            with open(sys.argv[4], "a") as log:
                log.write(json.dumps([self.path, body]) + "\n")
        Handler.num_requests += 1
        if BEHAVIOR == "die_at" and Handler.num_requests == int(ARGUMENT):
            os._exit(3)
        if BEHAVIOR == "slow":
            time.sleep(float(ARGUMENT))
        if BEHAVIOR == "drop" and is_failing():
            self.close_connection = True
        elif BEHAVIOR == "status" and is_failing():
            self._send(int(ARGUMENT), {"error": "no"})
        elif BEHAVIOR == "garbage" and is_failing():
            self._send(200, {"output_ids": ["x"], "choices": "?"})
        elif BEHAVIOR == "refuse" and 77 in body.get("input_ids", []):
            self._send(400, {"error": "no such thing"})
        else:
            self._answer(body)

    def _answer(self, body):
        if KIND == "sglang" and self.path == "/generate":
            ids = answer_to(body["input_ids"], body["sampling_params"]["max_new_tokens"])
            end = {"type": "stop" if ids[-1] == STOP else "length"}
            self._send(200, {"text": "?", "output_ids": ids, "meta_info": {"finish_reason": end}})
        elif KIND == "completions" and self.path == "/v1/completions":
            ids = answer_to(body["prompt"], body["max_tokens"])
            choice = {"text": "?", "finish_reason": "stop" if ids[-1] == STOP else "length"}
            if body.get("return_token_ids"):
                choice["token_ids"] = ids
            self._send(200, {"choices": [choice]})
        elif KIND == "chat" and self.path == "/v1/chat/completions":
            message = {"role": "assistant", "content": f"answer {len(body['messages'])}", "refusal": None}
            end = "stop"
            if BEHAVIOR == "cut":
                message, end = {"role": "assistant", "content": None, "reasoning_content": ARGUMENT or None}, "length"
            self._send(200, {"choices": [{"message": message, "finish_reason": end}]})
        else:
            self._send(404, {"error": "Not Found"})

    def _admitted(self):
        if BEHAVIOR == "token" and self.headers.get("Authorization") != f"Bearer {ARGUMENT}":
            self._send(401, {"error": "Unauthorized"})
            return False
        return True

    def _send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    KIND, MODEL = sys.argv[1:3]
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()
