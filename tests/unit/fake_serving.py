# SPDX-License-Identifier: Apache-2.0
"""Scripts that stand in for `vllm serve` and `vllm bench serve`: the target's name says what the server counts, the
variable FAKE_CLIENT what befalls the client."""

SERVER = '''
import json, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, target = int(sys.argv[sys.argv.index("--port") + 1]), sys.argv[2]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if target == "dies":
    print("ValueError: no such model", flush=True)
    sys.exit(3)
answered = busy = most = 0
lock = threading.Lock()
METRICS = {
    "plain": "",
    "ours": """
# TYPE heterospec_steps counter
heterospec_steps_total {steps}
# TYPE heterospec_verified_trees counter
heterospec_verified_trees_total {steps}
# TYPE heterospec_step_seconds counter
heterospec_step_seconds_total{{part="draft"}} {half}
heterospec_step_seconds_total{{part="target"}} {steps}
# TYPE heterospec_budget_nodes gauge
heterospec_budget_nodes 7
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{{engine="0"}} {steps}
""",
    "drafter": """
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{{engine="0"}} {steps}
vllm:spec_decode_num_drafts_total{{engine="1"}} {steps}
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {steps}
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {half}
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {half}
""",
}
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())
    def do_GET(self):
        steps = 100 + answered
        text = METRICS[target].format(steps=steps, half=steps / 2)
        self.answer(200, text if self.path == "/metrics" else str(most))
    def do_POST(self):
        global answered, busy, most
        if self.path == "/die":
            print("EngineDeadError: out of memory", flush=True)
            os._exit(7)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            answered, busy = answered + 1, busy + 1
            most = max(most, busy)
        time.sleep(0.05)
        with lock:
            busy -= 1
        if self.path == "/v1/completions":
            chosen = {"5": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -1.5, "rank": 2}}
            logprobs = [None, *[chosen] * (len(body["prompt"]) - 1)]
            self.answer(200, json.dumps({"choices": [{"prompt_logprobs": logprobs}]}))
        elif body["messages"][0]["content"] == "too long":
            self.answer(400, json.dumps({"error": {"message": "maximum context length"}}))
        else:
            wanted = [("temperature", 0.0), ("ignore_eos", True), ("return_token_ids", True)]
            assert all(body[name] == value for name, value in wanted) and body["model"] == target
            length = len(body["messages"][0]["content"])
            choice = {"token_ids": [length] * body["max_tokens"]}
            self.answer(200, json.dumps({"choices": [choice]}))
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''

# What it writes has the keys that vLLM's client writes.
CLIENT = """
import json, os, sys, time, urllib.request
from pathlib import Path
arguments, flags, name = {}, [], None
for word in sys.argv[1:]:
    if word.startswith("--"):
        name = word[2:]
        arguments[name] = []
    else:
        arguments[name].append(word)
one = lambda name: arguments[name][0]
mode = os.environ["FAKE_CLIENT"]
if mode == "hangs":
    print("client", os.getpid(), flush=True)
    time.sleep(600)
if mode == "refuses":
    print("ValueError: Invalid metric name found", flush=True)
    sys.exit(1)
def post(path, body):
    request = urllib.request.Request(one("base-url") + path, json.dumps(body).encode())
    try:
        urllib.request.urlopen(request).read()
    except OSError:
        if mode != "server dies":
            raise
if mode == "server dies":
    post("/die", {})
    sys.exit(1)
prompts = [json.loads(x)["prompt"] for x in Path(one("dataset-path")).read_text().splitlines()]
for prompt in prompts:
    post("/v1/completions", {"prompt": prompt})
count, length = len(prompts), int(one("output-len"))
failed = 2 if mode == "requests fail" else 0
short = 1 if mode == "short" else 0
result = {
    "duration": 2.0,
    "completed": count - failed,
    "failed": failed,
    "total_output_tokens": (count - failed) * length - short,
    "request_throughput": (count - failed) / 2,
    "request_goodput": 1.25 if "goodput" in arguments else None,
    "output_lens": [length] * count,
    "ttfts": [0.1] * count,
    "latencies": [0.5] * count,
    "queue_times": [0.2] * count,
    "errors": ["Traceback:\\n  ...\\nServerDisconnectedError\\n" if i < failed else "" for i in range(count)],
    "prompts": prompts,
    "arguments": arguments,
    "proxies": [name for name in os.environ if name.lower().endswith("_proxy")],
    "order": ["ttft", "tpot", "itl", "e2el"],
}
for number, name in enumerate(result["order"], 1):
    result[f"p50_{name}_ms"], result[f"p99_{name}_ms"] = number * 10.0, number * 11.0
if mode == "other version":
    del result["p99_itl_ms"]
(Path(one("result-dir")) / one("result-filename")).write_text(json.dumps(result))
"""
