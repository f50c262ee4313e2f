"""The module SparseAttention of native-sparse-attention-pytorch for `cargo xtask bench --peer lucidrains`; wire.py says
how they talk.

Its forward pass is timed as a whole. Included beside the attention are the RMS norm, the projections from and to a
model's width, here as narrow as one head (under 1 % of the work), rotary embedding and the gates. Blocks are
compressed by their mean, as ours are; the query's own block counts as one of the selected.
"""

import time
from importlib.metadata import version

import torch
import wire
from native_sparse_attention_pytorch import SparseAttention

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Mean(torch.nn.Module):
    """[..., block tokens, dim] to [..., dim]"""

    def forward(self, x):
        return x.mean(-2)


class Peer:
    def __init__(self):
        self.current = None

    def hello(self, request):
        torch.set_num_threads(request["threads"])
        torch.manual_seed(1)
        wire.limit_memory(request["memory_bytes"])
        return {"version": version("native-sparse-attention-pytorch")}

    def attention(self, job):
        self.current = None
        if job["dim_qk"] != job["dim_v"]:
            raise ValueError(f"it has one head dimension, not {job['dim_qk']} and {job['dim_v']}")
        width, dtype = job["dim_qk"], DTYPES[job["dtype"]]
        module = SparseAttention(
            dim=width,
            dim_head=width,
            heads=job["heads"],
            kv_heads=job["kv_heads"],
            sliding_window_size=job["window"],
            compress_block_size=job["compress_block"],
            compress_block_sliding_stride=job["compress_stride"],
            selection_block_size=job["select_block"],
            num_selected_blocks=job["select_count"] - 1,
            causal=True,
            compress_mlp=Mean(),
        )
        self.current = module.to(dtype), torch.randn(1, job["tokens"], width).to(dtype)
        return {"forward": "whole module, norm, projections and rotary embedding included"}

    def turn(self, _):
        module, x = self.current
        with torch.no_grad():
            start = time.perf_counter()
            module(x)
            return {"forward": time.perf_counter() - start}

    def drop(self, _):
        self.current = None
        return {}


peer = Peer()
wire.serve({call: getattr(peer, call) for call in ("hello", "attention", "turn", "drop")})
