"""Position embeddings at another image size: PyTorch's bicubic interpolation, in numpy."""

import numpy as np

# PyTorch's cubic convolution coefficient; jax.image.resize uses -0.5 and antialiases.
CUBIC = -0.75


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """The (new, old) float64 matrix that resizes a line of ``old`` samples to ``new``.

    Equals ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`` along one
    axis: no antialiasing, samples beyond the border repeat the border. Each row sums to 1.

    Source: Keys 1981, equation 15, with a = -0.75.

    >>> bicubic_matrix(3, 3)
    array([[1., 0., 0.],
           [0., 1., 0.],
           [0., 0., 1.]])
    """
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    left = np.floor(centre)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(left + tap, 0, old - 1).astype(int)
        np.add.at(matrix, (np.arange(new), column), _cubic(np.abs(centre - left - tap)))
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    near = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
    far = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_positions(position: np.ndarray, grid: int) -> np.ndarray:
    """Interpolates the position embeddings of a square grid of patches to another grid.

    Args:
      position: (1, 1 + g * g, D), the class token's embedding first, then the patches row by row.
      grid: patches along one side of the new image.

    Returns:
      (1, 1 + grid * grid, D) in the dtype of ``position``; the class token's embedding is
      unchanged, and with ``grid == g`` the argument itself comes back.

    Raises:
      ValueError: the number of patches is not a square.

    >>> resize_positions(np.ones((1, 1 + 14 * 14, 8), np.float32), 24).shape
    (1, 577, 8)
    """
    patches, width = position.shape[1] - 1, position.shape[2]
    old = round(patches**0.5)
    if old * old != patches:
        raise ValueError(
            f"position embeddings of {patches} patches do not form a square grid; "
            "only square images can be resized"
        )
    if grid == old:
        return position
    resize = bicubic_matrix(old, grid)
    image = position[0, 1:].astype(np.float64).reshape(old, old, width)
    image = np.einsum("yh,hwd,xw->yxd", resize, image, resize, optimize=True)
    image = image.reshape(1, grid * grid, width).astype(position.dtype)
    return np.concatenate([position[:, :1], image], axis=1)
