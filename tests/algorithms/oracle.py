"""The losses of the EAGLE family written for clarity: float64, one document, one slot, one step, one head at a time.

No code of the package.  ``Eagle3Oracle`` covers EAGLE-3 and EAGLE-3.1, ``EagleOracle`` EAGLE-1/2 and HASS.
"""

import functools
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
    """The loss of ``documents`` under the parameters ``p`` (name → float64 tensor), and its counts."""

    def __init__(self, p, shape, theta, embedding, head, num_steps, decay):
        self.p, self.shape, self.theta = p, shape, theta
        self.embedding, self.head = embedding.double(), head.double()
        self.num_steps, self.decay = num_steps, decay
        self.names = [f"layers.{n}" for n in range(shape.num_layers)]
        self.position_id = lambda t: t

    def norm(self, name, x):
        return rms_norm(x, self.p[f"{name}.weight"], self.shape.rms_norm_eps)

    def qkv(self, layer, x, position):
        q, k, v = (
            (self.p[f"{layer}.self_attn.{name}_proj.weight"] @ x).view(-1, self.shape.head_dim) for name in "qkv"
        )
        return rope(q, position, self.theta), rope(k, position, self.theta), v

    def layer(self, name, residual, q, keys, values):
        group, out = self.shape.num_heads // self.shape.num_kv_heads, []
        for head in range(self.shape.num_heads):
            scores = torch.stack([q[head] @ k[head // group] for k in keys]) / math.sqrt(self.shape.head_dim)
            weights = torch.softmax(scores, 0)
            out.append(sum(w * v[head // group] for w, v in zip(weights, values, strict=True)))
        x = residual + self.p[f"{name}.self_attn.o_proj.weight"] @ torch.cat(out)
        y = self.norm(f"{name}.post_attention_layernorm", x)
        gate, up = self.p[f"{name}.mlp.gate_proj.weight"] @ y, self.p[f"{name}.mlp.up_proj.weight"] @ y
        return x + self.p[f"{name}.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def first_pass(self, ids, features):
        """Step 0 at every position that has a next token: keys and values of each layer."""
        entered = [self.enter(ids[t + 1], features[t]) for t in range(len(ids) - 1)]
        memory = []
        for n, name in enumerate(self.names):
            qkv = [self.qkv(name, x, self.position_id(t)) for t, (x, _) in enumerate(entered)]
            memory.append(([k for _, k, _ in qkv], [v for _, _, v in qkv]))
            if n + 1 < len(self.names):
                keys, values = memory[-1]
                outputs = [
                    self.layer(name, residual, qkv[t][0], keys[: t + 1], values[: t + 1])
                    for t, (_, residual) in enumerate(entered)
                ]
                entered = [(self.normed(n + 1, x), x) for x in outputs]
        return memory

    def chain(self, ids, features, memory, t):
        """The outputs of the steps of slot t, each teacher-forced on the token after the one before."""
        own = [([], []) for _ in self.names]
        feature = features[t]
        for i in range(self.num_steps):
            x, residual = self.enter(ids[t + 1 + i], feature)
            for n, name in enumerate(self.names):
                if n:
                    x = self.normed(n, residual)
                q, k, v = self.qkv(name, x, self.position_id(t) + i)
                if i > 0:
                    own[n][0].append(k)
                    own[n][1].append(v)
                keys, values = memory[n][0][: t + 1] + own[n][0], memory[n][1][: t + 1] + own[n][1]
                residual = self.layer(name, residual, q, keys, values)
            yield residual
            feature = self.feed_back(residual)

    def feed_back(self, output):
        return output

    def document(self, ids, mask, aux, last_hidden_state, runs):
        """Per step: sums of losses and hits over the slots that run it; counts over all that are supervised."""
        sums, counts, hits = [0.0] * self.num_steps, [0] * self.num_steps, [0] * self.num_steps
        features = [self.read(aux[t], last_hidden_state[t]) for t in range(len(ids))]
        memory = self.first_pass(ids, features)
        for t in range(len(ids) - 2):
            if not mask[t + 1]:
                continue
            for i, output in enumerate(self.chain(ids, features, memory, t)):
                if t + 2 + i >= len(ids) or not mask[t + 2 + i]:
                    break
                counts[i] += 1
                if runs(t, i):
                    loss, hit = self.label(output, last_hidden_state[t + 1 + i])
                    sums[i], hits[i] = sums[i] + loss, hits[i] + hit
        return sums, counts, hits

    def loss(self, documents, by_conversation=False, runs=lambda n, t, i: True, position_ids=lambda n, t: t):
        """Σ_i decay^i · sum_i / count_i over all ``documents``, and the counts and hits of each step.

        ``runs`` tells whether slot t of document n runs step i; the counts are of all slots.  ``position_ids`` maps
        position t of document n to its position in the rotary embedding.
        """
        sums, counts, hits, weights = ([0.0] * self.num_steps for _ in range(4))
        for n, document in enumerate(documents):
            self.position_id = functools.partial(position_ids, n)
            found, number, hit = self.document(*document, functools.partial(runs, n))
            for i in range(self.num_steps):
                counts[i], hits[i] = counts[i] + number[i], hits[i] + hit[i]
                share = 1 / max(number[i], 1) if by_conversation else 1
                sums[i], weights[i] = sums[i] + found[i] * share, weights[i] + number[i] * share
        loss = sum(self.decay**i * s / max(w, 1) for i, (s, w) in enumerate(zip(sums, weights, strict=True)))
        return loss, counts, hits


class Eagle3Oracle(Oracle):
    """EAGLE-3; the switches of EAGLE-3.1 are read off the shape."""

    def __init__(self, *args):
        super().__init__(*args)
        if self.shape.num_layers == 1:
            self.names = ["midlayer"]
        self.ids = [j + int(offset) for j, offset in enumerate(self.p["d2t"])]

    def read(self, aux, last_hidden_state):
        if self.shape.norm_before_fc:
            aux = self.norm("input_norm", aux)
        if self.shape.fc_norm:
            aux = torch.cat([self.norm(f"fc_norm.{n}", part) for n, part in enumerate(aux.chunk(3))])
        return self.p["fc.weight"] @ aux

    def enter(self, token, feature):
        first = self.names[0]
        embedding = self.norm(f"{first}.input_layernorm", self.embedding[token])
        return torch.cat([embedding, self.norm(f"{first}.hidden_norm", feature)]), feature

    def normed(self, n, x):
        return self.norm(f"{self.names[n]}.hidden_norm", x)

    def feed_back(self, output):
        return self.norm("norm", output) if self.shape.norm_output else output

    def label(self, output, last_hidden_state):
        logits, target = self.p["lm_head.weight"] @ self.norm("norm", output), self.head @ last_hidden_state
        best = int(target.argmax())
        hit = self.ids[int(logits.argmax())] == best
        if best not in self.ids:
            return 0.0, hit
        p = torch.softmax(target[self.ids], 0)
        return -(p * torch.log_softmax(logits, 0)).sum(), hit


class EagleOracle(Oracle):
    """EAGLE-1; more than one step is HASS."""

    def __init__(self, *args, vloss_w, ploss_w, topk_w, topk):
        super().__init__(*args)
        self.vloss_w, self.ploss_w, self.topk_w, self.topk = vloss_w, ploss_w, topk_w, topk

    def read(self, aux, last_hidden_state):
        return last_hidden_state

    def enter(self, token, feature):
        x = self.p["fc.weight"] @ torch.cat([self.embedding[token], feature]) + self.p["fc.bias"]
        return x, x

    def normed(self, n, x):
        return self.norm(f"{self.names[n]}.input_layernorm", x)

    def label(self, output, last_hidden_state):
        gap = output - last_hidden_state
        vloss = torch.where(gap.abs() < 1, 0.5 * gap * gap, gap.abs() - 0.5).mean()
        p = torch.softmax(self.head @ last_hidden_state, 0)
        log_q = torch.log_softmax(self.head @ output, 0)
        ploss = -(p * log_q).sum()
        likeliest = p.argsort(descending=True)[: self.topk]
        topk_loss = -(p[likeliest] * log_q[likeliest]).sum()
        hit = int(log_q.argmax()) == int(p.argmax())
        return self.vloss_w * vloss + self.ploss_w * ploss + self.topk_w * topk_loss, hit
