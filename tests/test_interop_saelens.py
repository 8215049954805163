"""Lorsas under SAELens's verbs, cache, hooks, error term and evaluation; its SAEs beside them."""

import pytest
import torch
import zoo

sae_lens = pytest.importorskip("sae_lens")

from sae_lens import SAE, HookedSAETransformer, StandardSAE, StandardSAEConfig  # noqa: E402
from sae_lens.evals import EvalConfig, run_evals  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402
from sae_lens.training.activations_store import ActivationsStore  # noqa: E402

from lorsa_lens import Lorsa, splice, zero_heads  # noqa: E402
from lorsa_lens.evaluation import evaluate  # noqa: E402
from lorsa_lens.interop import as_lorsa, as_sae, at_output, load_attention_sae  # noqa: E402
from lorsa_lens.interop.saelens import LorsaSAE  # noqa: E402

LAYER = 1
TOKENS = zoo.tokens()
OUT = f"blocks.{LAYER}.hook_attn_out"


def hooked(name):
    """A HookedSAETransformer with the weights of a model of the zoo."""
    plain = zoo.by_name(name).build(torch.float32)
    with zoo.quiet():
        model = HookedSAETransformer(plain.cfg, tokenizer=plain.tokenizer)
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.fixture(params=["learned", "learned-processed", "llama", "rotary-adjacent"])
def model(request):
    return hooked(request.param)


@pytest.fixture
def lorsa(model):
    """Not the layer itself: few heads stay."""
    return Lorsa.from_attention(model, LAYER, k=3)


def close(actual, expected, tolerance=2e-5):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


# ----------------------------------------------------------------------------------- the verbs


def test_run_with_saes_is_a_splice(model, lorsa):
    sae = as_sae(lorsa, model)
    with splice(model, lorsa):
        expected = model(TOKENS)
    assert not torch.allclose(expected, model(TOKENS), atol=1e-2)
    close(model.run_with_saes(TOKENS, saes=sae), expected)
    exact = as_sae(Lorsa.from_attention(model, LAYER), model)
    close(model.run_with_saes(TOKENS, saes=[exact]), model(TOKENS))


def test_the_cache_has_activations_and_patterns(model, lorsa):
    sae = as_sae(lorsa, model)
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    with splice(model, lorsa):
        _, expected = model.run_with_cache(TOKENS)
    ours = f"blocks.{LAYER}.attn.lorsa."
    for theirs, name in {
        "hook_sae_acts_post": "hook_acts_post",
        "hook_sae_acts_pre": "hook_acts_pre",
        "hook_sae_recons": "hook_recons",
        "hook_pattern": "hook_pattern",
        "hook_rot_q": "hook_rot_q",
    }.items():
        close(cache[f"{OUT}.{theirs}"], expected[ours + name])
    assert ((cache[f"{OUT}.hook_sae_acts_post"] != 0).sum(-1) == 3).all()


def test_interventions_count_and_the_error_term_keeps_the_rest(model, lorsa):
    sae = as_sae(lorsa, model)
    clean = model(TOKENS)
    close(model.run_with_saes(TOKENS, saes=sae, use_error_term=True), clean)
    head = int(lorsa.encode(torch.randn(1, 3, 32)).indices[0, 0, 0])
    for name, edit in (
        ("hook_sae_acts_post", zero_heads(range(0, lorsa.cfg.n_ov_heads, 2))),
        ("hook_pattern", lambda pattern, hook: pattern.roll(1, dims=-1)),
    ):
        ours = {"hook_sae_acts_post": "hook_acts_post"}.get(name, name)
        with splice(model, lorsa, error_term=True):
            hook = (f"blocks.{LAYER}.attn.lorsa.{ours}", edit)
            expected = model.run_with_hooks(TOKENS, fwd_hooks=[hook])
        with model.saes([sae], use_error_term=True):
            actual = model.run_with_hooks(TOKENS, fwd_hooks=[(f"{OUT}.{name}", edit)])
        close(actual, expected)
        assert (actual - clean).abs().max() > 1e-3, head


def test_the_model_is_as_it_was_afterwards(model, lorsa):
    before = model(TOKENS)
    model.run_with_saes(TOKENS, saes=as_sae(lorsa, model))
    assert torch.equal(model(TOKENS), before)
    assert not model.acts_to_saes
    with splice(model, lorsa):  # its own hook points were not touched
        pass


def test_a_bridge_runs_it_too():
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    with zoo.quiet():
        model = zoo.bridge(torch.float32, "Llama")
        model.__class__ = SAETransformerBridge
        model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    lorsa = Lorsa.from_attention(model, LAYER, k=3)
    with splice(model, lorsa):
        expected = model(TOKENS)
    close(model.run_with_saes(TOKENS, saes=as_sae(lorsa, model)), expected)


# ------------------------------------------------------------------------------- there and back


def test_saved_and_loaded_by_saelens(model, lorsa, tmp_path):
    sae = as_sae(lorsa, model, context_size=12)
    sae.save_model(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, LorsaSAE)
    assert loaded.cfg.metadata.hook_name_out == OUT
    assert loaded.cfg.metadata.context_size == 12
    x = torch.randn(2, 5, 32)
    assert torch.equal(loaded(x), sae(x))
    back = as_lorsa(loaded)
    with splice(model, lorsa):
        expected = model(TOKENS)
    with splice(model, back):
        close(model(TOKENS), expected)


def test_it_shares_nothing_with_the_lorsa_it_was_made_from(model, lorsa):
    x = torch.randn(1, 4, 32)
    before = lorsa(x)
    sae = as_sae(lorsa, model)
    sae.lorsa.W_O.data.zero_()
    as_lorsa(sae).b_O.data.fill_(1)
    assert torch.equal(lorsa(x), before)


def test_folding_decoder_norms_changes_nothing_that_is_written(model, lorsa):
    sae = as_sae(lorsa, model)
    x = torch.randn(2, 5, 32)
    before = sae(x)
    sae.fold_W_dec_norm()
    close(sae(x), before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(lorsa.cfg.n_ov_heads))


# ------------------------------------------------------------------------------------ evaluation


@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples")
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_saelens_evaluates_it(model, lorsa):
    datasets = pytest.importorskip("datasets")
    tokens = zoo.tokens(batch=8, pos=16, seed=3)
    sae = as_sae(lorsa, model, context_size=16, prepend_bos=False)
    store = ActivationsStore.from_sae(
        model, sae, dataset=datasets.Dataset.from_dict({"input_ids": tokens.tolist()}),
        streaming=False, store_batch_size_prompts=4, device="cpu",
    )  # fmt: skip
    config = EvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=2, compute_kl=True,
        compute_ce_loss=True, n_eval_sparsity_variance_batches=2, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    with at_output(sae, model):
        metrics, features = run_evals(
            sae, store, model, ActivationScaler(), config, exclude_special_tokens=False
        )
    ours = evaluate(model, lorsa, tokens)[0]
    theirs = metrics["model_performance_preservation"]
    assert theirs["ce_loss_without_sae"] == pytest.approx(ours.ce_clean, rel=1e-4)
    assert theirs["ce_loss_with_sae"] == pytest.approx(ours.ce_spliced, rel=1e-4)
    assert theirs["ce_loss_with_ablation"] == pytest.approx(ours.ce_zero, rel=1e-4)
    assert metrics["sparsity"]["l0"] == pytest.approx(3.0)
    variance = metrics["reconstruction_quality"]["explained_variance"]
    assert variance == pytest.approx(1 - ours.fvu, rel=1e-3)
    assert len(features["feature_density"]) == lorsa.cfg.n_ov_heads
    assert sae.cfg.metadata.hook_name == f"blocks.{LAYER}.ln1.hook_normalized"
    x = torch.randn(1, 4, 32)
    assert not torch.equal(sae(x), sae(2 * x))  # it reads what it is given again


# ------------------------------------------------------------------------- refused, and missing


def test_a_lorsa_before_a_norm_has_no_hook_to_write_to():
    model = hooked("gemma2")
    with pytest.raises(ValueError, match="a norm follows the attention of layer 1"):
        as_sae(Lorsa.from_attention(model, LAYER), model)
    behind = Lorsa.from_attention(model, LAYER, output_site="hook_attn_out", k=3)
    with splice(model, behind):
        expected = model(TOKENS)
    close(model.run_with_saes(TOKENS, saes=as_sae(behind, model)), expected)


def attention_sae(hook_name):
    cfg = StandardSAEConfig(d_in=8, d_sae=16, metadata=SAEMetadata(hook_name=hook_name))
    sae = StandardSAE(cfg)
    torch.nn.init.normal_(sae.W_enc)
    return sae


def test_saes_of_attention_outputs_are_loaded(tmp_path):
    sae = attention_sae("blocks.0.hook_attn_out")
    sae.save_model(tmp_path / "sae")
    loaded = load_attention_sae(tmp_path / "sae")
    x = torch.randn(3, 8)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    attention_sae("blocks.0.hook_mlp_out").save_model(tmp_path / "mlp")
    with pytest.raises(ValueError, match=r"reads blocks\.0\.hook_mlp_out: only one on hook_attn"):
        load_attention_sae(tmp_path / "mlp")
    with pytest.raises(FileNotFoundError, match=r"holds no cfg\.json, so no SAE is saved there"):
        load_attention_sae(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        load_attention_sae("nowhere", "layer_0")
