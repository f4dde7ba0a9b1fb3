"""Several models, frozen ones, models of transformers, and what may come out of a model."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import assert_same_on_jax, on_jax
from torch import nn

from polyaccel.errors import PrepareError

torch.set_num_threads(1)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_a_gan_trains_in_the_loop_of_the_dcgan_tutorial():
    def script(acc):
        generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        critic = mlp(2, 8, 1)
        opt_d, opt_g = sgd(critic, 0.05), sgd(generator, 0.05)
        generator, critic, opt_d, opt_g = acc.prepare(generator, critic, opt_d, opt_g)
        criterion = nn.BCEWithLogitsLoss()
        seen = []
        for _ in range(3):
            real = torch.randn(8, 2) + 2
            label = torch.full((8,), 1.0)
            opt_d.zero_grad()
            err_real = criterion(critic(real).view(-1), label)
            acc.backward(err_real)
            fake = generator(torch.randn(8, 3))
            label.fill_(0.0)
            err_fake = criterion(critic(fake.detach()).view(-1), label)
            acc.backward(err_fake)
            opt_d.step()
            opt_g.zero_grad()
            label.fill_(1.0)
            err_g = criterion(critic(fake).view(-1), label)
            acc.backward(err_g)
            opt_g.step()
            seen += [err_real.item() + err_fake.item(), err_g.item(), fake.mean().item()]
        return seen, dict(generator.state_dict()), dict(critic.state_dict())

    assert_same_on_jax(script)
    assert_same_on_jax(lambda acc: script_without_batch_norm(acc), num_devices=4)


def script_without_batch_norm(acc):
    generator, critic = mlp(3, 8, 2), mlp(2, 8, 1)
    opt_d, opt_g = sgd(critic, 0.05), sgd(generator, 0.05)
    generator, critic, opt_d, opt_g = acc.prepare(generator, critic, opt_d, opt_g)
    for _ in range(2):
        fake = generator(torch.randn(8, 3))
        loss_d = F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(torch.randn(8, 2))).mean()
        opt_d.zero_grad()
        acc.backward(loss_d)
        opt_d.step()
        loss_g = F.softplus(-critic(fake)).mean()
        opt_g.zero_grad()
        acc.backward(loss_g)
        opt_g.step()
    return dict(generator.state_dict()), dict(critic.state_dict())


def test_changing_parameters_between_forward_and_backward_fails_as_in_torch():
    acc = on_jax()
    model = mlp(2, 2)
    model, optimizer = acc.prepare(model, sgd(model))
    x = torch.randn(4, 2)
    first = model(x).sum()
    acc.backward(model(x).pow(2).sum())
    optimizer.step()
    with pytest.raises(RuntimeError, match="was changed"):
        acc.backward(first)


def test_a_teacher_may_be_prepared_or_not():
    def script(acc):
        student, teacher, plain_teacher = mlp(4, 8, 3), mlp(4, 8, 3), mlp(4, 8, 3)
        student, optimizer, teacher = acc.prepare(student, sgd(student), teacher)
        for _ in range(3):
            x = torch.randn(8, 4)
            with torch.no_grad():
                target = teacher(x).softmax(-1) + plain_teacher(x).softmax(-1)
            loss = F.kl_div(student(x).log_softmax(-1), target / 2, reduction="batchmean")
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return dict(student.state_dict())

    assert_same_on_jax(script)


def test_gradients_pass_through_a_frozen_model():
    def script(acc):
        student, judge = mlp(4, 8, 3), mlp(3, 8, 1)
        judge.requires_grad_(False)
        student, optimizer, judge = acc.prepare(student, sgd(student), judge)
        for _ in range(3):
            loss = judge(student(torch.randn(8, 4))).mean()
            acc.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return dict(student.state_dict()), [p.grad for p in judge.parameters()]

    assert_same_on_jax(script)


def test_freezing_and_modes_may_change_between_steps():
    def script(acc):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 2))
        model, optimizer = acc.prepare(model, sgd(model))
        model.eval()
        for step in range(4):
            if step == 2:
                acc.unwrap_model(model)[0].requires_grad_(False)
            if step == 3:
                model[0].weight.requires_grad_(True)
                model[1].train()
            acc.backward(model(torch.randn(8, 4)).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)))

    def script(acc):
        model = Tied()
        model, optimizer = acc.prepare(model, sgd(model))
        assert len(list(model.parameters())) == 1
        for _ in range(3):
            ids = torch.randint(0, 10, (4, 5))
            acc.backward(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
            optimizer.step()
            optimizer.zero_grad()
        assert model.head.weight is model.embed.weight
        return dict(model.state_dict())

    assert_same_on_jax(script)


def test_bert_with_a_padding_mask_gives_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16,
    )  # fmt: skip

    def script(acc):
        model = transformers.BertForSequenceClassification(config)
        model.train()
        model, optimizer = acc.prepare(model, sgd(model))
        seen = []
        for _ in range(2):
            ids, mask = torch.randint(1, 50, (4, 8)), torch.ones(4, 8, dtype=torch.long)
            mask[0, 5:] = 0
            out = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 1, 0]))
            acc.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
            seen += [out.loss.item(), out["logits"].argmax(-1), out.logits.shape[0], out[1].sum().item()]
        model.eval()
        with torch.no_grad():
            seen.append(model(input_ids=ids, attention_mask=mask).logits)
        return seen, model.config.hidden_size

    # BERT's embeddings and layer norms sum in another order; two steps leave 1e-5.
    assert_same_on_jax(script, atol=2e-5)


def test_gpt2_trains_and_its_cache_is_refused_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )

    def script(acc):
        model = transformers.GPT2LMHeadModel(config)
        model.train()
        model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        for _ in range(2):
            ids = torch.randint(0, 40, (4, 8))
            out = model(ids, labels=ids, use_cache=False)
            acc.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
        return out.loss

    assert_same_on_jax(script, atol=2e-5)
    acc = on_jax()
    model = acc.prepare(transformers.GPT2LMHeadModel(config))
    out = model(torch.randint(0, 40, (2, 8)), use_cache=True)
    assert out.logits.shape == (2, 8, 40)
    with pytest.raises(PrepareError, match="DynamicCache"):
        out.past_key_values.get_seq_length()


def test_a_branch_on_values_inside_the_model_is_refused_with_its_line():
    class Branchy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            out = self.layer(x)
            return out if out.sum() > 0 else -out  # the line

    acc = on_jax()
    model = acc.prepare(Branchy())
    with pytest.raises(PrepareError, match="# the line"):
        model(torch.randn(2, 2))
    with torch.no_grad(), pytest.raises(PrepareError, match="# the line"):
        model(torch.randn(2, 2))


def test_recurrent_models_and_constants_of_a_model_work():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 5, batch_first=True)
            self.scale = torch.linspace(1, 2, 5)  # no buffer: a plain attribute

        def forward(self, x):
            out, (h, _) = self.rnn(x)
            return out * self.scale, h

    def script(acc):
        model = Recurrent()
        model, optimizer = acc.prepare(model, sgd(model))
        for _ in range(2):
            out, h = model(torch.randn(4, 6, 3))
            acc.backward(out.pow(2).mean() + h.mean())
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict()), h

    assert_same_on_jax(script)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_dropout_masks_of_a_forward_stay_in_every_backward_that_goes_through_it(num_devices):
    acc = on_jax(num_devices=num_devices)
    generator = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 1, bias=False))
    critic = nn.Linear(1, 1)
    generator, critic, optimizer = acc.prepare(generator, critic, sgd(critic))
    weight = generator[1].weight.detach().clone()
    fake = generator(torch.ones(4, 32))
    acc.backward(critic(fake.detach()).mean())
    optimizer.step()
    values = fake.detach().clone()
    acc.backward(fake.sum() + 0 * critic(fake).mean())
    grad = generator[1].weight.grad.clone()
    assert (grad * weight).sum().item() == pytest.approx(values.sum().item(), abs=1e-5)  # linear in the weight
