"""Small networks for images of 8×8 pixels."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["DigitsNet", "DigitsStudent"]


class DigitsNet(nn.Module):
    """A small ResNet-like classifier: convolutions, ReLU, average pooling, linear head.

    Args:
        classes: Number of classes K.
        width: Number of channels, and dimension d of the activations.

    Example:
        >>> DigitsNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, 1, 8, 8)."""
        logits: Tensor = self.fc(self.features(x))
        return logits


class DigitsStudent(nn.Module):
    """A network of a few thousand parameters, the student of a `DigitsNet`.

    Args:
        classes: Number of classes K.

    Attributes:
        features_out: Number of features before the head.

    Example:
        >>> DigitsStudent()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    features_out = 32

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, self.features_out),
            nn.ReLU(),
        )
        self.fc = nn.Linear(self.features_out, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, 1, 8, 8)."""
        logits: Tensor = self.fc(self.features(x))
        return logits
