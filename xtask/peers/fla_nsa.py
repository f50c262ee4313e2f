"""Native sparse attention of flash-linear-attention for `cargo xtask bench --peer fla`; wire.py says how they talk.

Its branches share keys and values. It compresses blocks of as many tokens as it selects, without overlap: a quarter of our
compressed keys at the paper's sizes. Its sliding window needs another package (flash-attn) and is left out. So it
computes less than ours.
"""

import device
import torch
import wire
from fla import __version__
from fla.ops.nsa import parallel_nsa


class Peer:
    def __init__(self):
        self.current = None

    def hello(self, request):
        device.prepare(request)
        return {"version": __version__}

    def attention(self, job):
        self.current = None
        dtype, tokens, heads, groups = device.DTYPES[job["dtype"]], job["tokens"], job["heads"], job["kv_heads"]
        q = device.random(dtype, 1, tokens, heads, job["dim_qk"])
        k = device.random(dtype, 1, tokens, groups, job["dim_qk"])
        v = device.random(dtype, 1, tokens, groups, job["dim_v"])
        gates = [torch.full((1, tokens, heads), 0.5, dtype=dtype) for _ in range(2)]
        grad = device.random(dtype, 1, tokens, heads, job["dim_v"])
        self.current = job, [q, k, v, *gates], grad
        way = "no sliding window, compressed blocks do not overlap"
        return {"forward": way, "backward": way}

    def turn(self, _):
        job, inputs, grad = self.current

        def attend(q, k, v, g_cmp, g_slc):
            sizes = {"block_counts": job["select_count"], "block_size": job["select_block"]}
            return parallel_nsa(q, k, v, g_cmp=g_cmp, g_slc=g_slc, **sizes)

        seconds = device.turn(attend, inputs, grad, job["backward"])
        return dict(zip(("forward", "backward"), seconds))

    def drop(self, _):
        self.current = None
        return {}


peer = Peer()
wire.serve({call: getattr(peer, call) for call in ("hello", "attention", "turn", "drop")})
