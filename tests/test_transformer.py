"""Encoder and decoder: pre-norm against the paper's equations, attention implementations, checkpointing."""

import pytest
import torch
from conftest import padded_batch, random_labels, randomise_norms, tiny_model
from torch.nn import functional as F


def attention_by_hand(module, query, key, value):
    """float64 multi-head attention from the projections' weights."""

    def project(layer, x):
        return x @ layer.weight.double().T + layer.bias.double()

    heads = query.shape[-1] // module.head_dim
    q, k, v = (
        project(layer, x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for layer, x in ((module.q_proj, query), (module.k_proj, key), (module.v_proj, value))
    )
    weights = (q @ k.transpose(-1, -2) / module.head_dim**0.5).softmax(-1)
    return project(module.o_proj, (weights @ v).transpose(1, 2).flatten(2))


def test_pre_norm_is_the_papers_other_variant():
    """x + f(norm(x)) in every block, positions after the norm, and a norm that closes the encoder."""
    model = tiny_model(pre_norm=True).double()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    out = model(images, output_hidden_states=True)
    positions = model.model.position_embedding(2, 3, None, torch.device("cpu")).double()  # 64 x 96 at stride 32
    x = out.encoder_hidden_states[0]

    def norm(layer, values):
        return F.layer_norm(values, values.shape[-1:], layer.weight, layer.bias)

    def feed_forward(layer, values):
        return layer.mlp.fc2(layer.mlp.fc1(norm(layer.final_layer_norm, values)).relu())

    for layer in model.model.encoder.layers:
        y = norm(layer.self_attn_layer_norm, x)
        x = x + attention_by_hand(layer.self_attn, y + positions, y + positions, y)
        x = x + feed_forward(layer, x)
    memory = norm(model.model.encoder.layernorm, x)
    torch.testing.assert_close(out.encoder_last_hidden_state, memory, atol=1e-5, rtol=1e-5)
    queries = model.model.query_position_embeddings.weight[None]
    x = torch.zeros_like(queries)
    for layer in model.model.decoder.layers:
        y = norm(layer.self_attn_layer_norm, x)
        x = x + attention_by_hand(layer.self_attn, y + queries, y + queries, y)
        y = norm(layer.encoder_attn_layer_norm, x)
        x = x + attention_by_hand(layer.encoder_attn, y + queries, memory + positions, memory)
        x = x + feed_forward(layer, x)
    torch.testing.assert_close(out.last_hidden_state, norm(model.model.decoder.layernorm, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree_on_padded_batches(implementation):
    model = tiny_model(attn_implementation="eager")
    images, mask = padded_batch([(64, 96), (96, 64)])
    with torch.no_grad():
        expected = model(images, mask)
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        with torch.compiler.set_stance("force_eager"):  # flex_attention without the minutes that its kernels take
            actual = model(images, mask)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_attention_weights_come_back_whatever_the_implementation_and_ignore_padding():
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    images, mask = padded_batch([(64, 96), (128, 64)])
    out = model(images, mask, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, model(images, mask).logits, atol=1e-5, rtol=1e-5)
    assert [len(x) for x in (out.encoder_attentions, out.decoder_attentions, out.cross_attentions)] == [2, 3, 3]
    assert [len(x) for x in (out.encoder_hidden_states, out.decoder_hidden_states)] == [3, 4]
    cross = out.cross_attentions[0]  # (B, heads, Q, hw), the grid is 4 x 3 at stride 32
    assert cross.shape == (2, 4, 12, 12)
    torch.testing.assert_close(cross.sum(-1), torch.ones(2, 4, 12))
    grid = cross.unflatten(-1, (4, 3))
    assert grid[0, :, :, 2:].max() == 0  # the first image is 2 cells high
    assert grid[1, :, :, :, 2:].max() == 0  # the second is 2 cells wide
    torch.testing.assert_close(out.encoder_hidden_states[-1], out.encoder_last_hidden_state)
    torch.testing.assert_close(out.decoder_hidden_states[-1], out.last_hidden_state)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model(dropout=0.0).train()
    images, labels = torch.randn(2, 3, 64, 64), random_labels([1, 2])

    def gradients():
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


def test_no_graph_break_under_compile():
    model = tiny_model()
    images, mask = padded_batch([(64, 96), (96, 64)])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)
        assert compiled(images, mask).logits.isfinite().all()  # a padded batch goes through whole: no graph break


def test_tuples_instead_of_outputs():
    model = tiny_model()
    images = torch.randn(1, 3, 64, 64)
    logits, boxes, *_ = model(images, return_dict=False)
    assert torch.equal(logits, model(images).logits)
    assert boxes.shape == (1, 12, 4)
