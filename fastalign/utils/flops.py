"""What the hardware can do at most."""

PEAK_BF16 = {"H100": 989.5e12, "H200": 989.5e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the vendors' data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, None where it is not known."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device_name), None)
