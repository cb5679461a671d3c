# SPDX-License-Identifier: Apache-2.0
# fmt: off
"""Training data for a draft head: the target's own answers, by continuous batching on one GPU.

The target, a Llama without biases, writes user prompts and articles of its own, then answers these and the given:

    python tools/answer_on_gpu.py --target DIR --prompts prompts.jsonl --output answers.jsonl --minutes 6
"""

import argparse
import json
import random
import re
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

CHUNK = 16  # decode steps between two looks from the host
WINDOWS = (256, 384, 512, 640, 768, 896, 1024, 1280, 1536)
PREFILL_TOKENS = 32768
OWN_PROMPT_TOKENS, ARTICLE_TOKENS = 300, (250, 900)
OWN_SHARE_OF_TIME, GRACE_SECONDS = 0.3, 20
# No opening ends in a space: a lone space token would leave the model off its usual word starts.
OPENINGS = ("Write a Python function", "def", "from typing import List\n\n\ndef", "Who", "When", "What is",
    "where is", "Explain", "Give me", "Compare", "Write an email", "Imagine you are", "Translate", "Rewrite",
    "How many", "List", "How do I", "Why", "Write a short story about", "Summarize", "Write a SQL query", "Solve",
    "import numpy as np\n\n\ndef", "A store sells", "Describe", "who sang", "Create a", "What are the", "Find the")
REQUESTS = ("Summarize: ", "Summarize the following text:\n\n", "TL;DR ",
    "Summarize this article in three sentences.\n\n", "Give a short summary of this news story:\n\n",
    "What are the main points of this article?\n\n", "Please summarise:\n",
    "Write a headline and a summary for the following article.\n\n")
NEWS = ("(CNN) --", "LONDON (Reuters) -", "By . Associated Press .", "The mayor of the city said on Monday that",
    "A new study finds", "Manchester United", "Police are looking for", "The president", "WASHINGTON (AP) -",
    "Scientists have discovered", "Shares of", "A man has been charged with", "The Supreme Court ruled on Friday",
    "Chelsea manager", "By . Daily Mail Reporter .", "(CNN)The", "Researchers at the University of",
    "The prime minister has", "A woman who", "Firefighters were called to", "PARIS -", "Thousands of",
    "The company announced on Tuesday that it", "A former teacher", "The World Health Organization", "The family of a")
SENTENCE_END, SENTINEL = re.compile(r"[.!?][\"')\]]*(?=\s|$)"), "SENTINELCONTENT"


class Request(NamedTuple):
    key: str
    ids: list[int]
    max_new: int
    temperature: float = 0.0

class Model:
    """The weights of a Llama, and the parts of its forward pass that prefill and decode share."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default" or config.get("attention_bias") or config.get("mlp_bias"):
            raise SystemExit("only a plain Llama is known here: no rope scaling, no biases")
        files = sorted(folder.glob("*.safetensors"))
        weights = {name: tensor.to(device, dtype) for file in files for name, tensor in load_file(file).items()}
        self.heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps, self.hidden = config["rms_norm_eps"], config["hidden_size"]
        self.theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        self.device, self.dtype = device, dtype
        self.embed, self.norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        self.head = self.embed if config.get("tie_word_embeddings") else weights["lm_head.weight"]
        self.blocks = []
        for i in range(self.layers):
            start = f"model.layers.{i}."
            at = {k[len(start) :].removesuffix(".weight"): w for k, w in weights.items() if k.startswith(start)}
            qkv = torch.cat([at[f"self_attn.{x}_proj"] for x in "qkv"])
            gate_up = torch.cat([at["mlp.gate_proj"], at["mlp.up_proj"]])
            self.blocks.append((at["input_layernorm"], qkv, at["self_attn.o_proj"],
                                at["post_attention_layernorm"], gate_up, at["mlp.down_proj"]))

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, [length, 1, dim]: x*cos + roll(x, dim/2)*sin is the half-split rotation."""
        inverse = self.theta ** -(torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * inverse
        cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
        return tuple(x[:, None].to(self.device, self.dtype) for x in (cos, sin))

    def qkv(self, layer: int, x, cos, sin):
        """Rotated queries and keys, and values: [..., heads, dim] each."""
        norm, weight = self.blocks[layer][:2]
        y = F.linear(F.rms_norm(x, (self.hidden,), norm, self.eps), weight).unflatten(-1, (-1, self.dim))
        turned = y[..., : self.heads + self.kv_heads, :]
        turned = torch.addcmul(turned * cos, torch.roll(turned, self.dim // 2, -1), sin)
        return turned[..., : self.heads, :], turned[..., self.heads :, :], y[..., self.heads + self.kv_heads :, :]

    def rest(self, layer: int, x, attended):
        """The block after its attention."""
        _, _, out, norm, gate_up, down = self.blocks[layer]
        x = x + F.linear(attended, out)
        gate, up = F.linear(F.rms_norm(x, (self.hidden,), norm, self.eps), gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down)

def pick(logits, inverse_temperature, noisy):
    """Gumbel-max in float32: a draw from softmax(logits / T) where `noisy` is 1, the argmax where it is 0."""
    scores = logits.float() * inverse_temperature[:, None]
    noise = torch.empty_like(scores).exponential_().clamp_min_(3e-8).log_()
    return scores.addcmul_(noise, noisy[:, None], value=-1.0).argmax(-1)

class Engine:
    """`slots` sequences decode side by side on a static KV cache; a finished one makes room for the next."""

    def __init__(self, model: Model, slots: int, max_len: int, stop_ids: list[int], graphs: bool = False):
        self.model, self.slots, self.max_len, on = model, slots, max_len, model.device
        self.windows = [w for w in WINDOWS if w < max_len] + [max_len]
        shape = (model.layers, slots * model.kv_heads, max_len, model.dim)
        # Zeros, not empty: what is masked is multiplied by 0, and must be finite.
        self.keys, self.values = (torch.zeros(shape, dtype=model.dtype, device=on) for _ in range(2))
        self.cos, self.sin = model.rotary(max_len)
        self.token, self.length, self.remaining = (torch.zeros(slots, dtype=torch.long, device=on) for _ in range(3))
        self.inverse_temperature, self.noisy = torch.ones(slots, device=on), torch.zeros(slots, device=on)
        self.out = torch.zeros(CHUNK + 1, slots, dtype=torch.long, device=on)  # the last row: who is still live
        self.step, self.live = torch.zeros(1, dtype=torch.long, device=on), torch.zeros(slots, device=on) > 0
        self.rows, self.positions = (torch.arange(n, device=on) for n in (slots * model.kv_heads, max_len))
        self.stops = torch.tensor(sorted(stop_ids), device=on)
        self.held, self.graphs = {}, {}  # by slot: (request, its tokens); by window
        self.known = np.zeros(slots, dtype=np.int64)  # the host's copy of `length`
        if graphs:
            self._capture()

    @torch.no_grad()
    def _decode(self, window: int) -> None:
        """One step of every slot, all in place on static tensors: fit for a CUDA graph, no look from the host."""
        m, groups = self.model, self.model.heads // self.model.kv_heads
        cos, sin = self.cos.index_select(0, self.length), self.sin.index_select(0, self.length)
        at = self.length[:, None].expand(-1, m.kv_heads).reshape(-1)
        hidden = (self.positions[:window] > self.length[:, None])[:, None]  # [slots, 1, window]
        x = F.embedding(self.token, m.embed)
        for layer in range(m.layers):
            q, k, v = m.qkv(layer, x, cos, sin)
            keys, values = self.keys[layer], self.values[layer]
            keys.index_put_((self.rows, at), k.reshape(-1, m.dim))
            values.index_put_((self.rows, at), v.reshape(-1, m.dim))
            q = (q * m.dim**-0.5).reshape(-1, groups, m.dim)
            scores = torch.bmm(q, keys[:, :window].transpose(1, 2))
            scores.view(self.slots, -1, window).masked_fill_(hidden, float("-inf"))
            weights = torch.softmax(scores, -1)  # float32 inside, rounded once at its end
            x = m.rest(layer, x, torch.bmm(weights, values[:, :window]).reshape(self.slots, -1))
        logits = F.linear(F.rms_norm(x, (m.hidden,), m.norm, m.eps), m.head)
        new = pick(logits, self.inverse_temperature, self.noisy)
        self.out.index_copy_(0, self.step, new.masked_fill(~self.live, -1)[None])
        self.step.add_(1).remainder_(CHUNK)
        self.token.copy_(torch.where(self.live, new, self.token))
        self.length.add_(self.live)
        self.remaining.sub_(self.live.long())
        self.live.logical_and_((self.remaining > 0) & (new[:, None] != self.stops).all(-1))

    def _capture(self) -> None:
        """One graph a window, widest first so that the shared pool is big enough for the others."""
        try:
            stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            for window in reversed(self.windows):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):  # nothing is live: this only writes position 0 of each slot
                    self._decode(window)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self._decode(window)
                self.graphs[window] = graph
        except RuntimeError as error:
            print(f"warning: no CUDA graphs, every step is launched eagerly: {error!r}", flush=True)
            self.graphs = {}
        torch.cuda.synchronize()
        self.step.zero_()

    @torch.no_grad()
    def _prefill(self, slots: list[int], requests: list[Request]) -> None:
        """Keys and values of all but the last prompt token, which is left to the first decode step."""
        m, width = self.model, max(len(r.ids) - 1 for r in requests)
        width = min(max(16, -(-width // 16) * 16), self.max_len)
        padded = torch.tensor([r.ids[:-1] + [0] * (width - len(r.ids) + 1) for r in requests])
        x = F.embedding(padded.to(m.device), m.embed)
        where = torch.tensor(slots, device=m.device)
        cos, sin = self.cos[:width], self.sin[:width]
        for layer in range(m.layers):
            q, k, v = (y.transpose(1, 2) for y in m.qkv(layer, x, cos, sin))
            for cache, new in ((self.keys, k), (self.values, v)):
                cache[layer].unflatten(0, (self.slots, m.kv_heads))[:, :, :width].index_copy_(0, where, new)
            k, v = (y.repeat_interleave(m.heads // m.kv_heads, dim=1) for y in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = m.rest(layer, x, attended.transpose(1, 2).flatten(2))

    def _admit(self, waiting: deque[Request]) -> None:
        free = [slot for slot in range(self.slots) if slot not in self.held]
        taken = sorted((waiting.popleft() for _ in range(min(len(free), len(waiting)))), key=lambda r: len(r.ids))
        free, start = free[: len(taken)], 0
        for end in range(1, len(taken) + 1):
            longest = 0 if end == len(taken) else len(taken[end].ids)
            full = (end + 1 - start) * (longest + 16) > PREFILL_TOKENS or longest > 2 * len(taken[start].ids) + 64
            if full or end == len(taken):
                self._prefill(free[start:end], taken[start:end])
                start = end
        limits = [min(r.max_new, self.max_len - len(r.ids)) for r in taken]
        where, heat = torch.tensor(free, device=self.model.device), [r.temperature for r in taken]
        for state, new in ((self.token, [r.ids[-1] for r in taken]), (self.length, [len(r.ids) - 1 for r in taken]),
                           (self.remaining, limits), (self.noisy, [float(t > 0) for t in heat]),
                           (self.inverse_temperature, [1 / t if t else 1.0 for t in heat])):
            state.index_copy_(0, where, torch.tensor(new, dtype=state.dtype).to(self.model.device))
        self.live.index_fill_(0, where, True)
        for slot, request in zip(free, taken, strict=True):
            self.held[slot], self.known[slot] = (request, []), len(request.ids) - 1

    def _harvest(self, finish) -> int:
        fetched = self.out.cpu().numpy()
        counts, columns = (fetched[:CHUNK] >= 0).sum(0), fetched[:CHUNK].T.tolist()
        for slot in list(self.held):
            request, tokens = self.held[slot]
            tokens.extend(columns[slot][: counts[slot]])
            if not fetched[CHUNK, slot]:
                del self.held[slot]
                finish(request, tokens, True)
        self.known += counts
        return int(counts.sum())

    @torch.no_grad()
    def run(self, requests, finish, admit_until: float, drop_at: float, tick=lambda tokens, waiting: None) -> None:
        """Answer `requests` in their order; `finish(request, tokens, done)` gets each, done=False if cut short."""
        waiting = deque(r for r in requests if 0 < len(r.ids) < self.max_len and r.max_new > 0)
        while True:
            if waiting and len(self.held) < self.slots and time.monotonic() < admit_until:
                self._admit(waiting)
            if not self.held or time.monotonic() >= drop_at:
                break
            need = min(int(self.known[list(self.held)].max()) + CHUNK, self.max_len)
            window = next(w for w in self.windows if w >= need)
            for _ in range(CHUNK):
                self.graphs[window].replay() if window in self.graphs else self._decode(window)
            self.out[CHUNK].copy_(self.live)
            tick(self._harvest(finish), len(waiting))
        for request, tokens in self.held.values():
            finish(request, tokens, False)
        self.held.clear()
        self.live.zero_()

class Chat:
    """Texts to prompt ids and back, by the target's tokenizer and chat template."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prefix, suffix = self.render(SENTINEL).split(SENTINEL)
        self.special = set(self.tokenizer.all_special_ids)
        ends = self.encode([suffix])[0][:1]
        generation = folder / "generation_config.json"
        found = [json.loads(file.read_text()) for file in (generation, folder / "config.json") if file.exists()]
        eos = next(x["eos_token_id"] for x in found if x.get("eos_token_id") is not None)
        self.stops = set(eos if isinstance(eos, list) else [eos]) | (set(ends) & self.special)

    def render(self, text: str) -> str:
        turn = {"role": "user", "content": text}
        return self.tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def body(self, ids: list[int]) -> str | None:
        """The text before the stop; None where another special token is in it."""
        ids = ids[:-1] if ids and ids[-1] in self.stops else ids
        return None if self.special & set(ids) else self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

class Progress:
    def __init__(self, start: float):
        self.start, self.phase, self.answers, self.tokens = start, "own", 0, 0
        self.shown, self.since = time.monotonic(), 0

    def tick(self, tokens: int, waiting: int, force: bool = False) -> None:
        self.tokens, self.since, now = self.tokens + tokens, self.since + tokens, time.monotonic()
        if now - self.shown >= 10 or force:
            speed = self.since / max(now - self.shown, 1e-6)
            print(f"{now - self.start:6.0f} s  {self.phase:7}  {speed:9,.0f} tokens/s  {self.answers:,} answers  "
                  f"{self.tokens:,} tokens  {waiting:,} waiting", flush=True)
            self.shown, self.since = now, 0

def own_texts(engine: Engine, chat: Chat, args, seen: set[str], until: float, tick) -> list[tuple[str, str]]:
    """User prompts and articles that the target writes itself: [(id, text)]."""
    dice = random.Random(args.seed)
    openings = [OPENINGS[i // 3 % len(OPENINGS)] if i % 3 == 0 else "" for i in range(args.own_prompts)]
    starts = [dice.choice(REQUESTS) + dice.choice(NEWS) for _ in range(args.own_articles)]
    lengths = sorted((dice.randint(*ARTICLE_TOKENS) for _ in starts), reverse=True)  # the short ones end it
    texts = {f"own/{i}": text for i, text in enumerate(openings)}
    texts |= {f"article/{i}": text for i, text in enumerate(starts)}
    ids = chat.encode([chat.prefix + text for text in texts.values()])
    limits = [(OWN_PROMPT_TOKENS, 1.0)] * len(openings) + [(n, 0.9) for n in lengths]
    requests = [Request(key, x, *limit) for key, x, limit in zip(texts, ids, limits, strict=True)]
    found = []

    def finish(request: Request, tokens: list[int], done: bool) -> None:
        body = chat.body(tokens)
        text = "" if body is None else (texts[request.key] + body).strip()
        if request.key.startswith("own/"):
            good = done and tokens[-1] in chat.stops and len(text.split()) >= 3
        else:
            ends = [match.end() for match in SENTENCE_END.finditer(text)]
            text = text[: ends[-1]] if ends else ""
            good = len(text.split()) >= 40
        if good and text not in seen:
            seen.add(text)
            found.append((request.key, text))

    engine.run(requests, finish, until, until, tick)
    return found

def answer_order(greedy: list[Request], args) -> list[Request]:
    """A random order, in waves sorted by length up and down by turns: small windows, and a fair mix at any end."""
    dice = random.Random(args.seed + 1)
    dice.shuffle(greedy)
    again = [Request(r.key + "#s", r.ids, r.max_new, 1.0) for r in greedy if dice.random() < args.sampled_share]
    dice.shuffle(again)
    size, ordered, everything = 6 * args.slots, [], greedy + again
    for wave, start in enumerate(range(0, len(everything), size)):
        ordered += sorted(everything[start : start + size], key=lambda r: len(r.ids), reverse=wave % 2 == 1)
    return ordered

def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", type=Path, required=True, help="folder of the target model (Llama architecture)")
    add("--prompts", type=Path, required=True, help="JSON lines with `id` and `prompt` or `turns` (the first is used)")
    add("--output", type=Path, required=True, help="JSON lines written: id, p (prompt ids), o (answer ids), t")
    add("--minutes", type=float, required=True, help="time until no new request is admitted, loading included")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where to run (default: cuda)")
    add("--slots", type=int, default=1024, help="sequences decoded side by side (default: 1024)")
    add("--max-tokens", type=int, default=448, help="longest answer in tokens (default: 448)")
    add("--max-prompt", type=int, default=1300, help="longer prompts, in tokens, are skipped (default: 1300)")
    add("--own-prompts", type=int, default=12000, help="user prompts for the target to write (default: 12000)")
    add("--own-articles", type=int, default=4000, help="articles for the target to write (default: 4000)")
    add("--sampled-share", type=float, default=0.35, help="share also answered at temperature 1 (default: 0.35)")
    add("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    add("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    return parser.parse_args(argv)

def main(argv=None) -> None:
    args, begun = parse_args(argv), time.monotonic()
    torch.manual_seed(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    chat = Chat(args.target)
    with args.prompts.open(encoding="utf-8") as file:  # str.splitlines would also split inside texts
        lines = [json.loads(line) for line in file if line.strip()]
    given = [(str(x["id"]), x["prompt"] if "prompt" in x else x["turns"][0]) for x in lines]
    given_ids = chat.encode([chat.render(text) for _, text in given])
    model = Model(args.target, args.device, getattr(torch, args.dtype))
    max_len = -(-(args.max_prompt + args.max_tokens) // 64) * 64
    engine = Engine(model, args.slots, max_len, sorted(chat.stops), graphs=args.device == "cuda")
    size = 2 * engine.keys.numel() * engine.keys.element_size() / 1e9
    print(f"{time.monotonic() - begun:.1f} s to start: {len(given):,} prompts, {args.slots} slots of {max_len} tokens, "
          f"KV cache {size:.1f} GB, {len(engine.graphs)} graphs, stops {sorted(chat.stops)}", flush=True)
    progress, end = Progress(begun), begun + args.minutes * 60
    until = time.monotonic() + OWN_SHARE_OF_TIME * max(0.0, end - time.monotonic())
    own = own_texts(engine, chat, args, {text for _, text in given}, until, progress.tick)
    own_ids = chat.encode([chat.render(text) for _, text in own])
    progress.tick(0, 0, force=True)
    keys = [key for key, _ in given + own]
    articles = sum(key.startswith("article/") for key, _ in own)
    kept = [Request(key, ids, args.max_tokens) for key, ids in zip(keys, given_ids + own_ids, strict=True)
            if len(ids) <= args.max_prompt]
    print(f"{len(own) - articles:,} own prompts, {articles:,} articles; {len(keys) - len(kept):,} prompts are too long",
          flush=True)
    progress.phase = "answers"
    with args.output.open("w") as output:
        def finish(request: Request, tokens: list[int], done: bool) -> None:
            if done:
                line = {"id": request.key, "p": request.ids, "o": tokens, "t": request.temperature}
                print(json.dumps(line, separators=(",", ":")), file=output, flush=True)
                progress.answers += 1

        engine.run(answer_order(kept, args), finish, end, end + GRACE_SECONDS, progress.tick)
    progress.tick(0, 0, force=True)

if __name__ == "__main__":
    main()
