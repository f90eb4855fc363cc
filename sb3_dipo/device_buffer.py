"""Files that version 0.1.0 saved on a GPU name this module; unpickling them is all that it is for."""

from sb3_dipo.fast.device_buffer import DIPODeviceReplayBuffer

__all__ = ["DIPODeviceReplayBuffer"]
