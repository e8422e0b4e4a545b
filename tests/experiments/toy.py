"""Small data and models for tests of the training code."""

import torch
from torch import Tensor, nn

from p2k.core.seeding import generator
from p2k.data import ImageData


def toy_data(train: int = 96, *, dtype: torch.dtype = torch.float32) -> ImageData:
    """Two channels of 4x4 noise around one of three prototypes."""
    rng = generator(0)
    prototypes = torch.randn(3, 2, 4, 4, generator=rng)

    def part(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 3, (count,), generator=rng)
        return (prototypes[labels] + torch.randn(count, 2, 4, 4, generator=rng)).to(dtype), labels

    return ImageData("toy", *part(train), *part(24), *part(40), num_classes=3)


class ToyNet(nn.Module):
    """Attention over 16 pixels between two linear maps: every kind of parameter the training code meets."""

    def __init__(self, seed: int = 0, *, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(2, 8)
            self.position = nn.Parameter(0.02 * torch.randn(16, 8))
            self.norm = nn.LayerNorm(8)
            self.mix = nn.Linear(8, 24)
            self.gain = nn.Parameter(torch.tensor(1.0))
            self.head = nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(2).mT.to(self.embed.weight.dtype)) + self.position
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q.unsqueeze(-3), k.unsqueeze(-3), v.unsqueeze(-3))
        x = x + self.gain * self.dropout(attended.squeeze(-3))
        return self.head(x.mean(-2))
