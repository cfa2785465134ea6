"""A fake ``sglang.launch_server``: the answers, verifications and failures of a server whose sums are known.

The answer to L prompt ids is L % 5 + 6 tokens "a0 a1 …".  Without --speculative-algorithm one token comes at a time;
with it the prefill gives one and each verification three, two of them drafts.  FAKE_SGLANG selects a failure: ``die``
at once, ``die_at:N`` at the N-th question (once, while the file FAKE_ONCE is missing), ``token:X`` requires that token,
``info`` makes /server_info an error, ``pool:N`` aborts longer prompts as the scheduler of 0.5.23 does, ``plain`` never
verifies anything.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BEHAVIOUR, _, ARGUMENT = os.environ.get("FAKE_SGLANG", "serve").partition(":")
CONTEXT = 200
PER_VERIFICATION, ACCEPTED = 3, 2


def flag(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def answer_tokens(length):
    return length % 5 + 6


def arrivals(length, speculates):
    """(tokens so far, verifications so far) of each chunk."""
    total, tokens, verifications = answer_tokens(length), 1, 0
    yield tokens, verifications
    while tokens < total:
        tokens = min(tokens + (PER_VERIFICATION if speculates else 1), total)
        verifications += 1 if speculates else 0
        yield tokens, verifications


class Handler(BaseHTTPRequestHandler):
    num_requests = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/health":
            self._send(200, {})
        elif BEHAVIOUR == "info":
            self._send(500, {"error": "Internal Server Error"})
        elif self._admitted():
            named = ("--speculative-algorithm", "--speculative-draft-model-path", "--dtype")
            counted = ("--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens")
            settings = {name: flag(name) for name in named} | {name: int(flag(name, 0)) for name in counted}
            info = {name.strip("-").replace("-", "_"): value for name, value in settings.items()}
            model = flag("--model-path")
            self._send(200, {"version": "0.5.23", "model_path": model, "tokenizer_path": model, **info})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._admitted():
            return
        if self.path == "/flush_cache":
            self._send(200, {})
        else:
            self._generate(json.loads(body))

    def _admitted(self):
        if BEHAVIOUR == "token" and self.headers.get("Authorization") != f"Bearer {ARGUMENT}":
            self._send(401, {"error": "Unauthorized"})
            return False
        return True

    def _generate(self, body):
        Handler.num_requests += 1
        once = Path(os.environ.get("FAKE_ONCE", os.devnull))
        if (
            BEHAVIOUR == "die_at"
            and Handler.num_requests == int(ARGUMENT)
            and (once.name == "null" or not once.exists())
        ):
            once.touch()
            print("CUDA error: an illegal memory access", flush=True)
            os._exit(3)
        length, speculates = len(body["input_ids"]), flag("--speculative-algorithm") is not None
        if length > CONTEXT:
            self._send(400, {"error": {"message": f"{length} tokens are longer than the context"}})
            return
        self.send_response(200)
        self.end_headers()
        if BEHAVIOUR == "pool" and length > int(ARGUMENT):
            reason = {"type": "abort", "status_code": 400, "message": f"{length} tokens exceed the pool"}
            info = {"completion_tokens": 0, "prompt_tokens": length, "finish_reason": reason}
            self.wfile.write(b"data: " + json.dumps({"text": "", "meta_info": info}).encode() + b"\n\ndata: [DONE]\n\n")
            return
        for tokens, verifications in arrivals(length, speculates):
            info = {"completion_tokens": tokens, "prompt_tokens": length, "finish_reason": None}
            if verifications and BEHAVIOUR != "plain":
                info |= {"spec_verify_ct": verifications, "spec_correct_drafts_histogram": [0, 0, verifications]}
            if tokens == answer_tokens(length):
                info["finish_reason"] = {"type": "stop"}
            text = " ".join(f"a{i}" for i in range(tokens))
            self.wfile.write(b"data: " + json.dumps({"text": text, "meta_info": info}).encode() + b"\n\n")
            self.wfile.flush()
            time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    print("fake SGLang:", *sys.argv[1:], flush=True)
    if BEHAVIOUR == "die":
        print("CUDA error: out of memory", flush=True)
        sys.exit(7)
    ThreadingHTTPServer((flag("--host"), int(flag("--port"))), Handler).serve_forever()
