"""EAGLE-3's loss written for clarity: float64, one document, one slot, one step at a time; no code of the package."""

import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rope(x, position, theta):
    """x [heads, d]: pairs (j, j + d/2) turned by position * theta^(-2j/d)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1)


class Oracle:
    """The loss of ``documents`` under the parameters ``p`` (name → float64 tensor), and what goes with it."""

    def __init__(self, p, shape, theta, embedding, head, num_steps, decay):
        self.p, self.shape, self.theta = p, shape, theta
        self.embedding, self.head = embedding.double(), head.double()
        self.num_steps, self.decay = num_steps, decay
        self.ids = [j + int(offset) for j, offset in enumerate(p["d2t"])]

    def norm(self, name, x):
        return rms_norm(x, self.p[f"{name}.weight"], self.shape.rms_norm_eps)

    def qkv(self, token, feature, position):
        x = torch.cat(
            [
                self.norm("midlayer.input_layernorm", self.embedding[token]),
                self.norm("midlayer.hidden_norm", feature),
            ]
        )
        q, k, v = (
            (self.p[f"midlayer.self_attn.{name}_proj.weight"] @ x).view(-1, self.shape.head_dim) for name in "qkv"
        )
        return rope(q, position, self.theta), rope(k, position, self.theta), v

    def layer(self, feature, q, keys, values):
        group, out = self.shape.num_heads // self.shape.num_kv_heads, []
        for head in range(self.shape.num_heads):
            scores = torch.stack([q[head] @ k[head // group] for k in keys]) / math.sqrt(self.shape.head_dim)
            weights = torch.softmax(scores, 0)
            out.append(sum(w * v[head // group] for w, v in zip(weights, values, strict=True)))
        x = feature + self.p["midlayer.self_attn.o_proj.weight"] @ torch.cat(out)
        y = self.norm("midlayer.post_attention_layernorm", x)
        gate, up = self.p["midlayer.mlp.gate_proj.weight"] @ y, self.p["midlayer.mlp.up_proj.weight"] @ y
        return x + self.p["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def document(self, ids, mask, aux, last_hidden):
        """Per step: (sum of losses, supervised slots, hits); and per slot the row of hits."""
        length = len(ids)
        sums, counts, hits = [0.0] * self.num_steps, [0] * self.num_steps, [0] * self.num_steps
        features = [self.p["fc.weight"] @ aux[t] for t in range(length)]
        first = [self.qkv(ids[t + 1], features[t], t) for t in range(length - 1)]
        for t in range(length - 2):
            if not mask[t + 1]:
                continue
            keys, values = [k for _, k, _ in first[: t + 1]], [v for _, _, v in first[: t + 1]]
            q, feature = first[t][0], features[t]
            for i in range(self.num_steps):
                if t + 2 + i >= length or not all(mask[t + 1 : t + 3 + i]):
                    break
                if i > 0:
                    q, k, v = self.qkv(ids[t + 1 + i], feature, t + i)
                    keys, values = [*keys, k], [*values, v]
                feature = self.layer(feature, q, keys, values)
                logits = self.p["lm_head.weight"] @ self.norm("norm", feature)
                target = self.head @ last_hidden[t + 1 + i]
                best = int(target.argmax())
                counts[i] += 1
                hits[i] += self.ids[int(logits.argmax())] == best
                if best in self.ids:
                    p = torch.softmax(target[self.ids], 0)
                    sums[i] = sums[i] - (p * torch.log_softmax(logits, 0)).sum()
        return sums, counts, hits

    def loss(self, documents):
        """Σ_i decay^i · sum_i / count_i over all ``documents``, and the counts and hits of each step."""
        sums, counts, hits = ([0.0] * self.num_steps, [0] * self.num_steps, [0] * self.num_steps)
        for document in documents:
            for total, part in zip((sums, counts, hits), self.document(*document), strict=True):
                for i, value in enumerate(part):
                    total[i] = total[i] + value
        loss = sum(self.decay**i * s / max(c, 1) for i, (s, c) in enumerate(zip(sums, counts, strict=True)))
        return loss, counts, hits
