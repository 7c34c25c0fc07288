"""Ways to run one model: equal logits by every path, nothing left behind afterwards."""

from __future__ import annotations

import json

import pytest
import torch

from monge.cli import main
from monge.conversion import ConvertConfig, convert
from monge.conversion.evaluation.contenders import contenders, with_experts, without_ffns
from monge.conversion.ffn import find_ffns

IDS = torch.arange(12)[None]


def tiny_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@torch.no_grad()
def test_every_path_gives_the_same_logits():
    model = tiny_mixtral()
    before, wanted = model.config._experts_implementation, model(IDS).logits
    ways = contenders(None, model)
    assert list(ways) == [f"transformers {n}" for n in ("eager", "batched_mm", "grouped_mm")] + ["monge"]
    for way in ways.values():
        with way() as ready:
            torch.testing.assert_close(ready(IDS).logits, wanted)
        assert model.config._experts_implementation == before


def test_the_implementation_comes_back_after_an_error():
    model = tiny_mixtral()
    before = model.config._experts_implementation
    with pytest.raises(KeyError), with_experts(model, "eager"):
        raise KeyError
    assert model.config._experts_implementation == before


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_ffns_a_model_is_its_attention_and_head(family, tiny_model):
    model = tiny_model(family)
    ffns = find_ffns(model)
    wanted = model(IDS).logits
    with without_ffns(model, ffns) as bare:
        given = bare(IDS).logits
    zeros = [f.output_module.register_forward_hook(lambda *a: torch.zeros_like(a[2])) for f in ffns]
    torch.testing.assert_close(given, model(IDS).logits)
    for hook in zeros:
        hook.remove()
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=0)


def test_a_model_with_monges_layers_runs_as_it_is():
    import monge

    model = torch.nn.Sequential(monge.MoE(dim=8, hidden=4, num_experts=2, top_k=1))
    assert contenders(None, model) == {"monge": model}


def test_monge_bench_times_a_whole_model(tiny_folder, tiny_text, tmp_path, capsys):
    text, dense = tiny_text(), tiny_folder("llama")
    sizes = {"tokens": 512, "eval_tokens": 64, "length": 32, "experts": 4, "threads": 1}
    convert(dense, ConvertConfig(text=(text,), **sizes), out=tmp_path / "moe")
    out = tmp_path / "out"
    layer = ["--dim", "32", "--hidden", "8", "--experts", "4", "--active", "1", "--phases", "decode"]
    case = ["--layers", "--dtypes", "float32", "--repeats", "1", "--threads", "1"]
    models = ["--model", str(tmp_path / "moe/model"), "--against", str(dense)]
    prompt = ["--text", text, "--prompt", "16", "--decode", "2"]
    assert main(["bench", *layer, *case, *models, *prompt, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows if row["kind"] == "model"] == [
        "dense",
        "dense without FFNs",
        "transformers eager",
        "transformers batched_mm",
        "transformers grouped_mm",
        "monge",
    ]
    assert "Whole model" in capsys.readouterr().out
