"""Damage for files: what a bad disk, a cut transfer or a careless editor does to them."""

import random


def mutations(content, count, seed=0):
    """Yields `count` damaged versions of a file's bytes, each another than the original."""
    chance = random.Random(seed)
    while count:
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            _damage(damaged, chance)
        if damaged != content:
            yield bytes(damaged)
            count -= 1


def _damage(content, chance):
    at, length = chance.randrange(len(content) + 1), chance.choice((1, 2, 4, 16, 100))
    kind = chance.randrange(8)
    if kind == 0:
        del content[at:]
    elif kind == 1:
        del content[at : at + length]
    elif kind == 2:
        content[at:at] = chance.randbytes(length)
    elif kind == 3:
        content[at:at] = content[at : at + length]
    elif kind == 4:
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif kind == 5 and at < len(content):
        content[at] ^= 1 << chance.randrange(8)
    elif kind == 6 and at < len(content):
        content[at] = chance.choice(b'0123456789"{}[],:ae \n')
    else:
        content[at : at + length] = chance.randbytes(len(content[at : at + length]))
