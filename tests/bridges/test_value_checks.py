"""Code of models that looks at values although a fixed program can do without: CTC targets, checks before a clamp, assertions."""

from __future__ import annotations

import bridge_scripts
import captured_parity
import checked_models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DetrConfig, HubertConfig, HubertForCTC
from transformers.models.detr.modeling_detr import DetrEncoderLayer

from polyaccel.errors import PrepareError


class Recognizer(nn.Module):
    """Selects its targets as scripts do; -100 may stand anywhere in a row."""

    def __init__(self, select):
        super().__init__()
        self.layer, self.select = nn.Linear(4, 6), select

    def forward(self, x, labels):
        mask = labels >= 0
        log_probs = self.layer(x).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((x.shape[0],), x.shape[1])
        return F.ctc_loss(log_probs, self.select(labels, mask), lengths, mask.sum(-1))


def batch() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 12, 4), torch.tensor([[1, 2, -100, 3], [-100, 5, 5, -100], [4, 1, 2, 2]])]


def step(modules, x, labels):
    return modules["model"](x, labels)


@pytest.mark.parametrize(
    "select",
    [
        lambda labels, mask: labels.masked_select(mask),
        lambda labels, mask: labels[mask],
        lambda labels, mask: torch.masked_select(labels, mask).to(torch.int32),
    ],
)
def test_targets_of_the_ctc_loss_may_be_selected_with_a_mask(select):
    assert captured_parity.train_both(step, {"model": Recognizer(select)}, batch()).worst < 1e-5


def test_another_use_of_selected_labels_is_refused():
    model = Recognizer(lambda labels, mask: labels[mask] + 1)
    with pytest.raises(PrepareError, match="of elements that a mask selects"):
        captured_parity.train_both(step, {"model": model}, batch())


def test_hubert_learns_from_padded_text():
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(10, 3),
        conv_stride=(5, 4), num_feat_extract_layers=2, vocab_size=12, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        apply_spec_augment=False,
    )  # fmt: skip
    labels = torch.tensor([[3, 4, 4, 5], [7, 8, -100, -100]])
    torch.manual_seed(0)
    parity = captured_parity.train_both(
        lambda modules, x, y: modules["model"](input_values=x, labels=y).loss,
        {"model": HubertForCTC(config).train()},
        [torch.randn(2, 400), labels],
        floor=1e-3,  # the bias of a key projection has gradient 0
    )
    assert parity.worst < 1e-4


def test_a_layer_that_clamps_what_is_not_finite_is_captured():
    layer = DetrEncoderLayer(DetrConfig(d_model=8, encoder_attention_heads=2, encoder_ffn_dim=16, dropout=0.0)).train()
    torch.manual_seed(0)
    parity = captured_parity.train_both(
        lambda modules, x: modules["model"](x, None).square().mean(),
        {"model": layer},
        [torch.randn(2, 3, 8)],
        floor=1e-3,
    )
    assert parity.worst < 1e-4


def test_the_same_check_of_other_code_is_the_read_of_a_value():
    class Cleaned(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            if not torch.isfinite(out).all():
                out = torch.zeros_like(out)
            return out

    with pytest.raises(PrepareError, match="uses the value of a tensor"):
        captured_parity.train_both(lambda m, x: m["model"](x).mean(), {"model": Cleaned(2, 2)}, [torch.randn(3, 2)])


def check(x: torch.Tensor, checking, **options):
    torch.manual_seed(0)
    model = checked_models.Checked(checking, **options)
    return captured_parity.train_both(lambda m, x: m["model"](x).square().mean(), {"model": model}, [x])


@pytest.mark.parametrize("checking", checked_models.CHECKS)
def test_a_branch_that_only_raises_is_not_taken(checking):
    assert check(torch.rand(4, 3) + 0.1, checking).worst < 1e-6


def test_where_it_would_have_raised_loss_and_gradients_are_nan():
    model = checked_models.Checked(checked_models.asserting)
    x = torch.tensor([[1.0, 2.0, -3.0]])
    with pytest.raises(AssertionError, match="must be positive"):
        model(x)
    accelerator = bridge_scripts.on_jax(1)
    model = accelerator.prepare(model)
    assert torch.isfinite(model(x.abs())).all()
    loss = model(x).square().mean()
    accelerator.backward(loss)
    assert loss.isnan()
    assert model.layer.weight.grad.isnan().all()


def test_a_checkpointed_block_may_check_too():
    assert check(torch.rand(4, 3) + 0.1, checked_models.asserting, is_checkpointed=True).worst < 1e-6


@pytest.mark.parametrize("checking", checked_models.REFUSED)
def test_a_check_that_another_way_leads_on_from_is_refused(checking):
    with pytest.raises(PrepareError, match=r"uses the value of a tensor.*checked_models\.py"):
        check(torch.rand(4, 3) + 0.1, checking)


def test_a_check_without_a_floating_output_is_refused():
    model = bridge_scripts.on_jax(1).prepare(Ranks())
    with pytest.raises(PrepareError, match=r"checked_models\.py:\d+ raises depends on the value"), torch.no_grad():
        model(torch.rand(4, 3) + 0.1)


class Ranks(nn.Module):
    """Gives integers alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        checked_models.asserting(x)
        return self.layer(x).argmax(-1)


def test_torchs_own_check_of_a_tensor_gives_nan_where_it_would_raise():
    # What transformers compares the number of image tokens with that of patches by; holds the lowering of `aten._is_all_true.default`.
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            torch._check_tensor_all(x.sum(-1) < 100, lambda: f"{x} is too large")
            return self.layer(x)

    model = bridge_scripts.on_jax().prepare(Checked())
    with torch.no_grad():
        assert model(torch.ones(2, 3)).isfinite().all()
        assert model(torch.full((2, 3), 40.0)).isnan().all()
