"""The plate: everything the generator needs to know about a composed collage, as arrays.

Main type: `Plate`. The compositor makes it, the generator reads it, object storage carries it between them as one
safetensors file. It knows neither prompts nor models, only the model's latent factor.

Suffixes: H, W canvas pixels; h, w latent cells (H = h * factor); L layers of the collage, back to front; C = 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

# Names of control pictures in the file begin with this; the kind follows.
_CONTROL = "control_HWC."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plate:
    """A composed collage.

    composite_HWC: uint8 sRGB, the layers over the background (for a redo: the parent, with cut-outs restored
        where asked).
    visible_Lhw: float32 in [0, 1], what can be seen of each layer, v_i = a_i * (1 - A_{>i}), averaged over each
        latent cell. Soft; a hidden layer is all zero.
    strength_hw: float64 in [0, 1], the noise map: SDEdit strength of each latent cell as a fraction of the steps.
    release_HW: uint8, how much of the generated picture replaces the composite in each pixel; 0 keeps the
        composite's own bytes, 255 takes the generated pixel as it is.
    control: by ControlNet kind, uint8 HWC, the control picture of all layers that use it; empty where none does.
    """

    composite_HWC: NDArray[np.uint8]
    visible_Lhw: NDArray[np.float32]
    strength_hw: NDArray[np.float64]
    release_HW: NDArray[np.uint8]
    control: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        height, width, channels = self.composite_HWC.shape
        assert channels == 3 and self.release_HW.shape == (height, width), "pixel planes disagree"
        assert all(
            control_HWC.shape == (height, width, 3) and control_HWC.dtype == np.uint8
            for control_HWC in self.control.values()
        ), "control pictures disagree"
        assert self.visible_Lhw.shape[1:] == self.strength_hw.shape, "latent planes disagree"
        grid_height, grid_width = self.strength_hw.shape
        assert height % grid_height == 0 and height // grid_height == width // grid_width, (
            "not one factor"
        )

    @property
    def latent_factor(self) -> int:
        """Pixels from canvas to latent cell, each way."""
        return int(self.composite_HWC.shape[0] // self.strength_hw.shape[0])

    def to_bytes(self) -> bytes:
        """One safetensors file."""
        data: bytes = save(
            {
                "composite_HWC": np.ascontiguousarray(self.composite_HWC),
                "visible_Lhw": np.ascontiguousarray(self.visible_Lhw),
                "strength_hw": np.ascontiguousarray(self.strength_hw),
                "release_HW": np.ascontiguousarray(self.release_HW),
                **{
                    f"{_CONTROL}{kind}": np.ascontiguousarray(control_HWC)
                    for kind, control_HWC in self.control.items()
                },
            }
        )
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Plate":
        """Reads what `to_bytes` wrote."""
        planes = load(data)
        control = {
            name.removeprefix(_CONTROL): planes.pop(name)
            for name in sorted(planes)
            if name.startswith(_CONTROL)
        }
        return cls(**planes, control=control)
