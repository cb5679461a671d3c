# SPDX-License-Identifier: Apache-2.0
"""What the head has seen of each request: against a model that holds every token in a list."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterospec_vllm.draft.accepted_tokens import AcceptedTokens, slots_of, split_last
from heterospec_vllm.draft.progress import HeadProgress

BLOCK = 4
WIDTH = 3  # of the aux hidden states
TOKEN_BYTES = WIDTH * 4


def token_of(name: str, position: int) -> int:
    return 1000 * int(name[1:]) + position


def feature_of(name: str, position: int) -> list[float]:
    return [token_of(name, position) + 0.25 * i for i in range(WIDTH)]


def step_of(parts: dict[str, tuple[int, int, list[int]]]) -> AcceptedTokens:
    """A step over some requests: position of the first token, number of tokens, blocks."""
    places = [(name, first + i) for name, (first, n, _) in parts.items() for i in range(n)]
    most = max(len(blocks) for _, _, blocks in parts.values())
    return AcceptedTokens(
        token_ids=torch.tensor([token_of(*place) for place in places]),
        positions=torch.tensor([position for _, position in places]),
        features=torch.tensor([feature_of(*place) for place in places]),
        num_tokens=np.array([n for _, n, _ in parts.values()]),
        next_token_ids=torch.tensor(
            [token_of(name, first + n) for name, (first, n, _) in parts.items()],
            dtype=torch.int32,
        ),
        block_table=torch.tensor(
            [blocks + [0] * (most - len(blocks)) for _, _, blocks in parts.values()],
            dtype=torch.int32,
        ),
        context_starts=np.zeros(len(parts), dtype=np.int64),
    )


def advance(
    progress: HeadProgress,
    parts: dict[str, tuple[int, int, list[int]]],
    feed: str = "",
    forget: str = "",
) -> dict[str, list[int]] | None:
    """One step; the positions that the head gets for each request of `feed`, everything else checked."""
    names, tokens = list(parts), step_of(parts)
    fed = np.array([name in feed.split() for name in names])
    begun = progress.follow(names, tokens, fed)
    kept = begun & [name not in forget.split() for name in names]
    given_tokens = progress.advance(names, tokens, fed & begun, kept)
    if given_tokens is None:
        return None
    found: dict[str, list[int]] = {}
    ends = np.cumsum(given_tokens.num_tokens).tolist()
    chosen = [name for name, is_fed in zip(names, fed & begun, strict=True) if is_fed]
    assert len(ends) == len(chosen)
    slots = slots_of(given_tokens, BLOCK).tolist()
    for i, name in enumerate(chosen):
        rows = slice(ends[i] - int(given_tokens.num_tokens[i]), ends[i])
        found[name] = given_tokens.positions[rows].tolist()
        assert given_tokens.token_ids[rows].tolist() == [token_of(name, p) for p in found[name]]
        assert given_tokens.features[rows].tolist() == [feature_of(name, p) for p in found[name]]
        assert given_tokens.next_token_ids[i] == token_of(name, found[name][-1] + 1)
        start = progress.context_start(name)
        assert given_tokens.context_starts[i] == start and start % BLOCK == 0
        blocks = parts[name][2]
        here = given_tokens.block_table[i, : len(blocks) - start // BLOCK].tolist()
        assert here == blocks[start // BLOCK :]
        assert slots[rows] == [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in found[name]]
    return found


def test_kept_tokens_come_before_the_step_s_own() -> None:
    progress = HeadProgress(8, BLOCK)
    assert advance(progress, {"r1": (0, 3, [1])}) is None
    assert advance(progress, {"r1": (3, 1, [1])}) is None
    assert advance(progress, {"r1": (4, 2, [1, 2])}) is None
    assert progress.pending("r1") == 6
    assert advance(progress, {"r1": (6, 1, [1, 2])}, feed="r1") == {"r1": [0, 1, 2, 3, 4, 5, 6]}
    assert progress.pending("r1") == 0
    assert advance(progress, {"r1": (7, 1, [1, 2])}, feed="r1") == {"r1": [7]}


def test_requests_catch_up_each_in_its_own_time() -> None:
    progress = HeadProgress(16, BLOCK)
    blocks = {"r1": [1, 2], "r2": [3, 4], "r3": [5, 6]}

    def step(feed: str = "", **parts: tuple[int, int]) -> dict[str, list[int]] | None:
        return advance(progress, {n: (*part, blocks[n]) for n, part in parts.items()}, feed)

    assert step("r2", r1=(0, 2), r2=(0, 3), r3=(0, 1)) == {"r2": [0, 1, 2]}
    assert step("", r3=(1, 2), r1=(2, 1)) is None
    assert step("r1 r2", r2=(3, 1), r3=(3, 1), r1=(3, 1)) == {"r2": [3], "r1": [0, 1, 2, 3]}
    assert [progress.pending(name) for name in blocks] == [0, 0, 4]
    assert step("r3", r1=(4, 1), r3=(4, 2)) == {"r3": [0, 1, 2, 3, 4, 5]}
    assert step("r1", r1=(5, 1)) == {"r1": [4, 5]}


def test_a_step_that_is_fed_whole_is_not_copied() -> None:
    progress = HeadProgress(8, BLOCK)
    tokens = step_of({"r1": (0, 2, [1]), "r2": (0, 1, [2])})
    everyone = np.array([True, True])
    progress.follow(["r1", "r2"], tokens, everyone)
    assert progress.advance(["r1", "r2"], tokens, everyone, everyone) is tokens


def test_the_oldest_tokens_go_when_memory_is_full() -> None:
    """The head's context then begins at the next block, and what lies before it is not read."""
    progress = HeadProgress(16, BLOCK, max_bytes=6 * TOKEN_BYTES)
    advance(progress, {"r1": (0, 2, [1])})
    advance(progress, {"r2": (0, 2, [3])})
    advance(progress, {"r1": (2, 1, [1])})
    assert progress.context_start("r1") == 0
    advance(progress, {"r1": (3, 3, [1, 2])})
    assert (progress.context_start("r1"), progress.context_start("r2")) == (4, 0)
    assert (progress.pending("r1"), progress.pending("r2")) == (4, 2)
    assert advance(progress, {"r2": (2, 1, [3])}, feed="r2") == {"r2": [0, 1, 2]}
    assert advance(progress, {"r1": (6, 1, [1, 2])}, feed="r1") == {"r1": [4, 5, 6]}
    assert advance(progress, {"r1": (7, 2, [1, 2, 5])}, feed="r1") == {"r1": [7, 8]}
    assert (progress.num_late, progress.pending("r1")) == (1, 0)


def test_a_request_is_out_of_reach_until_its_context_begins() -> None:
    progress = HeadProgress(16, BLOCK, max_bytes=4 * TOKEN_BYTES)
    advance(progress, {"r1": (0, 5, [1, 2])})
    assert progress.context_start("r1") == 8 and progress._kept_bytes == 0
    # Fed or not, tokens of the block that the head has not seen whole are of no use.
    assert advance(progress, {"r1": (5, 1, [1, 2])}, feed="r1") is None
    advance(progress, {"r1": (6, 2, [1, 2])})
    assert (progress.pending("r1"), progress._kept_bytes) == (0, 0)
    assert advance(progress, {"r1": (8, 1, [1, 2, 3])}, feed="r1") == {"r1": [8]}
    # A chunk that reaches across the start.
    advance(progress, {"r2": (0, 5, [4, 5])})
    assert advance(progress, {"r2": (5, 5, [4, 5, 6])}, feed="r2") == {"r2": [8, 9]}


def test_tokens_fed_now_are_not_dropped_for_what_is_kept_now() -> None:
    """The head would go on behind a gap, and its blocks would pass for seen."""
    progress = HeadProgress(16, BLOCK, max_bytes=4 * TOKEN_BYTES)
    advance(progress, {"r1": (0, 3, [1])})
    parts = {"r1": (3, 1, [1]), "r2": (0, 3, [3])}
    assert advance(progress, parts, feed="r1") == {"r1": [0, 1, 2, 3]}
    assert progress.context_start("r1") == progress.context_start("r2") == 0


def test_a_preempted_request_loses_its_stale_tokens() -> None:
    progress = HeadProgress(16, BLOCK)
    advance(progress, {"r1": (0, 3, [1]), "r2": (0, 1, [2])})
    # It starts over in other blocks, in larger steps.
    advance(progress, {"r1": (0, 2, [5])})
    assert progress.pending("r1") == 2
    assert advance(progress, {"r1": (2, 3, [5, 6])}, feed="r1") == {"r1": [0, 1, 2, 3, 4]}
    assert advance(progress, {"r2": (1, 1, [2])}, feed="r2") == {"r2": [0, 1]}


def test_a_context_begins_behind_the_part_of_a_prefix_that_the_head_has_not_seen() -> None:
    progress = HeadProgress(16, BLOCK)
    starts = progress.context_start
    advance(progress, {"r1": (0, 6, [1, 2])})
    assert advance(progress, {"r2": (4, 1, [1, 3])}, feed="r2") == {"r2": [4]}
    assert starts("r2") == 4
    advance(progress, {"r1": (6, 2, [1, 2])}, feed="r1")
    advance(progress, {"r3": (8, 1, [1, 2, 4])})
    assert (starts("r3"), starts("r2")) == (0, 4), "its keys are there now, but it has begun"
    # Skipped tokens in one of its blocks, and none is missing in the first.
    advance(progress, {"r1": (8, 4, [1, 2, 5])}, forget="r1")
    advance(progress, {"r4": (12, 1, [1, 2, 5, 6]), "r5": (8, 1, [1, 2, 7])})
    assert (starts("r4"), starts("r5")) == (12, 0)
    # A prefix that ends within such a block.
    assert advance(progress, {"r6": (10, 1, [1, 2, 5])}, feed="r6") is None
    assert advance(progress, {"r6": (11, 2, [1, 2, 5, 8])}, feed="r6") == {"r6": [12]}


def test_a_prefix_that_is_filled_in_the_same_step_counts_as_it_will_be() -> None:
    progress = HeadProgress(16, BLOCK)
    starts = progress.context_start
    advance(progress, {"r1": (0, 8, [1, 2])})
    progress.remove("r1")
    # The head was not there when blocks 1 and 2 were filled, and is now. The second request stands first in the batch.
    parts = {"r3": (8, 1, [1, 2, 4]), "r2": (0, 9, [1, 2, 3])}
    assert advance(progress, parts, feed="r2 r3") == {"r3": [8], "r2": list(range(9))}
    assert starts("r3") == 0
    # And the other way round: it was there, and is not now.
    advance(progress, {"r5": (8, 1, [1, 2, 6]), "r4": (0, 9, [1, 2, 5])})
    assert (starts("r4"), starts("r5")) == (0, 8)


def test_one_long_request_does_not_hold_the_rows_of_those_that_left() -> None:
    progress = HeadProgress(64, BLOCK, max_bytes=40 * TOKEN_BYTES)
    for position in range(20):
        others = {f"r{3 * position + i + 2}": (0, 3, [10 + 2 * i]) for i in range(3)}
        own = {"r1": (position, 1, [1, 2, 3, 4, 5])}
        # It stands between the others, whose rows go.
        advance(
            progress, dict([*list(others.items())[:1], *own.items(), *list(others.items())[1:]])
        )
        for name in others:
            progress.remove(name)
    assert progress.context_start("r1") == 0 and progress._kept_bytes == 20 * TOKEN_BYTES
    own = {"r1": (20, 1, [1, 2, 3, 4, 5, 6])}
    assert advance(progress, own, feed="r1") == {"r1": list(range(21))}


def test_a_block_that_is_filled_again_counts_anew() -> None:
    progress = HeadProgress(16, BLOCK)
    advance(progress, {"r1": (0, 4, [1])})
    progress.remove("r1")
    advance(progress, {"r2": (0, 4, [1])}, feed="r2")
    advance(progress, {"r3": (4, 1, [1, 2])})
    assert progress.context_start("r3") == 0


def test_tokens_of_plain_requests_are_not_kept() -> None:
    progress = HeadProgress(16, BLOCK)
    advance(progress, {"r1": (0, 4, [1]), "r2": (0, 2, [2])}, forget="r1")
    assert (progress.pending("r1"), progress.pending("r2")) == (0, 2)
    assert progress._kept_bytes == 2 * TOKEN_BYTES


def is_empty(progress: HeadProgress) -> bool:
    held = (progress._kept, progress._next, progress._pending, progress._starts, progress._late)
    return not any(held) and progress._kept_bytes == 0


def test_removing_frees_everything() -> None:
    progress = HeadProgress(16, BLOCK)
    advance(progress, {"r1": (0, 2, [1]), "r2": (0, 1, [2])})
    advance(progress, {"r1": (2, 2, [1]), "r2": (1, 1, [2])}, feed="r2")
    assert progress._kept_bytes > 0
    progress.remove("r1")
    assert progress._kept_bytes == 0
    progress.remove("nobody")
    progress.remove("r2")
    assert is_empty(progress)


# ---- against a model


@dataclass
class Text:
    """One request of the model."""

    blocks: list[int]
    position: int = 0  # of its next token
    head: int = 0  # position of the first token that the head has not seen
    start: int = 0  # of the head's context
    followed: bool = True
    started: bool = False


@dataclass
class World:
    """An engine that hands out blocks and a head that remembers every slot."""

    rng: np.random.Generator
    progress: HeadProgress
    texts: dict[str, Text] = field(default_factory=dict)
    slot_seen: dict[tuple[int, int], bool] = field(default_factory=dict)
    num_blocks: int = 1
    num_texts: int = 0

    def new_blocks(self, count: int) -> list[int]:
        self.num_blocks += count
        return list(range(self.num_blocks - count, self.num_blocks))

    def arrive(self) -> None:
        """A new request, perhaps with a prefix of another one's full blocks."""
        self.num_texts += 1
        prefix: list[int] = []
        if self.texts and self.rng.random() < 0.5:
            other = self.texts[self.rng.choice(list(self.texts))]
            prefix = other.blocks[: int(self.rng.integers(0, other.position // BLOCK + 1))]
        text = Text(prefix + self.new_blocks(24), position=len(prefix) * BLOCK)
        text.followed = self.rng.random() < 0.8
        self.texts[f"r{self.num_texts}"] = text

    def preempt(self, text: Text) -> None:
        full = int(self.rng.integers(0, text.position // BLOCK + 1))
        if full * BLOCK != text.position:  # else it goes on as if nothing had happened
            text.blocks = text.blocks[:full] + self.new_blocks(24)
            text.position, text.started = full * BLOCK, False

    def begin(self, text: Text) -> None:
        """The first step of a request or after a preemption: the head's context begins behind what it missed."""
        text.started, text.head = True, text.position
        missed = [
            p
            for p in range(text.position)
            if not self.slot_seen.get((text.blocks[p // BLOCK], p % BLOCK), True)
        ]
        text.start = (missed[-1] // BLOCK + 1) * BLOCK if missed else 0

    def mark(self, text: Text, positions: range, seen: bool) -> None:
        for p in positions:
            self.slot_seen[text.blocks[p // BLOCK], p % BLOCK] = seen

    def step(self, limited: bool) -> None:
        names = [name for name in self.texts if self.rng.random() < 0.8]
        if not names:
            return
        parts = {}
        for name in names:
            text = self.texts[name]
            parts[name] = text.position, int(self.rng.integers(1, 4)), text.blocks
            if not text.started:
                self.begin(text)
        tokens = step_of(parts)
        everybody = self.rng.random() < 0.3
        texts = [self.texts[name] for name in names]
        followed = np.array([text.followed for text in texts])
        begun = self.progress.follow(names, tokens, followed & everybody)
        assert [self.progress.context_start(name) for name in names] == [t.start for t in texts]
        ends = np.array([first + n for first, n, _ in parts.values()])
        assert (begun == (ends > [text.start for text in texts])).all()
        follow = followed & begun
        feed = follow & (everybody | (self.rng.random(len(names)) < self.rng.choice([0.0, 0.4])))
        fed = self.progress.advance(names, tokens, feed, follow)
        for text, end in zip(texts, ends.tolist(), strict=True):
            text.position = end
        self.check(names, feed, fed)
        for name, text in self.texts.items():
            if not text.started:
                continue
            start = self.progress.context_start(name)
            if limited and start > text.start:  # its oldest tokens had to go
                assert start % BLOCK == 0 and text.head < start < text.position + BLOCK
                text.start = start
            assert start == text.start
            waiting = text.position - max(text.head, start) if text.followed else 0
            pending = self.progress.pending(name)
            assert pending == waiting if start == 0 else max(0, waiting) <= pending
            assert start == 0 or pending < max(0, waiting) + BLOCK

    def check(self, names: list[str], feed: np.ndarray, fed: AcceptedTokens | None) -> None:
        """Each fed request gets all that the head has not seen of it, in text order, from its context's start on."""
        places = []
        for name, is_fed in zip(names, feed.tolist(), strict=True):
            text = self.texts[name]
            missing = range(max(text.head, text.start), text.position)
            self.mark(text, range(text.head, text.position), seen=False)
            if is_fed:
                self.mark(text, missing, seen=True)
                places += [(name, p) for p in missing]
                text.head = text.position
        if fed is None:
            assert not places
            return
        assert fed.positions.tolist() == [p for _, p in places]
        assert fed.token_ids.tolist() == [token_of(*place) for place in places]
        assert fed.features.tolist() == [feature_of(*place) for place in places]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 4, 12, 40]))
def test_the_head_never_sees_a_gap(seed: int, most_tokens: int | None) -> None:
    most = 2**40 if most_tokens is None else most_tokens * TOKEN_BYTES
    world = World(np.random.default_rng(seed), HeadProgress(4096, BLOCK, max_bytes=most))
    for _ in range(30):
        action = world.rng.random()
        if action < 0.25 and len(world.texts) < 5:
            world.arrive()
        elif action < 0.3 and world.texts:
            world.preempt(world.texts[world.rng.choice(list(world.texts))])
        elif action < 0.35 and world.texts:
            name = world.rng.choice(list(world.texts))
            world.progress.remove(str(name))
            del world.texts[name]
        world.step(limited=most_tokens is not None)
        kept = sum(record.features.nbytes for record in world.progress._kept)
        assert world.progress._kept_bytes == kept <= most
    for name in world.texts:
        world.progress.remove(name)
    assert is_empty(world.progress)


def test_each_requests_last_token_is_split_off() -> None:
    step = step_of({"r1": (4, 3, [1, 2]), "r2": (0, 1, [3]), "r3": (7, 2, [5, 6, 7])})
    earlier, last = split_last(step)
    assert earlier.tolist() == [0, 1, 4]
    assert last.token_ids.tolist() == [1006, 2000, 3008]
    assert last.positions.tolist() == [6, 0, 8] and last.num_tokens.tolist() == [1, 1, 1]
    assert last.features[:, 0].tolist() == [1006, 2000, 3008]
    assert last.next_token_ids is step.next_token_ids and last.block_table is step.block_table
    assert not split_last(last)[0].numel()
