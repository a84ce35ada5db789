"""Which layers of a component are quantised, by the marks that ComfyUI reads.

A quantised layer has a scale beside its weight. ComfyUI applies the scale only where the file marks
the layer, in one of three ways: a ``comfy_quant`` tensor per layer, a list in the file's metadata,
or one ``scaled_fp8`` tensor for all layers that have a ``scale_weight``.
"""

from __future__ import annotations

import json
from typing import Any

from .component import Component
from .header import WeightsError

_LIST = "_quantization_metadata"
_MARK = ".comfy_quant"
_MARK_OF_ALL = "scaled_fp8"
_OLD_SCALE = ".scale_weight"
_SCALES = (_OLD_SCALE, ".weight_scale", ".weight_scale_2", ".weight_scale_inv")


def quantised_layers(component: Component, prefix: str = "") -> set[str]:
    """The layers that the component marks as quantised, by their names in the files.

    Args:
        prefix: what the host takes away in front of the tensor names; marks may lack it.

    Raises:
        WeightsError: a scale of a layer that is not marked, or a list that cannot be read.
    """
    tensors = component.tensors
    listed = _listed(component)
    found = {n.removesuffix(_MARK) for n in tensors if n.endswith(_MARK)}
    found |= {start + name for start in ("", prefix) for name in listed}
    if _MARK_OF_ALL in tensors or f"{prefix}{_MARK_OF_ALL}" in tensors:
        found |= {n.removesuffix(_OLD_SCALE) for n in tensors if n.endswith(_OLD_SCALE)}
    for name in tensors:
        if name.endswith(_SCALES) and name.rpartition(".")[0] not in found:
            raise WeightsError(
                f"{component.label} holds the scale {name}, and nothing in it tells ComfyUI to "
                "apply it: choose plain weights, or a file that was quantised for ComfyUI"
            )
    return found


def joined_metadata(component: Component) -> dict[str, str]:
    """The metadata of all files as one, with the lists of their quantised layers joined.

    Raises:
        WeightsError: a list that cannot be read.
    """
    joined = {key: text for metadata in component.metadata for key, text in metadata.items()}
    listed = _listed(component)
    return joined | {_LIST: json.dumps({"layers": listed})} if listed else joined


def _listed(component: Component) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for metadata in component.metadata:
        if _LIST in metadata:
            try:
                layers |= dict(json.loads(metadata[_LIST])["layers"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise WeightsError(
                    f"{component.label} has a malformed {_LIST}: download it again"
                ) from error
    return layers
