"""The command line, ``imu-fast``."""
