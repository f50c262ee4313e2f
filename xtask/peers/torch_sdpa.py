"""Times PyTorch's scaled_dot_product_attention (causal, grouped queries) for `cargo xtask bench --peer torch`.

Arguments: one JSON object {tokens, heads, kv_heads, dim_qk, dim_v, dtype, threads, samples}.
Prints one JSON object {"version", "forward": [seconds ...], "backward": [...]}.
"""

import json
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


def main():
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(1)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[job["dtype"]]
    tokens, repeat = job["tokens"], job["heads"] // job["kv_heads"]

    def random(heads, length, dim):
        return torch.randn(1, heads, length, dim).to(dtype)

    q = random(job["heads"], tokens, job["dim_qk"])
    k = random(job["kv_heads"], tokens, job["dim_qk"])
    v = random(job["kv_heads"], tokens, job["dim_v"])

    def attend(q, k, v, causal):
        # The heads of a group share keys and values: a view without a copy when there is one group.
        wide = [x.unsqueeze(2).expand(-1, -1, repeat, -1, -1).flatten(1, 2) for x in (k, v)]
        return sdpa(q, *wide, is_causal=causal)

    times = {"version": torch.__version__, "forward": [], "backward": []}

    def clock(name, run):
        start = time.perf_counter()
        result = run()
        times[name].append(time.perf_counter() - start)
        return result

    with torch.no_grad():
        attend(q[:, :, :256], k[:, :, :256], v[:, :, :256], True)
    for _ in range(job["samples"]):
        with torch.no_grad():
            clock("forward", lambda: attend(q, k, v, True))
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, True)
        grad = torch.ones_like(out)
        clock("backward", lambda: out.backward(grad))
    print(json.dumps(times))


main()
