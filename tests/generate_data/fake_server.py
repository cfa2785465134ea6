"""Stands in for the servers that answer: python -m tests.generate_data.fake_server KIND MODEL PORT [LOG]

KIND is sglang, completions (ids if asked for), logprobs (older vLLM), or chat, which refuses everything else.  The
answer to a prompt of ids is ``answer_to``; to messages, their number in words.  FAKE says what goes wrong:
``die_at:N`` at the N-th question, ``garbage`` and ``status:CODE`` and ``hang`` for as long as the file FAKE_WHILE
exists (or always), likewise ``get:CODE`` to all that is no question and ``drop`` of connections, ``refuse`` of prompts
with the id 77, ``token:X`` to be carried, ``slow:S`` seconds an answer, ``cut:REASONING`` of a chat that says
nothing else.  FAKE_PATH is where its model was loaded from.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BEHAVIOUR, _, ARGUMENT = os.environ.get("FAKE", "").partition(":")
STOP = 1


def answer_to(prompt, limit):
    """Letters, then the stop token."""
    length = len(prompt) % 5 + 3
    return [*(70 + (sum(prompt) + i) % 20 for i in range(length)), STOP][:limit]


def wrong_now():
    trouble = os.environ.get("FAKE_WHILE")
    return trouble is None or Path(trouble).exists()


class Handler(BaseHTTPRequestHandler):
    asked = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        if not self._admitted():
            return
        if BEHAVIOUR == "get" and wrong_now():
            self._send(int(ARGUMENT), {"error": "no"})
        elif self.path == "/v1/models":
            self._send(200, {"data": [{"id": MODEL, "max_model_len": 200}]})
        elif self.path == "/model_info" and KIND == "sglang":
            self._send(200, {"model_path": os.environ.get("FAKE_PATH", MODEL)})
        else:
            self._send(404, {"error": "Not Found"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            return
        if len(sys.argv) > 4:
            with open(sys.argv[4], "a") as log:
                log.write(json.dumps([self.path, asked]) + "\n")
        Handler.asked += 1
        if BEHAVIOUR == "die_at" and Handler.asked == int(ARGUMENT):
            os._exit(3)
        if BEHAVIOUR == "slow":
            time.sleep(float(ARGUMENT))
        if BEHAVIOUR == "drop" and wrong_now():
            self.close_connection = True
        elif BEHAVIOUR == "status" and wrong_now():
            self._send(int(ARGUMENT), {"error": "no"})
        elif BEHAVIOUR == "garbage" and wrong_now():
            self._send(200, {"output_ids": ["x"], "choices": "?"})
        elif BEHAVIOUR == "refuse" and 77 in asked.get("input_ids", []):
            self._send(400, {"error": "no such thing"})
        else:
            self._answer(asked)

    def _answer(self, asked):
        if KIND == "sglang" and self.path == "/generate":
            ids = answer_to(asked["input_ids"], asked["sampling_params"]["max_new_tokens"])
            end = {"type": "stop" if ids[-1] == STOP else "length"}
            self._send(200, {"text": "?", "output_ids": ids, "meta_info": {"finish_reason": end}})
        elif KIND in ("completions", "logprobs") and self.path == "/v1/completions":
            ids = answer_to(asked["prompt"], asked["max_tokens"])
            choice = {"text": "?", "finish_reason": "stop" if ids[-1] == STOP else "length"}
            if KIND == "completions" and asked.get("return_token_ids"):
                choice["token_ids"] = ids
            if KIND == "logprobs" and asked.get("return_tokens_as_token_ids"):
                choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids]}
            self._send(200, {"choices": [choice]})
        elif KIND == "chat" and self.path == "/v1/chat/completions":
            message = {"role": "assistant", "content": f"answer {len(asked['messages'])}", "refusal": None}
            end = "stop"
            if BEHAVIOUR == "cut":
                message, end = {"role": "assistant", "content": None, "reasoning_content": ARGUMENT or None}, "length"
            self._send(200, {"choices": [{"message": message, "finish_reason": end}]})
        else:
            self._send(404, {"error": "Not Found"})

    def _admitted(self):
        if BEHAVIOUR == "token" and self.headers.get("Authorization") != f"Bearer {ARGUMENT}":
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
