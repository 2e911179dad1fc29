"""An independent generator of the masks' random bits, in Python integers."""

import zlib

import numpy as np


def threefry2x32(key, counter):
    """Salmon et al. 2011, Threefry-2x32 with 20 rounds, in Python integers."""
    word = 0xFFFFFFFF
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    x0, x1 = (counter[0] + keys[0]) & word, (counter[1] + keys[1]) & word
    for block in range(5):
        for r in rotations[block % 2]:
            x0 = (x0 + x1) & word
            x1 = ((x1 << r | x1 >> (32 - r)) & word) ^ x0
        x0 = (x0 + keys[(block + 1) % 3]) & word
        x1 = (x1 + keys[(block + 2) % 3] + block + 1) & word
    return x0, x1


def reference_bits(seed, step, path, shape):
    key = threefry2x32((0, seed), (0, step))
    key = threefry2x32(key, (0, zlib.crc32(path.encode())))
    words = [threefry2x32(key, (0, i)) for i in range(int(np.prod(shape, dtype=int)))]
    return np.array([a ^ b for a, b in words], np.uint32).reshape(shape)


def reference_uniform(*args):
    return (reference_bits(*args) >> 8) / 2.0**24
