"""A training step of a Llama-like model in PyTorch, the twin of ours, for `cargo xtask bench train`; wire.py says how they
talk.

Embedding, layers of RMSNorm, grouped SDPA with rotary embedding and SwiGLU, head, cross-entropy, gradient clipping and
AdamW. Several ways to write the step are tried, and the fastest stands for PyTorch: eager or compiled, bf16 by autocast
or with bf16 weights beside f32 ones, AdamW fused or by lists of tensors.
"""

import device
import torch
import wire
from torch import nn
from torch.nn.functional import cross_entropy, embedding, linear, rms_norm, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa

# The ways are compared at the job's shape with sequences of this many tokens at most.
TRIAL_TOKENS = 2048
TRIALS = 3


def rotate(x, cos, sin):
    """x [B, H, T, D], cos and sin [T, D/2]"""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class Model(nn.Module):
    def __init__(self, job):
        super().__init__()
        self.job = job
        width, inner, vocab = job["hidden_size"], job["intermediate_size"], job["vocab_size"]
        heads, groups, dim, dim_v = job["heads"], job["kv_heads"], job["head_dim"], job["v_head_dim"]

        def matrix(outputs, inputs):
            return nn.Parameter(torch.randn(outputs, inputs) * job["initializer_range"])

        self.embedding = matrix(vocab, width)
        self.head = self.embedding if job["tied"] else matrix(vocab, width)
        self.norm = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleList()
        for _ in range(job["layers"]):
            layer = nn.Module()
            layer.norm1, layer.norm2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
            layer.q, layer.o = matrix(heads * dim, width), matrix(width, heads * dim_v)
            layer.k, layer.v = matrix(groups * dim, width), matrix(groups * dim_v, width)
            layer.gate, layer.up, layer.down = matrix(inner, width), matrix(inner, width), matrix(width, inner)
            if job["qk_norm"]:
                layer.q_norm, layer.k_norm = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
            self.layers.append(layer)
        angles = torch.arange(job["tokens"])[:, None] * torch.tensor(job["inv_freq"])
        self.register_buffer("cos", angles.cos() * job["rope_factor"])
        self.register_buffer("sin", angles.sin() * job["rope_factor"])

    def normed(self, x, weight):
        return rms_norm(x, weight.shape, weight.to(x.dtype), self.job["eps"])

    def attention(self, layer, x):
        job = self.job

        def heads(weight, norm):
            y = linear(x, weight).unflatten(-1, (-1, job["head_dim"]))
            y = self.normed(y, norm) if norm is not None else y
            return rotate(y.transpose(1, 2), self.cos.to(y.dtype), self.sin.to(y.dtype))

        q, k = (heads(weight, norm) for weight, norm in self.queries_and_keys(layer))
        v = linear(x, layer.v).unflatten(-1, (-1, job["v_head_dim"])).transpose(1, 2)
        y = sdpa(q, k, v, is_causal=True, scale=job["scale"], enable_gqa=job["heads"] != job["kv_heads"])
        return linear(y.transpose(1, 2).flatten(2), layer.o)

    def queries_and_keys(self, layer):
        if self.job["qk_norm"]:
            return (layer.q, layer.q_norm), (layer.k, layer.k_norm)
        return (layer.q, None), (layer.k, None)

    def forward(self, tokens, targets):
        x = embedding(tokens, self.embedding)
        if torch.is_autocast_enabled(device.kind()):
            x = x.to(torch.get_autocast_dtype(device.kind()))
        for layer in self.layers:
            x = x + self.attention(layer, self.normed(x, layer.norm1))
            h = self.normed(x, layer.norm2)
            x = x + linear(silu(linear(h, layer.gate)) * linear(h, layer.up), layer.down)
        logits = linear(self.normed(x, self.norm), self.head)
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Training:
    """A model and its optimizer, in one way to write the step."""

    def __init__(self, job, way):
        self.way, self.job = way, job
        model = Model(job)
        self.trained = list(model.parameters())
        self.copies = None
        if way["bf16"] == "weights":
            # Products take rounded copies of the weights, made anew after each step.
            self.trained = [p.detach().clone().requires_grad_() for p in self.trained]
            self.copies = list(model.to(torch.bfloat16).parameters())
        decays = [p for p in self.trained if p.dim() > 1]
        groups = [{"params": decays}, {"params": [p for p in self.trained if p.dim() == 1], "weight_decay": 0.0}]
        options = {"lr": job["lr"], "betas": job["betas"], "eps": job["adam_eps"], "weight_decay": job["weight_decay"]}
        self.optimizer = torch.optim.AdamW(groups, **options, **{way["adamw"]: True})
        self.run = torch.compile(model, dynamic=False) if way["compiled"] else model
        tokens = torch.randint(0, job["vocab_size"], (job["batch"], job["tokens"] + 1))
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self):
        """Seconds of a step."""
        start = device.now()
        with torch.autocast(device.kind(), torch.bfloat16, enabled=self.way["bf16"] == "autocast"):
            loss = self.run(self.tokens, self.targets)
        loss.backward()
        if self.copies is not None:
            for master, copy in zip(self.trained, self.copies):
                master.grad, copy.grad = copy.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.trained, self.job["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.copies is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.trained)
        loss.item()
        return device.now() - start


def described(way):
    parts = ["compiled" if way["compiled"] else "eager", f"AdamW {way['adamw']}"]
    return ", ".join(parts + ([f"bf16 {way['bf16']}"] if way["bf16"] else []))


class Peer:
    def __init__(self):
        # Models by dtype, all of one shape.
        self.trainings = {}

    def hello(self, request):
        device.prepare(request)
        return {"version": torch.__version__}

    def train(self, job):
        """Makes a model, its optimizer and a batch, and chooses the way; the reply names it."""
        way = self.choose(dict(job, tokens=min(job["tokens"], TRIAL_TOKENS)))
        self.trainings[job["dtype"]] = Training(job, way)
        # What a compiler does at the first step is no part of the others.
        self.trainings[job["dtype"]].step()
        return {"way": described(way)}

    def choose(self, job):
        seconds, errors = {}, []

        def trial(way):
            try:
                training = Training(job, way)
                seconds[tuple(way.items())] = min(training.step() for _ in range(1 + TRIALS))
            except Exception as error:
                errors.append(f"{described(way)}: {str(error).strip().splitlines()[0]}")

        for kind in [None] if job["dtype"] == "f32" else ["autocast", "weights"]:
            for compiled in (False, True):
                trial({"bf16": kind, "compiled": compiled, "adamw": "fused"})
        if not seconds:
            raise RuntimeError("; ".join(errors))
        trial(dict(min(seconds, key=seconds.get)) | {"adamw": "foreach"})
        return dict(min(seconds, key=seconds.get))

    def step(self, request):
        return {"seconds": self.trainings[request["dtype"]].step()}

    def drop(self, _):
        self.trainings = {}
        return {}


peer = Peer()
wire.serve({call: getattr(peer, call) for call in ("hello", "train", "step", "drop")})
