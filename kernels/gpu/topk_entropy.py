# SPDX-License-Identifier: Apache-2.0
"""Top-k log-probabilities, log-sum-exp and top-k entropy of logits rows, on the device (Triton).

    z_j = x_j / T                       (T = 1 where the row's temperature is 0)
    lse = log sum_j exp(z_j)            over the whole vocabulary
    l_i = z_(i) - lse                   of the k largest, the lowest index first among equals
    H   = -sum_i q_i log q_i            q = exp(l_i) / sum_i exp(l_i), in nats, at most ln k

Two launches. `_topk_chunk_kernel`: one program reads one chunk of one row, once, and leaves the chunk's
maximum, sum of exponentials and k best entries. `_topk_merge_kernel`: one program per row merges
those few hundred numbers. Probabilities are never materialised.

An entry's rank is one 64-bit key: the value's bits made order-preserving, above the index reversed. So
k maxima over integers are the top k with ties resolved, independent of chunk size and program order.

Defined for every input: NaN counts as -inf, -0 as +0, +inf as the largest float32. Where fewer than k
entries are finite, the places behind them have index -1 and log-probability -inf; without a finite
entry lse is -inf and H is 0.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .aot_registry import AotConfig

MAX_TOP_K = 16
MAX_VOCAB = 2**18
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_CHUNK = 8192
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
# Below the key of every entry, also of -inf at the last index.
_NO_KEY = tl.constexpr(-(2**63))


@dataclass(frozen=True)
class TopKEntropy:
    """What the draft says about each row's next token; all on the device of the logits."""

    log_probs: torch.Tensor  # [num_rows, k] float32, falling, -inf where there is no entry
    indices: torch.Tensor  # [num_rows, k] int64, -1 where there is no entry
    log_sum_exp: torch.Tensor  # [num_rows] float32, of the logits divided by the temperature
    entropies: torch.Tensor  # [num_rows] float32, nats

    @classmethod
    def allocate(cls, num_rows: int, k: int, device: torch.device) -> "TopKEntropy":
        """Uninitialised buffers, for CUDA graphs that must write to the same addresses."""
        return cls(
            torch.empty(num_rows, k, device=device),
            torch.empty(num_rows, k, dtype=torch.int64, device=device),
            torch.empty(num_rows, device=device),
            torch.empty(num_rows, device=device),
        )


def topk_entropy_reference(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows]
    temperature: torch.Tensor,
    k: int,
) -> TopKEntropy:
    """What `topk_entropy` computes (same arguments), in float64."""
    values = logits.float()
    values = values.masked_fill(values.isnan(), -torch.inf)
    order = values.sort(dim=-1, descending=True, stable=True)
    width = min(k, logits.shape[1])
    divisor = torch.where(temperature == 0, 1.0, temperature.float())[:, None]
    # Divided in float32 like the kernel's: the logits are data, their quotient is not refined.
    scaled = (values / divisor).clamp(max=torch.finfo(torch.float32).max).double()
    lse = scaled.logsumexp(dim=-1)
    top = scaled.gather(1, order.indices[:, :width])
    pad = (0, k - width)
    top = torch.nn.functional.pad(top, pad, value=-torch.inf)
    indices = torch.nn.functional.pad(order.indices[:, :width], pad, value=-1)
    absent = top == -torch.inf
    weights = (top - top[:, :1]).masked_fill(absent, -torch.inf).softmax(dim=-1)
    entropies = torch.special.entr(weights).sum(dim=-1).masked_fill(absent[:, 0], 0)
    log_probs = torch.where(absent, -torch.inf, top - lse[:, None])
    return TopKEntropy(
        log_probs.float(), indices.masked_fill(absent, -1), lse.float(), entropies.float()
    )


@triton.jit
def _keys(values, indices):
    """Order-preserving int64 keys of float32 values; among equals the lower index is the greater."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - indices).to(tl.int64)


@triton.jit
def _key_values(keys):
    """The float32 values that `_keys` packed."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best_keys(keys, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K] the TOP_K greatest keys, falling; keys are distinct."""
    places = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_K], _NO_KEY, tl.int64)
    for place in range(TOP_K):
        greatest = tl.max(keys, axis=0)
        best = tl.where(places == place, greatest, best)
        keys = tl.where(keys == greatest, _NO_KEY, keys)
    return best


@triton.jit
def _topk_chunk_kernel(
    # [num_rows, vocab_size]
    logits_ptr,
    logits_stride,
    # [num_rows]
    temperature_ptr,
    # [num_rows, num_chunks, BLOCK_K]
    chunk_keys_ptr,
    # [num_rows, num_chunks]
    chunk_max_ptr,
    # [num_rows, num_chunks]
    chunk_sum_ptr,
    vocab_size,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    indices = chunk * CHUNK + tl.arange(0, CHUNK)
    in_vocab = indices < vocab_size
    values = tl.load(
        logits_ptr + row * logits_stride + indices, mask=in_vocab, other=float("-inf")
    ).to(tl.float32)
    values = tl.where(values == values, values, float("-inf"))
    temperature = tl.load(temperature_ptr + row)
    divisor = tl.where(temperature == 0.0, 1.0, temperature)
    scaled = tl.minimum(values / divisor, _FLOAT_MAX)
    largest = tl.max(scaled, axis=0)
    # A chunk of -inf alone would subtract -inf from -inf.
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    out = row * tl.num_programs(1) + chunk
    tl.store(chunk_max_ptr + out, largest)
    tl.store(chunk_sum_ptr + out, tl.sum(tl.exp(scaled - origin), axis=0))
    keys = tl.where(in_vocab, _keys(values, indices), _NO_KEY)
    best = _best_keys(keys, TOP_K, BLOCK_K)
    tl.store(chunk_keys_ptr + out * BLOCK_K + tl.arange(0, BLOCK_K), best)


@triton.jit
def _topk_merge_kernel(
    # [num_rows, num_chunks, BLOCK_K]
    chunk_keys_ptr,
    # [num_rows, num_chunks]
    chunk_max_ptr,
    # [num_rows, num_chunks]
    chunk_sum_ptr,
    # [num_rows]
    temperature_ptr,
    # [num_rows, TOP_K]
    log_probs_ptr,
    # [num_rows, TOP_K]
    indices_ptr,
    # [num_rows]
    log_sum_exp_ptr,
    # [num_rows]
    entropies_ptr,
    num_chunks,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    at = row * num_chunks + chunks
    maxima = tl.load(chunk_max_ptr + at, mask=chunks < num_chunks, other=float("-inf"))
    sums = tl.load(chunk_sum_ptr + at, mask=chunks < num_chunks, other=0.0)
    largest = tl.max(maxima, axis=0)
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(sums * tl.exp(maxima - origin), axis=0)
    # Without a finite entry the total is 0 and its logarithm -inf.
    log_sum_exp = origin + tl.log(total)
    tl.store(log_sum_exp_ptr + row, log_sum_exp)

    entries = tl.arange(0, BLOCK_CHUNKS * BLOCK_K)
    keys = tl.load(
        chunk_keys_ptr + row * num_chunks * BLOCK_K + entries,
        mask=entries < num_chunks * BLOCK_K,
        other=_NO_KEY,
    )
    best = _best_keys(keys, TOP_K, BLOCK_K)
    temperature = tl.load(temperature_ptr + row)
    scaled = _key_values(best) / tl.where(temperature == 0.0, 1.0, temperature)
    scaled = tl.minimum(scaled, _FLOAT_MAX)
    places = tl.arange(0, BLOCK_K)
    present = (best != _NO_KEY) & (scaled > float("-inf"))
    scaled = tl.where(present, scaled, float("-inf"))
    out = row * TOP_K + places
    stored = places < TOP_K
    log_probs = tl.where(present, scaled - log_sum_exp, float("-inf"))
    tl.store(log_probs_ptr + out, log_probs, mask=stored)
    indices = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    tl.store(indices_ptr + out, tl.where(present, indices, -1), mask=stored)

    shifted = tl.where(present, scaled - largest, 0.0)
    weights = tl.where(present, tl.exp(shifted), 0.0)
    # -q log q = (log W - shift) q, summed; 1 keeps the logarithm of an empty row defined.
    weight_sum = tl.where(largest == float("-inf"), 1.0, tl.sum(weights, axis=0))
    entropy = tl.log(weight_sum) - tl.sum(weights * shifted, axis=0) / weight_sum
    tl.store(entropies_ptr + row, tl.maximum(entropy, 0.0))


def _check(logits: torch.Tensor, temperature: torch.Tensor, k: int, out: TopKEntropy) -> None:
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits: dtype {logits.dtype}, allowed: {[*_DTYPES]}")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, allowed: [rows, 1 to {MAX_VOCAB}]")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits: the last dimension has stride {logits.stride(1)}, allowed: 1")
    if not 1 <= k <= MAX_TOP_K:
        raise ValueError(f"k: {k}, allowed: 1 to {MAX_TOP_K}")
    num_rows = logits.shape[0]
    for name, tensor, shape, dtype in (
        ("temperature", temperature, (num_rows,), torch.float32),
        ("out.log_probs", out.log_probs, (num_rows, k), torch.float32),
        ("out.indices", out.indices, (num_rows, k), torch.int64),
        ("out.log_sum_exp", out.log_sum_exp, (num_rows,), torch.float32),
        ("out.entropies", out.entropies, (num_rows,), torch.float32),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} of {tensor.dtype}, needed: {shape} of {dtype}"
            )
        if not tensor.is_contiguous() or tensor.device != logits.device:
            raise ValueError(f"{name}: must be contiguous and on {logits.device}")


def topk_entropy(
    # [num_rows, vocab_size] float32, bfloat16 or float16; any row stride, entries adjacent
    logits: torch.Tensor,
    # [num_rows] float32, >= 0; 0: the distribution at temperature 1
    temperature: torch.Tensor,
    k: int,
    out: TopKEntropy | None = None,
) -> TopKEntropy:
    """Top-k log-probabilities and indices, log-sum-exp and renormalised top-k entropy of each row.

    Two launches, no host read. Without `out` the results are allocated.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above, k is not 1 to 16, or the
            vocabulary has more than 262,144 entries; the message names the argument.
    """
    if out is None:
        out = TopKEntropy.allocate(logits.shape[0], k, logits.device)
    _check(logits, temperature, k, out)
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return out
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    block_k = triton.next_power_of_2(k)
    keys = torch.empty(num_rows, num_chunks, block_k, dtype=torch.int64, device=logits.device)
    maxima = torch.empty(num_rows, num_chunks, device=logits.device)
    sums = torch.empty_like(maxima)
    _topk_chunk_kernel[(num_rows, num_chunks)](
        logits,
        logits.stride(0),
        temperature,
        keys,
        maxima,
        sums,
        vocab_size,
        TOP_K=k,
        BLOCK_K=block_k,
        CHUNK=min(_CHUNK, triton.next_power_of_2(vocab_size)),
        num_warps=8,
    )
    _topk_merge_kernel[(num_rows,)](
        keys,
        maxima,
        sums,
        temperature,
        out.log_probs,
        out.indices,
        out.log_sum_exp,
        out.entropies,
        num_chunks,
        TOP_K=k,
        BLOCK_K=block_k,
        BLOCK_CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=4,
    )
    return out


_CHUNK_POINTERS = {
    "chunk_keys_ptr": "*i64:16",
    "chunk_max_ptr": "*fp32:16",
    "chunk_sum_ptr": "*fp32:16",
}
AOT_CONFIGS = (
    *(
        AotConfig(
            _topk_chunk_kernel,
            f"{dtype}_k{k}",
            {
                "logits_ptr": f"*{dtype}:16",
                "logits_stride": "i64",
                "temperature_ptr": "*fp32:16",
                **_CHUNK_POINTERS,
                "vocab_size": "i32",
            },
            {"TOP_K": k, "BLOCK_K": block_k, "CHUNK": _CHUNK},
            num_warps=8,
        )
        for dtype, k, block_k in (("bf16", 10, 16), ("fp32", 16, 16))
    ),
    AotConfig(
        _topk_merge_kernel,
        "k16_262144",
        {
            **_CHUNK_POINTERS,
            "temperature_ptr": "*fp32:16",
            "log_probs_ptr": "*fp32:16",
            "indices_ptr": "*i64:16",
            "log_sum_exp_ptr": "*fp32:16",
            "entropies_ptr": "*fp32:16",
            "num_chunks": "i32",
        },
        {"TOP_K": 16, "BLOCK_K": 16, "BLOCK_CHUNKS": 32},
    ),
)
