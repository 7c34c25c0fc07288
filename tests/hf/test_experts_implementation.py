"""The experts implementation "monge" against transformers' eager one, on a tiny model of every family."""

from __future__ import annotations

import pytest
import torch

import monge.hf
from monge.moe.compute import PATHS

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Mixtral": {"intermediate_size": 12, "num_local_experts": 4},
    "Qwen2Moe": {"moe_intermediate_size": 12, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8},
    "Olmoe": {"intermediate_size": 12, "num_experts": 4},
    "DeepseekV3": {
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "GraniteMoe": {"intermediate_size": 12, "num_local_experts": 4},
    "GraniteMoeShared": {"intermediate_size": 12, "num_local_experts": 4, "shared_intermediate_size": 8},
}


def tiny(family: str, dtype=torch.float32, **options):
    """A random model with weights large enough that its experts matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, p in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def run(model, implementation: str, tokens):
    """Logits and all gradients."""
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    logits = model(tokens).logits
    grad = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    grads = torch.autograd.grad(logits, list(model.parameters()), grad, allow_unused=True)
    return [logits.detach(), *grads]


def experts_of(model):
    """The experts of the first layer."""
    return next(m for m in model.modules() if hasattr(m, "is_concatenated"))


def routed(T: int, dtype):
    """Hidden states, two distinct experts of four, and gates; the floats require grad."""
    rng = torch.Generator().manual_seed(3)
    indices = torch.rand(T, 4, generator=rng).argsort(dim=1)[:, :2]
    x, gates = torch.randn(T, 16, generator=rng), torch.rand(T, 2, generator=rng)
    return x.to(dtype).requires_grad_(), indices, gates.to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def _registered():
    monge.hf.register_experts()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 200])
def test_the_model_equals_eager_forward_and_backward(family, length):
    """2 x 3 tokens take the compiled path, 2 x 200 the sorted one."""
    model = tiny(family)
    tokens = torch.randint(1, 32, (2, length), generator=torch.Generator().manual_seed(1))
    eager, ours = run(model, "eager", tokens), run(model, "monge", tokens)
    assert [g is None for g in eager] == [g is None for g in ours]
    for a, b in zip(ours, eager):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T", [1, 6, 400])
def test_the_experts_equal_eager_to_the_last_digits(family, T):
    """In float64, which some routers leave for float32: hence the experts alone."""
    model = tiny(family, torch.float64)
    x, indices, gates = routed(T, torch.float64)
    both = []
    for name in ("eager", "monge"):
        model.set_experts_implementation(name)
        out = experts_of(model)(x, indices, gates)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        both.append([out, *torch.autograd.grad(out, [x, gates, *experts_of(model).parameters()], grad)])
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_monge_that_computes(family, monkeypatch):
    called = []
    for name, path in list(PATHS.items()):
        monkeypatch.setitem(PATHS, name, lambda *a, path=path, name=name: called.append(name) or path(*a))
    run(tiny(family), "monge", torch.tensor([[1, 2, 3]]))
    assert called == ["gemv", "gemv"]  # one per layer


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float64_as_eager(family):
    tokens = torch.randint(1, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    low = tiny(family, torch.bfloat16)
    exact = tiny(family, torch.float64)
    exact.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    hidden, indices, gates = routed(48, torch.bfloat16)
    with torch.no_grad():
        exact.set_experts_implementation("eager")
        reference = experts_of(exact)(hidden.double(), indices, gates.double())
        errors = {}
        for name in ("eager", "monge"):
            low.set_experts_implementation(name)
            out = experts_of(low)(hidden, indices, gates)
            assert out.dtype == torch.bfloat16
            errors[name] = (out.double() - reference).norm() / reference.norm()
    assert errors["monge"] <= 1.1 * errors["eager"] <= 0.02
    assert torch.isfinite(low(tokens).logits).all()


def test_greedy_decoding_writes_the_same_tokens():
    model = tiny("Mixtral", torch.float64)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    written = {}
    for name in ("eager", "monge"):
        model.set_experts_implementation(name)
        written[name] = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist()
    assert written["monge"] == written["eager"]
    assert len(written["monge"][0]) == 17


def test_use_experts_is_the_one_line():
    model = tiny("Qwen3Moe")
    assert monge.hf.use_experts(model) is model
    assert model.config._experts_implementation == "monge"
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_other_gates_equal_eager(act):
    model = tiny("Mixtral", torch.float64, hidden_act=act)
    outputs = {}
    for name in ("eager", "monge"):
        model.set_experts_implementation(name)
        outputs[name] = experts_of(model)(*routed(9, torch.float64))
    torch.testing.assert_close(outputs["monge"], outputs["eager"], rtol=1e-12, atol=1e-12)


def test_what_has_no_path_is_refused_and_left_alone():
    model = tiny("Mixtral", hidden_act="relu")
    before = model.config._experts_implementation
    with pytest.raises(ValueError, match="MixtralExperts has the activation ReLU"):
        monge.hf.use_experts(model)
    assert model.config._experts_implementation == before
    with pytest.raises(ValueError, match="has no experts that transformers dispatches"):
        monge.hf.use_experts(torch.nn.Linear(2, 2))


def test_gates_of_their_own_are_refused():
    config = transformers.GptOssConfig(**{**SIZES, "head_dim": 8}, intermediate_size=12, num_local_experts=4)
    with pytest.raises(
        ValueError, match="GptOssExperts has interleaved gates and transposed weights and biases"
    ):
        monge.hf.use_experts(transformers.GptOssForCausalLM(config))


def test_experts_of_other_ranks_are_empty_slots():
    """Under expert parallelism transformers numbers them E."""
    model = tiny("Mixtral", torch.float64)
    model.set_experts_implementation("monge")
    experts = experts_of(model)
    x, weights = torch.randn(3, 16, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    indices = torch.tensor([[0, 4], [4, 4], [2, 1]])
    experts._is_expert_parallel = True
    ours = experts(x, indices, weights)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(ours, experts(x, indices, weights), rtol=1e-12, atol=1e-12)
    assert (ours[1] == 0).all()


def test_compiles_whole():
    torch._dynamo.reset()
    model = tiny("Mixtral")
    model.set_experts_implementation("monge")
    tokens = torch.tensor([[1, 2, 3, 4]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_experts_that_do_not_say_whether_they_are_parallel_may_be():
    """transformers before 5.18 marks the experts of other ranks by their number E alone."""
    model = tiny("Mixtral")
    monge.hf.use_experts(model)
    experts = experts_of(model)
    x, indices, gates = routed(6, torch.float32)
    expected = experts(x, indices, gates.where(indices < 3, 0))
    experts.__dict__.pop("_is_expert_parallel", None)
    found = experts(x, indices.where(indices < 3, 4), gates)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_accelerator_the_model_equals_eager(family, dtype):
    device = torch.accelerator.current_accelerator()
    model = tiny(family, dtype).to(device)
    tokens = torch.randint(1, 32, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    eager, ours = run(model, "eager", tokens), run(model, "monge", tokens)
    assert [g is None for g in eager] == [g is None for g in ours]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for a, b in zip(ours, eager):
        if b is not None and b.any():
            assert (a - b).norm() <= tolerance * b.norm()
