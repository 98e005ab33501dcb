"""The linear algebra of calibrated pooling: folds are exact, and what is the same up to a change of basis is found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cla_convert.conversion.group_fit import HeadShape, Moments, Projections, fit_group
from cla_convert.conversion.keys import fold_queries, mix_rotary
from cla_convert.conversion.refit import ridge_towards
from cla_convert.conversion.values import fold_free_queries, fold_outputs
from cla_convert.errors import InputError

TOKENS = 11


pytestmark = pytest.mark.usefixtures("one_thread")


def rotate(heads: Tensor, rotary_dim: int) -> Tensor:
    """RoPE on the first channels of [heads, T, D], halves paired."""
    half = rotary_dim // 2
    angle = torch.arange(heads.shape[1]).double()[:, None] * 100.0 ** -(torch.arange(half) / max(half, 1))
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = torch.complex(heads[..., :half], heads[..., half:rotary_dim]) * turn
    return torch.cat([turned.real, turned.imag, heads[..., rotary_dim:]], -1)


def attention(shape: HeadShape, reader: Projections, owner: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [heads, T, T] and output [T, hidden] of `reader`'s queries on `owner`'s K/V, all reading x [T, p]."""
    split = lambda weight, heads: (x @ weight.T).view(len(x), heads, -1).transpose(0, 1)  # noqa: E731
    query = rotate(split(reader.q, shape.heads), shape.rotary_dim)
    key, value = split(owner.k, shape.kv_heads), split(owner.v, shape.kv_heads)
    key = rotate(key, shape.rotary_dim).repeat_interleave(shape.repeat, 0)
    logits = query @ key.transpose(1, 2) / shape.head_dim**0.5
    heads = logits.softmax(-1) @ value.repeat_interleave(shape.repeat, 0)
    return logits, heads.transpose(0, 1).flatten(1) @ reader.o.T


def random_layer(shape: HeadShape, inputs: int) -> Projections:
    q, k, v = (
        torch.randn(n * shape.head_dim, inputs, dtype=torch.float64)
        for n in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return Projections(q, k, v, torch.randn(7, shape.heads * shape.head_dim, dtype=torch.float64))


def well_conditioned(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] * (0.5 + torch.rand(size))


def disguise(shape: HeadShape, layer: Projections) -> Projections:
    """The same layer in other bases: heads permuted, rotary keys times complex scalars, the rest in any basis."""
    order = torch.randperm(shape.kv_heads).tolist()
    dim, rotary, repeat = shape.head_dim, shape.rotary_dim, shape.repeat
    q, k, v = (w.view(-1, dim, w.shape[1]) for w in (layer.q, layer.k, layer.v))
    o = layer.o.view(len(layer.o), -1, dim)
    new_q, new_k, new_v, new_o = [], [], [], []
    for head in order:
        scale = torch.randn(rotary // 2, dtype=torch.complex128) + 0.3
        free, values = well_conditioned(dim - rotary), well_conditioned(dim)
        new_k.append(torch.cat([mix_rotary(k[head, :rotary], scale), free @ k[head, rotary:]]))
        new_v.append(values @ v[head])
        for i in range(head * repeat, (head + 1) * repeat):  # key times c: conj(q / conj(c)) (c k) = conj(q) k
            new_q.append(torch.cat([fold_queries(q[i, :rotary], 1 / scale), torch.linalg.inv(free).T @ q[i, rotary:]]))
            new_o.append(o[:, i] @ torch.linalg.inv(values))
    return Projections(torch.cat(new_q), torch.cat(new_k), torch.cat(new_v), torch.stack(new_o, 1).flatten(1))


def same_inputs(x: Tensor, members: int) -> Moments:
    second = x.T @ x / len(x)
    return Moments(second, x.mean(0), [second] * members, [second] * members)


@st.composite
def shapes(draw: st.DrawFn) -> HeadShape:
    kv_heads, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    return HeadShape(kv_heads * repeat, kv_heads, head_dim, draw(st.sampled_from(range(0, head_dim + 1, 2))))


@settings(max_examples=40)
@given(shape=shapes(), members=st.integers(2, 4), seed=st.integers(0, 1000), biased=st.booleans())
def test_layers_that_are_the_same_up_to_a_change_of_basis_are_recovered(
    shape: HeadShape, members: int, seed: int, biased: bool
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(64, 9, dtype=torch.float64)
    if biased:
        x[:, -1] = 1
    layers = [random_layer(shape, 9)]
    layers += [disguise(shape, layers[0]) for _ in range(members - 1)]

    fit = fit_group(shape, layers, same_inputs(x, members))

    assert fit.captured_k == pytest.approx(1) and fit.captured_v == pytest.approx(1)
    for old, new, permutation in zip(layers, fit.members, fit.permutations, strict=True):
        before, after = attention(shape, old, old, x[:TOKENS]), attention(shape, new, fit.members[0], x[:TOKENS])
        order = [h * shape.repeat + r for h in permutation for r in range(shape.repeat)]
        torch.testing.assert_close(after[0], before[0][order], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(after[1], before[1], rtol=1e-7, atol=1e-7)


def test_a_group_of_one_is_left_alone() -> None:
    shape = HeadShape(4, 2, 4, 4)
    layer = random_layer(shape, 5)
    assert fit_group(shape, [layer], same_inputs(torch.randn(9, 5).double(), 1)).members == [layer]


@settings(max_examples=20)
@given(shape=shapes(), seed=st.integers(0, 1000))
def test_each_change_of_basis_alone_leaves_the_layer_as_it_was(shape: HeadShape, seed: int) -> None:
    torch.manual_seed(seed)
    x, layer = torch.randn(TOKENS, 9, dtype=torch.float64), random_layer(shape, 9)
    other = disguise(shape, layer)
    torch.testing.assert_close(
        attention(shape, other, other, x)[1], attention(shape, layer, layer, x)[1], rtol=1e-7, atol=1e-7
    )


def test_folding_values_into_the_output_projection_is_exact() -> None:
    torch.manual_seed(0)
    outputs, member_map, shared = torch.randn(5, 4).double(), torch.randn(4, 4).double(), torch.randn(4).double()
    torch.testing.assert_close(fold_outputs(outputs, member_map) @ shared, outputs @ (member_map.T @ shared))


def test_folding_free_keys_into_the_queries_is_exact() -> None:
    torch.manual_seed(0)
    query, member_map, shared = torch.randn(4, 1).double(), torch.randn(4, 4).double(), torch.randn(4).double()
    torch.testing.assert_close(
        fold_free_queries(query, member_map)[:, 0] @ shared, query[:, 0] @ (member_map.T @ shared)
    )


def test_folding_a_complex_scale_commutes_with_rope() -> None:
    torch.manual_seed(0)
    scale = torch.randn(3, dtype=torch.complex128)
    query, key = torch.randn(2, 1, TOKENS, 6, dtype=torch.float64)
    scaled_key = mix_rotary(key[0].T, scale).T[None]
    folded_query = fold_queries(query[0].T, scale).T[None]
    torch.testing.assert_close(rotate(folded_query, 6) @ rotate(key, 6).mT, rotate(query, 6) @ rotate(scaled_key, 6).mT)


def test_a_member_that_captures_less_is_reported() -> None:
    torch.manual_seed(0)
    shape = HeadShape(2, 2, 4, 4)
    fit = fit_group(shape, [random_layer(shape, 16) for _ in range(2)], same_inputs(torch.randn(64, 16).double(), 2))
    assert 0.4 < fit.captured_k < 0.95 and 0.4 < fit.captured_v < 0.95


def test_head_matching_finds_the_order_of_the_heads() -> None:
    torch.manual_seed(0)
    shape = HeadShape(3, 3, 4, 4)
    layer = random_layer(shape, 16)
    order = [2, 0, 1]
    rows = [i * 4 + c for i in order for c in range(4)]
    other = Projections(layer.q[rows], layer.k[rows], layer.v[rows], layer.o[:, rows])
    fit = fit_group(shape, [layer, other], same_inputs(torch.randn(64, 16).double(), 2))
    assert fit.permutations == [(0, 1, 2), (1, 2, 0)]


def test_ridge_keeps_the_weights_where_nothing_needs_to_change_and_moves_them_where_it_does() -> None:
    torch.manual_seed(0)
    x, weight, target = torch.randn(50, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    gram = x.T @ x / 50
    torch.testing.assert_close(ridge_towards(weight, gram, gram @ weight.T, 1.0), weight)
    torch.testing.assert_close(ridge_towards(weight, gram, gram @ target.T, 1e-9), target, rtol=1e-6, atol=1e-6)


def test_ridge_of_each_output_is_its_own() -> None:
    torch.manual_seed(0)
    x, weight, target = torch.randn(50, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    gram, cross, strengths = x.T @ x / 50, x.T @ (x @ target.T) / 50, torch.tensor([0.1, 1.0, 10.0]).double()
    rows = [ridge_towards(weight, gram, cross, s.item())[i] for i, s in enumerate(strengths)]
    torch.testing.assert_close(ridge_towards(weight, gram, cross, strengths), torch.stack(rows))


def test_ridge_refuses_what_is_not_finite() -> None:
    """LAPACK's eigenvalues of such a matrix come back without a word."""
    weight, gram = torch.zeros(3, 64).double(), torch.full((64, 64), torch.nan).double()
    for strength in (0.1, torch.ones(3).double()):
        with pytest.raises(InputError, match="not finite"):
            ridge_towards(weight, gram, torch.zeros(64, 3).double(), strength)
