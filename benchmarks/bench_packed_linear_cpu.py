# SPDX-License-Identifier: Apache-2.0
"""Times our CPU products against vLLM's on the linear layers of a model, one after the other, as a step calls them.

    python benchmarks/bench_packed_linear_cpu.py [--dtype bfloat16] [--build native] [--rows 1 8 64]

The weights are random and as large as SmolLM2-135M's (270 MB in bfloat16), so that each is read from memory. Rounds of
the two alternate; a figure is the median, in milliseconds for all layers and the logits of every row. To see what
another processor's vLLM would do, set ONEDNN_MAX_CPU_ISA (AVX2, AVX512_CORE_VNNI) and take the build that goes with it.
"""

import argparse
import statistics
import time

import torch
import vllm._custom_ops as ops
from vllm.platforms import current_platform

from heterospec_vllm.kernels.cpu.library import BUILDS, choose_build, instruction_set
from heterospec_vllm.kernels.cpu.packed_linear import pack_weight, packed_linear_cpu

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 576, 1536, 30, 49152
LAYER = [(960, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def vllms(weight: torch.Tensor):
    """vLLM's product with a weight: oneDNN's, or torch's where oneDNN has none for the dtype."""
    try:
        handler = ops.create_onednn_mm(weight.t(), 32)
    except RuntimeError:
        return lambda rows: torch.nn.functional.linear(rows, weight)
    return lambda rows: ops.onednn_mm(handler, rows, None)


def ours(weight: torch.Tensor):
    packed = pack_weight(weight)
    return lambda rows: packed_linear_cpu(rows, packed)


def seconds(products: list, rows: dict[int, torch.Tensor], depths: list[int]) -> float:
    start = time.perf_counter()
    for product, depth in zip(products, depths, strict=True):
        product(rows[depth])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--build", choices=BUILDS, default="native")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 32, 64, 256, 700], metavar="N"
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    choose_build(args.build)
    current_platform.import_kernels()
    dtype = DTYPES[args.dtype]
    shapes = [*LAYER * LAYERS, (VOCABULARY, HIDDEN)]
    depths = [depth for _, depth in shapes]
    weights = [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]
    systems = {"vllm": [*map(vllms, weights)], "ours": [*map(ours, weights)]}
    print(f"{args.dtype}, {instruction_set()}, {torch.get_num_threads()} threads, ms")
    print("rows   vllm    ours   ratio")
    for count in args.rows:
        rows = {depth: torch.randn(count, depth).to(dtype) for depth in {HIDDEN, INTERMEDIATE}}
        times: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(args.rounds if count < 100 else max(3, args.rounds // 2)):
            for name, products in systems.items():
                times[name].append(seconds(products, rows, depths) * 1e3)
        vllm, mine = (statistics.median(times[name]) for name in systems)
        print(f"{count:4} {vllm:7.1f} {mine:7.1f} {mine / vllm:6.2f}", flush=True)


if __name__ == "__main__":
    main()
