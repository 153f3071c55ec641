"""How the browser reads the bytes of a scene."""

import numpy as np

from minianyflow.support.errors import choose


def unpack(scene, payload, name):
    """The array of that name as the browser reads it, in data units."""
    array = choose("array", name, scene["arrays"])
    kind = {"uint8": "u1", "float16": "<f2", "float32": "<f4", "int32": "<i4"}[array["type"]]
    values = np.frombuffer(payload, kind, int(np.prod(array["shape"])), array["offset"])
    return values.reshape(array["shape"]) * np.float32(array["scale"])
