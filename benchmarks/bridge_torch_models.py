"""The three models of bridge.py in PyTorch, as one would write them: a GPT, a BERT classifier and a ResNet-18."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, time, head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's shape, without dropout; the head shares the token embedding."""

    def __init__(self, layers, heads, width, vocabulary, context):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids):
        x = self.token(ids) + self.position.weight[: ids.shape[1]]  # (batch, time, width)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)  # (batch, time, vocabulary)


def gpt_loss(model, batch):
    ids, targets = batch["ids"], batch["targets"]
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


class BertLayer(nn.Module):
    """BERT's layer: LayerNorm behind each addition."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down, self.norm2 = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.LayerNorm(width, 1e-12),
        )

    def forward(self, x, mask):
        batch, time, width = x.shape

        def split(y):
            return y.view(batch, time, self.heads, -1).transpose(1, 2)  # (batch, heads, time, head)

        y = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)), mask)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(batch, time, width)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """A BERT classifier with padding masks, without dropout."""

    def __init__(self, layers, heads, width, vocabulary, context, classes=2):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width, padding_idx=0), nn.Embedding(context, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(layers))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, ids):
        mask = (ids != 0)[:, None, None, :]  # (batch, 1, 1, time)
        x = self.norm(self.token(ids) + self.position.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


def bert_loss(model, batch):
    return F.cross_entropy(model(batch["ids"]), batch["label"])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a way around them."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.shortcut = self.shortcut_norm = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))))


class ResNet18(nn.Module):
    """ResNet-18 with the stem of ImageNet: 7x7 convolution, max-pool, four stages of two blocks."""

    def __init__(self, width=64, classes=100):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.ModuleList(
            BasicBlock(sizes[stage] if first else sizes[stage + 1], sizes[stage + 1], 2 if first and stage else 1)
            for stage in range(4)
            for first in (True, False)
        )
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.norm(self.conv(images))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def resnet_loss(model, batch):
    return F.cross_entropy(model(batch["images"]), batch["label"])
