"""Reference of each method's initialization and steps: dense float64, from the papers' formulas.

A layer's tensors have the project's names: A (m, r), B (n, r), U (m, r), R (r, r), V (n, r),
M (r̂, r̂), and DoRA's magnitudes, "size" (m,). Random draws are data: they are taken from the run
under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from scalora_dist.layers.lora_init import lora_init
from tests.support import reference as scalora

Own = dict[str, Tensor]
Options = Mapping[str, Any]
BETAS = (0.9, 0.999)


@dataclass
class Layer:
    """One layer with full tensors.

    Attributes:
        name: name of W in the model.
        W: weight (m, n).
        own: {name: tensor that the method added}.
        m: {name: AdamW's first moment of a trained tensor}.
        v: {name: AdamW's second moment of a trained tensor}.
    """

    name: str
    W: Tensor
    own: Own
    m: Own = field(default_factory=dict)
    v: Own = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """One method, as functions.

    Attributes:
        weight: (W, own, options) → the layer's effective weight.
        start: (name, W, the run's own tensors at its start, ∇W of the samples, options) → (W, own).
        trained: names in ``own`` that are trained.
        count: (m, n, r) → number of trained elements of a layer; None: every parameter is trained.
        change: (layer, G, gradients, options and the step's number from 1 as "step"): edit in place
            between backward and step.
        after: (layer, options, steps taken): edit in place after the step.
        rate: (name, options, steps taken) → factor of the learning rate.
    """

    weight: Callable[[Tensor, Own, Options], Tensor]
    start: Callable[[str, Tensor, Own, Tensor | None, Options], tuple[Tensor, Own]]
    trained: tuple[str, ...]
    count: Callable[[int, int, int], int] | None
    change: Callable[[Layer, Tensor, Own, Options], None] = lambda layer, G, grads, o: None
    after: Callable[[Layer, Options, int], None] = lambda layer, o, steps: None
    rate: Callable[[str, Options, int], float] = lambda name, o, steps: 1.0


# --- training ------------------------------------------------------------------------------------


def mean_loss(model: nn.Module, weights: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
    """The mean loss over a batch's target tokens, with ``weights`` instead of the model's own."""
    inputs = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}
    logits = functional_call(model, dict(weights), (), {**inputs, "use_cache": False}).logits
    labels = torch.tensor(batch["labels"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(
    model: nn.Module, weights: Mapping[str, Tensor], batch: Mapping[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient ∂ℓ/∂W of each of ``weights``."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = mean_loss(model, leaves, batch)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, found, strict=True))


def train(
    method: Reference,
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Mapping[str, Any]],
    options: Options,
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Train. Returns each step's loss, and the effective weights at the start and after each step.

    Losses are one per batch; weights one more.
    """

    def weights() -> dict[str, Tensor]:
        return {layer.name: method.weight(layer.W, layer.own, options) for layer in layers}

    losses, seen = [], [weights()]
    for taken, batch in enumerate(batches):
        loss, G = gradients(model, seen[-1], batch)
        losses.append(loss)
        grads = [factor_gradients(method, layer, G[layer.name], options) for layer in layers]
        now = {**options, "step": taken + 1, "clip": clipping(grads, options["max_grad_norm"])}
        for layer, own in zip(layers, grads, strict=True):
            method.change(layer, G[layer.name], own, now)
        clip = clipping(grads, options["max_grad_norm"])
        for layer, own in zip(layers, grads, strict=True):
            for name, gradient in own.items():
                lr = options["learning_rate"] * method.rate(name, options, taken)
                adamw_step(layer, name, clip * gradient, taken + 1, lr, options["adam_epsilon"])
            method.after(layer, options, taken + 1)
        seen.append(weights())
    return losses, seen


def clipping(grads: Sequence[Own], limit: float) -> float:
    """What clipping multiplies these gradients by; no limit: 0."""
    norm = float(sum(g.square().sum() for own in grads for g in own.values()) ** 0.5)
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0


def factor_gradients(method: Reference, layer: Layer, G: Tensor, options: Options) -> Own:
    """Gradients of the trained tensors from G = ∂ℓ/∂W, by autograd of ``weight``: ∇A = s·G B, …"""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in layer.own.items()}
    own = [leaves[name] for name in method.trained]
    found = torch.autograd.grad(method.weight(layer.W, leaves, options), own, G)
    return dict(zip(method.trained, (g.clone() for g in found), strict=True))


def adamw_step(layer: Layer, name: str, g: Tensor, step: int, lr: float, epsilon: float) -> None:
    m, v = (moments.get(name, torch.zeros_like(g)) for moments in (layer.m, layer.v))
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
    layer.m[name], layer.v[name] = m, v
    first, second = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
    layer.own[name] = layer.own[name] - lr * first / (second.sqrt() + epsilon)


# --- what a layer computes -----------------------------------------------------------------------


def s_lora(o: Options, n: int) -> float:
    return o["lora_alpha"] / o["rank"]


def s_rslora(o: Options, n: int) -> float:
    return o["lora_alpha"] / math.sqrt(o["rank"])


def s_lora_alpha(o: Options, n: int) -> float:
    alpha = 256 * math.sqrt(o["rank"])
    if o["alpha_variant"] == "II":
        alpha = math.sqrt(3 * n * o["rank"])
    return o["alpha_multiplier"] * alpha / o["rank"]


def low_rank(s: Callable[[Options, int], float]) -> Callable[[Tensor, Own, Options], Tensor]:
    return lambda W, own, o: W + s(o, W.shape[1]) * own["A"] @ own["B"].T


def core(s: Callable[[Options, int], float]) -> Callable[[Tensor, Own, Options], Tensor]:
    return lambda W, own, o: W + s(o, W.shape[1]) * own["U"] @ own["R"] @ own["V"].T


def dora(W: Tensor, own: Own, o: Options) -> Tensor:
    """m ⊙ V / ‖V‖ by rows, with V = W + s·A Bᵀ; no gradient through the norm (DoRA, section 4.3)"""
    V = low_rank(s_lora)(W, own, o)
    return own["size"][:, None] * V / V.detach().norm(dim=1, keepdim=True)


def hira(W: Tensor, own: Own, o: Options) -> Tensor:
    return W + W * (own["A"] @ own["B"].T)


def mora(W: Tensor, own: Own, o: Options) -> Tensor:
    return W + mora_outputs(torch.eye(W.shape[1], dtype=W.dtype), own["M"], W.shape[0]).T


def mora_outputs(x: Tensor, M: Tensor, out_features: int) -> Tensor:
    """MoRA's equation 9 on rows x (k, n): rotates the complex (z_i, z_{i + r̂/2}) of each piece."""
    side, (k, n) = len(M), x.shape
    pieces = math.ceil(n / side)
    z = x[:, torch.arange(pieces * side) % n].view(k, pieces, side)
    z = torch.complex(z[..., : side // 2], z[..., side // 2 :])
    frequencies = 10000.0 ** (-2 * torch.arange(side // 2, dtype=x.dtype) / side)
    angles = torch.arange(pieces, dtype=x.dtype)[:, None] * frequencies
    z = z * torch.polar(torch.ones_like(angles), angles)
    y = (torch.cat([z.real, z.imag], dim=-1) @ M.T).reshape(k, -1)
    return y[:, torch.arange(out_features) % y.shape[1]]


# --- how it starts -------------------------------------------------------------------------------


def start_lora(
    name: str, W: Tensor, found: Own, G: Tensor | None, o: Options
) -> tuple[Tensor, Own]:
    m, n = W.shape
    layer = name.removesuffix(".weight")
    _, B = lora_init(layer, m, n, o["rank"], seed=o["seed"], dtype=torch.float32)
    return W, {"A": torch.zeros(m, o["rank"], dtype=W.dtype), "B": B.double()}


def start_dora(name: str, W: Tensor, found: Own, G: Any, o: Options) -> tuple[Tensor, Own]:
    return W, {**start_lora(name, W, found, G, o)[1], "size": W.norm(dim=1)}


def start_hira(name: str, W: Tensor, found: Own, G: Any, o: Options) -> tuple[Tensor, Own]:
    return W, {"A": torch.zeros_like(found["A"]), "B": found["B"]}


def start_mora(name: str, W: Tensor, found: Own, G: Any, o: Options) -> tuple[Tensor, Own]:
    m, n = W.shape
    side = mora_side(m, n, o["rank"])
    return W, {"M": torch.zeros(side, side, dtype=W.dtype)}


def mora_side(m: int, n: int, r: int) -> int:
    side = math.floor(math.sqrt((m + n) * r))
    return side - side % 2


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh.T


def alike(columns: Tensor, found: Tensor) -> Tensor:
    """The sign ±1 (r,) that turns each column to the one found. An SVD leaves signs free."""
    return torch.where((columns * found).sum(0) < 0, -1.0, 1.0).double()


def init_lora_xs(name: str, W: Tensor, found: Own, G: Any, o: Options) -> tuple[Tensor, Own]:
    U, S, V = (part[..., : o["rank"]] for part in svd(W))
    sign = alike(V, found["V"])
    return W, {"U": U * S * sign, "V": V * sign, "R": found["R"]}


def init_lora_sb(
    name: str, W: Tensor, found: Own, G: Tensor | None, o: Options
) -> tuple[Tensor, Own]:
    """LoRA-SB: the SVD of −η·sign(ΣG), with R = Σ_r (equations 7 and 8 with s = 1)."""
    assert G is not None
    U, S, V = (part[..., : o["rank"]] for part in svd(-lora_sb_eta(o) * G.sign()))
    sign = alike(V, found["V"])
    return W, {"U": U * sign, "V": V * sign, "R": torch.diag(S)}


def lora_sb_eta(o: Options) -> float:
    """The learning rate; or that of the first warm-up step, of a run in steps of 3 examples."""
    if o.get("sb_eta", "paper") == "paper":
        return o["learning_rate"]
    steps = math.ceil(o["max_steps"] * o["train_batch_size"] / 3)
    return o["learning_rate"] / (o["warmup_ratio"] * steps)


def init_pissa(name: str, W: Tensor, found: Own, G: Any, o: Options) -> tuple[Tensor, Own]:
    U, S, V = (part[..., : o["rank"]] for part in svd(W))
    s = s_lora(o, W.shape[1])
    root, sign = (S / s).sqrt(), alike(V, found["B"])
    A, B = U * root * sign, V * root * sign
    return W - s * A @ B.T, {"A": A, "B": B}


def init_lora_ga(
    name: str, W: Tensor, found: Own, G: Tensor | None, o: Options
) -> tuple[Tensor, Own]:
    """LoRA-GA, and W −= s·A Bᵀ.

    A is the second r left singular vectors times Σ·m^¼/√16. B is the first r right ones.
    """
    assert G is not None
    r, (U, S, V) = o["rank"], svd(G)
    A = (U * S)[:, r : 2 * r] * len(W) ** 0.25 / 16**0.5
    A, B = A * alike(A, found["A"]), V[:, :r] * alike(V[:, :r], found["B"])
    return W - s_lora(o, W.shape[1]) * A @ B.T, {"A": A, "B": B}


# --- what happens while training -----------------------------------------------------------------


def rescale(layer: Layer, G: Tensor, grads: Own, o: Options) -> None:
    """ScaLoRA's transform, from the formulas in ``reference``."""
    s = s_lora(o, G.shape[1])
    W, A, B, whole, gA, gB = (
        tensor.numpy() for tensor in (layer.W, layer.own["A"], layer.own["B"], G, *grads.values())
    )
    moments = [of.get(name, 0 * layer.own[name]) for name in "AB" for of in (layer.m, layer.v)]
    low, high = (float(bound) for bound in o["scale_bounds"].split())
    state = scalora.State(W, A, B, gA, gB, *(moment.numpy() for moment in moments))
    if o["scaling_rule"] == "paper":
        alpha, beta, _ = scalora.scales(whole, A, B, s, o["eta_lipschitz"], (low, high))
    else:
        assert o["scaling_rule"] == "adamw"
        how: dict[str, Any] = {"step": o["step"], "clip": o["clip"], "epsilon": o["adam_epsilon"]}
        alpha, beta = scalora.adamw_scales(state, s, o["eta_lipschitz"], (low, high), **how)
    state = scalora.transform(state, alpha, beta, s)
    layer.W = torch.from_numpy(state.W)
    layer.own = {"A": torch.from_numpy(state.A), "B": torch.from_numpy(state.B)}
    layer.m = {"A": torch.from_numpy(state.m_A), "B": torch.from_numpy(state.m_B)}
    layer.v = {"A": torch.from_numpy(state.v_A), "B": torch.from_numpy(state.v_B)}
    grads |= {"A": torch.from_numpy(state.grad_A), "B": torch.from_numpy(state.grad_B)}


def project(layer: Layer, G: Tensor, grads: Own, o: Options) -> None:
    s = s_lora(o, G.shape[1])
    grads |= dict(zip("AB", lora_pro(layer.own["A"], layer.own["B"], G, s), strict=True))


def lora_pro(A: Tensor, B: Tensor, G: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """LoRA-Pro's gradients: the minimiser of ‖Tθ − G‖ that is nearest to ∇ = (∇A, ∇B).

    θ = (dA, dB) and Tθ = s(dA Bᵀ + A dBᵀ). So θ = ∇ + T⁺(G − T∇) with T⁺ = Tᵀ(T Tᵀ)⁺. Here
    T Tᵀ X = s²(X B Bᵀ + A Aᵀ X). In the eigenvectors of A Aᵀ and B Bᵀ, it multiplies the entry
    (i, j) of X by s²(a_i² + b_j²).
    """
    (U, a), (V, b) = (torch.linalg.svd(factor)[:2] for factor in (A, B))
    a, b = F.pad(a, (0, len(A) - len(a))), F.pad(b, (0, len(B) - len(b)))
    sizes = s**2 * (a[:, None] ** 2 + b**2)
    grad_A, grad_B = s * G @ B, s * G.T @ A
    missing = U.T @ (G - s * (grad_A @ B.T + A @ grad_B.T)) @ V
    Y = U @ torch.where(sizes > 0, missing / sizes, torch.zeros_like(G)) @ V.T
    return grad_A + s * Y @ B, grad_B + s * Y.T @ A


def restart(layer: Layer, o: Options, steps: int) -> None:
    """ReLoRA: merge, A = 0, re-initialize B, and zero the smallest part of m and the same of v."""
    if steps % o["relora_interval"]:
        return
    layer.W = low_rank(s_lora)(layer.W, layer.own, o)
    name = f"{layer.name.removesuffix('.weight')} after {steps} steps"
    _, layer.own = start_lora(name, layer.W, layer.own, None, o)
    for key, first in layer.m.items():
        smallest = first.flatten().abs().argsort()[: int(o["relora_prune"] * first.numel())]
        for moments in (layer.m, layer.v):
            pruned = moments[key].flatten().index_fill(0, smallest, 0.0)
            moments[key] = pruned.view(first.shape)


def warmed_up(name: str, o: Options, steps: int) -> float:
    """ReLoRA's factor of the rate: after a restart it rises from 1/(w + 1) to 1 in w + 1 steps."""
    since, rise = steps % o["relora_interval"], o["relora_warmup_steps"] + 1
    return 1.0 if steps < o["relora_interval"] else min(1.0, (since + 1) / rise)


# --- all of them ---------------------------------------------------------------------------------


def both(m: int, n: int, r: int) -> int:
    return r * (m + n)


LORA = Reference(low_rank(s_lora), start_lora, ("A", "B"), both)


def like_lora(**others: Any) -> Reference:
    return Reference(**{**vars(LORA), **others})


CORE = Reference(core(s_lora), init_lora_xs, ("R",), lambda m, n, r: r * r)

REFERENCES: dict[str, Reference] = {
    "scalora": like_lora(change=rescale),
    "lora": LORA,
    "rslora": like_lora(weight=low_rank(s_rslora)),
    "lora-alpha": like_lora(weight=low_rank(s_lora_alpha)),
    "lora-plus": like_lora(rate=lambda name, o, steps: o["lr_ratio"] if name == "A" else 1.0),
    "lora-pro": like_lora(change=project),
    "relora": like_lora(after=restart, rate=warmed_up),
    "lora-xs": CORE,
    "lora-sb": Reference(core(lambda o, n: 1.0), init_lora_sb, CORE.trained, CORE.count),
    "mora": Reference(mora, start_mora, ("M",), lambda m, n, r: mora_side(m, n, r) ** 2),
    "full": Reference(
        lambda W, own, o: own["W"], lambda name, W, *_: (W, {"W": W}), ("W",), count=None
    ),
    "peft-lora": LORA,
    "dora": Reference(dora, start_dora, ("A", "B", "size"), lambda m, n, r: both(m, n, r) + m),
    "hira": Reference(hira, start_hira, ("A", "B"), both),
    "pissa": like_lora(start=init_pissa),
    "lora-ga": like_lora(start=init_lora_ga),
}
