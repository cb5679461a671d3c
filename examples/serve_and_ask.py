# SPDX-License-Identifier: Apache-2.0
"""A server with draft trees and the openai client: starts `vllm serve`, asks it, ends it.

    python examples/serve_and_ask.py

You see the command, one streamed answer, and how many tokens were drafted, verified and accepted. In a terminal of its
own that command is all that serving needs. Activate `.venv` first: `vllm` is looked up in PATH.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import time
import urllib.request

from openai import APIConnectionError, OpenAI

from heterospec_vllm.config import BUILTIN_HEAD
from heterospec_vllm.demo.model_cache import demo_target

URL = "http://127.0.0.1:8123"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="folder or hub id; default: the demo model")
    parser.add_argument("--head", default=BUILTIN_HEAD, help="its EAGLE-3 head: folder or hub id")
    args = parser.parse_args()
    model = args.model or demo_target()
    config = json.dumps({"method": "heterospec", "model": args.head})  # or the path of such a file
    command = ["vllm", "serve", model, "--port", "8123", "--speculative-config", config]
    print(shlex.join(command))
    server = subprocess.Popen(command, env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ})
    client = OpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0)
    try:
        _wait(client, server)
        question = [{"role": "user", "content": "Why is the sky blue?"}]
        ask = client.chat.completions.create
        for chunk in ask(model=model, messages=question, temperature=0.0, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        metrics = urllib.request.urlopen(f"{URL}/metrics").read().decode()
        print("", *re.findall("^heterospec_.*ed_nodes_total .*", metrics, re.M), sep="\n")
    finally:
        server.terminate()


def _wait(client: OpenAI, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            return print(f"serving {client.models.list().data[0].id}")
        except APIConnectionError:
            time.sleep(1)


if __name__ == "__main__":
    main()
