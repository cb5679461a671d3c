# SPDX-License-Identifier: Apache-2.0
"""Grammars in the worker: the mask of every node of a request's tree, at drafting and at verification.

A node's next token must fit what the grammar allows behind the node's own path. The engine masks the next token of each
request and judges what is emitted; it does not know the trees. So the worker compiles the same grammar with vLLM's own
manager, off the hot path, and follows it by emitted tokens. Until it is ready the request decodes plainly.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

from heterospec_vllm.arrays import NO_ROW, Ints
from heterospec_vllm.config import REASONING_ARGUMENT
from heterospec_vllm.engine.step import without_speculation
from heterospec_vllm.runners.scheduler import manager_of_engine
from heterospec_vllm.tree.masks import Path, TokenMasks
from heterospec_vllm.tree.trees import DraftTrees

logger = init_logger(__name__)

# Backends whose compiled grammars do not depend on how far a matcher must be able to go back.
SHARED_BACKENDS = ("xgrammar", "guidance")
FULL_MASK = -1


@dataclass
class _Request:
    """What vLLM's manager reads of a request."""

    request_id: str
    sampling_params: SamplingParams
    prompt_token_ids: list[int]
    structured_output_request: StructuredOutputRequest
    all_token_ids: list[int]
    use_structured_output: bool = True
    num_followed: int = 0  # outputs that the grammar has seen
    masks: dict[Path, np.ndarray] = field(default_factory=dict)  # behind the outputs of this step

    @property
    def grammar(self) -> StructuredOutputGrammar | Exception | None:
        """None while it is being compiled; the error where that failed."""
        return self.structured_output_request.grammar


class Grammars:
    """The grammars of the requests in this worker."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config
        self._manager: StructuredOutputManager | None = None
        self._requests: dict[str, _Request] = {}
        self._num_words = -(-vllm_config.model_config.get_vocab_size() // 32)

    def start(self, req_id: str, params: SamplingParams, prompt_token_ids: list[int]) -> None:
        """A request with a grammar has come: its compilation begins on another thread."""
        structured = StructuredOutputRequest.from_sampling_params(params)
        assert structured is not None
        told = (params.extra_args or {}).get(REASONING_ARGUMENT, {})
        structured.reasoning_ended = told.get("ended")
        structured.reasoning_parser_kwargs = told.get("arguments")
        request = _Request(req_id, params, prompt_token_ids, structured, list(prompt_token_ids))
        self._requests[req_id] = request
        self._compile(request)

    def _compile(self, request: _Request) -> None:
        manager = self._manager
        if manager is None:
            manager = self._manager = StructuredOutputManager(self._config)
        structured = request.sampling_params.structured_outputs
        assert structured is not None
        if manager.backend is None:
            engines = manager_of_engine(self._config)
            if engines is not None and structured._backend in SHARED_BACKENDS:
                manager.backend = engines.backend
        if structured._backend == "lm-format-enforcer":
            # It refuses speculation by name, but goes back as well as any.
            manager.vllm_config = without_speculation(self._config)
        try:
            manager.grammar_init(request)
        finally:
            manager.vllm_config = self._config

    def remove(self, req_id: str) -> None:
        self._requests.pop(req_id, None)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._requests

    def failed(self, req_id: str) -> bool:
        """Whether a request's grammar cannot be followed here."""
        return isinstance(self._requests[req_id].grammar, Exception)

    def follow(
        self,
        req_id: str,
        output_token_ids: list[int],  # all that the request has emitted
    ) -> bool:
        """Brings a grammar up to date; False where it is not ready or has lost the request."""
        request = self._requests[req_id]
        grammar = request.grammar
        if grammar is None or isinstance(grammar, Exception):
            return False
        new = output_token_ids[request.num_followed :]
        if new:
            assert self._manager is not None
            request.masks.clear()
            request.num_followed = len(output_token_ids)
            request.all_token_ids.extend(new)
            if not self._manager.accept_tokens(request, new):
                self._lose(request, "it does not take what the target emitted")
                return False
        return True

    def any_of(self, req_ids: list[str]) -> bool:
        """Whether one of the requests has a grammar."""
        return bool(self._requests) and any(req_id in self._requests for req_id in req_ids)

    def masks_behind(
        self,
        req_ids: list[str],  # [num_rows] whose rows they are
        paths: list[Path],  # [num_rows]
    ) -> TokenMasks | None:
        """The masks of the tokens behind each row's path (`tree.masks.Constraints`)."""
        of_request: dict[str, list[Path]] = defaultdict(list)
        rows = [row for row, req_id in enumerate(req_ids) if req_id in self._requests]
        if not rows:
            return None
        for row in rows:
            of_request[req_ids[row]].append(paths[row])
        for req_id, behind in of_request.items():
            self._fill(self._requests[req_id], behind)
        of_row = np.full(len(req_ids), NO_ROW, np.int32)
        of_row[rows] = np.arange(len(rows))
        masks = [self._requests[req_ids[row]].masks[paths[row]] for row in rows]
        return TokenMasks(np.stack(masks), of_row)

    def masks_of_trees(
        self,
        req_ids: list[str],  # [num_reqs]
        trees: DraftTrees,  # [num_reqs] to be verified; none is followed where the engine knows better
        structured: list[str],  # [num_structured] requests whose next token the engine has masked
        engines: np.ndarray,  # [num_structured, num_words] int32
    ) -> TokenMasks:
        """Masks of the rows of logits, root and nodes of each request: the engine's for roots, ours for nodes."""
        first_row = np.cumsum(trees.num_nodes + 1) - trees.num_nodes - 1
        of_row = np.full(int(trees.num_nodes.sum()) + len(req_ids), NO_ROW, np.int32)
        bits = [engines]
        num_masks = len(engines)
        places = {req_id: place for place, req_id in enumerate(req_ids)}
        for mask, req_id in enumerate(structured):
            place = places[req_id]
            of_row[first_row[place]] = mask
            count = int(trees.num_nodes[place])
            if not count:
                continue
            request = self._requests[req_id]
            paths = _paths(trees.parents[place, : count + 1], trees.tokens[place, :count])
            self._fill(request, paths)
            if not np.array_equal(request.masks[()], engines[mask]):
                self._lose(request, "its state is not the engine's")
                trees.tokens[place] = NO_ROW
                continue
            bits.append(np.stack([request.masks[path] for path in paths[1:]]))
            of_row[first_row[place] + 1 : first_row[place] + 1 + count] = num_masks + np.arange(
                count
            )
            num_masks += count
        return TokenMasks(np.concatenate(bits), of_row)

    def _lose(self, request: _Request, why: str) -> None:
        """A grammar that cannot be followed further: its request decodes plainly from now on."""
        logger.warning("heterospec: the grammar of request %s is lost: %s", request.request_id, why)
        request.structured_output_request._grammar = ValueError(why)

    def _fill(self, request: _Request, paths: list[Path]) -> None:
        """Finds the masks of the tokens behind some paths where they are not known yet."""
        missing = {path for path in paths if path not in request.masks}
        if not missing:
            return
        if self._is_open(request):
            for path in missing:
                request.masks[path] = self._mask_behind(request, path)
        else:
            self._fill_tree(request, sorted(missing))

    def _is_open(self, request: _Request) -> bool:
        """Whether the grammar may begin behind some later token, where the reasoning ends."""
        manager = self._manager
        assert manager is not None
        ended = request.structured_output_request.reasoning_ended
        return manager.reasoner_cls is not None and not manager.enable_in_reasoning and not ended

    def _mask_behind(self, request: _Request, path: Path) -> np.ndarray:
        """As vLLM fills a chain's masks, those of tokens within the reasoning among them."""
        assert self._manager is not None
        req_id = request.request_id
        masks = self._manager.grammar_bitmask({req_id: request}, [req_id], {req_id: list(path)})
        assert masks is not None
        return masks[len(path)].copy()

    def _fill_tree(
        self,
        request: _Request,
        paths: list[Path],  # sorted, so that neighbours share most
    ) -> None:
        grammar = request.grammar
        assert isinstance(grammar, StructuredOutputGrammar)
        masks = torch.full((len(paths), self._num_words), FULL_MASK, dtype=torch.int32)
        taken: list[int] = []  # tokens by which the grammar is ahead
        for row, path in enumerate(paths):
            common = _num_common(taken, path)
            if common < len(taken):
                grammar.rollback(len(taken) - common)
                del taken[common:]
            for token in path[common:]:
                if grammar.is_terminated():
                    break
                if not grammar.accept_tokens(request.request_id, [token]):
                    break
                taken.append(token)
            if len(taken) < len(path) and not grammar.is_terminated():
                masks[row] = 0
            elif not grammar.is_terminated():
                grammar.fill_bitmask(masks, row)
        if taken:
            grammar.rollback(len(taken))
        request.masks.update(zip(paths, masks.numpy(), strict=True))


def _paths(
    parents: Ints,  # [num_nodes + 1] parent row of the root and each node, lower than its own
    tokens: Ints,  # [num_nodes]
) -> list[Path]:
    """[num_nodes + 1] the path of the root and of each node."""
    paths: list[Path] = [()]
    for parent, token in zip(parents[1:].tolist(), tokens.tolist(), strict=True):
        paths.append((*paths[parent], token))
    return paths


def _num_common(taken: list[int], path: Path) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(taken, path, strict=False):
        if one != other:
            break
        count += 1
    return count
