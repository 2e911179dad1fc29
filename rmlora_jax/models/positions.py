"""Position embeddings: absolute ones for another image size, and scores of relative ones."""

import jax
import jax.numpy as jnp
import numpy as np

# PyTorch's cubic convolution coefficient; jax.image.resize uses -0.5 and antialiases.
CUBIC = -0.75


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """The (new, old) float64 matrix that resizes a line of ``old`` samples to ``new``.

    Equals ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`` along one
    axis: no antialiasing, samples beyond the border repeat the border. Each row sums to 1.

    Source: Keys 1981, equation 15, with a = -0.75.
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


def bucket(distance, buckets: int, longest: int) -> np.ndarray:
    """The row of a distance relative to the middle of the table; odd in ``distance``.

    With m = ``buckets`` // 2: d for |d| <= m, and beyond sign(d) (m + ceil((m - 1)
    log(|d| / m) / log((longest - 1) / m))). Without buckets (below 1): d.

    Args:
      distance: int array, position of the query minus position of the key.
      buckets: rows on each side.
      longest: the distance that falls into the last bucket, plus 1.

    Source: He et al. 2021, https://arxiv.org/abs/2006.03654, section 3.1; the logarithmic buckets
    are those of the released DeBERTa-v2.

    >>> bucket(np.array([-9, -3, 0, 2, 5, 7, 9]), 4, 10).tolist()
    [-3, -3, 0, 2, 3, 3, 3]
    """
    distance = np.asarray(distance)
    if buckets < 1:
        return distance
    # In float32, so that ceil falls where it fell in training.
    middle = np.float32(buckets // 2)
    far = np.maximum(np.abs(distance), middle).astype(np.float32)
    fraction = np.log(far / middle) / np.log(np.float32((longest - 1) / (buckets // 2)))
    log = np.ceil(fraction * (middle - 1)) + middle
    near = np.abs(distance) <= middle
    return np.where(near, distance, np.sign(distance) * log).astype(np.int64)


def drop_rows(key: jax.Array, x: jax.Array, rows: np.ndarray, rate: float) -> jax.Array:
    """Dropout of the table from which ``x`` (M, D) was taken: equal ``rows`` lose equal entries.

    >>> out = drop_rows(jax.random.key(0), jnp.ones((2, 50)), np.array([3, 3]), 0.5)
    >>> bool((out[0] == out[1]).all()), float(out.max())
    (True, 2.0)
    """
    kept = jax.random.bernoulli(key, 1 - rate, (rows.max() + 1, x.shape[1]))
    return jnp.where(kept[rows], x / (1 - rate), 0).astype(x.dtype)


def skew(scores: jax.Array, start: int) -> jax.Array:
    """out[..., i, j] = scores[..., i, j - i + start]: (..., N, 2 N) -> (..., N, N).

    ``start`` is N - 1 or N. A reshape and two slices, whose backward pass pads and reshapes; that
    of an indexed lookup would scatter.

    Source: Huang et al. 2018, https://arxiv.org/abs/1809.04281, section 3.4.1.

    >>> skew(jnp.arange(8).reshape(2, 4), 1).tolist()
    [[1, 2], [4, 5]]
    """
    *lead, n, wide = scores.shape
    flat = scores.reshape(*lead, n * wide)
    flat = flat[..., start : start + n * (wide - 1)]
    return flat.reshape(*lead, n, wide - 1)[..., :n]


def disentangled_scores(
    query: jax.Array,
    key: jax.Array,
    position_key: jax.Array | None,
    position_query: jax.Array | None,
) -> jax.Array:
    """q_i k_j + q_i K_(i - j) + k_j Q_(i - j) for each head, not scaled.

    Args:
      query: (B, N, H, head_dim), any floating dtype; ``key`` has the same shape.
      position_key: (2 N, H, head_dim), K for distances -N .. N - 1; None: without the term
        content to position.
      position_query: likewise Q; None: without the term position to content.

    Returns:
      (B, H, N, N) float32, queries before keys.

    Source: He et al. 2021, https://arxiv.org/abs/2006.03654, equation 4.
    """
    n = query.shape[1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if position_key is not None:
        # Distances N - 1 .. -N, so that later keys are to the right.
        wide = jnp.einsum("bqhd,ehd->bhqe", query, position_key[::-1])
        scores += skew(wide, n - 1)
    if position_query is not None:
        wide = jnp.einsum("bkhd,ehd->bhke", key, position_query)
        scores += skew(wide, n).swapaxes(-1, -2)
    return scores
