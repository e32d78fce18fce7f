"""The yardstick of attention_gpu_bench and dense_gpu_bench: dense FP16 attention by cuDNN through
PyTorch.

Same shapes (32 query heads over 8 KV heads, head_dim 128; one query token, or a causal prefill of
32K), copies that together exceed the L2 cache, a CUDA graph of several calls, medians.
`dense_attention.py [repeats]`.
"""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

COLD_BYTES = 600 << 20


def measure(backend, q, kv, times, repeats, causal=False):
    """Microseconds of one call, sorted."""
    def run():
        for i in range(times):
            k, v = kv[i % len(kv)]
            scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=causal)

    with sdpa_kernel([backend]):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    us = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        us.append(start.elapsed_time(end) * 1000 / times)
    return sorted(us[2:])


def randn(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def bench(backend, tokens, batch, repeats):
    bytes_each = 2 * batch * 8 * tokens * 128 * 2
    copies = max(1, -(-COLD_BYTES // bytes_each))
    kv = [(randn(batch, 8, tokens, 128), randn(batch, 8, tokens, 128)) for _ in range(copies)]
    us = measure(backend, randn(batch, 32, 1, 128), kv, max(copies, 8), repeats)
    median = us[len(us) // 2]
    print(f"{tokens:7} {batch:5} dense {backend.name:20} {median:9.2f} us "
          f"{bytes_each / median * 1e-3:8.0f} GB/s  (fastest {us[0]:.2f})", flush=True)


def bench_prefill(backend, tokens, repeats):
    kv = [(randn(1, 8, tokens, 128), randn(1, 8, tokens, 128))]
    us = measure(backend, randn(1, 32, tokens, 128), kv, 1, repeats, causal=True)
    median = us[len(us) // 2]
    flops = 4 * tokens * (tokens + 1) / 2 * 32 * 128
    print(f"{tokens:7} prefill {backend.name:20} {median:9.1f} us {flops / median * 1e-6:8.0f} "
          f"TFLOP/s  (fastest {us[0]:.1f})", flush=True)


def main():
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
          f"cuDNN {torch.backends.cudnn.version()}, medians of {repeats}")
    for batch in (1, 4):
        for tokens in (8192, 32768, 65536, 131072):
            try:
                bench(SDPBackend.CUDNN_ATTENTION, tokens, batch, repeats)
            except RuntimeError as error:
                print(f"{tokens:7} {batch:5} dense cuDNN: {error}")
    bench_prefill(SDPBackend.CUDNN_ATTENTION, 32768, repeats)


if __name__ == "__main__":
    main()
